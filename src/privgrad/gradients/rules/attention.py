"""Scaled dot product attention, which vmap alone would run row by row, and multi-head attention made of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.batched import any_batched
from privgrad.gradients.catching import Rule, Scope


def scaled_dot_product_attention(
    scope: Scope, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
) -> Any:
    """torch's fused operator on all rows at once. It has no weights."""
    dims = query.dim()
    if not 3 <= dims <= 4 or key.dim() != dims or value.dim() != dims or not any_batched([query, key, value]):
        return NotImplemented
    masks = () if attn_mask is None else (attn_mask,)

    def on_rows(rows: int, query: Tensor, key: Tensor, value: Tensor, *masks: Tensor) -> Tensor:
        images = query.shape[1] if dims == 4 else 1
        if dims == 4:
            query, key, value = query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1)
        mask = None
        for tensor in masks:
            mask = tensor.reshape(rows, *[1] * (dims - tensor.dim() + 1), *tensor.shape[1:])
            if dims == 4:
                mask = mask.expand(rows, images, *mask.shape[2:]).flatten(0, 1)
        output = F.scaled_dot_product_attention(query, key, value, mask, *args, **kwargs)
        return output.view(rows, images, *output.shape[1:]) if dims == 4 else output

    return scope.on_rows(on_rows, query, key, value, *masks)


def multi_head_attention(scope: Scope, *args: Any, **kwargs: Any) -> Any:
    """torch.nn.functional.multi_head_attention_forward, which arrives as one call: projections and attention, each caught."""
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    with scope.mode:
        return _multi_head_attention(**given.arguments)


_SIGNATURE = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    use_separate_proj_weight: bool,
    q_proj_weight: Tensor | None,
    k_proj_weight: Tensor | None,
    v_proj_weight: Tensor | None,
    static_k: Tensor | None,
    static_v: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> Any:
    if static_k is not None or static_v is not None:
        return NotImplemented
    unbatched = query.dim() == 2
    if unbatched:
        query, key, value = query[:, None], key[:, None], value[:, None]
        key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
    length, batch, width = query.shape
    query, key, value = _projected(
        (query, key, value),
        in_proj_weight,
        in_proj_bias,
        (q_proj_weight, k_proj_weight, v_proj_weight) if use_separate_proj_weight else None,
    )
    if bias_k is not None and bias_v is not None:
        key = torch.cat([key, bias_k.expand(1, batch, -1)])
        value = torch.cat([value, bias_v.expand(1, batch, -1)])
    query, key, value = _heads(query, num_heads), _heads(key, num_heads), _heads(value, num_heads)
    if add_zero_attn:
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    extra = int(bias_k is not None) + int(add_zero_attn)
    mask = _mask(attn_mask, key_padding_mask, extra, num_heads, query)
    dropout = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
        weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
        weights = F.dropout(weights, dropout, training)
        attended = weights @ value
    else:
        attended = F.scaled_dot_product_attention(query, key, value, mask, dropout)
    output = F.linear(attended.permute(2, 0, 1, 3).reshape(length, batch, width), out_proj_weight, out_proj_bias)
    if weights is not None and average_attn_weights:
        weights = weights.mean(dim=1)
    if unbatched:
        output = output[:, 0]
        weights = None if weights is None else weights[0]
    return output, weights


def _projected(
    inputs: tuple[Tensor, Tensor, Tensor],
    together: Tensor | None,
    bias: Tensor | None,
    separate: tuple[Tensor | None, Tensor | None, Tensor | None] | None,
) -> list[Tensor]:
    """Queries, keys and values; in one product where they are projections of the same tensor."""
    if separate is None and inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        assert together is not None
        return list(F.linear(inputs[0], together, bias).chunk(3, dim=-1))
    if separate is None:
        assert together is not None
        weights = together.chunk(3)
    else:
        assert all(weight is not None for weight in separate)
        weights = separate  # type: ignore[assignment]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    return [F.linear(*given) for given in zip(inputs, weights, biases, strict=True)]


def _heads(tensor: Tensor, heads: int) -> Tensor:
    """[length, batch, width] to [batch, heads, length, width / heads]."""
    return tensor.reshape(*tensor.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _mask(attention: Tensor | None, padding: Tensor | None, extra: int, heads: int, query: Tensor) -> Tensor | None:
    """One additive mask [batch or 1, heads or 1, length, source] of the two; added positions are never masked."""
    mask = None
    if attention is not None:
        attention = _additive(attention, query.dtype)
        mask = attention[None, None] if attention.dim() == 2 else attention.reshape(-1, heads, *attention.shape[1:])
    if padding is not None:
        other = _additive(padding, query.dtype)[:, None, None]
        mask = other if mask is None else mask + other
    return mask if mask is None or extra == 0 else F.pad(mask, (0, extra))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)


RULES: Mapping[Any, Rule] = {F.multi_head_attention_forward: multi_head_attention}

WITHOUT_WEIGHTS: Mapping[Any, Rule] = {F.scaled_dot_product_attention: scaled_dot_product_attention}

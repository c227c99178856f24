"""Tables that are looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.errors import RefusedError
from privgrad.gradients.batched import is_batched
from privgrad.gradients.catching import Rule, Scope
from privgrad.gradients.collector import Weight
from privgrad.gradients.terms import Lookup, Term


def embedding(
    scope: Scope,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """torch.nn.functional.embedding."""
    _check_unchanged(max_norm)
    owner = scope.weight(weight)
    if not is_batched(input) or owner is None or scale_grad_by_freq:
        return NotImplemented

    def on_rows(rows: int, index: Tensor) -> Tensor:
        output = F.embedding(index, owner.detached)
        count = owner.tensor.shape[0]
        padding = None if padding_idx is None else padding_idx % count

        def terms(gradient: Tensor, saved: Tensor) -> Iterator[tuple[Weight, Term]]:
            right = scope.scaled(gradient.flatten(0, -2), rows)
            places = saved.view(rows, -1)
            if padding is not None:
                right = right.masked_fill((places == padding)[:, :, None], 0)
            yield owner, Lookup(places, right, count)

        return scope.catch(output, [owner], terms, index.contiguous())

    return scope.on_rows(on_rows, input)


def embedding_bag(
    scope: Scope,
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    """torch.nn.functional.embedding_bag for bags of one length: look-ups, then their sum or mean."""
    _check_unchanged(max_norm)
    plain = not scale_grad_by_freq and mode in ("sum", "mean") and input.dim() == 2
    if not plain or not is_batched(input) or scope.weight(weight) is None:
        return NotImplemented
    with scope.mode:
        looked_up = F.embedding(input, weight, padding_idx)
        if per_sample_weights is not None:
            looked_up = looked_up * per_sample_weights[:, :, None]
        counted = torch.ones_like(input, dtype=torch.bool)
        if padding_idx is not None:
            counted = input != padding_idx % weight.shape[0]
            looked_up = looked_up * counted[:, :, None]
        total = looked_up.sum(1)
        return total if mode == "sum" else total / counted.sum(1, keepdim=True).clamp(min=1)


def _check_unchanged(max_norm: float | None) -> None:
    if max_norm is not None:
        raise RefusedError(
            "an embedding with max_norm rescales the entries that a batch looks up, in place and un-noised: the weights would "
            "tell which ones; leave max_norm out"
        )


RULES: Mapping[Any, Rule] = {F.embedding: embedding, F.embedding_bag: embedding_bag}

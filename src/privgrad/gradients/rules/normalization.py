"""Layers that normalise within a row, then scale and shift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.batched import is_batched
from privgrad.gradients.catching import Rule, Scope
from privgrad.gradients.collector import Weight
from privgrad.gradients.norms import wide
from privgrad.gradients.rows import Rows
from privgrad.gradients.terms import Term


def layer_norm(
    scope: Scope,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """torch.nn.functional.layer_norm: the normalised input is formed once more, in backward, and not kept."""
    if not is_batched(input) or is_batched(weight) or is_batched(bias):
        return NotImplemented

    def on_rows(rows: int, inputs: Tensor) -> Tensor:
        owners = [None if value is None else scope.weight(value) for value in (weight, bias)]
        values = [None if value is None else scope.value(value) for value in (weight, bias)]
        output, mean, deviation = torch.native_layer_norm(inputs, list(normalized_shape), values[0], values[1], eps)
        dims = len(normalized_shape)

        def terms(gradient: Tensor, *saved: Tensor) -> Iterator[tuple[Weight, Term]]:
            spread = scope.scaled(gradient.flatten(0, -dims - 1), rows)
            if owners[0] is not None:
                inputs, mean, inverse = (wide(tensor) for tensor in saved)
                normalized = ((inputs - mean) * inverse).reshape(spread.shape)
                yield owners[0], Rows(normalized.mul_(spread).sum(1))
            if owners[1] is not None:
                yield owners[1], Rows(spread.sum(1))

        saved = (inputs, mean, deviation) if owners[0] is not None else ()
        return scope.catch(output, owners, terms, *saved)

    return scope.on_rows(on_rows, input)


def group_norm(
    scope: Scope,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    """torch.nn.functional.group_norm, the rows side by side as channels: its own backward pass then gives row gradients."""
    if not is_batched(input) or is_batched(weight) or is_batched(bias):
        return NotImplemented

    def on_rows(rows: int, inputs: Tensor) -> Tensor:
        many = rows * inputs.shape[1]
        scale, shift = (_copied(scope, value, rows, inputs.shape[1]) for value in (weight, bias))
        side_by_side = inputs.reshape(1, many * inputs.shape[2], -1)
        output = F.group_norm(side_by_side, many * num_groups, scale, shift, eps)
        return output.view(inputs.shape)

    return scope.on_rows(on_rows, input)


def instance_norm(
    scope: Scope,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """torch.nn.functional.instance_norm: as many groups as channels; with running statistics an affine map."""
    if not is_batched(input):
        return NotImplemented
    if use_input_stats:
        return group_norm(scope, input, input.shape[1], weight, bias, eps)
    return batch_norm(scope, input, running_mean, running_var, weight, bias, False, momentum, eps)


def batch_norm(
    scope: Scope,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """torch.nn.functional.batch_norm with given statistics: an affine map. Train mode is left alone: it couples examples."""
    if training or not is_batched(input):
        return NotImplemented
    normalized = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    shape = (-1, *[1] * (input.dim() - 2))
    with scope.mode:
        if weight is not None:
            normalized = normalized * weight.view(shape)
        return normalized if bias is None else normalized + bias.view(shape)


def rms_norm(
    scope: Scope, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Any:
    """torch.nn.functional.rms_norm: the scale is applied apart."""
    if not is_batched(input):
        return NotImplemented
    normalized = F.rms_norm(input, list(normalized_shape), None, eps)
    with scope.mode:
        return normalized if weight is None else normalized * weight


def _copied(scope: Scope, value: Tensor | None, rows: int, images: int) -> Tensor | None:
    """A weight [channels] once per row and image of a row, in one line."""
    if value is None:
        return None
    owner = scope.weight(value)
    copies = value.expand(rows, -1).reshape(-1) if owner is None else scope.copies(owner, rows, flat=True)
    return copies if images == 1 else copies.view(rows, 1, -1).expand(-1, images, -1).reshape(-1)


RULES: Mapping[Any, Rule] = {
    F.layer_norm: layer_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.batch_norm: batch_norm,
    F.rms_norm: rms_norm,
}

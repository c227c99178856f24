"""The moments of normalization layers' inputs, unit by unit: a forward pass, and no backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.gradients.batched import Hidden, Swallowed
from privgrad.gradients.chunks import chunks
from privgrad.gradients.contract import Fold, LossFn, Tree
from privgrad.gradients.loss import WithLoss, nothing_kept

_ROWS = 256
"""So many rows go through the network at once: nothing is kept for a backward pass."""


@dataclass(frozen=True)
class Watched:
    """A layer, with the mean and the deviation [channels] that its inputs [rows, channels, ...] are measured against."""

    layer: nn.Module
    mean: Tensor
    deviation: Tensor


def unit_moments(
    model: nn.Module, loss_fn: LossFn, batch: Tree, fold: Fold, layers: Sequence[Watched], *, together: bool
) -> Iterator[Tensor]:
    """[units, 2 * channels of all layers], in parts: for each layer the means of u by channel, then those of u^2 - 1, where
    u = (input - mean) / deviation, over the unit's rows and all positions (and uses, of a layer that is used more than once).

    together: a unit's rows go through the network together, unscaled, and a unit without rows is left out. Otherwise each row
    goes by itself (under vmap; one after the other where that cannot run the model), and rows fold into units as gradients do.

    Guarantee: what a unit's vector is depends on its own rows, the weights and the model's buffers only. Buffers stay as they
    were. A number that is not finite stays in its own unit's vector.
    """
    module = WithLoss(model, loss_fn)
    if together:
        for unit in torch.unique(fold.index).tolist():
            rows = (fold.index == unit).nonzero().flatten()
            yield _moments(module, _taken(batch, rows), layers)[None]
        return
    for part, inside in chunks(batch, fold, _ROWS):
        yield _folded(_row_moments(module, part, layers), inside)


def _row_moments(module: WithLoss, batch: Tree, layers: Sequence[Watched]) -> Tensor:
    """[rows, 2 * channels]: each row through the network as a batch of one."""

    def one(row: Tree) -> Tensor:
        return _moments(module, pytree.tree_map(lambda leaf: leaf.unsqueeze(0), row), layers)

    hidden = Hidden()
    with hidden, Swallowed(hidden) as swallowed:
        try:
            found: Tensor = torch.func.vmap(one, randomness="different")(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            found = torch.empty(0)
    if len(found) and swallowed.operator is None:
        return found
    count = len(pytree.tree_leaves(batch)[0])
    return torch.stack([_moments(module, _taken(batch, torch.tensor([row])), layers) for row in range(count)])


def _moments(module: WithLoss, batch: Tree, layers: Sequence[Watched]) -> Tensor:
    """[2 * channels]: over everything that comes to each layer in one forward pass; zeros for a layer that is not used."""
    seen: list[list[Tensor]] = [[] for _ in layers]

    def watch(watched: Watched, uses: list[Tensor]) -> Any:
        def before(layer: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            values = (*inputs, *named.values())[0]
            others = [dimension for dimension in range(values.dim()) if dimension != 1]
            shape = [1, -1, *[1] * (values.dim() - 2)]
            scaled = (values.to(watched.mean.dtype) - watched.mean.view(shape)) / watched.deviation.view(shape)
            uses.append(torch.cat([scaled.mean(others), scaled.square().mean(others) - 1]))

        return before

    with ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(nothing_kept(module))
        for watched, uses in zip(layers, seen, strict=True):
            handle = watched.layer.register_forward_pre_hook(watch(watched, uses), with_kwargs=True)
            hooks.callback(handle.remove)
        module(batch)
    return torch.cat(
        [
            torch.stack(uses).mean(0) if uses else torch.cat([torch.zeros_like(watched.mean)] * 2)
            for watched, uses in zip(layers, seen, strict=True)
        ]
    )


def _folded(rows: Tensor, fold: Fold) -> Tensor:
    """[rows, n] to [units, n]: the scaled sum over each unit's rows."""
    if fold.is_identity:
        return rows
    if fold.scale is not None:
        rows = rows * fold.scale.to(rows)[:, None]
    return rows.new_zeros(fold.units, rows.shape[1]).index_add_(0, fold.index.to(rows.device), rows)


def _taken(batch: Tree, rows: Tensor) -> Tree:
    return pytree.tree_map(lambda leaf: leaf[rows.to(leaf.device)], batch)

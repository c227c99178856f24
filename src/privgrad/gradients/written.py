"""Unit gradients written out in full, one after the other: for public rows, whose gradients are looked at themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from privgrad.gradients.contract import (
    Engine,
    Fold,
    LossFn,
    Need,
    Request,
    Sums,
    Tree,
    accumulation_dtype,
    trainable,
)


def unit_gradients(engine: Engine, model: nn.Module, loss_fn: LossFn, batch: Tree, fold: Fold) -> dict[str, Tensor]:
    """{parameter: [units, *shape]} as `engine` finds them. Holds them all: memory for units times parameters.

    NOT for private rows: nothing here is clipped.
    """
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    device = next(model.parameters()).device
    sink = Sums(shapes, device, accumulation_dtype(model))
    written = _Written(shapes)
    engine.accumulate(model, loss_fn, Request(batch, fold, written, [tuple(shapes)], written, sink))
    return {name: torch.cat([part[name] for part in written.found]) for name in shapes}


class _Written:
    """An encoding that changes nothing and wants everything, and the rule that keeps what was encoded last."""

    separable = False

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        self.found: list[dict[str, Tensor]] = []
        self._shapes = shapes
        self._last: Mapping[str, Tensor] = {}

    def slots(self) -> Mapping[str, torch.Size]:
        return self._shapes

    def need(self, parameter: str) -> Need:
        return Need.COORDINATES

    def places(self, parameter: str) -> Tensor | None:
        return None

    def encode(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        self._last = gradients
        return gradients

    def decode(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return sums

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        # An engine may try a row out with another rule: only what this one is asked about counts.
        self.found.append({name: value.detach().clone() for name, value in self._last.items()})
        return torch.zeros_like(norms)

"""From rows to units: a fold as the terms of a weight's gradients want it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from privgrad.gradients.contract import Fold

_FILLING = 2.5
"""So many times their rows may units of different sizes take in a product: beyond it their gradients are multiplied out."""


@dataclass(frozen=True)
class Folding:
    """A fold on the model's device, and what terms want to know of it.

    each: rows per unit where all units have as many; None where they differ.
    most: rows of the largest unit.
    """

    index: Tensor
    units: int
    scale: Tensor | None
    each: int | None
    most: int

    @staticmethod
    def of(fold: Fold, device: torch.device) -> Folding:
        """The fold, moved to the device."""
        if fold.is_identity:
            return Folding(fold.index, fold.units, None, 1, 1)
        counts = fold.index.bincount(minlength=fold.units)
        same = bool((counts == counts[0]).all())
        scale = None if fold.scale is None else fold.scale.to(device)
        return Folding(fold.index.to(device), fold.units, scale, int(counts[0]) if same else None, int(counts.max()))

    def scaled(self, gradient: Tensor) -> Tensor:
        """A gradient [rows, ...] with each row's factor."""
        if self.scale is None:
            return gradient
        return gradient * self.scale.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))

    def sum(self, rows: Tensor) -> Tensor:
        """[rows, ...] to [units, ...]."""
        if self.each == 1:
            return rows
        if self.each is not None:
            return rows.view(self.units, self.each, *rows.shape[1:]).sum(1)
        return rows.new_zeros(self.units, *rows.shape[1:]).index_add_(0, self.index, rows)

    @property
    def joins(self) -> bool:
        """True where units are of about the same size, so that `joined` does not fill up too much."""
        return self.each is not None or self.units * self.most <= _FILLING * len(self.index)

    def joined(self, rows: Tensor) -> Tensor:
        """[rows, T, ...] to [units, most * T, ...]: a unit's rows side by side, and zeros up to the largest unit's size."""
        if self.each is None:
            counts = self.index.bincount(minlength=self.units)
            within = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[self.index]
            filled = rows.new_zeros(self.units * self.most, *rows.shape[1:])
            rows = filled.index_copy_(0, self.index * self.most + within, rows)
        return rows.reshape(self.units, -1, *rows.shape[2:])

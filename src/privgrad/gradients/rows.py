"""Unit gradients that a term holds themselves, multiplied out: in the order of the weight, or as they were computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from privgrad.gradients.contract import weighted_sum
from privgrad.gradients.folding import Folding
from privgrad.gradients.norms import norms_of, select

Take = Callable[[int, torch.Size, Tensor], Tensor]
"""take(rows, shape, like): a buffer [rows, *shape], see `memory.Workspace`."""


@dataclass
class Rows:
    """The gradients themselves, [units, *shape]. known: their squared norms, where they were taken on the way."""

    gradient: Tensor
    known: Tensor | None = None

    def dense(self) -> Tensor:
        return self.gradient

    def squares(self) -> Tensor:
        return norms_of(self.gradient).square() if self.known is None else self.known

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None, cap: float | None = None) -> Tensor:
        _, factors, flat = self.weighted(weights, dropped)
        return weighted_sum(factors, flat, cap).view(self.gradient.shape[1:])

    def weighted(self, weights: Tensor, dropped: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Ones [units, 1], factors [units] and gradients [units, numbers]: see `Outer.weighted`."""
        flat = select(self.gradient, dropped).reshape(len(self.gradient), -1)
        return flat.new_ones(len(flat), 1), weights.to(flat), flat

    def cut(self, rows: Tensor) -> Rows:
        return Rows(self.gradient.index_select(1, rows.to(self.gradient.device)))

    def folded(self, folding: Folding) -> Rows:
        return Rows(folding.sum(self.gradient))

    def kept(self, take: Take) -> Rows:
        return self

    def masked(self, mask: Tensor, take: Take) -> Rows:
        return Rows(self.gradient * mask)


@dataclass
class Turned:
    """A convolution's gradients [units, c, p, *kernel] that were computed backwards: rows and channels have changed places, and
    kernels their direction.

    Norms are the same in any order, and to turn the sum costs less than to turn every unit's gradient.
    """

    gradient: Tensor
    known: Tensor | None

    def dense(self) -> Tensor:
        return turned(self.gradient, self.gradient.dim() - 3)

    def squares(self) -> Tensor:
        return Rows(self.gradient, self.known).squares()

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        return turned(Rows(self.gradient).weighted_sum(weights, dropped), self.gradient.dim() - 3)


def turned(weight: Tensor, dims: int) -> Tensor:
    """[..., p, c, *kernel] of [..., c, p, *kernel], or the other way round, each kernel (of so many dimensions) backwards."""
    kernel = range(weight.dim() - dims, weight.dim())
    return weight.transpose(kernel[0] - 2, kernel[0] - 1).flip(tuple(kernel))


def multiplied_out(share: object) -> Tensor | None:
    """The gradients, in whatever order, where a share holds them themselves."""
    return share.gradient if isinstance(share, Rows | Turned) else None

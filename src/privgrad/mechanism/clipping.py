"""How a unit's vector is bounded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privgrad.errors import PrivgradError, check_number
from privgrad.mechanism.disclosure import ClippingWatch
from privgrad.mechanism.stage import Block, Clipping, Stage, State, Thresholds


@dataclass(frozen=True)
class FlatClipping(Stage):
    """g * min(1, C / ||g||), the norm over all trainable parameters together (arXiv:1607.00133, algorithm 1).

    Guarantee: every unit's vector lies in the l2 ball of radius max_norm.
    """

    kind: ClassVar[str] = "flat"
    separable: ClassVar[bool] = False

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_number("clipping.max_norm", self.max_norm, above=0)

    @property
    def radius(self) -> float:
        """C: no unit's vector is longer."""
        return self.max_norm

    def partition(self, slots: Mapping[str, torch.Size]) -> Sequence[Block]:
        return (Block("gradient", tuple(slots), self.max_norm),)

    def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
        # A norm of 0 divides to infinity, which the minimum turns into 1.
        return (thresholds / norms).clamp_(max=1.0)

    @property
    def words(self) -> str:
        return f"each contribution is scaled down to an l2 norm of at most {self.max_norm:g}"


@dataclass(frozen=True)
class CoordinateClipping(FlatClipping):
    """First g * min(1, C / ||g||), then every coordinate cut to +-C / sqrt(p) (l2 and l-infinity; arXiv:2210.03843, algorithm 2).

    max_norm: C. p: at 1 nothing is cut; at the number of parameters only the signs of large gradients are left.

    Guarantee: every unit's vector lies in the l2 ball of radius C (cutting coordinates makes no vector longer) and in the cube of
    half width C / sqrt(p), in this order: both bounds hold.
    """

    kind: ClassVar[str] = "l2_linf"

    p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clipping.p", self.p, at_least=1)

    @property
    def max_coordinate(self) -> float:
        """C / sqrt(p)."""
        return self.max_norm / math.sqrt(self.p)

    def partition(self, slots: Mapping[str, torch.Size]) -> Sequence[Block]:
        return (Block("gradient", tuple(slots), self.max_norm, self.max_coordinate if self.p > 1 else None),)

    @property
    def words(self) -> str:
        return (
            f"each contribution is scaled down to an l2 norm of at most {self.max_norm:g}, then each coordinate is cut to at "
            f"most {self.max_coordinate:g}"
        )


class ClippingRule:
    """A clipping stage as an engine sees it: weights for finite norms, 0 for the others, side releases into their sum.

    side: a thresholds stage, its state and the [blocks] sum that its side contributions are added to; or None. watch: keeps what
    the plan discloses of clipping.

    Guarantee: what a unit contributes to a block has a norm of at most the block's threshold, whatever the stage answers: larger
    weights are reduced, weights that are no number are 0. A unit (for separable rules: a unit's block) whose norm is not finite
    contributes exactly zero, to the gradient and to the side release.
    """

    def __init__(
        self,
        clipping: Clipping,
        thresholds: Tensor,
        side: tuple[Thresholds, State, Tensor] | None = None,
        watch: ClippingWatch | None = None,
    ) -> None:
        self.separable = clipping.separable
        self._clipping = clipping
        self._thresholds = thresholds
        self._side = side
        self._watch = watch

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        """See `gradients.contract.Rule`."""
        columns = list(blocks)
        finite = norms.isfinite()
        if not self.separable:
            finite = finite.all(dim=1, keepdim=True).expand_as(norms)
        zero = torch.zeros_like(norms)
        safe = torch.where(finite, norms, zero)
        thresholds = self._thresholds.to(norms)[columns]
        if self._side is not None:
            stage, state, sums = self._side
            sums[columns] += torch.where(
                finite, _one_each("side", stage, stage.side(state, safe, thresholds), norms), zero
            ).sum(0)
        limits = thresholds / safe
        weights = _one_each("weights", self._clipping, self._clipping.weights(safe, thresholds), norms)
        weights = weights.clamp(-limits, limits)
        weights = torch.where(finite & weights.isfinite(), weights, zero)
        if self._watch is not None:
            self._watch.add(norms, weights)
        return weights


def _one_each(method: str, stage: object, answer: Tensor, norms: Tensor) -> Tensor:
    """A stage's answer, if it is one number for each norm. Another shape would be broadcast: a unit would move the others'."""
    if not isinstance(answer, Tensor) or answer.shape != norms.shape:
        # In words: the number of units is private.
        raise PrivgradError(
            f"{type(stage).__name__}.{method} answered in another shape than the norms have; expected [units, blocks], one "
            "number for each norm"
        )
    return answer


class NormsOnly:
    """A rule that keeps the norms of all units and lets nothing into the sum: for public rows."""

    separable = False

    def __init__(self) -> None:
        self.norms: list[Tensor] = []

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        """See `gradients.contract.Rule`."""
        self.norms.append(norms.detach().clone())
        return torch.zeros_like(norms)

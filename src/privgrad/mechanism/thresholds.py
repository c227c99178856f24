"""Clipping norms that follow the training: adaptive layerwise clipping (arXiv:2307.11939) and its relatives.

In every kind the thresholds of a step are a function of earlier releases and of public data only. C_l never falls below
1e-3 of the stated norm: a dead block would give 0 / 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from privgrad.errors import check_count, check_number
from privgrad.mechanism.stage import PublicView, Stage, State
from privgrad.mechanism.states import Consumer, Release
from privgrad.privacy.sensitivity import Bound

_SMALLEST = 1e-3


@dataclass(frozen=True)
class PublicThresholds(Stage):
    """C_l = C e_l / max_j e_j, with e_l the mean norm of block l over ALL public data at the released weights (ALC).

    The norms are of the same kind of unit as in training (examples, or groups of the same expected size). every: so many steps
    apart.

    Guarantee: costs no privacy. It sees public data and released weights only; that the data are public is the user's word.
    """

    kind: ClassVar[str] = "public"
    needs_public: ClassVar[bool] = True

    every: int = 100

    def __post_init__(self) -> None:
        check_count("thresholds.every", self.every)

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        return {"shares": torch.empty(0)}

    def refresh(self, state: State, view: PublicView) -> State:
        if len(state["shares"]) and view.step % self.every:
            return state
        norms = view.norms(view.public).to(torch.float64)
        return {"shares": _shares(norms[norms.isfinite().all(dim=1)].mean(0).nan_to_num())}

    def values(self, state: State, max_norms: Tensor) -> Tensor:
        return max_norms * state["shares"].to(max_norms)

    def side_bound(self, thresholds: Tensor) -> Bound | None:
        return None

    def side(self, state: State, norms: Tensor, thresholds: Tensor) -> Tensor:
        raise NotImplementedError("there is no side release")

    @property
    def words(self) -> str:
        return f"clipping norms in proportion to the gradient norms of public data, anew every {self.every} steps"


@dataclass(frozen=True)
class PrivateThresholds(Stage):
    """C_l = C e_l / max_j e_j, with e_l a noised mean of block norms of the private batches before.

    Each unit contributes min(||g_l||, limit) for every block, in the same event as the gradient. limit: R_l, in units of gradient
    norm; a wrong one biases the estimate and costs no privacy. decay: of the average over steps.

    Guarantee: what a unit contributes lies in [0, limit]^L; the noise's `side_share` says what of the budget it gets.
    """

    kind: ClassVar[str] = "private"

    limit: float = 1.0
    decay: float = 0.9

    def __post_init__(self) -> None:
        check_number("thresholds.limit", self.limit, above=0)
        check_number("thresholds.decay", self.decay, at_least=0, below=1)

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        return {"means": torch.empty(0)}

    def values(self, state: State, max_norms: Tensor) -> Tensor:
        if not len(state["means"]):
            return max_norms
        return max_norms * _shares(state["means"]).to(max_norms)

    def side_bound(self, thresholds: Tensor) -> Bound | None:
        return Bound.box(*[self.limit] * len(thresholds))

    def side(self, state: State, norms: Tensor, thresholds: Tensor) -> Tensor:
        return norms.clamp(0.0, self.limit)

    def update(self, state: State, release: Release) -> State:
        found = _side_release(release).clamp(0.0, self.limit)
        if not len(state["means"]):
            return {"means": found}
        return {"means": self.decay * state["means"].to(found) + (1 - self.decay) * found}

    @property
    def words(self) -> str:
        return (
            f"clipping norms in proportion to noised mean gradient norms (each cut at {self.limit:g}), which are part of every "
            "step's release"
        )


@dataclass(frozen=True)
class QuantileThresholds(Stage):
    """C_l <- C_l exp(-rate (b_l - quantile)), b_l the noised share of units with ||g_l|| <= C_l (arXiv:1905.03871, section 3).

    Guarantee: each unit contributes +1/2 or -1/2 for every block: a vector of norm sqrt(L)/2, in the same event as the gradient.
    """

    kind: ClassVar[str] = "quantile"

    quantile: float = 0.5
    rate: float = 0.2

    def __post_init__(self) -> None:
        check_number("thresholds.quantile", self.quantile, above=0, below=1)
        check_number("thresholds.rate", self.rate, above=0)

    def init(self, shapes: Mapping[str, torch.Size]) -> State:
        return {"logarithms": torch.empty(0)}

    def values(self, state: State, max_norms: Tensor) -> Tensor:
        if not len(state["logarithms"]):
            return max_norms
        return max_norms * state["logarithms"].to(max_norms).exp()

    def side_bound(self, thresholds: Tensor) -> Bound | None:
        diagonal = math.sqrt(len(thresholds))
        return Bound(diagonal / 2, diagonal)

    def side(self, state: State, norms: Tensor, thresholds: Tensor) -> Tensor:
        return (norms <= thresholds).to(norms.dtype) - 0.5

    def update(self, state: State, release: Release) -> State:
        below = _side_release(release) + 0.5
        before = state["logarithms"].to(below) if len(state["logarithms"]) else torch.zeros_like(below)
        moved = before - self.rate * (below - self.quantile)
        return {"logarithms": moved.clamp(math.log(_SMALLEST), -math.log(_SMALLEST))}

    @property
    def words(self) -> str:
        return (
            f"clipping norms that follow the {self.quantile:g} quantile of gradient norms, by noised counts that are part of "
            "every step's release"
        )


def _shares(means: Tensor) -> Tensor:
    """e_l / max_j e_j, at least 1e-3; all 1 where nothing is known."""
    largest = means.max()
    return (means / largest).clamp(_SMALLEST, 1.0) if largest > 0 else torch.ones_like(means)


def _side_release(release: Release) -> Tensor:
    """[blocks]: the noised sum over units, over the constant divisor."""
    slots: Sequence[Tensor] = list((release.side or {})[Consumer.THRESHOLDS].values())
    (noised,) = slots
    return noised / release.divisor

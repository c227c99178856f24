"""ModelMix: each step starts from a random point between the last two released weights (arXiv:2210.03843, algorithm 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from privgrad.errors import PrivgradError, RefusedError, check_number
from privgrad.mechanism.clipping import CoordinateClipping, FlatClipping
from privgrad.mechanism.layerwise import LayerwiseClipping
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.sparsification import RandomSparsification
from privgrad.mechanism.stage import ChargedStatistics, Stage, State
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Sampler

CALIBRATE: Literal["calibrate"] = "calibrate"
"""What stands for a width that follows from epsilon."""
_FINEST = 2**53


@dataclass(frozen=True)
class ModelMix(Stage):
    """w_k = m - eta (U_k + decay w_{k-1}) + momentum (w_{k-1} - w_{k-2}), with U_k the noised mean gradient at w_{k-1}.

    m is uniform, coordinate by coordinate, on an interval around (w_{k-1} + w_{k-2}) / 2 whose length is the largest whole
    multiple of tau = width_ratio * eta that fits between the two, and at least tau. The first two weights are both the initial
    ones. m and the noised gradient are never released; the weights are. decay and momentum are known shifts by released weights.
    width_ratio: "calibrate" until the plan is calibrated to an epsilon by it, under the noise multiplier that the plan has.

    Guarantee: with W = width_ratio * divisor, a step is a Gaussian of standard deviation s plus a uniform of width W in every
    coordinate, on the clipped sum: a wider interval is post-processing of this one. Every trainable parameter is mixed. Holds for
    what `check` lets pass.
    """

    kind: ClassVar[str] = "modelmix"

    width_ratio: float | Literal["calibrate"] = 0.15
    decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.width_ratio, str) and self.width_ratio != CALIBRATE:
            raise PrivgradError(
                f"mixing.width_ratio is {self.width_ratio!r}; expected a number above 0, or {CALIBRATE!r}"
            )
        if self.width_ratio != CALIBRATE:
            check_number("mixing.width_ratio", self.width_ratio, above=0)
        check_number("mixing.decay", self.decay, at_least=0)
        check_number("mixing.momentum", self.momentum, at_least=0, below=1)

    def check(self, plan: Any) -> None:
        """Refuse plans whose steps are not the mechanism that the accountant knows."""
        sampled = plan.sampling.sampled
        if sampled is not None and sampled.sampler not in (Sampler.POISSON, Sampler.FULL_BATCH):
            raise RefusedError(
                f"mixing is proven for Poisson sampling, and the plan samples by {plan.sampling.kind!r}; use sampling.kind = "
                "'poisson', or leave out mixing"
            )
        if plan.adjacency is Adjacency.REPLACE_ONE:
            raise RefusedError(
                "mixing is not proven under replace_one: the worst pair is not known; use adjacency = 'zero_out' or 'add_remove'"
            )
        if type(plan.clipping) not in (FlatClipping, CoordinateClipping, LayerwiseClipping):
            raise RefusedError(
                f"mixing is proven for clipping.kind = 'flat', 'l2_linf' and 'layerwise', not for {plan.clipping.kind!r}; use "
                "one of them"
            )
        if plan.clipping.radius is None:
            raise RefusedError(
                "mixing needs to know how long a contribution can be, and clipping.max_norm is one number for blocks that only "
                "the model counts; give one norm per block, or clipping.kind = 'flat'"
            )
        joined = getattr(plan.compression, "joined", False)
        if type(plan.compression) not in (type(None), RandomSparsification) and not joined:
            raise RefusedError(
                f"mixing is proven where each coordinate of an update has its own noise, and compression.kind = "
                f"{plan.compression.kind!r} turns coordinates: a bound on each before is none after; set compression.joined = "
                "true (embedding), or leave out plan.compression or plan.mixing"
            )
        if isinstance(plan.clipping, LayerwiseClipping) and not joined and plan.noise.allocation != "uniform":
            raise RefusedError(
                f"mixing is proven for the same noise in every coordinate, and noise.allocation is {plan.noise.allocation!r}; "
                "use noise.allocation = 'uniform'"
            )
        if plan.thresholds is not None:
            raise RefusedError(
                "mixing is proven for fixed clipping norms: side releases and changing norms are no part of its accountant; "
                "leave out plan.thresholds"
            )
        if isinstance(plan.statistics, ChargedStatistics):
            raise RefusedError(
                "mixing is not proven beside statistics of the private records: their side release is no part of its "
                "accountant; use statistics.kind = 'public_batch', or leave out plan.mixing"
            )

    def mix(
        self, state: State, weights: Mapping[str, Tensor], update: Mapping[str, Tensor], rate: float, source: Source
    ) -> tuple[Mapping[str, Tensor], State]:
        mixed, kept = {}, {}
        assert self.width_ratio != CALIBRATE
        width = self.width_ratio * rate
        for name, now in weights.items():
            # In double precision, and rounded once at the end: rounding what is released is post-processing.
            current = now.to(torch.float64)
            before = state[name].to(current) if name in state else current
            gap = before - current
            share = source.integers(now.numel(), _FINEST).to(current).view(now.shape).div_(_FINEST)
            length = (gap.abs() / width).floor_().clamp_(min=1.0).mul_(width)
            point = (current + gap / 2).add_(share.sub_(0.5).mul_(length))
            point -= rate * (update[name].to(current) + self.decay * current)
            point -= self.momentum * gap
            mixed[name] = point.to(now.dtype)
            kept[name] = now.detach().clone()
        return mixed, kept

    @property
    def words(self) -> str:
        more = "".join(
            f", {name} {value:g}" for name, value in (("decay", self.decay), ("momentum", self.momentum)) if value
        )
        width = self.width_ratio if self.width_ratio == CALIBRATE else f"{self.width_ratio:g}"
        return (
            f"each step starts from a random point between the last two released weights (width {width} learning "
            f"rates at least{more}), and the weights are what is released"
        )

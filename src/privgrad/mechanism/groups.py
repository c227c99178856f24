"""Batch Clipping: groups of units are clipped instead of units (arXiv:2307.11939)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from privgrad.errors import PrivgradError, check_count, check_number
from privgrad.gradients.contract import Engine, Fold
from privgrad.gradients.grouped import MeanEngine
from privgrad.gradients.streamed import StreamedEngine
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Stage


@dataclass(frozen=True)
class RandomGroups(Stage):
    """Every sampled unit draws one of `count` groups; a group gives ONE vector a_h = A(w; S_h), which is clipped.

    count: m, and the constant that the noised sum is divided by. local_steps: 0 makes A the mean gradient of the group in train
    mode, so that BatchNorm sees the group; k > 0 makes it the weight change of k steps of SGD on the group with rate
    `local_rate` (federated averaging, in its place).

    Guarantee: one unit moves the sum by at most 2C under every adjacency: it changes its own group's vector from one point of the
    ball to another, and no other group's, because each unit draws its group independently of all others and A depends on the
    weights, the group and fresh randomness only (docs/guarantees/batch_clipping.md).
    """

    kind: ClassVar[str] = "random"

    count: int = 0
    local_steps: int = 0
    local_rate: float | None = None

    def __post_init__(self) -> None:
        if self.count == 0:
            raise PrivgradError("groups.count is not given; it is into how many groups each batch falls")
        check_count("groups.count", self.count)
        check_count("groups.local_steps", self.local_steps, at_least=0)
        if (self.local_rate is None) != (self.local_steps == 0):
            raise PrivgradError("groups.local_steps and groups.local_rate belong together; give both, or none")
        if self.local_rate is not None:
            check_number("groups.local_rate", self.local_rate, above=0)

    def assign(self, fold: Fold, source: Source) -> Fold:
        drawn = source.integers(fold.units, self.count)
        return Fold(drawn[fold.index], self.count, fold.scale)

    def engine(self, apart: Callable[[], bool], rows: float | None) -> Engine:
        if self.local_steps:
            return StreamedEngine(mean=True, local_steps=self.local_steps, local_rate=self.local_rate or 0.0)
        return MeanEngine(apart, None if rows is None else rows / self.count)

    @property
    def words(self) -> str:
        what = (
            f"the change of the weights by {self.local_steps} steps of SGD on the group (rate {self.local_rate:g})"
            if self.local_steps
            else "the group's mean gradient"
        )
        return (
            f"each sampled {{unit}} draws one of {self.count} groups independently of all others, and {what} is clipped as one "
            "contribution"
        )

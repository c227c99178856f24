"""Gaussian noise for a whole step, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from privgrad.errors import PrivgradError, check_count, check_number, nearest
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Stage
from privgrad.mechanism.states import ClippedSum, Consumer, NoisedSum
from privgrad.privacy.ledger import Receipt


def _uniform(distances: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [math.hypot(*distances)] * len(distances)


def _per_layer(distances: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [math.sqrt(len(distances)) * distance for distance in distances]


def _dimension(distances: Sequence[float], sizes: Sequence[int]) -> list[float]:
    together = sum(distance * math.sqrt(size) for distance, size in zip(distances, sizes, strict=True))
    return [math.sqrt(distance / math.sqrt(size) * together) for distance, size in zip(distances, sizes, strict=True)]


ALLOCATIONS: Mapping[str, Callable[[Sequence[float], Sequence[int]], list[float]]] = {
    "uniform": _uniform,
    "per_layer": _per_layer,
    "dimension": _dimension,
}
"""The parts' standard deviations at z = 1, from how far a record moves each (R_l) and how many coordinates it has (d_l)."""

_STRETCH = 2**18
"""So many numbers of noise are drawn at once: little memory, and they are added while they are in the cache."""

_DIGITS = 20
"""Binary digits of a standard deviation that are released; rounding adds less than a 10^-12th to the noise's variance."""
_SMALLEST = 1e-200

SECRET: Literal["secret"] = "secret"
"""What a stored plan holds in place of a seed."""


@dataclass(frozen=True)
class GaussianNoise(Stage):
    """N(0, s^2) on every coordinate of everything that a step releases.

    multiplier: the JOINT z = s / R of the step; None until the plan is calibrated; 0 is no privacy at all.
    allocation: how the gradient's noise is spread over its parts (blocks), given z. "uniform": the same s everywhere,
    s = z sqrt(sum R_j^2). "per_layer": s_l = z sqrt(L) R_l (the choice of arXiv:2307.11939). "dimension": s_l^2 = z^2 (R_l /
    sqrt(d_l)) sum_j R_j sqrt(d_j), the least noise in all, d_l coordinates in part l (arXiv:2212.01539). Equal for one part.
    side_share: the share of 1/z^2 that charged side releases get, split evenly among them; the gradient gets the rest.
    insecure_seed: reproducible noise and sampling; the guarantee then holds only while the seed stays secret, so that plans
    are stored with the word "secret" in its place. Such a plan can be accounted for and not run.

    Guarantee: 1/z^2 = sum over parts of (R_p / s_p)^2, one Gaussian mechanism per step, whatever the allocation.
    """

    kind: ClassVar[str] = "gaussian"

    multiplier: float | None = None
    allocation: str = "uniform"
    side_share: float = 0.05
    insecure_seed: int | Literal["secret"] | None = None

    def __post_init__(self) -> None:
        if self.multiplier is not None:
            check_number("noise.multiplier", self.multiplier, at_least=0)
        if self.allocation not in ALLOCATIONS:
            raise PrivgradError(
                f"noise.allocation is {self.allocation!r}; {nearest(str(self.allocation), ALLOCATIONS)}"
            )
        check_number("noise.side_share", self.side_share, above=0, below=1)
        if self.insecure_seed not in (None, SECRET):
            check_count("noise.insecure_seed", self.insecure_seed, at_least=0)

    def scales(self, sums: ClippedSum) -> dict[str, float]:
        """The standard deviation of each part."""
        if self.multiplier is None:
            raise PrivgradError("noise.multiplier is not set; give it, or calibrate the plan to an epsilon")
        distances = {part.name: sums.distance(part) for part in sums.parts}
        side = [part.name for part in sums.parts if part.consumer is not Consumer.UPDATE]
        gradient = [part for part in sums.parts if part.consumer is Consumer.UPDATE]
        gradient_multiplier = self.multiplier / math.sqrt(1 - self.side_share) if side else self.multiplier
        sizes = [max(1, sum(sums.values[slot].numel() for slot in part.slots)) for part in gradient]  # masked ones too
        shares = ALLOCATIONS[self.allocation]([distances[part.name] for part in gradient], sizes)
        scales = {part.name: gradient_multiplier * share for part, share in zip(gradient, shares, strict=True)}
        for name in side:
            scales[name] = self.multiplier * math.sqrt(len(side) / self.side_share) * distances[name]
        return scales

    def add(self, sums: ClippedSum, receipt: Receipt, source: Source) -> NoisedSum:
        """Add the noise in place, a stretch at a time: it is never held as a whole.

        Sum and noise meet in double precision and are rounded to whole cells of about 2^-20 s, each of which thousands of noise
        values reach. What a value's last digits would tell of the sum below it (arXiv:2112.05307) is gone.
        """
        scales = self.scales(sums)
        drawn = source.at(receipt.step)
        longest = max(sums.values.values(), key=lambda value: value.numel())
        buffer = longest.new_empty(min(_STRETCH, longest.numel()), dtype=torch.float64)
        by_slot = {slot: scales[part.name] for part in sums.parts for slot in part.slots}
        for slot, value in sums.values.items():
            flat = value.view(-1)
            scale = by_slot[slot]
            if scale == 0:
                continue
            if scale < _SMALLEST:
                raise PrivgradError(
                    f"the noise of {slot!r} would have the standard deviation {scale:g}, too small for computer arithmetic; take "
                    "a larger clipping norm"
                )
            cell = 2.0 ** (math.frexp(scale)[1] - _DIGITS)
            for first in range(0, len(flat), _STRETCH):
                part = flat[first : first + _STRETCH]
                noise = drawn.normal_(buffer[: len(part)])
                noised = noise.mul_(scale / cell).add_(part, alpha=1 / cell).round_()
                torch.mul(noised, cell, out=part)
        return NoisedSum(sums, scales, receipt)

    @property
    def words(self) -> str:
        generator = (
            "a cryptographic generator (AES-256 in counter mode) with a key that was never stored"
            if self.insecure_seed is None
            else "a seeded generator: THE GUARANTEE HOLDS ONLY WHILE THE SEED STAYS SECRET and serves no other training"
        )
        return f"Gaussian noise, {self.multiplier or 0:.4g} times what one {{unit}} can change, drawn from {generator}"

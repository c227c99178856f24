"""The states of data: ClippedSum (private) -> NoisedSum (private while a random stage is to come) -> Release (public).

The types wrap a few tensors once per step and cost nothing per element. What is not a Release is never logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from privgrad.errors import PrivgradError
from privgrad.privacy.ledger import Receipt
from privgrad.privacy.sensitivity import Bound, joint_multiplier, presence_distance


class Consumer(Enum):
    """Who reads a part of the sum."""

    UPDATE = "update"
    """The optimizer (or mixing): blocks of the encoded gradient."""
    THRESHOLDS = "thresholds"
    """The stage that adapts clipping thresholds: a charged side release."""
    STATISTICS = "statistics"
    """The stage that tracks normalization statistics: a charged side release."""


@dataclass(frozen=True)
class Part:
    """One named part of what a step sums: some slots, and the set in which every unit's contribution to them lies."""

    name: str
    slots: Sequence[str]
    bound: Bound
    consumer: Consumer = Consumer.UPDATE


@dataclass(frozen=True)
class ClippedSum:
    """PRIVATE. The sum over units of bounded contributions, by slot."""

    parts: Sequence[Part]
    values: Mapping[str, Tensor]
    grouped: bool

    def distance(self, part: Part) -> float:
        """R of one part: how far one record can move it from where its absence leaves it."""
        return presence_distance(part.bound, grouped=self.grouped)


@dataclass(frozen=True)
class NoisedSum:
    """A clipped sum plus Gaussian noise of the given standard deviation on each part.

    Guarantee: jointly one Gaussian mechanism with noise multiplier `multiplier()`. PRIVATE while a mixing stage is to come.
    """

    sums: ClippedSum
    scales: Mapping[str, float]
    receipt: Receipt

    def multiplier(self) -> float:
        """The joint z of what was really added."""
        return joint_multiplier((self.sums.distance(part), self.scales[part.name]) for part in self.sums.parts)

    def of(self, consumer: Consumer) -> dict[str, Tensor]:
        """The noised slots that one consumer reads."""
        slots = [slot for part in self.sums.parts if part.consumer is consumer for slot in part.slots]
        return {slot: self.sums.values[slot] for slot in slots}


@dataclass(frozen=True)
class Release:
    """PUBLIC. What a step gives away, with the receipt of its ledger line; everything after it is post-processing.

    update: noisy mean gradient by parameter, or None where the release is the weights.
    weights: new weights by parameter (mixing), or None.
    side: noised side releases by consumer, as SUMS, with the constant `divisor` beside them.
    """

    receipt: Receipt
    divisor: float
    update: Mapping[str, Tensor] | None = None
    weights: Mapping[str, Tensor] | None = None
    side: Mapping[Consumer, Mapping[str, Tensor]] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.receipt, Receipt):
            raise PrivgradError("a release needs the receipt of its step in the ledger")
        if (self.update is None) == (self.weights is None):
            raise PrivgradError("a release is an update or weights, one of the two")

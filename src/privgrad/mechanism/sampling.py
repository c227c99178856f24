"""Which units take part in a step: one class per sampler, each accounted as what it is."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from privgrad.errors import PrivgradError, RefusedError, check_count, check_number
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Stage
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Sampled, Sampler

_Sized = TypeVar("_Sized", bound="_Sampling")
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Sampling(Stage):
    """What samplers share: their size in either of two forms, and what follows from it.

    Either expected_batch_size (b) and dataset_size (n): q = b / n; or rate (q) and divisor: the constant by which sums are
    divided. The second form is needed where the size of the data set is private (add_remove).
    """

    expected_batch_size: float | None = None
    dataset_size: int | None = None
    rate: float | None = None
    divisor: float | None = None

    def __post_init__(self) -> None:
        by_size = self.rate is None and self.divisor is None and self.expected_batch_size is not None
        by_rate = self.expected_batch_size is None and self.rate is not None
        if self.dataset_size is not None:
            check_count("sampling.dataset_size", self.dataset_size)
        if by_size:
            check_number("sampling.expected_batch_size", self.expected_batch_size, above=0)
            if self.dataset_size is not None:
                check_number(
                    "sampling.expected_batch_size (with this dataset_size)",
                    self.expected_batch_size,
                    at_most=self.dataset_size,
                )
        elif by_rate:
            check_number("sampling.rate", self.rate, above=0, at_most=1)
            if self.divisor is not None:
                check_number("sampling.divisor", self.divisor, above=0)
        else:
            raise PrivgradError(
                "sampling needs either expected_batch_size (and dataset_size), or rate (and divisor); "
                f"got {self._given()}"
            )

    def _given(self) -> str:
        names = ("expected_batch_size", "dataset_size", "rate", "divisor")
        return ", ".join(name for name in names if getattr(self, name) is not None) or "neither"

    @property
    def probability(self) -> float:
        """q: the rate at which a unit is sampled."""
        if self.rate is not None:
            return float(self.rate)
        return _known(self.expected_batch_size) / _known(self.dataset_size)

    @property
    def normaliser(self) -> float | None:
        """The constant by which the sum over units is divided."""
        return self.divisor if self.rate is not None else self.expected_batch_size

    def check(self, adjacency: Adjacency) -> None:
        """Refuse a plan that would need the size of the data set where that size is private."""
        if adjacency is Adjacency.ADD_REMOVE and self.dataset_size is not None:
            raise RefusedError(
                "under add_remove the size of the data set is private, so nothing may be derived from it; "
                "state sampling.rate and sampling.divisor as numbers, or use adjacency = 'zero_out'"
            )

    def for_dataset(self: _Sized, units: int, adjacency: Adjacency) -> _Sized:
        """This sampler with the number of units filled in where it needs it; another number is refused."""
        _check_size(self.dataset_size, units)
        if self.expected_batch_size is not None:
            return dataclasses.replace(self, dataset_size=units)
        if self.divisor is None and adjacency is not Adjacency.ADD_REMOVE:
            return dataclasses.replace(self, divisor=self.probability * units)
        return self

    def steps_in(self, epochs: float) -> int:
        """How many steps so many passes over the data are: epochs / q."""
        return max(1, round(epochs / self.probability))

    def charges(self, steps: int) -> int:
        """Every step costs."""
        return steps


@dataclass(frozen=True)
class PoissonSampling(_Sampling):
    """Every unit takes part in every step by a coin of its own, with probability q. q = 1 is full batch.

    Guarantee: coins are independent across units and steps, and true with at most q. The divisor is a constant; the realised
    batch size is never used.
    """

    kind: ClassVar[str] = "poisson"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate is not None and self.dataset_size is not None:
            raise PrivgradError("sampling has both rate and dataset_size; the rate says it already: leave one out")

    @property
    def sampled(self) -> Sampled | None:
        if self.rate is None and self.dataset_size is None:
            return None
        q = self.probability
        return Sampled(Sampler.FULL_BATCH) if q == 1 else Sampled(Sampler.POISSON, q)

    def draw(self, units: int, step: int, source: Source) -> Tensor:
        return source.coins(units, self.probability).nonzero().flatten()

    @property
    def words(self) -> str:
        if self.probability == 1:
            return "every {unit} takes part in every step"
        return f"Poisson: each {{unit}} takes part in each step by an independent coin with probability {self.probability:.4g}"


@dataclass(frozen=True)
class TruncatedPoissonSampling(_Sampling):
    """Poisson sampling whose batches never exceed `max_batch_size`: of a larger sample, a random subset of that size stays.

    Batches then have a bounded size in memory (arXiv:2508.15089).

    Guarantee: as for Poisson; the subset is uniform and independent of what the units hold.
    """

    kind: ClassVar[str] = "truncated_poisson"

    max_batch_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("sampling.max_batch_size", self.max_batch_size)

    @property
    def sampled(self) -> Sampled | None:
        if self.dataset_size is None:
            return None
        return Sampled(Sampler.TRUNCATED_POISSON, self.probability, self.dataset_size, self.max_batch_size)

    def check(self, adjacency: Adjacency) -> None:
        """The table of events refuses what has to be refused."""

    def for_dataset(self, units: int, adjacency: Adjacency) -> TruncatedPoissonSampling:
        return dataclasses.replace(super().for_dataset(units, adjacency), dataset_size=units)

    def draw(self, units: int, step: int, source: Source) -> Tensor:
        drawn = source.coins(units, self.probability).nonzero().flatten()
        if len(drawn) <= self.max_batch_size:
            return drawn
        return drawn[source.permutation(len(drawn))[: self.max_batch_size]].sort().values

    @property
    def words(self) -> str:
        return (
            f"truncated Poisson: each {{unit}} is drawn for each step by an independent coin with probability "
            f"{self.probability:.4g}, and of a larger draw a random {self.max_batch_size} stay"
        )


@dataclass(frozen=True)
class FixedSizeSampling(Stage):
    """A uniformly random subset of `batch_size` units in every step, without replacement.

    Guarantee: subsets are uniform and independent across steps.
    """

    kind: ClassVar[str] = "fixed_size"

    batch_size: int = 0
    dataset_size: int | None = None

    def __post_init__(self) -> None:
        _check_batches(self.batch_size, self.dataset_size)

    @property
    def sampled(self) -> Sampled | None:
        if self.dataset_size is None:
            return None
        return Sampled(Sampler.FIXED_SIZE, self.batch_size / self.dataset_size, self.dataset_size, self.batch_size)

    @property
    def normaliser(self) -> float | None:
        return float(self.batch_size)

    def check(self, adjacency: Adjacency) -> None:
        """The table of events refuses what has to be refused."""

    def for_dataset(self, units: int, adjacency: Adjacency) -> FixedSizeSampling:
        _check_size(self.dataset_size, units)
        return dataclasses.replace(self, dataset_size=units)

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs * _known(self.dataset_size) / self.batch_size))

    def charges(self, steps: int) -> int:
        return steps

    def draw(self, units: int, step: int, source: Source) -> Tensor:
        return source.permutation(units)[: self.batch_size].sort().values

    @property
    def words(self) -> str:
        return f"fixed size: a random {self.batch_size} of {self.dataset_size} {{unit}}s take part in each step"


@dataclass(frozen=True)
class ShuffledBatches(Stage):
    """Each epoch cuts a permutation into batches of `batch_size`: for comparison, WITHOUT amplification by sampling.

    The permutation follows from (epoch, `order`) and is not secret: nothing in the accounting rests on it. A resumed run goes on
    with the same one, so that no unit takes part twice in an epoch.

    Guarantee: for any order that does not look at the data, a unit takes part in one step of an epoch at most. One Gaussian is
    charged at each epoch's start, also of an epoch that is not finished.
    """

    kind: ClassVar[str] = "shuffled"

    batch_size: int = 0
    dataset_size: int | None = None
    order: int = 0

    def __post_init__(self) -> None:
        _check_batches(self.batch_size, self.dataset_size)
        check_count("sampling.order", self.order, at_least=0)

    @property
    def steps_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller; it is divided by the same constant."""
        return -(-_known(self.dataset_size) // self.batch_size)

    @property
    def sampled(self) -> Sampled | None:
        return None if self.dataset_size is None else Sampled(Sampler.SHUFFLED)

    @property
    def normaliser(self) -> float | None:
        return float(self.batch_size)

    def check(self, adjacency: Adjacency) -> None:
        """The table of events refuses what has to be refused."""

    def for_dataset(self, units: int, adjacency: Adjacency) -> ShuffledBatches:
        _check_size(self.dataset_size, units)
        return dataclasses.replace(self, dataset_size=units)

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs * self.steps_per_epoch))

    def charges(self, steps: int) -> int:
        return -(-steps // self.steps_per_epoch)

    def draw(self, units: int, step: int, source: Source) -> Tensor:
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        mixed = hashlib.sha256(f"{self.order}:{epoch}:{units}:{self.batch_size}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:8], "little", signed=True))
        order = torch.randperm(units, generator=generator)
        return order[position * self.batch_size : (position + 1) * self.batch_size].sort().values

    @property
    def words(self) -> str:
        return (
            f"shuffled: each epoch goes once through all {{unit}}s, in batches of at most {self.batch_size}; nothing is claimed "
            "for the shuffling"
        )


@dataclass(frozen=True)
class FullBatch(Stage):
    """Every unit takes part in every step. divisor: the constant that sums are divided by; by default the number of units."""

    kind: ClassVar[str] = "full_batch"

    divisor: float | None = None

    def __post_init__(self) -> None:
        if self.divisor is not None:
            check_number("sampling.divisor", self.divisor, above=0)

    @property
    def sampled(self) -> Sampled:
        return Sampled(Sampler.FULL_BATCH)

    @property
    def normaliser(self) -> float | None:
        return self.divisor

    def check(self, adjacency: Adjacency) -> None:
        """Nothing here depends on the size of the data set."""

    def for_dataset(self, units: int, adjacency: Adjacency) -> FullBatch:
        if self.divisor is not None:
            return self
        if adjacency is Adjacency.ADD_REMOVE:
            raise RefusedError(
                "under add_remove the size of the data set is private; state sampling.divisor as a number"
            )
        return dataclasses.replace(self, divisor=float(units))

    def steps_in(self, epochs: float) -> int:
        return max(1, round(epochs))

    def charges(self, steps: int) -> int:
        return steps

    def draw(self, units: int, step: int, source: Source) -> Tensor:
        return torch.arange(units)

    @property
    def words(self) -> str:
        return "every {unit} takes part in every step"


def _known(value: _T | None) -> _T:
    if value is None:
        raise PrivgradError("sampling.dataset_size is not known; give it, or a data set")
    return value


def _check_size(known: int | None, units: int) -> None:
    if known is not None and known != units:
        raise PrivgradError(
            f"the plan was made for {known} records and the data set has {units}; "
            "make the plan from this data set (sampling.dataset_size)"
        )


def _check_batches(batch_size: int, dataset_size: int | None) -> None:
    if batch_size == 0:
        raise PrivgradError("sampling.batch_size is not given; it is how many units each step takes")
    check_count("sampling.batch_size", batch_size)
    if dataset_size is not None:
        check_count("sampling.dataset_size", dataset_size)
        check_number("sampling.batch_size (with this dataset_size)", batch_size, at_most=dataset_size)

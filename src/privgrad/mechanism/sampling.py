"""Which units take part in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from privgrad.errors import PrivgradError, RefusedError, check_count, check_number
from privgrad.mechanism.randomness import Source
from privgrad.mechanism.stage import Stage
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Sampler


@dataclass(frozen=True)
class PoissonSampling(Stage):
    """Every unit takes part in every step by a coin of its own, with probability q.

    Either expected_batch_size (b) and dataset_size (n): q = b / n; or rate (q) and divisor: the constant by which sums are
    divided. The second form is needed where the size of the data set is private (add_remove). q = 1 is full batch.

    Guarantee: coins are independent across units and steps, and true with at most q. The divisor is a constant; the realised
    batch size is never used.
    """

    kind: ClassVar[str] = "poisson"

    expected_batch_size: float | None = None
    dataset_size: int | None = None
    rate: float | None = None
    divisor: float | None = None

    def __post_init__(self) -> None:
        by_size = self.rate is None and self.divisor is None and self.expected_batch_size is not None
        by_rate = self.expected_batch_size is None and self.dataset_size is None and self.rate is not None
        if by_size:
            check_number("sampling.expected_batch_size", self.expected_batch_size, above=0)
            if self.dataset_size is not None:
                check_count("sampling.dataset_size", self.dataset_size)
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
        if self.dataset_size is None or self.expected_batch_size is None:
            raise PrivgradError("sampling.dataset_size is not known; give it, or a data set")
        return self.expected_batch_size / self.dataset_size

    @property
    def sampler(self) -> Sampler:
        """What the accountant calls this."""
        return Sampler.FULL_BATCH if self.probability == 1 else Sampler.POISSON

    @property
    def normaliser(self) -> float:
        """The constant by which the sum over units is divided."""
        if self.divisor is not None:
            return float(self.divisor)
        if self.expected_batch_size is None:
            raise PrivgradError("sampling.divisor is needed with sampling.rate: the constant that sums are divided by")
        return float(self.expected_batch_size)

    def check(self, adjacency: Adjacency) -> None:
        """Refuse a plan that would need the size of the data set where that size is private."""
        if adjacency is Adjacency.ADD_REMOVE and self.dataset_size is not None:
            raise RefusedError(
                "under add_remove the size of the data set is private, so nothing may be derived from it; "
                "state sampling.rate and sampling.divisor as numbers, or use adjacency = 'zero_out'"
            )

    def draw(self, units: int, source: Source) -> Tensor:
        """The indices of the units that take part in one step, increasing."""
        return source.coins(units, self.probability).nonzero().flatten()

    @property
    def words(self) -> str:
        if self.probability == 1:
            return "every record takes part in every step"
        return f"Poisson: each record takes part in each step by an independent coin with probability {self.probability:.4g}"

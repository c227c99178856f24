"""The table (sampler, adjacency, accountant) -> event, and events as JSON.

Events are dp-accounting's own classes: a description complete enough to be the contract. dp-accounting's neighbouring
relations change the sensitivity themselves, and not consistently (PLD doubles under REPLACE_ONE, RDP does not), so that
nobody outside this file builds an event or names a relation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import attr
import dp_accounting
from dp_accounting import DpEvent, NeighboringRelation

from privgrad.errors import PrivgradError, RefusedError, VerificationError, nearest
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.sensitivity import replacement_factor


class Accountant(StrEnum):
    """How an event becomes an epsilon. Both give upper bounds."""

    PLD = "pld"
    """Privacy loss distributions on a grid, rounded pessimistically: the tightest."""
    RDP = "rdp"
    """Renyi differential privacy: looser, and covers some samplers that PLD does not."""


class Sampler(StrEnum):
    """How a step chooses its units, as far as the accountant cares."""

    POISSON = "poisson"
    """Every unit by its own coin, independently in every step."""
    TRUNCATED_POISSON = "truncated_poisson"
    """As Poisson; of a sample that is larger than a stated size, a random subset of that size."""
    FIXED_SIZE = "fixed_size"
    """A random subset of a fixed size, independently in every step."""
    SHUFFLED = "shuffled"
    """Fixed batches, one participation an epoch: no amplification, one Gaussian for each epoch that was begun."""
    FULL_BATCH = "full_batch"
    """Every unit in every step."""


@dataclass(frozen=True)
class Sampled:
    """A sampler with the numbers that the accountant needs of it.

    rate: q. dataset_size: n (under add_remove a stated upper bound), batch_size: the largest or the fixed size of a batch;
    both only where the sampler's row of the table uses them.
    """

    sampler: Sampler
    rate: float = 1.0
    dataset_size: int | None = None
    batch_size: int | None = None


@dataclass(frozen=True)
class Mixed:
    """Uniform noise in every coordinate, beside the Gaussian. width: in units of R. No coordinate moves beyond R / sqrt(p)."""

    width: float
    p: float


@attr.s(frozen=True, slots=True, auto_attribs=True)
class MixedGaussianDpEvent(DpEvent):  # type: ignore[misc]  # dp-accounting has no types
    """A Gaussian mechanism with independent uniform noise of `width` in every coordinate (`privacy.mixed`).

    Two neighbours differ by at most 1 in l2 norm and by at most 1 / sqrt(p) in every coordinate.
    """

    noise_multiplier: float
    width: float
    p: float


_PLD, _RDP = Accountant.PLD, Accountant.RDP

_TABLE: dict[tuple[Sampler, Adjacency], tuple[NeighboringRelation, tuple[Accountant, ...]]] = {
    (Sampler.POISSON, Adjacency.ZERO_OUT): (NeighboringRelation.REPLACE_SPECIAL, (_PLD, _RDP)),
    (Sampler.POISSON, Adjacency.ADD_REMOVE): (NeighboringRelation.ADD_OR_REMOVE_ONE, (_PLD, _RDP)),
    # PLD's REPLACE_ONE doubles the sensitivity inside: the event keeps z = s / R. RDP's does not, and is refused.
    (Sampler.POISSON, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_ONE, (_PLD,)),
    (Sampler.TRUNCATED_POISSON, Adjacency.ZERO_OUT): (NeighboringRelation.REPLACE_SPECIAL, (_PLD,)),
    # The record's place is taken by another one also under zero_out: the doubling is ours (`step_event`).
    (Sampler.FIXED_SIZE, Adjacency.ZERO_OUT): (NeighboringRelation.REPLACE_ONE, (_RDP,)),
    (Sampler.FIXED_SIZE, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_ONE, (_RDP,)),
    # From here on the doubling of replace_one is ours, so that PLD and RDP agree.
    (Sampler.SHUFFLED, Adjacency.ZERO_OUT): (NeighboringRelation.REPLACE_SPECIAL, (_PLD, _RDP)),
    (Sampler.SHUFFLED, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_SPECIAL, (_PLD, _RDP)),
    (Sampler.FULL_BATCH, Adjacency.ZERO_OUT): (NeighboringRelation.REPLACE_SPECIAL, (_PLD, _RDP)),
    (Sampler.FULL_BATCH, Adjacency.ADD_REMOVE): (NeighboringRelation.ADD_OR_REMOVE_ONE, (_PLD, _RDP)),
    (Sampler.FULL_BATCH, Adjacency.REPLACE_ONE): (NeighboringRelation.REPLACE_SPECIAL, (_PLD, _RDP)),
}

_WITHOUT_A_ROW = {
    (
        Sampler.TRUNCATED_POISSON,
        Adjacency.ADD_REMOVE,
    ): "how often a batch is cut off depends on the number of records, which is "
    "private, and neither a larger nor a smaller number is a bound; use sampling.kind = 'poisson', or adjacency = 'zero_out'",
    (Sampler.TRUNCATED_POISSON, Adjacency.REPLACE_ONE): "its accountant has no pair for a replaced record; "
    "use sampling.kind = 'poisson', or adjacency = 'zero_out'",
    (Sampler.FIXED_SIZE, Adjacency.ADD_REMOVE): "a batch of fixed size gives away whether there are enough records; "
    "use sampling.kind = 'poisson', or adjacency = 'zero_out'",
    (Sampler.SHUFFLED, Adjacency.ADD_REMOVE): "one record less shifts every later batch; "
    "use sampling.kind = 'poisson', or adjacency = 'zero_out'",
}


def relation(sampler: Sampler, adjacency: Adjacency, accountant: Accountant) -> NeighboringRelation:
    """The neighbouring relation under which dp-accounting composes the events of `step_event`.

    Raises:
        RefusedError: for a row that is not in the table.
    """
    if (sampler, adjacency) not in _TABLE:
        why = _WITHOUT_A_ROW.get((sampler, adjacency), "no accountant is proven for it; use sampling.kind = 'poisson'")
        raise RefusedError(f"{sampler} sampling under {adjacency} is refused: {why}")
    found, accountants = _TABLE[sampler, adjacency]
    if accountant not in accountants:
        raise RefusedError(
            f"{sampler} sampling under {adjacency} has no {accountant.upper()} accountant in dp-accounting; use accountant = "
            f"{accountants[0].value!r}" + ("" if adjacency is Adjacency.ZERO_OUT else ", or adjacency = 'zero_out'")
        )
    return found


def step_event(
    sampled: Sampled,
    adjacency: Adjacency,
    accountant: Accountant,
    *,
    multiplier: float,
    grouped: bool = False,
    mixed: Mixed | None = None,
) -> DpEvent:
    """The event of ONE step whose joint noise multiplier is z = s / R (`privacy.sensitivity`). mixed: noise of mixing beside it.

    Guarantee: the divergence between the step's outputs on two neighbours is at most that of the event under
    `relation(...)`, by the rows of the table in docs/guarantees/dp_sgd.md. Noise 0 is NonPrivateDpEvent (epsilon is infinite).

    Raises:
        RefusedError: for a row that is not in the table.
    """
    relation(sampled.sampler, adjacency, accountant)
    if multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    if mixed is not None:
        inner = MixedGaussianDpEvent(multiplier, mixed.width, mixed.p)
        if adjacency is not Adjacency.REPLACE_ONE and sampled.sampler is Sampler.POISSON:
            return dp_accounting.PoissonSampledDpEvent(sampled.rate, inner)
        if adjacency is not Adjacency.REPLACE_ONE and sampled.sampler is Sampler.FULL_BATCH:
            return inner
        raise RefusedError(f"mixing is not proven for {sampled.sampler} sampling under {adjacency}")
    doubled = multiplier / replacement_factor(grouped=grouped)
    match sampled.sampler:
        case Sampler.POISSON:
            return dp_accounting.PoissonSampledDpEvent(sampled.rate, dp_accounting.GaussianDpEvent(multiplier))
        case Sampler.TRUNCATED_POISSON:
            return dp_accounting.TruncatedSubsampledGaussianDpEvent(
                sampled.dataset_size, sampled.rate, sampled.batch_size, multiplier
            )
        case Sampler.FIXED_SIZE:
            gaussian = dp_accounting.GaussianDpEvent(doubled)
            return dp_accounting.SampledWithoutReplacementDpEvent(sampled.dataset_size, sampled.batch_size, gaussian)
        case Sampler.SHUFFLED | Sampler.FULL_BATCH:
            return dp_accounting.GaussianDpEvent(doubled if adjacency is Adjacency.REPLACE_ONE else multiplier)


def compose(events: Mapping[DpEvent, int]) -> DpEvent:
    """One event for each of `events` run as often as its count says."""
    costly = {
        event: count for event, count in events.items() if count > 0 and type(event) is not dp_accounting.NoOpDpEvent
    }
    parts = [dp_accounting.SelfComposedDpEvent(event, count) for event, count in costly.items()]
    if not parts:
        return dp_accounting.NoOpDpEvent()
    return parts[0] if len(parts) == 1 else dp_accounting.ComposedDpEvent(tuple(parts))  # a tuple, to be hashable


_SERIALISED: dict[str, type[DpEvent]] = {
    "gaussian": dp_accounting.GaussianDpEvent,
    "mixed_gaussian": MixedGaussianDpEvent,
    "poisson_sampled": dp_accounting.PoissonSampledDpEvent,
    "truncated_poisson_gaussian": dp_accounting.TruncatedSubsampledGaussianDpEvent,
    "sampled_without_replacement": dp_accounting.SampledWithoutReplacementDpEvent,
    "non_private": dp_accounting.NonPrivateDpEvent,
    # A step whose cost was charged with another line: the later batches of a shuffled epoch.
    "no_op": dp_accounting.NoOpDpEvent,
}
_KINDS = {cls: kind for kind, cls in _SERIALISED.items()}


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """A plain dictionary for the ledger: the event's kind and its numbers.

    Raises:
        PrivgradError: an event that `event_from_json` would not read back.
    """
    if type(event) not in _KINDS:
        raise PrivgradError(f"no ledger form for the event {event!r}; known: {', '.join(_SERIALISED)}")
    fields = attr.asdict(event, recurse=False)
    values = {name: event_to_json(value) if isinstance(value, DpEvent) else value for name, value in fields.items()}
    data = {"kind": _KINDS[type(event)], **values}
    try:
        event_from_json(data)
    except VerificationError as error:
        raise PrivgradError(f"the ledger cannot hold this event: {error}") from error
    return data


_COUNTS = {"dataset_size", "truncated_batch_size", "source_dataset_size", "sample_size"}
_LARGEST_COUNT = 2**53


def event_from_json(data: object, *, sampled: bool = False) -> DpEvent:
    """The event of a dictionary made by `event_to_json`. sampled: it stands inside a sample, so it must be a Gaussian.

    Raises:
        VerificationError: for an unknown kind, a missing or surplus key, or a number outside its range.
    """
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise VerificationError(f"unknown event {_shown(data)}; expected an object with a 'kind'")
    kind = data["kind"]
    known = ["gaussian", "mixed_gaussian"] if sampled else list(_SERIALISED)
    if kind not in known:
        raise VerificationError(
            f"unknown event {kind!r}{' inside a sample' if sampled else ''}; {nearest(kind, known)}"
        )
    cls = _SERIALISED[kind]
    names = {field.name for field in attr.fields(cls)}
    if set(data) - {"kind"} != names:
        raise VerificationError(f"event {kind!r} has the keys {_shown(set(data) - {'kind'})}; expected {sorted(names)}")
    values = {name: _field(kind, name, data[name]) for name in names}
    if values.get("p", 1.0) < 1:
        raise VerificationError(f"event {kind!r} has p = {values['p']}; expected at least 1")
    if values.get("sample_size", 1) > values.get("source_dataset_size", math.inf):
        raise VerificationError(f"event {kind!r} samples {values['sample_size']} of {values['source_dataset_size']}")
    return cls(**values)


def _field(kind: str, name: str, value: object) -> Any:
    if name == "event":
        return event_from_json(value, sampled=True)
    whole = name in _COUNTS
    upper = _LARGEST_COUNT if whole else 1.0 if name == "sampling_probability" else sys.float_info.max
    allowed = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value <= upper:
        wanted = "whole number" if whole else "number"
        raise VerificationError(f"event {kind!r} has {name} = {_shown(value)}; expected a {wanted} in (0, {upper:g}]")
    return value if whole else float(value)


def _shown(value: object) -> str:
    """The value for a message, cut to a length that a person reads."""
    text = repr(sorted(value, key=str) if isinstance(value, set) else value)
    return text if len(text) <= 80 else text[:77] + "..."

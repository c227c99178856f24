"""The table (sampler, adjacency, accountant) -> event, and events as JSON.

Events are dp-accounting's own classes: a description complete enough to be the contract. dp-accounting's neighbouring
relations change the sensitivity themselves, and not consistently (PLD doubles under REPLACE_ONE, RDP does not), so that
nobody outside this file builds an event or names a relation.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
    FULL_BATCH = "full_batch"
    """Every unit in every step."""


_RELATIONS = {
    (Sampler.POISSON, Adjacency.ZERO_OUT): NeighboringRelation.REPLACE_SPECIAL,
    (Sampler.POISSON, Adjacency.ADD_REMOVE): NeighboringRelation.ADD_OR_REMOVE_ONE,
    # PLD's REPLACE_ONE doubles the sensitivity inside: the event keeps z = s / R.
    (Sampler.POISSON, Adjacency.REPLACE_ONE): NeighboringRelation.REPLACE_ONE,
    (Sampler.FULL_BATCH, Adjacency.ZERO_OUT): NeighboringRelation.REPLACE_SPECIAL,
    (Sampler.FULL_BATCH, Adjacency.ADD_REMOVE): NeighboringRelation.ADD_OR_REMOVE_ONE,
    # Here the doubling is ours (`step_event`), so that PLD and RDP agree.
    (Sampler.FULL_BATCH, Adjacency.REPLACE_ONE): NeighboringRelation.REPLACE_SPECIAL,
}


def relation(sampler: Sampler, adjacency: Adjacency, accountant: Accountant) -> NeighboringRelation:
    """The neighbouring relation under which dp-accounting composes the events of `step_event`.

    Raises:
        RefusedError: for a row that is not in the table.
    """
    if (sampler, adjacency, accountant) == (Sampler.POISSON, Adjacency.REPLACE_ONE, Accountant.RDP):
        raise RefusedError(
            "replace_one with Poisson sampling has no RDP accountant (dp-accounting's ignores the doubled sensitivity); "
            "use accountant = 'pld', or adjacency = 'zero_out'"
        )
    return _RELATIONS[sampler, adjacency]


def step_event(
    sampler: Sampler,
    adjacency: Adjacency,
    accountant: Accountant,
    *,
    multiplier: float,
    rate: float = 1.0,
    grouped: bool = False,
) -> DpEvent:
    """The event of ONE step whose joint noise multiplier is z = s / R (`privacy.sensitivity`).

    Guarantee: the divergence between the step's outputs on two neighbours is at most that of the event under
    `relation(...)`, by the rows of the table in docs/guarantees/dp_sgd.md. Noise 0 is NonPrivateDpEvent (epsilon is infinite).

    Raises:
        RefusedError: for a row that is not in the table.
    """
    relation(sampler, adjacency, accountant)
    if multiplier == 0:
        return dp_accounting.NonPrivateDpEvent()
    if sampler is Sampler.FULL_BATCH:
        if adjacency is Adjacency.REPLACE_ONE:
            multiplier /= replacement_factor(grouped=grouped)
        return dp_accounting.GaussianDpEvent(multiplier)
    return dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))


def compose(events: Mapping[DpEvent, int]) -> DpEvent:
    """One event for each of `events` run as often as its count says."""
    parts = [dp_accounting.SelfComposedDpEvent(event, count) for event, count in events.items() if count > 0]
    if not parts:
        return dp_accounting.NoOpDpEvent()
    return parts[0] if len(parts) == 1 else dp_accounting.ComposedDpEvent(tuple(parts))  # a tuple, to be hashable


_SERIALISED: dict[str, type[DpEvent]] = {
    "gaussian": dp_accounting.GaussianDpEvent,
    "poisson_sampled": dp_accounting.PoissonSampledDpEvent,
    "non_private": dp_accounting.NonPrivateDpEvent,
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


def event_from_json(data: object, *, sampled: bool = False) -> DpEvent:
    """The event of a dictionary made by `event_to_json`. sampled: it stands inside a Poisson sample, so it must be a Gaussian.

    Raises:
        VerificationError: for an unknown kind, a missing or surplus key, or a number outside its range.
    """
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        raise VerificationError(f"unknown event {_shown(data)}; expected an object with a 'kind'")
    kind = data["kind"]
    known = ["gaussian"] if sampled else list(_SERIALISED)
    if kind not in known:
        raise VerificationError(
            f"unknown event {kind!r}{' inside a Poisson sample' if sampled else ''}; {nearest(kind, known)}"
        )
    cls = _SERIALISED[kind]
    names = {field.name for field in attr.fields(cls)}
    if set(data) - {"kind"} != names:
        raise VerificationError(f"event {kind!r} has the keys {_shown(set(data) - {'kind'})}; expected {sorted(names)}")
    values: dict[str, Any] = {}
    for name in names:
        if name == "event":
            values[name] = event_from_json(data[name], sampled=True)
        else:
            values[name] = _number(
                kind, name, data[name], 1.0 if name == "sampling_probability" else sys.float_info.max
            )
    return cls(**values)


def _number(kind: str, name: str, value: object, upper: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= upper:
        raise VerificationError(f"event {kind!r} has {name} = {_shown(value)}; expected a number in (0, {upper:g}]")
    return float(value)


def _shown(value: object) -> str:
    """The value for a message, cut to a length that a person reads."""
    text = repr(sorted(value, key=str) if isinstance(value, set) else value)
    return text if len(text) <= 80 else text[:77] + "..."

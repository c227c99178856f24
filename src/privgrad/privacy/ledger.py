"""The write-ahead ledger: a step is on the disk before its noisy update touches the weights.

One JSON object per line. The first line names the plan (by hash) and how its events are composed; every further line is
one charged step with its event. Each line carries the hash of the line before it, so that no line can be changed, moved
or taken out. A missing tail is found by whoever holds the count and the head hash: checkpoint and certificate.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections import Counter
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from dp_accounting import DpEvent, NoOpDpEvent

from privgrad.errors import PrivgradError, VerificationError, check_number
from privgrad.files import canonical_json, digest, sync_directory
from privgrad.privacy import accounting
from privgrad.privacy.accounting import Precision
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Accountant, Sampler, compose, event_from_json, event_to_json, relation

_FORMAT = 1
_FIRST_KEYS = {"format", "plan", "sampler", "adjacency", "accountant", "delta", "previous", "hash"}
_STEP_KEYS = {"step", "event", "previous", "hash"}


@dataclass(frozen=True)
class Terms:
    """What the ledger's first line fixes: the plan, and how events become an epsilon."""

    plan: str
    """SHA-256 of the plan's canonical JSON."""
    sampler: Sampler
    adjacency: Adjacency
    accountant: Accountant
    delta: float

    def to_json(self) -> dict[str, Any]:
        """The first line's content, without the chain."""
        return {
            "format": _FORMAT,
            "plan": self.plan,
            "sampler": self.sampler.value,
            "adjacency": self.adjacency.value,
            "accountant": self.accountant.value,
            "delta": self.delta,
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Terms:
        """The terms of a first line; VerificationError where it does not hold them."""
        try:
            if data["format"] != _FORMAT or data["format"] is True:
                raise VerificationError(
                    f"the ledger has format {data['format']!r}; this version reads format {_FORMAT}"
                )
            if data.keys() != _FIRST_KEYS or not isinstance(data["plan"], str):
                raise VerificationError(f"the ledger's first line holds {sorted(data)}; expected {sorted(_FIRST_KEYS)}")
            terms = Terms(
                data["plan"],
                Sampler(data["sampler"]),
                Adjacency(data["adjacency"]),
                Accountant(data["accountant"]),
                data["delta"],
            )
            check_number("delta", terms.delta, above=0, below=1)
        except VerificationError:
            raise
        except (KeyError, ValueError, TypeError, PrivgradError) as error:
            raise VerificationError(f"the ledger's first line does not name its terms: {error}") from error
        return terms


@dataclass(frozen=True)
class Receipt:
    """Proof that a step is in the ledger. Only `Ledger.charge` makes one, and a `Release` cannot be made without."""

    step: int
    """The number of this charge, from 1. Never used twice, also not after a crash: seeded noise is indexed by it."""
    event: DpEvent


@dataclass(frozen=True)
class Record:
    """What a ledger says: its terms, how often each event was charged, and the two numbers that show a missing tail."""

    terms: Terms
    events: Counter[DpEvent]
    count: int
    head: str
    heads: tuple[str, ...]
    """The hash of the first line and of each charged step: `heads[k]` is the head after k steps."""
    torn: int
    """Bytes of a last line that was not completely written."""

    def spent(self, precision: Precision = Precision.FINE) -> float:
        """The epsilon of everything charged, at the ledger's delta. An upper bound (`privacy.accounting`)."""
        return self._composed(accounting.epsilon, precision)

    def attack_success(self, precision: Precision = Precision.FINE) -> float:
        """The largest chance of guessing rightly whether one unit took part (`accounting.attack_success`)."""
        return self._composed(accounting.attack_success, precision)

    def _composed(self, measure: Any, precision: Precision) -> float:
        terms = self.terms
        rules = relation(terms.sampler, terms.adjacency, terms.accountant)
        return float(measure(compose(self.events), terms.delta, rules, terms.accountant, precision))


def _line(content: dict[str, Any], previous: str) -> tuple[bytes, str]:
    entry = {**content, "previous": previous}
    head = digest(entry)
    return (canonical_json({**entry, "hash": head}) + "\n").encode(), head


def _read_line(raw: bytes, number: int, previous: str) -> dict[str, Any]:
    """Check that line `number` follows the hash `previous` and is, to the byte, what its own hash covers."""
    try:
        entry = json.loads(raw)
        content = {key: value for key, value in entry.items() if key not in ("previous", "hash")}
        expected, _ = _line(content, previous)
    except (ValueError, AttributeError, RecursionError) as error:
        raise VerificationError(f"ledger line {number} is not a valid entry: {error}") from error
    if raw != expected:
        raise VerificationError(f"ledger line {number} does not fit the chain: it, or a line before it, was changed")
    return dict(entry)


def read_ledger(path: Path) -> Record:
    """Read and check a whole ledger.

    Raises:
        VerificationError: a broken chain, an unknown event, steps out of order, a first line without terms.
        PrivgradError: no such file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {error.strerror or error}") from error
    *lines, tail = raw.split(b"\n")
    if not lines:
        raise VerificationError(f"{path} holds no complete line; expected the ledger's terms in the first")
    first = _read_line(lines[0] + b"\n", 1, "")
    terms = Terms.from_json(first)
    events: Counter[DpEvent] = Counter()
    heads = [first["hash"]]
    known: dict[str, DpEvent] = {}
    for step, line in enumerate(lines[1:], start=1):
        entry = _read_line(line + b"\n", step + 1, heads[-1])
        if entry.get("step") != step or entry.get("step") is True or entry.keys() != _STEP_KEYS:
            raise VerificationError(
                f"ledger line {step + 1} is not the charge of step {step}: {canonical_json(entry)[:120]}"
            )
        text = canonical_json(entry.get("event"))
        if text not in known:
            known[text] = event_from_json(entry.get("event"))
        if type(known[text]) is NoOpDpEvent and (terms.sampler is not Sampler.SHUFFLED or step == 1):
            raise VerificationError(f"ledger line {step + 1} charges nothing; only a shuffled epoch has such steps")
        events[known[text]] += 1
        heads.append(entry["hash"])
    return Record(terms, events, len(heads) - 1, heads[-1], tuple(heads), torn=len(tail))


class Ledger:
    """An append-only ledger; in memory where `path` is None (a notebook, an audit).

    Guarantee: `charge` returns only after its line was flushed to the disk, and after any failure of a write every
    further charge is refused, because nobody knows what the file then holds.
    """

    def __init__(self, terms: Terms, path: Path | None = None) -> None:
        """Start a new ledger. An existing file is refused: `Ledger.resume` continues one."""
        self.terms = terms
        self._file: FileIO | None = None
        self._events: Counter[DpEvent] = Counter()
        self._count = 0
        self._broken = False
        line, self._head = _line(terms.to_json(), "")
        if path is None:
            return
        try:
            self._file = path.open("xb", buffering=0)
        except FileExistsError:
            raise PrivgradError(f"{path} exists already; resume that run or choose another directory") from None
        except OSError as error:
            raise PrivgradError(f"{path} cannot be written: {error.strerror or error}") from error
        _lock(self._file, path)
        self._append(line)
        self._broken = False
        sync_directory(path.parent)

    @classmethod
    def resume(cls, path: Path, terms: Terms) -> Ledger:
        """Continue a ledger after a stop or a crash. Every complete line counts; a torn last line is cut off.

        Raises:
            PrivgradError: another process holds the ledger, or it was written under other terms.
            VerificationError: a broken chain.
        """
        try:
            stream = path.open("r+b", buffering=0)
        except OSError as error:
            raise PrivgradError(f"{path} cannot be opened: {error.strerror or error}") from error
        _lock(stream, path)
        try:
            record = read_ledger(path)
            if record.terms != terms:
                raise PrivgradError(f"{path} was written for another plan; resume with the plan that started it")
            if record.torn:
                # The line was cut off in the middle of its write: `charge` never returned, so its noise was never used.
                stream.truncate(path.stat().st_size - record.torn)
                os.fsync(stream.fileno())
            stream.seek(0, os.SEEK_END)
        except OSError as error:
            stream.close()
            raise PrivgradError(f"{path} cannot be mended: {error.strerror or error}") from error
        except PrivgradError:
            stream.close()
            raise
        ledger = cls.__new__(cls)
        ledger.terms, ledger._file, ledger._broken = terms, stream, False
        ledger._events, ledger._count, ledger._head = Counter(record.events), record.count, record.head
        return ledger

    def charge(self, event: DpEvent) -> Receipt:
        """Write one step's event, flush it to the disk, and only then give the receipt that its release needs."""
        if self._file is not None and self._file.closed:
            raise PrivgradError("this run has ended and its ledger is closed; resume it to go on")
        if self._broken:
            raise PrivgradError("the ledger failed to write an earlier step; stop, mend the disk, and resume the run")
        content = {"step": self._count + 1, "event": event_to_json(event)}
        line, head = _line(content, self._head)
        self._append(line)
        self._count, self._head = self._count + 1, head
        self._events[event] += 1
        self._broken = False
        return Receipt(self._count, event)

    @property
    def record(self) -> Record:
        """What the ledger says now."""
        return Record(self.terms, Counter(self._events), self._count, self._head, (), torn=0)

    @property
    def count(self) -> int:
        """Steps charged so far."""
        return self._count

    @property
    def head(self) -> str:
        """The hash of the last line."""
        return self._head

    def close(self) -> None:
        """Give the file and its lock back."""
        if self._file is not None:
            self._file.close()
            self._broken = True

    def _append(self, line: bytes) -> None:
        if self._file is None:
            return
        # Broken until the step is counted: an interrupt anywhere before leaves a ledger that nobody may go on with.
        self._broken = True
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise PrivgradError(
                f"the ledger cannot be written ({error.strerror or error}); the step was not taken"
            ) from error


def _lock(stream: FileIO, path: Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise PrivgradError(
            f"{path.parent} is in use by another privgrad process; wait for it or choose another directory"
        ) from None

"""The write-ahead ledger: a step is on the disk before its noisy update touches the weights.

One JSON object per line. The first line names the plan (by hash) and how its events are composed; every further line is
one charged step with its event. Each line carries the hash of the line before it, so that no line can be changed, moved
or taken out. A missing tail is found by whoever holds the count and the head hash: checkpoint and certificate.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp_accounting import DpEvent, NoOpDpEvent

from privgrad.errors import PrivgradError, VerificationError, check_number
from privgrad.files import AppendFile, canonical_json, digest, reason
from privgrad.privacy import accounting
from privgrad.privacy.accounting import Precision
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Accountant, Sampler, compose, event_from_json, event_to_json, relation

_FORMAT = 1
_FIRST_KEYS = {"format", "plan", "sampler", "adjacency", "accountant", "delta", "previous", "hash"}
_STEP_KEYS = {"step", "event", "previous", "hash"}
_LONGEST_FIRST_LINE = 4096


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


def _split(raw: bytes) -> tuple[list[bytes], bytes]:
    """The lines, and a last one that a crash cut off.

    A power cut may also leave a hole of zeros in a line that was not flushed yet. No change of a single bit makes a zero byte of
    a ledger's line, so that this is not mistaken for damage.
    """
    *lines, tail = raw.split(b"\n")
    if not tail and lines and b"\0" in lines[-1]:
        tail = lines.pop() + b"\n"
    return lines, tail


def has_begun(path: Path) -> bool:
    """True where the ledger at `path` has its first line. Without it nothing was ever charged, and a run may start there.

    Raises:
        PrivgradError: a file that cannot be read.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(_LONGEST_FIRST_LINE + 1)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {reason(error)}") from error
    lines, _ = _split(start)
    return bool(lines) or len(start) > _LONGEST_FIRST_LINE


def read_ledger(path: Path) -> Record:
    """Read and check a whole ledger.

    Raises:
        VerificationError: a broken chain, an unknown event, steps out of order, a first line without terms.
        PrivgradError: no such file.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {reason(error)}") from error
    lines, tail = _split(raw)
    if not lines:
        raise VerificationError(f"{path} holds no complete line; expected the ledger's terms in the first")
    longest = max(map(len, lines))
    if len(tail) > 2 * longest:  # a crash cuts off one line: every one before it was flushed
        raise VerificationError(
            f"{path} ends in {len(tail)} bytes that are no entry, more than a crash leaves of a line "
            f"({longest} bytes at most): the file was damaged, and charged steps may be lost; restore it from a copy"
        )
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

    def __init__(self, terms: Terms, path: Path | str | None = None, prepare: Callable[[], None] | None = None) -> None:
        """Start a new ledger. A file in which a run has begun is refused: `Ledger.resume` continues one.

        prepare: called while the file is locked and before its first line is written: for what a begun run must have.
        """
        self.terms = terms
        self._file: AppendFile | None = None
        self._events: Counter[DpEvent] = Counter()
        self._count = 0
        self._broken = False
        line, self._head = _line(terms.to_json(), "")
        if path is None:
            return
        path = Path(path)
        try:
            self._file = AppendFile(path, create=True)
            if has_begun(path):
                raise PrivgradError(
                    f"{path} exists already; resume that run (in a loop of your own: Ledger.resume), or choose another directory"
                )
            self._file.cut(0)  # a first line that a crash cut off
            if prepare is not None:
                prepare()
            self._append(line)
            self._broken = False
        except OSError as error:
            self.close()
            raise PrivgradError(f"{path} cannot be written: {reason(error)}") from error
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(cls, terms: Terms, path: Path | str) -> Ledger:
        """Continue a ledger after a stop or a crash. Every complete line counts; a torn last line is cut off.

        Raises:
            PrivgradError: another process holds the ledger, or it was written under other terms.
            VerificationError: a broken chain.
        """
        path = Path(path)
        try:
            file = AppendFile(path)
        except OSError as error:
            raise PrivgradError(f"{path} cannot be opened: {reason(error)}") from error
        try:
            record = read_ledger(path)
            if record.terms != terms:
                raise PrivgradError(f"{path} was written for another plan; resume with the plan that started it")
            if record.torn:
                # The line was cut off in the middle of its write: `charge` never returned, so its noise was never used.
                file.cut(path.stat().st_size - record.torn)
        except OSError as error:
            file.close()
            raise PrivgradError(f"{path} cannot be mended: {reason(error)}") from error
        except BaseException:
            file.close()
            raise
        ledger = cls.__new__(cls)
        ledger.terms, ledger._file, ledger._broken = terms, file, False
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

    def flush(self) -> None:
        """After `resume`, before anything is written that names its count: make sure that every line is on the disk."""
        self._append(b"")
        self._broken = False

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

    def abandon(self) -> None:
        """Close it; where nothing was charged, the file says again that no run has begun, so that another can start there."""
        try:
            if self._count == 0 and self._file is not None:
                with contextlib.suppress(OSError):  # then the run can be resumed instead
                    self._file.cut(0)
        finally:
            self.close()

    def _append(self, line: bytes) -> None:
        if self._file is None:
            return
        # Broken until the step is counted: an interrupt anywhere before leaves a ledger that nobody may go on with.
        self._broken = True
        try:
            self._file.append(line)
        except OSError as error:
            raise PrivgradError(f"the ledger cannot be written ({reason(error)}); the step was not taken") from error

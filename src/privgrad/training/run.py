"""A run: what may be done with its directory, and whether its files fit each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from dp_accounting import DpEvent

from privgrad.errors import PrivgradError, VerificationError, check_count
from privgrad.files import (
    canonical_json,
    digest,
    file_digest,
    is_locked,
    make_directory,
    read_json,
    reason,
    remove,
    sync_directory,
    write_atomically,
)
from privgrad.mechanism.plan import Plan
from privgrad.privacy.certificate import Evaluation, make_certificate, to_markdown
from privgrad.privacy.events import event_to_json
from privgrad.privacy.ledger import Record, read_ledger
from privgrad.report.certificate_page import to_html
from privgrad.training.checkpoint import load_tree
from privgrad.training.layout import Layout

_ABOVE, _BELOW = 1e-6, 1e-12
"""Relative differences that the same accounting may show on another machine; below what the ledger gives, rounding alone."""


@dataclass(frozen=True)
class Verified:
    """What `verify` found: the epsilon of the ledger alone, and every mismatch in words (none: all is well)."""

    epsilon: float
    steps: int
    finished: bool
    mismatches: list[str]


@dataclass(frozen=True)
class Run(Layout):
    """One run: its files, what may be done with them, and whether they fit each other."""

    @property
    def complete(self) -> bool:
        """True where everything that a finished run holds is there and fits; otherwise it can be finished again."""
        if not self.begun or not all(path.exists() for path in self.results):
            return False
        broken: list[str] = []
        _collect(broken, "certificate", self._fitting_certificate)
        return not broken

    def create(self) -> None:
        """Make the directory for a new run.

        Raises:
            PrivgradError: it holds a run already, or what is left of one, or cannot be made.
        """
        if self.begun:
            raise PrivgradError(
                f"{self.directory} already holds a run; continue it with --resume, or choose another directory (--out)"
            )
        left = self._left()
        if left:
            raise PrivgradError(
                f"{self.directory} holds {', '.join(left)} of a run whose ledger is lost; choose another directory (--out)"
            )
        self.make()

    def make(self) -> None:
        """Make the directories that are missing."""
        try:
            make_directory(self.checkpoint.parent)
        except OSError as error:
            raise PrivgradError(f"{self.directory} cannot be made: {reason(error)}") from error

    def sync(self) -> None:
        """Make the last file of a finished run survive a power cut: who wrote it may have died before that."""
        try:
            sync_directory(self.directory)
        except OSError as error:
            raise PrivgradError(f"{self.directory} cannot be flushed to the disk: {reason(error)}") from error

    def clear(self) -> None:
        """Remove what a start that came to nothing left behind, before another run begins here."""
        for path in (self.checkpoint, self.metrics):
            remove(path)

    def check_plan(self, plan: dict[str, Any]) -> None:
        """Refuse to continue the run with another plan than it was started with."""
        if not self.begun:
            raise PrivgradError(f"{self.directory} holds no run to resume; start one without --resume")
        before = read_json(self.plan)
        changed = differences(before, plan)
        if changed:
            raise PrivgradError(
                f"the plan differs from the one that {self.directory} was started with: {', '.join(changed)}; "
                "resume with the same plan, or start another run"
            )

    def certify(self, record: Record, plan: Plan, applied: int, data: str, evaluation: Evaluation | None) -> None:
        """Write the certificate of the model that is there, in its three forms. applied: steps whose noise is in the model."""
        certificate = make_certificate(
            record,
            plan.facts(),
            steps_applied=applied,
            data=data,
            model_digest=file_digest(self.model),
            evaluation=evaluation,
            created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        write_atomically(self.certificate, certificate_text(certificate))
        write_atomically(self.markdown, to_markdown(certificate))
        write_atomically(self.page, to_html(certificate))

    def check_tail(self, seen: dict[str, Any] | None = None) -> None:
        """Refuse a ledger that lost lines which the checkpoint (`seen`, where there is one) or a certificate has seen."""
        record = read_ledger(self.ledger)
        if seen is not None:
            _check_tail(record, seen, "checkpoint")
        certificate = _collect([], "certificate", self._read_certificate)
        if certificate is not None:  # a damaged one has seen nothing, and is written anew
            _check_tail(record, certificate.get("ledger"), "certificate")

    def verify(self, *, own: bool = False) -> Verified:
        """Recompute epsilon from the ledger alone, and compare every file of the run with it. Also while the run is going on.

        own: import mechanisms of the user's own that the plan names; without it, a plan whose code is not loaded is a mismatch.

        Raises:
            VerificationError: a broken ledger.
            PrivgradError: no run.
        """
        if not self.begun:
            if self._left() or (self.plan.exists() and not self.ledger.exists()):
                raise VerificationError(f"{self.ledger} is missing or empty; without its ledger a run has no guarantee")
            raise PrivgradError(
                f"{self.directory} is not a run (no ledger.jsonl in which anything was charged); expected what `train` makes"
            )
        mismatches: list[str] = []
        # The ledger last: a run that is going on adds to it, and checkpoint and certificate never know more than it.
        finished = any(path.exists() for path in self.results) and not is_locked(self.ledger)
        saved = _collect(
            mismatches, "checkpoint", lambda: load_tree(self.checkpoint) if self.checkpoint.exists() else None
        )
        record = read_ledger(self.ledger)
        _collect(mismatches, "plan", lambda: self._check_plan(record, own))
        if saved is not None:
            _collect(mismatches, "checkpoint", lambda: _check_checkpoint(record, saved))
        if finished:
            _collect(mismatches, "certificate", lambda: self._check_certificate(record, own))
        return Verified(record.spent(), record.count, finished, mismatches)

    def _left(self) -> list[str]:
        """The files that show that steps were charged here, also where no ledger says so."""
        left = [path.name for path in self.results if path.exists()]
        if self.checkpoint.exists():
            steps = _collect([], "checkpoint", lambda: load_tree(self.checkpoint)["ledger"]["steps"])
            left += [] if steps == 0 else [self.checkpoint.name]
        return left

    def _check_plan(self, record: Record, own: bool) -> None:
        stored = read_json(self.plan)
        if digest(stored) != record.terms.plan:
            raise VerificationError("plan.json is not the plan that the ledger was written for")
        if self.plan.read_text(encoding="utf-8") != plan_text(stored):
            raise VerificationError("plan.json is not written as privgrad writes it")
        plan = Plan.from_json(stored, own=own)
        if plan.terms() != record.terms:
            raise VerificationError("the ledger's terms are not those of plan.json")
        if record.count > plan.steps:
            raise VerificationError(f"the ledger charges {record.count} steps; the plan has {plan.steps}")
        if record.events != plan.events(record.count):
            raise VerificationError(
                f"the ledger does not charge the plan's events: it holds {_shown(record.events)}; "
                f"expected {_shown(plan.events(record.count))}"
            )

    def _read_certificate(self) -> dict[str, Any]:
        """The content of certificate.json, where it is as it was written."""
        stored = read_json(self.certificate)
        content = {key: value for key, value in stored.items() if key != "digest"}
        if stored.get("digest") != digest(content):
            raise VerificationError("certificate.json was changed: its digest does not fit its content")
        if self.certificate.read_text(encoding="utf-8") != certificate_text(stored):
            raise VerificationError("certificate.json is not written as privgrad writes it")
        return stored

    def _fitting_certificate(self) -> dict[str, Any]:
        """The certificate, where certificate.json, its two other forms and the model fit one another."""
        stored = self._read_certificate()
        if file_digest(self.model) != stored["model_sha256"]:
            raise VerificationError("model.safetensors is not the model that the certificate was made for")
        for path, render in ((self.markdown, to_markdown), (self.page, to_html)):
            if path.read_text(encoding="utf-8") != render(stored):
                raise VerificationError(f"{path.name} does not say what certificate.json says")
        return stored

    def _check_certificate(self, record: Record, own: bool) -> None:
        stored = self._fitting_certificate()
        _check_tail(record, stored["ledger"], "certificate")
        self._check_words(record, stored, own)

    def _check_words(self, record: Record, stored: dict[str, Any], own: bool) -> None:
        """Make the certificate again, from the ledger and plan.json; only what they do not know is taken from the stored one."""
        evaluation = stored["evaluation"]
        again = make_certificate(
            record,
            Plan.from_json(read_json(self.plan), own=own).facts(),
            steps_applied=stored["steps"]["applied"],
            data=stored["data"],
            model_digest=stored["model_sha256"],
            evaluation=None if evaluation is None else Evaluation(**evaluation),
            created=stored["created"],
        )
        if stored["steps"]["applied"] > record.count:
            raise VerificationError(f"{stored['steps']['applied']} steps were applied and only {record.count} charged")
        for key in again.keys() | stored.keys():
            if key in ("digest", "software"):
                continue
            now, then = again.get(key), stored.get(key)
            if key in ("epsilon", "attack_success") and isinstance(now, float) and isinstance(then, float):
                same = now * (1 - _BELOW) <= then <= now * (1 + _ABOVE)
            elif key == "accounting":
                same = {**(now or {}), "library": None} == {**(then or {}), "library": None}
            else:
                same = now == then
            if not same:
                raise VerificationError(f"the certificate says {key} = {then}; ledger and plan give {now}")


def certificate_text(certificate: dict[str, Any]) -> str:
    """How certificate.json is written."""
    return json.dumps(certificate, indent=2, allow_nan=False) + "\n"


def plan_text(plan: dict[str, Any]) -> str:
    """How plan.json is written."""
    return json.dumps(plan, indent=2, allow_nan=False) + "\n"


def _shown(events: Counter[DpEvent]) -> str:
    return ", ".join(f"{count} times {canonical_json(event_to_json(event))}" for event, count in events.items())


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two trees of tables differ, in words: key, old value, new value."""
    found: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} was {_value(old)} and is {_value(new)}")
    return found


def _value(value: Any) -> str:
    return "not given" if value is None else repr(dict(value) if isinstance(value, Mapping) else value)


def _collect(mismatches: list[str], what: str, check: Callable[[], Any]) -> Any:
    """The result of one check; whatever is wrong or missing becomes a line, never a traceback."""
    try:
        return check()
    except PrivgradError as error:
        mismatches.append(str(error))
    except OSError as error:
        mismatches.append(f"{error.filename} cannot be read: {reason(error)}")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        mismatches.append(f"{what}: a file lacks what it should hold ({error!r})")
    return None


def _check_checkpoint(record: Record, saved: dict[str, Any]) -> None:
    _check_tail(record, saved["ledger"], "checkpoint")
    if saved["applied"] > record.count:
        raise VerificationError(f"{saved['applied']} steps were applied and only {record.count} charged")


def _check_tail(record: Record, seen: Any, by: str) -> None:
    if not isinstance(seen, Mapping) or not {"steps", "head"} <= seen.keys():
        raise VerificationError(f"the {by} does not say what it has seen of the ledger (steps and head)")
    steps = seen["steps"]
    check_count(f"the {by}'s number of ledger steps", steps, at_least=0)
    if steps > record.count:
        raise VerificationError(
            f"the ledger has lost its tail: it holds {record.count} steps, and the {by} has seen {steps}"
        )
    if record.heads[steps] != seen["head"]:
        raise VerificationError(f"the ledger was rewritten: its step {steps} is not the one that the {by} has seen")

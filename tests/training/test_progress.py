"""What the display says during a run is true of that moment, and takes its share of the time and no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import privgrad as pg
from privgrad.privacy.accounting import Precision
from privgrad.privacy.certificate import round_up
from privgrad.training import ration as ration_module
from privgrad.training import trainer as trainer_module
from privgrad.training.progress import Silent
from privgrad.training.ration import Ration
from privgrad.training.trainer import Trainer
from tests.training.test_trainer import STEPS, build, end, records


class Recorder(Silent):
    """Keeps what was shown after each step."""

    def __init__(self) -> None:
        self.notes: dict[int, str] = {}

    def step(self, done: int, notes: str) -> None:
        self.notes[done] = notes


def shown(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[int, str], dict[int, str]]:
    """The display's notes by step, and the epsilon of the ledger at each step, as people read it."""
    recorder, spent = Recorder(), {}
    monkeypatch.setattr(trainer_module, "display", lambda quiet: recorder)
    ledger = trainer.private.ledger

    def watch(*_: object) -> None:
        spent[ledger.count] = round_up(ledger.record.spent(Precision.COARSE), 2)

    trainer.optimizer.register_step_post_hook(watch)
    trainer.fit()
    end(trainer)
    return recorder.notes, spent


def test_epsilon_is_shown_as_it_is_spent_with_the_last_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "_EPSILON_SHARE", 1e12)
    notes, spent = shown(build(tmp_path / "run", evaluations=2, test=pg.DeclaredSplit(records(1))), monkeypatch)
    assert list(notes) == list(range(1, STEPS + 1))
    assert len(set(spent.values())) == STEPS
    for step, words in notes.items():
        assert words.startswith(f"epsilon {spent[step]} at step {step}")
        looked = step // 3 * 3
        found = re.search(r"accuracy [\d.]+% at step (\d+)$", words)
        assert (int(found[1]) if found else 0) == looked


def test_an_older_epsilon_names_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "_EPSILON_SHARE", 0.0)
    notes, spent = shown(build(tmp_path / "run", evaluations=2), monkeypatch)
    told = [1, 1, 3, 3, 3, 6]
    assert [*notes.values()] == [f"epsilon {spent[step]} at step {step}" for step in told]


def test_a_ration_keeps_to_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(ration_module.time, "monotonic", lambda: now)
    ration = Ration(0.1)
    assert ration.due
    with ration.turn():
        now += 2.0
    assert not ration.due
    now += 19.0
    assert not ration.due
    now += 1.0
    assert ration.due
    with ration.turn():
        now += 0.5
    now += 5.0
    assert ration.due

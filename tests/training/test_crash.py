"""What a crash, a lost file or a second process can leave of a run directory, and that there is always a way on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import privgrad as pg
from privgrad.files import file_digest, write_atomically
from privgrad.privacy.ledger import has_begun, read_ledger
from privgrad.training import trainer as trainer_module
from privgrad.training.averaging import ExponentialAverage
from privgrad.training.checkpoint import load_tree
from privgrad.training.metrics import Metrics
from privgrad.training.run import Run
from privgrad.training.trainer import Trainer
from tests.training.test_trainer import (
    RUN_FILES,
    STEPS,
    build,
    crashed,
    end,
    files,
    finished,
    interrupted,
    plan,
    records,
    same_weights,
    steps_of,
)


@pytest.fixture
def saved_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "_CHECKPOINT_SHARE", 1e12)


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in files(directory)}


# A start that came to nothing.


def test_a_run_that_never_began_is_not_resumed_and_can_be_started(tmp_path: Path) -> None:
    """A death between the lock and the ledger's first line: an empty ledger, perhaps a plan."""
    for left in ([], ["plan.json"], ["plan.json", ".plan.json.tmp", ".config.toml.tmp"]):
        directory = tmp_path / str(len(left))
        directory.mkdir()
        for name in ("ledger.jsonl", *left):
            (directory / name).write_bytes(b"")
        with pytest.raises(pg.PrivgradError, match="no run to resume; start one without --resume"):
            build(directory, resume=True)
        with pytest.raises(pg.PrivgradError, match="is not a run"):
            Run(directory).verify()
        finished(directory, config="")
        assert files(directory) == RUN_FILES - {"metrics.jsonl"} | {"config.toml", "metrics.jsonl"}


def test_the_checkpoint_of_a_start_that_came_to_nothing_is_not_taken_for_the_new_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names the head of another ledger: with it the new run could neither be resumed nor started again."""
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_loop", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path).fit()
    assert (tmp_path / "checkpoint" / "latest.safetensors").exists()
    assert not has_begun(tmp_path / "ledger.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", _interrupted)
        patch.setattr("privgrad.privacy.ledger.Ledger.abandon", lambda self: self.close())  # as kill -9: no cleaning up
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path, plan=plan(delta=1e-6))
    assert has_begun(tmp_path / "ledger.jsonl")
    finished(tmp_path, plan=plan(delta=1e-6), resume=True)
    assert Run(tmp_path).verify().mismatches == []


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failing", ["make_private", "save_tree"])
def test_a_start_that_fails_leaves_the_directory_free_and_unlocked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise pg.PrivgradError("refused")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, failing, refuse)
        with pytest.raises(pg.PrivgradError, match="refused") as held:
            build(tmp_path)
    assert held
    finished(tmp_path)
    assert Run(tmp_path).verify().mismatches == []


def test_of_two_starts_at_once_the_second_is_refused_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first has not written a line yet: another plan beside its ledger would make it unusable."""
    seen: list[str] = []
    write_plan = Trainer._write_plan

    def meanwhile(self: Trainer) -> None:
        monkeypatch.setattr(Trainer, "_write_plan", write_plan)
        for resume in (False, True):
            with pytest.raises(pg.PrivgradError) as refusal:
                build(tmp_path, plan=plan(delta=1e-6), resume=resume)
            seen.append(str(refusal.value))
        write_plan(self)

    monkeypatch.setattr(Trainer, "_write_plan", meanwhile)
    finished(tmp_path)
    assert "in use by another privgrad process" in seen[0]
    assert "no run to resume" in seen[1]
    assert Run(tmp_path).verify().mismatches == []


def test_two_resumes_at_once_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path, 2)
    first = build(tmp_path, resume=True)
    before = contents(tmp_path)
    for resume, message in ((True, "in use by another"), (False, "already holds a run")):
        with pytest.raises(pg.PrivgradError, match=message):
            build(tmp_path, resume=resume)
    assert contents(tmp_path) == before
    assert first.fit().steps == STEPS
    assert Run(tmp_path).verify().mismatches == []


# What is gone.


@pytest.mark.parametrize("gone", ["checkpoint/latest.safetensors", "checkpoint"])
def test_without_its_checkpoint_a_run_goes_on_with_new_weights_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str
) -> None:
    """No crash does this. What was charged stays charged."""
    interrupted(tmp_path, 4, evaluations=STEPS)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    capsys.readouterr()
    trainer = build(tmp_path, resume=True, evaluations=STEPS)
    assert "is gone: 4 steps stay charged, and the weights start anew" in capsys.readouterr().err
    trainer.fit()
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": STEPS - 4}
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [5, 6]
    assert Run(tmp_path).verify().mismatches == []


def test_a_model_without_its_checkpoint_is_not_overwritten_by_new_weights(tmp_path: Path) -> None:
    finished(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    (tmp_path / "certificate.md").unlink()
    before = contents(tmp_path)
    with pytest.raises(pg.PrivgradError, match="holds a model without its checkpoint"):
        build(tmp_path, resume=True)
    assert contents(tmp_path) == before


def test_resuming_a_finished_run_without_its_checkpoint_makes_none(tmp_path: Path) -> None:
    whole = finished(tmp_path, averaging=ExponentialAverage(0.5))
    shutil.rmtree(tmp_path / "checkpoint")
    before = contents(tmp_path)
    again = finished(tmp_path, averaging=ExponentialAverage(0.5), resume=True)
    assert contents(tmp_path) == before
    assert same_weights(whole.model, again.model)


def test_resuming_a_finished_run_with_another_model_is_refused_in_words(tmp_path: Path) -> None:
    finished(tmp_path)
    with pytest.raises(pg.PrivgradError, match="does not fit this model"):
        build(tmp_path, model=lambda: torch.nn.Linear(3, 2), resume=True)


@pytest.mark.parametrize("left", ["model.safetensors", "certificate.html", "checkpoint/latest.safetensors"])
def test_no_run_is_started_on_what_is_left_of_one_whose_ledger_is_lost(tmp_path: Path, left: str) -> None:
    finished(tmp_path)
    for name in RUN_FILES - {left, "plan.json"}:
        (tmp_path / name).unlink()
    with pytest.raises(pg.PrivgradError, match="of a run whose ledger is lost; choose another"):
        build(tmp_path)
    with pytest.raises(pg.VerificationError, match="without its ledger a run has no guarantee"):
        Run(tmp_path).verify()
    assert files(tmp_path) == {left, "plan.json"}


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_finished_run_whose_ledger_lost_its_tail_is_not_trained_further(tmp_path: Path, checkpoint: bool) -> None:
    """The lost steps were paid for, and would be forgotten."""
    finished(tmp_path)
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))
    if not checkpoint:
        shutil.rmtree(tmp_path / "checkpoint")
        (tmp_path / "certificate.md").unlink()
    with pytest.raises(pg.VerificationError, match="lost its tail"):
        build(tmp_path, resume=True)


# Finishing.


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.page.unlink(),
        lambda run: run.markdown.write_text("epsilon = 0.1"),
        lambda run: run.certificate.write_text(run.certificate.read_text().replace("0", "1", 1)),
        lambda run: run.certificate.write_text("[" * 100_000),
        lambda run: run.certificate.write_text('{"digest": null, "ledger": {"steps": -1, "head": ""}}'),
        lambda run: run.model.write_bytes(run.model.read_bytes()[:-1]),
    ],
    ids=["no page", "other words", "other certificate", "no certificate", "a lie", "torn model"],
)
def test_resuming_makes_a_damaged_certificate_again(tmp_path: Path, spoil: Callable[[Run], Any]) -> None:
    """Or one that a crash left half written over an older one. Everything comes from the ledger and the checkpoint."""
    finished(tmp_path, averaging=ExponentialAverage(0.5))
    run = Run(tmp_path)
    before = file_digest(run.model)
    spoil(run)
    assert run.verify().mismatches
    assert not run.complete
    finished(tmp_path, averaging=ExponentialAverage(0.5), resume=True)
    assert run.verify().mismatches == []
    assert file_digest(run.model) == before
    assert steps_of(tmp_path) == {"planned": STEPS, "charged": STEPS, "applied": STEPS}


def test_a_run_verifies_at_every_moment_while_it_is_going_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_every_step: None
) -> None:
    """As seen by another process: between the writes of a step, and between those of the certificate's forms."""
    seen: list[tuple[int, bool]] = []

    def look(*_: Any) -> None:
        verified = Run(tmp_path).verify()
        assert verified.mismatches == []
        seen.append((verified.steps, verified.finished))

    def watched(path: Path, content: bytes | str) -> None:
        write_atomically(path, content)
        if has_begun(tmp_path / "ledger.jsonl"):
            look()

    for module in ("trainer", "checkpoint"):
        monkeypatch.setattr(f"privgrad.training.{module}.write_atomically", watched)
    trainer = build(tmp_path)
    trainer.optimizer.register_step_pre_hook(look)
    trainer.optimizer.register_step_post_hook(look)
    trainer.fit()
    assert {steps for steps, _ in seen} == set(range(STEPS + 1))
    assert not any(over for _, over in seen)
    look()
    assert seen[-1] == (STEPS, True)


def test_a_step_that_is_charged_while_verify_reads_is_no_mismatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved_every_step: None
) -> None:
    """The ledger is read after what refers to it."""
    trainer = build(tmp_path)
    batches = trainer.private.batches()
    trainer.private.step(next(batches))
    read = load_tree

    def meanwhile(path: Path) -> Any:
        trainer.private.step(next(batches))
        trainer._save()
        tree = read(path)
        trainer.private.step(next(batches))
        trainer._save()
        return tree

    monkeypatch.setattr("privgrad.training.run.load_tree", meanwhile)
    assert Run(tmp_path).verify().mismatches == []
    end(trainer)


# Metrics.


def test_metrics_follow_the_weights_that_the_run_went_on_with(tmp_path: Path, saved_every_step: None) -> None:
    """The look at step 4 was taken, and then the step was lost with everything behind the checkpoint of step 3."""
    options: dict[str, Any] = {"test": pg.DeclaredSplit(records(1)), "evaluations": STEPS}
    crashed(tmp_path, 4, **options)
    metrics = tmp_path / "metrics.jsonl"
    with metrics.open("a") as stream:
        stream.write('{"epsilon":1.0,"step":4,"test_accuracy":0.5}\n{"epsilon":1.0,"st')
    finished(tmp_path, resume=True, **options)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 5, 6]


def test_metrics_of_a_resumed_run_are_those_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"test": pg.DeclaredSplit(records(1)), "evaluations": STEPS}
    finished(tmp_path / "whole", **options)
    interrupted(tmp_path / "stopped", 2, **options)
    interrupted(tmp_path / "stopped", 5, resume=True, **options)
    finished(tmp_path / "stopped", resume=True, **options)
    assert (tmp_path / "whole" / "metrics.jsonl").read_text() == (tmp_path / "stopped" / "metrics.jsonl").read_text()


def test_a_run_whose_last_step_was_lost_still_looks_at_its_last_weights(tmp_path: Path, saved_every_step: None) -> None:
    crashed(tmp_path, STEPS, evaluations=1)
    assert not (tmp_path / "metrics.jsonl").exists()
    finished(tmp_path, evaluations=1, resume=True)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["step"] == STEPS


@pytest.mark.parametrize(
    ("raw", "kept", "last"),
    [
        (b"", b"", 0),
        (b'{"step":1}\n{"step":3}\n', b'{"step":1}\n{"step":3}\n', 3),
        (b'{"step":1}\n{"step":4}\n', b'{"step":1}\n', 1),
        (b'{"step":1}\n{"step":3}', b'{"step":1}\n', 1),
        (b'{"step":1}\n{"st', b'{"step":1}\n', 1),
        (b'{"step":1}\n\xff\xfe\n{"step":2}\n', b'{"step":1}\n', 1),
        (b'{"step":2}\n{"step":1}\n', b'{"step":2}\n', 2),
        (b'{"step":true}\n', b"", 0),
        (b'{"step":"1"}\n', b"", 0),
        (b"[1]\n", b"", 0),
        (b"[" * 100_000, b"", 0),
    ],
)
def test_going_back_keeps_whole_lines_up_to_a_step(tmp_path: Path, raw: bytes, kept: bytes, last: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(raw)
    metrics = Metrics(path)
    metrics.go_back(3)
    assert (path.read_bytes(), metrics.last) == (kept, last)
    metrics.add({"step": 9})
    assert path.read_bytes() == kept + b'{"step":9}\n'


def test_metrics_that_cannot_be_written_end_the_run_in_words_and_it_can_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(pg.PrivgradError, match=r"metrics.jsonl cannot be removed"):
        build(tmp_path)
    (tmp_path / "metrics.jsonl").rmdir()
    trainer = build(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(pg.PrivgradError, match=r"metrics.jsonl cannot be written: Is a directory"):
        trainer.fit()
    with pytest.raises(pg.PrivgradError, match=r"metrics.jsonl cannot be read: Is a directory"):
        build(tmp_path, resume=True)
    (tmp_path / "metrics.jsonl").rmdir()
    finished(tmp_path, resume=True)
    assert read_ledger(tmp_path / "ledger.jsonl").count == STEPS

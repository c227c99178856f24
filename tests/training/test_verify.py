"""`privgrad verify` on one small finished run: it passes untouched, and no change to what it vouches for goes unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.cli import run as privgrad
from privgrad.files import digest
from privgrad.mechanism.plan import Plan
from privgrad.privacy.certificate import to_markdown
from privgrad.privacy.ledger import Ledger
from privgrad.report.certificate_page import to_html
from privgrad.training.run import Run, certificate_text
from privgrad.training.trainer import Trainer

STEPS = 4
PLAN = Plan(sampling=pg.PoissonSampling(rate=0.5, divisor=12.0), steps=STEPS, noise=pg.GaussianNoise(multiplier=1.0))
COVERED = ("ledger.jsonl", "plan.json", "certificate.json", "certificate.md", "certificate.html", "model.safetensors")


def trainer(directory: Path, **options: Any) -> Trainer:
    inputs = torch.randn(24, 3)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = pg.supervised(F.cross_entropy)
    test = pg.DeclaredSplit(TensorDataset(-inputs, (inputs[:, 0] < 0).long()))
    return Trainer(model, optimizer, data, PLAN, loss_fn, directory=directory, test=test, quiet=True, **options)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "original"
    made = trainer(directory, evaluations=1)
    made.fit()
    made.private.ledger.close()
    return directory


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A copy, to be spoilt."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def fails(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What a failed check says, after the checks that hold for every failure."""
    assert privgrad(["verify", str(directory)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("privgrad: NOT VERIFIED: ")
    assert "Traceback" not in output.err
    return output.err


def passes(directory: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert privgrad(["verify", str(directory)]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return output.out


# Untouched.


def test_a_finished_run_is_verified(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = passes(finished, capsys)
    assert out.startswith("verified: epsilon = ")
    assert f"after {STEPS} steps; ledger, plan, certificate and model agree" in out


def test_json_says_ok_epsilon_and_steps(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert privgrad(["verify", str(finished), "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"ok": True, "epsilon": PLAN.epsilon(), "steps": STEPS, "finished": True}


def test_verifying_changes_no_file(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    privgrad(["verify", str(finished)])
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_run_may_be_moved_without_its_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(finished / "checkpoint")
    (finished / "metrics.jsonl").unlink()
    passes(finished, capsys)


# One bit.


def flipped(raw: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[position] ^= 1 << bit
    return bytes(changed)


@pytest.mark.parametrize("name", COVERED)
@pytest.mark.parametrize("place", range(15))
def test_one_changed_bit_fails(finished: Path, capsys: pytest.CaptureFixture[str], name: str, place: int) -> None:
    """At 15 places from the first byte to the last."""
    path = finished / name
    raw = path.read_bytes()
    path.write_bytes(flipped(raw, place * (len(raw) - 1) // 14, bit=place % 8))
    fails(finished, capsys)


def test_another_spelling_of_the_same_number_fails(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit too: 1e-05 and 1E-05 are the same to JSON."""
    for name in ("plan.json", "certificate.json"):
        path = finished / name
        text = path.read_text()
        assert "1e-05" in text
        path.write_text(text.replace("1e-05", "1E-05"))
        fails(finished, capsys)
        path.write_text(text)


def test_a_damaged_checkpoint_never_gives_a_traceback(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = finished / "checkpoint" / "latest.safetensors"
    raw = path.read_bytes()
    codes = set()
    for position in range(0, len(raw), 97):
        path.write_bytes(flipped(raw, position, bit=position % 8))
        codes.add(privgrad(["verify", str(finished)]))
    assert 1 in codes
    assert codes <= {0, 1}
    assert "Traceback" not in capsys.readouterr().err


# Larger damage.


def test_a_missing_tail_of_the_ledger_fails(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ledger = finished / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    for kept in (1, len(lines) - 1):
        ledger.write_bytes(b"".join(lines[:kept]))
        assert "lost its tail" in fails(finished, capsys)


def test_a_missing_tail_fails_also_without_a_checkpoint(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(finished / "checkpoint")
    ledger = finished / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    assert "lost its tail" in fails(finished, capsys)


@pytest.mark.parametrize("seen", [3, "x", None, [], {"steps": 4}])
def test_a_certificate_that_has_seen_no_ledger_is_neither_verified_nor_resumed(
    finished: Path, capsys: pytest.CaptureFixture[str], seen: object
) -> None:
    path = finished / "certificate.json"
    certificate = {key: value for key, value in json.loads(path.read_bytes()).items() if key != "digest"}
    certificate["ledger"] = seen
    path.write_text(certificate_text({**certificate, "digest": digest(certificate)}))
    fails(finished, capsys)
    with pytest.raises(pg.VerificationError, match="does not say what it has seen of the ledger"):
        Run(finished).check_tail()


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_of_a_finished_run_fails(finished: Path, capsys: pytest.CaptureFixture[str], cut: int) -> None:
    ledger = finished / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes()[:-cut])
    assert "lost its tail" in fails(finished, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: lines[1:],
        lambda lines: [],
        lambda lines: [b"\n"],
        lambda lines: [b"{}\n"],
        lambda lines: [b"[]\n"],
        lambda lines: [*lines, b"\n"],
    ],
    ids=["a line less", "swapped", "repeated", "no terms", "no byte", "no words", "no keys", "a list", "an empty line"],
)
def test_a_ledger_with_changed_lines_fails(
    finished: Path, capsys: pytest.CaptureFixture[str], change: Callable[[list[bytes]], list[bytes]]
) -> None:
    ledger = finished / "ledger.jsonl"
    ledger.write_bytes(b"".join(change(ledger.read_bytes().splitlines(keepends=True))))
    fails(finished, capsys)


def rewritten(directory: Path, plan: Plan, steps: int) -> None:
    """A ledger with a chain that holds, made by someone who knows how."""
    (directory / "ledger.jsonl").unlink()
    ledger = Ledger(plan.terms(), directory / "ledger.jsonl")
    for _ in range(steps):
        ledger.charge(plan.step_event())
    ledger.close()


@pytest.mark.parametrize(
    ("plan", "steps", "says"),
    [
        (PLAN, STEPS - 1, "lost its tail"),
        (PLAN, STEPS + 1, f"the plan has {STEPS}"),
        (PLAN.with_multiplier(2.0), STEPS, "not the plan that the ledger was written for"),
    ],
    ids=["fewer steps", "more steps", "another plan"],
)
def test_a_ledger_written_anew_fails(
    finished: Path, capsys: pytest.CaptureFixture[str], plan: Plan, steps: int, says: str
) -> None:
    rewritten(finished, plan, steps)
    assert says in fails(finished, capsys)


def test_events_that_are_not_the_plans_fail(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "ledger.jsonl").unlink()
    ledger = Ledger(PLAN.terms(), finished / "ledger.jsonl")
    for _ in range(STEPS):
        ledger.charge(PLAN.with_multiplier(9.0).step_event())
    ledger.close()
    assert "does not charge the plan's events" in fails(finished, capsys)


def test_another_plan_with_its_ledger_does_not_fit_the_certificate(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "checkpoint")
    other = PLAN.with_multiplier(2.0)
    rewritten(finished, other, STEPS)
    (finished / "plan.json").write_text(json.dumps(other.to_json(), indent=2) + "\n")
    assert "the ledger was rewritten" in fails(finished, capsys)


@pytest.mark.parametrize("name", [name for name in COVERED if name != "ledger.jsonl"])
def test_a_missing_file_fails_and_is_named(finished: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (finished / name).unlink()
    assert name in fails(finished, capsys)


def test_a_missing_ledger_fails(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "ledger.jsonl").unlink()
    assert "ledger.jsonl" in fails(finished, capsys)


def test_a_certificate_page_without_anything_behind_it_fails(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (finished / "certificate.json").unlink()
    (finished / "model.safetensors").unlink()
    (finished / "certificate.html").write_text("epsilon = 0.01")
    fails(finished, capsys)


@pytest.mark.parametrize("name", COVERED)
def test_a_directory_in_the_place_of_a_file_fails_without_a_traceback(
    finished: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (finished / name).unlink()
    (finished / name).mkdir()
    assert privgrad(["verify", str(finished)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_swapped_model_fails(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = load_file(finished / "model.safetensors")
    save_file({name: torch.zeros_like(value) for name, value in weights.items()}, finished / "model.safetensors")
    assert "model.safetensors is not the model" in fails(finished, capsys)


# A forged certificate.


def forged(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A changed certificate whose own digest and pages fit it."""
    certificate = json.loads((directory / "certificate.json").read_text())
    del certificate["digest"]
    change(certificate)
    certificate["digest"] = digest(certificate)
    (directory / "certificate.json").write_text(json.dumps(certificate, indent=2) + "\n")
    (directory / "certificate.md").write_text(to_markdown(certificate))
    (directory / "certificate.html").write_text(to_html(certificate))


def test_forging_without_a_change_passes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forged(finished, lambda c: None)
    passes(finished, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(epsilon=c["epsilon"] * 0.9),
        lambda c: c.update(epsilon=c["epsilon"] * (1 - 1e-7)),
        lambda c: c.update(delta=1e-9),
        lambda c: c["adjacency"].update(name="replace_one"),
        lambda c: c["accounting"].update(accountant="rdp"),
        lambda c: c["ledger"].update(steps=STEPS - 1),
        lambda c: c["ledger"].update(head="0" * 64),
        lambda c: c["plan"].update(steps=9),
        lambda c: c.update(plan_digest="0" * 64),
        lambda c: c.update(model_sha256="0" * 64),
        lambda c: c["ledger"].update(steps="4"),
    ],
    ids=[
        "epsilon",
        "epsilon a little",
        "delta",
        "adjacency",
        "accountant",
        "steps",
        "head",
        "plan",
        "plan digest",
        "model",
        "steps as text",
    ],
)
def test_a_forged_certificate_fails(
    finished: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any]
) -> None:
    forged(finished, change)
    fails(finished, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(attack_success=0.501),
        lambda c: c["noise"].update(multiplier=100.0),
        lambda c: c["noise"].update(secret_seed=True),
        lambda c: c["steps"].update(charged=1, applied=1, planned=1),
        lambda c: c.update(guarantee=False),
        lambda c: c["mechanism"].update(noise="a great deal of noise"),
        lambda c: c.update(unit="person"),
    ],
    ids=["attack success", "noise", "seed", "steps", "guarantee", "mechanism", "unit"],
)
def test_a_certificate_with_forged_words_fails(
    finished: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any]
) -> None:
    forged(finished, change)
    fails(finished, capsys)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(created="2000-01-01 00:00 UTC"),
        lambda c: c.update(data="other data"),
        lambda c: c["evaluation"]["metrics"].update(test_accuracy=0.999),
        lambda c: c["software"].update(privgrad="9.9.9"),
        lambda c: c["steps"].update(applied=1),
    ],
    ids=["created", "data", "accuracy", "software", "applied"],
)
def test_what_neither_ledger_nor_plan_knows_is_held_by_the_digest(
    finished: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], Any]
) -> None:
    path = finished / "certificate.json"
    before = json.loads(path.read_text())["digest"]
    forged(finished, change)
    certificate = json.loads(path.read_text()) | {"digest": before}
    path.write_text(json.dumps(certificate, indent=2) + "\n")
    (finished / "certificate.md").write_text(to_markdown(certificate))
    (finished / "certificate.html").write_text(to_html(certificate))
    assert "certificate.json was changed" in fails(finished, capsys)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-1", "0", "null", '"3"', "[]", "true", "1e999"])
def test_an_epsilon_that_is_no_number_fails(finished: Path, capsys: pytest.CaptureFixture[str], constant: str) -> None:
    path = finished / "certificate.json"
    epsilon = json.loads(path.read_text())["epsilon"]
    text = path.read_text().replace(f'"epsilon": {epsilon},', f'"epsilon": {constant},')
    assert text != path.read_text()
    path.write_text(text)
    fails(finished, capsys)


@pytest.mark.parametrize("name", ["certificate.json", "plan.json"])
def test_a_key_that_stands_twice_fails(finished: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = finished / name
    path.write_text(path.read_text().replace("{", '{\n  "delta": 1e-20,\n  "epsilon": 0.01,', 1))
    if name == "plan.json":
        path.write_text(path.read_text().replace('\n  "epsilon": 0.01,', "", 1))
    fails(finished, capsys)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plan.json", "[]"),
        ("plan.json", "{}"),
        ("plan.json", ""),
        ("certificate.json", "[]"),
        ("certificate.json", "{}"),
        ("certificate.json", "\ufeff{}"),
        ("certificate.json", '{"digest": {"epsilon": 1}}'),
        ("certificate.json", json.dumps({"digest": digest({})})),
        ("certificate.md", ""),
        ("certificate.html", "<html></html>"),
        ("model.safetensors", ""),
    ],
)
def test_a_file_with_other_content_fails(
    finished: Path, capsys: pytest.CaptureFixture[str], name: str, content: str
) -> None:
    (finished / name).write_text(content)
    fails(finished, capsys)


def test_every_mismatch_is_told(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "plan.json").unlink()
    (finished / "model.safetensors").unlink()
    lines = fails(finished, capsys).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("privgrad: NOT VERIFIED: ") for line in lines)


def test_json_of_a_failure_says_what_is_wrong(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "certificate.md").write_text("epsilon = 0.1")
    assert privgrad(["verify", str(finished), "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert (said["ok"], said["epsilon"], said["steps"]) == (False, PLAN.epsilon(), STEPS)
    assert said["mismatches"] == ["certificate.md does not say what certificate.json says"]


def test_json_of_a_broken_ledger_is_one_object(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "ledger.jsonl").write_text("nothing\n")
    assert privgrad(["verify", str(finished), "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    assert (said["ok"], said["epsilon"], said["steps"]) == (False, None, None)


# Not a run, or not yet a finished one.


@pytest.mark.parametrize("kind", ["nothing", "a file"])
def test_what_is_no_directory_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    path = tmp_path / "run"
    if kind == "a file":
        path.write_text("")
    assert privgrad(["verify", str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"privgrad: {path} is not a directory; expected a run directory")


def test_an_empty_directory_is_bad_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert privgrad(["verify", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ledger.jsonl" in line


@pytest.mark.parametrize("steps", [0, 2])
def test_an_unfinished_run_verifies_as_unfinished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    started = trainer(tmp_path / "run")
    batches = started.private.batches()
    for _ in range(steps):
        started.private.step(next(batches))
    started.private.ledger.close()
    assert "not finished, there is no certificate yet" in passes(tmp_path / "run", capsys)
    assert privgrad(["verify", str(tmp_path / "run"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"ok": True, "epsilon": PLAN.epsilon(steps=steps), "steps": steps, "finished": False}


def test_an_unfinished_run_with_a_shortened_ledger_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = trainer(tmp_path / "run")
    batches = started.private.batches()
    for _ in range(2):
        started.private.step(next(batches))
    started._save()
    started.private.ledger.close()
    ledger = tmp_path / "run" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:2]))
    assert "lost its tail" in fails(tmp_path / "run", capsys)

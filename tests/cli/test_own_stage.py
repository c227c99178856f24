"""A mechanism of the user's own, in a file of their own: trained, compared, certified by name, verified where it is trusted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from privgrad.files import read_json
from tests.cli.test_commands import SMALL, refusal, say

STAGE = '''
from dataclasses import dataclass
from typing import ClassVar

import torch

from privgrad.mechanism.clipping import FlatClipping


@dataclass(frozen=True)
class SmoothClipping(FlatClipping):
    """g C / (C + |g|)."""

    gentle: float = 1.0

    def weights(self, norms, thresholds):
        return thresholds / (thresholds + self.gentle * norms)

    @property
    def words(self):
        return "each gradient is scaled by C / (C + its norm)"


class NoDataclass:
    pass


Alias = SmoothClipping
'''


@pytest.fixture(autouse=True)
def _module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_stage.py").write_text(STAGE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_stage", None)
    yield
    sys.modules.pop("own_stage", None)


def plan(path: Path, kind: str) -> Path:
    path.write_text(
        f"""[model]
name = "logistic_regression"
[plan]
steps = 3
[plan.clipping]
kind = "{kind}"
[training]
evaluations = 1
"""
    )
    return path


def test_it_is_compared_with_another_at_the_same_epsilon(tmp_path: Path) -> None:
    plans = [plan(tmp_path / "own.toml", "own_stage:SmoothClipping"), plan(tmp_path / "flat.toml", "flat")]
    said = say("compare", *plans, "--seeds", 1, "--out", tmp_path / "compared")
    assert said.code == 0, said
    own, flat = (read_json(tmp_path / "compared" / name / "seed-0" / "certificate.json") for name in ("own", "flat"))
    assert own["epsilon"] == flat["epsilon"]
    assert own["own_mechanisms"] == ["own_stage:SmoothClipping"]
    assert (
        "mechanisms of the user's own (own_stage:SmoothClipping)"
        in (tmp_path / "compared" / "own" / "seed-0" / "certificate.md").read_text()
    )


def test_verify_runs_its_code_only_where_it_is_asked_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert say("train", plan(tmp_path / "own.toml", "own_stage:SmoothClipping"), "--out", run).code == 0
    sys.modules.pop("own_stage")
    said = say("verify", run)
    assert said.code == 1
    assert "whose code is not run unasked" in said.err
    assert "own_stage" not in sys.modules
    assert say("verify", "--own", run).code == 0


def test_an_audit_runs_its_code_only_where_it_is_asked_to(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert say("train", plan(tmp_path / "own.toml", "own_stage:SmoothClipping"), "--out", run).code == 0
    for kind in ("step", "one-run", "membership"):
        sys.modules.pop("own_stage", None)
        assert "plan.clipping.kind is 'own_stage:SmoothClipping'" in refusal("audit", run, "--kind", kind)
        assert "own_stage" not in sys.modules
    said = say("audit", run, "--own", "--trials", 20)
    assert said.code == 0, said


@pytest.mark.parametrize("edited", ["plan.json", "config.toml"])
def test_an_audit_reads_all_that_a_run_names(tmp_path: Path, edited: str) -> None:
    """Either file may have been written by somebody else."""
    run = tmp_path / "run"
    assert say("train", plan(tmp_path / "flat.toml", "flat"), "--out", run).code == 0
    content = (run / edited).read_text()
    assert content.count('"flat"') == 1
    (run / edited).write_text(content.replace('"flat"', '"own_stage:SmoothClipping"'))
    assert "--own" in refusal("audit", run)
    assert "own_stage" not in sys.modules


def test_an_audit_makes_no_model_of_anothers_unasked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert say("train", plan(tmp_path / "flat.toml", "flat"), "--out", run).code == 0
    content = (run / "config.toml").read_text()
    assert content.count('"logistic_regression"') == 1
    (run / "config.toml").write_text(content.replace('"logistic_regression"', '"own_stage:NoDataclass"'))
    assert "model.name is 'own_stage:NoDataclass'" in refusal("audit", run, "--kind", "one-run")
    assert "own_stage" not in sys.modules


def test_a_run_with_it_is_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert say("train", plan(tmp_path / "own.toml", "own_stage:SmoothClipping"), "--out", run).code == 0
    sys.modules.pop("own_stage")
    assert say("train", "--resume", "--out", run).code == 0


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("own_stage:Absent", "cannot be imported: AttributeError"),
        ("absent_stage:Any", "cannot be imported: ModuleNotFoundError"),
        ("own_stage:NoDataclass", "which is no dataclass"),
        ("own_stage:Alias", "name it where it is: 'own_stage:SmoothClipping'"),
        ("privgrad:Plan", "name it where it is"),
        ("privgrad.mechanism.plan:Plan", "plan.clipping"),
        ("flatt", "did you mean 'flat'? (your own: 'package.module:Class')"),
    ],
)
def test_what_is_no_stage_is_refused(tmp_path: Path, kind: str, says: str) -> None:
    given = (*SMALL, "--set", f"plan.clipping.kind={kind}", "--out", tmp_path / "run")
    assert says in refusal("train", *given)


def test_its_numbers_are_checked_like_any_others(tmp_path: Path) -> None:
    own = ("--set", "plan.clipping.kind=own_stage:SmoothClipping")
    assert "did you mean 'gentle'?" in refusal("train", *SMALL, *own, "--set", "plan.clipping.gentel=2")


def test_units_of_privacy_cannot_be_ones_own(tmp_path: Path) -> None:
    assert "plan.protects.kind is 'own_stage:Any'; known: example, user" in refusal(
        "train", *SMALL, "--set", "plan.protects.kind=own_stage:Any"
    )

"""`privgrad audit`: one JSON object with a bound below the claim, a picture, and refusals in words."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from tests.cli.test_commands import refusal, say

CONFIG = """
[privacy]
epsilon = 4.0
[model]
name = "logistic_regression"
[plan]
steps = 4
"""
KEYS = {"kind", "epsilon_claimed", "epsilon_lower", "confidence", "trials", "delta", "holds", "picture"}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def noisy(tmp_path: Path) -> Path:
    """With the noise given, and not the epsilon."""
    path = tmp_path / "noisy.toml"
    path.write_text(CONFIG.replace("epsilon = 4.0", "delta = 1e-5"))
    return path


def audited(*arguments: object) -> dict[str, object]:
    said = say("audit", *arguments, "--json")
    assert said.code == 0, said
    found = said.json
    assert found.keys() >= KEYS
    assert found["epsilon_lower"] >= 0
    assert found["holds"] is True
    return found


def test_a_picture_without_a_name_is_refused_before_the_attack(noisy: Path) -> None:
    said = say("audit", noisy, "--picture", "/")
    assert said.code == 2
    assert "--picture is '/', no name of a file" in said.err


def test_a_step_of_a_configuration(noisy: Path, tmp_path: Path) -> None:
    picture = tmp_path / "step.svg"
    found = audited(
        noisy, "--picture", picture, "--trials", 2000, "--set", "plan.noise.multiplier=0.5", "--set", "plan.steps=1"
    )
    assert found["kind"] == "step"
    assert found["trials"] == 2000
    assert found["confidence"] == 0.95
    assert found["mu_lower"] >= 0.8 * found["mu_claimed"] == 1.6  # type: ignore[operator]
    assert found["picture"] == str(picture)
    assert picture.read_text().startswith("<?xml")


def test_blocks_that_are_named_after_the_model(config: Path) -> None:
    settings = ["plan.clipping.kind=layerwise", 'plan.clipping.blocks={ w = ["*weight"], b = ["*bias"] }']
    assert (
        audited(config, *(part for setting in settings for part in ("--set", setting)), "--trials", 500)["trials"]
        == 500
    )


def test_mixing_is_audited_by_its_likelihood_ratio(noisy: Path) -> None:
    settings = [
        "plan.mixing.kind=modelmix",
        "plan.clipping.kind=l2_linf",
        "plan.clipping.p=20",
        "plan.noise.multiplier=0.5",
    ]
    found = audited(
        noisy,
        *(part for setting in settings for part in ("--set", setting)),
        "--set",
        "optimizer.lr=0.1",
        "--trials",
        2000,
    )
    assert found["delta"] == 1e-3


def test_a_whole_training(config: Path) -> None:
    found = audited(config, "--kind", "one-run", "--trials", 1000)
    assert (found["kind"], found["trials"], found["guesses"]) == ("one-run", 1000, 50)
    assert found["epsilon_lower_gaussian"] is None  # Poisson sampled


def test_membership_of_a_run_says_that_it_discloses(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert say("train", config, "--out", run).code == 0
    said = say("audit", run, "--kind", "membership", "--json")
    assert said.code == 0
    assert "WITHOUT noise" in said.err
    assert said.json["disclosed_without_noise"] is True
    assert said.json["trials"] == 720
    assert 0.4 < said.json["auc"] < 0.6
    assert said.json["picture"] is None, "the run directory holds nothing that its certificate does not cover"
    assert not list(run.glob("*.svg"))
    drawn = tmp_path / "membership.svg"
    assert say("audit", run, "--kind", "membership", "--picture", drawn).code == 0
    assert "WITHOUT noise" in drawn.read_text(), "a file of private numbers says what it is"
    assert audited(run, "--trials", 500)["picture"] == str(run / "audit-step.svg")
    assert say("verify", run).code == 0


def test_a_refuted_claim_ends_with_1(noisy: Path) -> None:
    """The claim is that of twice the noise."""
    with mock.patch("privgrad.audit.worst.claimed_mu", lambda plan: 0.5 / plan.noise.multiplier):
        said = say("audit", noisy, "--set", "plan.noise.multiplier=0.4", "--trials", 2000, "--json")
    assert said.code == 1
    assert said.json["holds"] is False
    assert "REFUTED" in said.err


def test_refusals(config: Path, noisy: Path, tmp_path: Path) -> None:
    assert "did you mean 'one-run'" in refusal("audit", config, "--kind", "onerun")
    assert "give the directory of a finished run" in refusal("audit", config, "--kind", "membership")
    assert "holds no run" in refusal("audit", tmp_path)
    assert "cannot be read" in refusal("audit", tmp_path / "nothing.toml")
    assert "--trials is 5" in refusal("audit", config, "--trials", 5)
    assert "--confidence is 1.0" in refusal("audit", config, "--confidence", 1.0)
    fixed = ["plan.sampling.kind=fixed_size", "plan.sampling.batch_size=100", "privacy.accountant=rdp"]
    assert "each by itself" in refusal(
        "audit", config, "--kind", "one-run", *(part for setting in fixed for part in ("--set", setting))
    )
    assert "no claim to audit" in refusal("audit", noisy, "--set", "plan.noise.multiplier=0.0")

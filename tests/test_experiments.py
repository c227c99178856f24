"""Recipes under experiments/ that are no plans: they run, and claim nothing."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from privgrad.cli import run as privgrad
from privgrad.files import read_json
from privgrad.nn.public_norm import PublicBatchNorm

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
PUBLISHED = EXPERIMENTS / "modelmix" / "published"
SMALL = ("--set", "data.source=digits", "--set", "model.name=mlp", "--set", "plan.sampling.expected_batch_size=512")


def test_modelmix_as_published_has_no_guarantee(tmp_path: Path) -> None:
    recipe, out = runpy.run_path(str(PUBLISHED / "recipe.py")), tmp_path / "run"
    accuracy = recipe["main"](
        ["--out", str(out), *SMALL, "--set", "plan.steps=30", "--set", "plan.clipping.max_norm=1.0"]
    )
    assert accuracy > 0.5
    certificate = read_json(out / "certificate.json")
    assert certificate["guarantee"] is False
    assert certificate["epsilon"] is None
    assert "nothing is claimed" in certificate["mechanism"]["noise"]
    assert privgrad(["verify", str(out)]) == 1, "the mechanism is not one that privgrad knows"


def test_no_configuration_offers_it(capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers beside it have no epsilon, and mixing does not take its optimizer."""
    config = [str(PUBLISHED / "recipe.toml"), *SMALL]
    assert privgrad(["epsilon", *config, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] is None
    mixing = ["--set", "plan.mixing.kind=modelmix", "--set", "plan.noise.multiplier=0.335"]
    assert privgrad(["train", *config, *mixing]) == 2
    assert "mixing needs plain SGD" in capsys.readouterr().err


def test_the_weight_noise_curve_measures_public_statistics() -> None:
    """It is run by nothing else here: a change of what it calls must not go unseen."""
    recipe = runpy.run_path(str(EXPERIMENTS / "weight_noise" / "__main__.py"))
    model, images, labels = PublicBatchNorm(3), torch.randn(16, 3) * 2 + 5, torch.zeros(16, dtype=torch.long)
    recipe["statistics_of"]((images, labels), nn.Sequential(model))
    torch.testing.assert_close(model.running_mean, images.mean(0))
    torch.testing.assert_close(model.running_var, images.var(0, correction=0))


def test_the_normalization_table_keeps_what_was_not_trained_again() -> None:
    """The networks are trained one by one, on machines that come and go: a row is replaced by its own plan and budget only."""
    merged = runpy.run_path(str(EXPERIMENTS / "normalization" / "__main__.py"))["merged"]

    def row(plan: str, epsilon: float | None, mean: float) -> dict[str, object]:
        return {"plan": plan, "target_epsilon": epsilon, "mean": mean}

    old = [row("mlp_none", 3.0, 0.1), row("mlp_none", None, 0.2), row("resnet20_none", 3.0, 0.3)]
    new = [row("resnet18_none", 3.0, 0.4), row("mlp_none", 3.0, 0.5)]
    assert merged(old, new) == [
        row("mlp_none", 3.0, 0.5),
        row("resnet20_none", 3.0, 0.3),
        row("resnet18_none", 3.0, 0.4),
        row("mlp_none", None, 0.2),
    ]

"""Whole trainings audited by one run of each: below the claim, near what ideal canaries show, above it without noise."""

from __future__ import annotations

import dataclasses
import json
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.one_run import OneRunAudit, audit_run, audit_training
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.plan import Plan
from tests.audit.one_run import EPSILON, RESULTS, audited, plans, summary


@pytest.mark.parametrize("name", plans())
def test_bounds_of_a_small_training(name: str) -> None:
    torch.set_num_threads(1)
    found = summary(name, plans()[name], repetitions=7)
    assert found.held == 7
    assert found.median >= 1.7
    assert found.largest <= EPSILON
    if found.median_gaussian is not None:
        assert found.median_gaussian >= 2.3


def test_the_committed_results_reach_their_mark() -> None:
    """Of `python -m tests.audit.one_run`, at claimed epsilon 4 and at least 10,000 canaries."""
    rows = json.loads(RESULTS.read_text())
    assert [row["plan"] for row in rows] == list(plans())
    for row in rows:
        assert row["held"] == row["repetitions"] == 20
        assert row["canaries"] >= 10_000
        assert row["guess_fraction"] == 0.05
        assert row["median"] >= 1.8
        if row["median_gaussian"] is not None:
            assert row["median_gaussian"] >= 2.5


def test_noise_that_is_too_weak_is_found() -> None:
    """A quarter of it, in a training of 10 steps."""

    def weak(stage: GaussianNoise, sums: object, receipt: object, source: object) -> object:
        noised = original(dataclasses.replace(stage, multiplier=stage.multiplier / 4), sums, receipt, source)  # type: ignore[arg-type,operator]
        return dataclasses.replace(noised, scales=stage.scales(sums))  # type: ignore[arg-type]

    original = GaussianNoise.add
    with mock.patch.object(GaussianNoise, "add", weak):
        found = audited(plans()["full batch, 10 steps"].calibrate(EPSILON))
    assert not found.holds
    assert found.epsilon_lower > EPSILON


STAGES: dict[str, dict[str, object]] = {
    "layerwise": {"clipping": pg.LayerwiseClipping(1.0), "thresholds": pg.QuantileThresholds()},
    "users": {"protects": pg.User("who", 3)},
    "groups": {"groups": pg.RandomGroups(4)},
    "sparsified": {"compression": pg.RandomSparsification(0.5)},
    "mixed": {"mixing": pg.ModelMix(), "clipping": pg.CoordinateClipping(1.0, p=4.0)},
    "added": {"adjacency": pg.Adjacency.ADD_REMOVE},
    "automatic": {"clipping": pg.AutomaticClipping(0.3)},
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=list(STAGES))
def test_every_stage_stays_below_its_claim(stages: dict[str, object]) -> None:
    sampling = pg.FullBatch(divisor=100.0)
    plan = Plan(sampling=sampling, steps=6, noise=GaussianNoise(multiplier=2.0), **stages)  # type: ignore[arg-type]
    found = audited(plan, canaries=2000).at(1 - 1e-6)
    assert found.holds
    assert found.epsilon_claimed == pytest.approx(plan.epsilon())
    assert (found.epsilon_lower_gaussian is None) == (plan.mixing is not None)


def test_the_same_coins_and_noise_give_the_same_audit() -> None:
    noise = GaussianNoise(multiplier=3.0, insecure_seed=1)
    plan = Plan(sampling=pg.FullBatch(divisor=10.0), steps=2, noise=noise)
    first, second = (audit_run(plan, canaries=500, seed=3) for _ in range(2))
    assert first == second
    assert torch.equal(first.scores, second.scores)
    assert torch.equal(first.inside, second.inside)
    assert 150 < int(first.inside.sum()) < 350


@pytest.mark.parametrize(
    "sampling",
    [pg.FixedSizeSampling(batch_size=10, dataset_size=100), pg.ShuffledBatches(batch_size=10, dataset_size=100)],
    ids=["fixed_size", "shuffled"],
)
def test_samplers_whose_coins_depend_on_one_another_are_refused(sampling: object) -> None:
    plan = Plan(sampling=sampling, steps=1, noise=GaussianNoise(multiplier=2.0), accountant=pg.Accountant.RDP)  # type: ignore[arg-type]
    with pytest.raises(pg.RefusedError, match="each by itself"):
        audit_run(plan, canaries=100)


def noisy_mean(noise: float) -> OneRunAudit:
    """A training that is not privgrad's: the sum of unit vectors in 2,000 dimensions, with noise."""
    torch.manual_seed(0)
    canaries = (torch.eye(2000),)
    return audit_training(
        lambda inside: inside[0].sum(0) + noise * torch.randn(2000),
        canaries,
        lambda seen, rows: rows[0] @ seen,
        claimed=4.0,
        gaussian=True,
        seed=1,
    )


def test_a_training_of_another_library() -> None:
    assert 0 <= noisy_mean(1 / 0.925).best <= 4
    leaking = noisy_mean(0.1)
    assert leaking.correct == leaking.guesses == 100
    assert not leaking.holds


def test_wrong_scores_and_canaries_are_refused() -> None:
    def audit(canaries: object, scores: object) -> None:
        audit_training(lambda inside: None, canaries, lambda seen, rows: scores)  # type: ignore[arg-type,return-value]

    with pytest.raises(pg.PrivgradError, match="at least 20"):
        audit((torch.zeros(3),), torch.zeros(3))
    with pytest.raises(pg.PrivgradError, match="same number of rows"):
        audit((torch.zeros(30), torch.zeros(31)), torch.zeros(30))
    for scores in (torch.zeros(29), torch.full((30,), torch.nan), 1.0):
        with pytest.raises(pg.PrivgradError, match="30 finite numbers"):
            audit((torch.zeros(30),), scores)
    with pytest.raises(pg.PrivgradError, match="belong together"):
        audit_run(plans()["full batch, 10 steps"].with_multiplier(2.0), model=nn.Linear(2, 2))


def test_a_black_box_audit_of_a_model_by_its_losses() -> None:
    """Plain SGD that overfits random labels gives away who was in; so does nothing else here."""

    def train(inside: tuple[Tensor, Tensor], steps: int) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(300, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inside[0]), inside[1]).backward()
            optimizer.step()
        return model

    def score(model: nn.Module, rows: tuple[Tensor, Tensor]) -> Tensor:
        return -nn.functional.cross_entropy(model(rows[0]), rows[1], reduction="none")

    torch.manual_seed(0)
    canaries = torch.randn(300, 300), torch.randint(2, (300,))
    leaking = audit_training(lambda inside: train(inside, 200), canaries, score, guess_fraction=0.2, seed=0)
    assert leaking.epsilon_lower > 1.5
    assert leaking.epsilon_claimed is None
    assert leaking.holds
    assert (
        audit_training(lambda inside: train(inside, 0), canaries, score, guess_fraction=0.2, seed=0).epsilon_lower < 1
    )

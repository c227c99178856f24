"""The step audit of any plan: near every claim, and above it where a plan is less private than it says."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import privgrad as pg
from privgrad.audit.step import claimed_mu
from privgrad.audit.worst import Tensors, audit_plan, worst_pair
from privgrad.mechanism.noise import GaussianNoise
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import PoissonSampling
from privgrad.nn.public_norm import PublicBatchNorm
from privgrad.privacy.sensitivity import Bound

NOISE = GaussianNoise(multiplier=0.4)


def plan(**stages: object) -> Plan:
    sampling = PoissonSampling(rate=0.1, divisor=30.0)
    return Plan(sampling=sampling, steps=1, noise=stages.pop("noise", NOISE), **stages)  # type: ignore[arg-type]


STAGES: dict[str, dict[str, object]] = {
    "flat": {},
    "replace_one": {"adjacency": pg.Adjacency.REPLACE_ONE},
    "named blocks": {"clipping": pg.LayerwiseClipping((0.3, 2.0), blocks={"a": ["first.*"], "b": ["last.*"]})},
    "l2_linf": {"clipping": pg.CoordinateClipping(0.7, p=50.0)},
    "public thresholds": {"clipping": pg.LayerwiseClipping(0.7), "thresholds": pg.PublicThresholds()},
    "masked layers": {"compression": pg.RandomSparsification(0.5, structure="layers")},
    "sparsified": {
        "compression": pg.RandomSparsification(0.7, structure="blocks"),
        "clipping": pg.LayerwiseClipping(0.7),
    },
}


@pytest.mark.parametrize("stages", STAGES.values(), ids=list(STAGES))
def test_below_the_claim_and_tight(stages: dict[str, object]) -> None:
    torch.set_num_threads(1)
    found = audit_plan(plan(**stages), trials=5000)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed
    assert found.trials == 5000 == len(found.inside) == len(found.outside)
    assert 0 < found.epsilon_lower < found.epsilon_lower_95


@pytest.mark.parametrize(
    "stages",
    [{"clipping": pg.LayerwiseClipping(0.7), "thresholds": pg.QuantileThresholds()}, {"groups": pg.RandomGroups(3)}],
    ids=["quantile", "groups"],
)
def test_units_that_meet_are_audited_one_by_one(stages: dict[str, object]) -> None:
    torch.set_num_threads(1)
    found = audit_plan(plan(**stages), trials=1200)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


def test_five_per_cent_too_little_noise_are_found() -> None:
    """With the number of trials that docs/audits.md states for it."""
    torch.set_num_threads(1)
    weak = dataclasses.replace(NOISE, multiplier=0.95 * 0.4)
    found = audit_plan(plan(noise=weak), trials=60_000)
    assert found.mu_lower > claimed_mu(plan())


def test_a_block_that_is_not_charged_is_found() -> None:
    """Noise for the first of two blocks only."""

    class Forgetful(GaussianNoise):
        def scales(self, sums: object) -> dict[str, float]:
            scales = super().scales(sums)  # type: ignore[arg-type]
            return {name: scale * (0.01 if "last" in name else 1.0) for name, scale in scales.items()}

    forgetful = plan(clipping=pg.LayerwiseClipping(0.7), noise=Forgetful(multiplier=0.4))
    with pytest.raises(pg.PrivgradError, match="nothing was released"):
        audit_plan(forgetful, trials=100)
    with mock.patch("privgrad.mechanism.step.StepRunner._check"):
        assert not audit_plan(forgetful, trials=1000).holds


def test_public_statistics() -> None:
    """A layer that took its statistics from the private rows would see each of them alone, and the step would not move."""

    def private(layer: PublicBatchNorm, inputs: Tensor) -> Tensor:
        variance, mean = torch.var_mean(inputs.detach(), 0)
        return functional.batch_norm(inputs, mean, variance, None, None, False, 0.0, layer.eps)

    torch.set_num_threads(1)
    found = audit_plan(plan(statistics=pg.PublicStatistics()), trials=1200)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed
    with mock.patch.object(PublicBatchNorm, "forward", private), pytest.raises(pg.PrivgradError, match="does not move"):
        audit_plan(plan(statistics=pg.PublicStatistics()), trials=10)


def test_a_radius_in_the_place_of_a_diameter_is_found() -> None:
    torch.set_num_threads(1)
    with mock.patch("privgrad.mechanism.states.presence_distance", lambda bound, grouped: bound.radius):
        found = audit_plan(plan(groups=pg.RandomGroups(1), noise=GaussianNoise(multiplier=0.8)), trials=1000)
    assert not found.holds
    assert Bound.ball(1.0).diameter == 2 * Bound.ball(1.0).radius


def test_the_model_has_the_names_that_a_plan_asks_for() -> None:
    model = Tensors({"a.weight": 2, "a.bias": 1, "b": 3})
    assert {name: len(value) for name, value in model.named_parameters()} == {"a.weight": 2, "a.bias": 1, "b": 3}
    named = plan(clipping=pg.LayerwiseClipping(1.0, blocks={"head": ["head.*"], "rest": ["conv.*"]}))
    assert audit_plan(named, sizes={"conv.weight": 9, "head.bias": 2}, trials=200).holds
    with pytest.raises(pg.PrivgradError, match="matches no parameter"):
        audit_plan(named, trials=10)


def test_what_claims_nothing_or_is_no_gaussian_is_refused() -> None:
    with pytest.raises(pg.PrivgradError, match="no claim"):
        audit_plan(plan(noise=GaussianNoise(multiplier=0.0)))
    with pytest.raises(pg.RefusedError, match="audit_mixing"):
        audit_plan(plan(mixing=pg.ModelMix()))


def test_no_canary_meets_another_before_the_noise() -> None:
    pair = worst_pair(plan())
    rows = pair.inside[: pair.canaries]
    assert bool(((rows != 0).sum(0) == 1).all())
    assert worst_pair(plan(groups=pg.RandomGroups(9))).canaries == 1

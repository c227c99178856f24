"""ModelMix exactly as its accountant knows it, and refusals of everything else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.cli import run
from privgrad.mechanism.mixing import ModelMix
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.randomness import source
from privgrad.privacy.events import MixedGaussianDpEvent
from tests.helpers import full_batch_plan, loop_gradients, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)
FIXTURE = Path(__file__).parents[1] / "cli" / "modelmix.toml"


def poisson_plan(**stages: object) -> Plan:
    return Plan(
        **{
            "sampling": pg.PoissonSampling(rate=0.5, divisor=10.0),
            "steps": 4,
            "noise": pg.GaussianNoise(multiplier=1.0),
            "clipping": pg.CoordinateClipping(max_norm=2.0, p=9.0),
            "mixing": ModelMix(width_ratio=0.3),
            **stages,
        }  # type: ignore[arg-type]
    )


def test_the_specifications_plan_costs_what_the_specification_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["epsilon", str(FIXTURE), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == pytest.approx(7.25, abs=0.01)


def test_the_event_has_the_numbers_of_the_step() -> None:
    event = poisson_plan().step_event().event
    assert event == MixedGaussianDpEvent(1.0, 0.3 * 10 / 2, 9.0)
    flat = poisson_plan(clipping=pg.FlatClipping(max_norm=2.0)).step_event().event
    assert flat == MixedGaussianDpEvent(1.0, 1.5, 1.0)
    layers = poisson_plan(clipping=pg.LayerwiseClipping((1.2, 1.6), p=9.0)).step_event().event
    assert layers == MixedGaussianDpEvent(1.0, 0.3 * 10 / 2, 9.0), "C is the norm of the blocks' norms"
    grouped = poisson_plan(groups=pg.RandomGroups(4)).step_event().event
    assert grouped == MixedGaussianDpEvent(1.0, 0.3 * 4 / (2 * 2), 9.0), (
        "R = 2C, and the divisor is the number of groups"
    )


@settings(deadline=None, max_examples=30)
@given(st.floats(0.0, 10.0), st.floats(0.01, 1.0), st.floats(0.01, 1.0), st.booleans())
def test_the_interval_is_a_whole_number_of_widths_and_at_least_one(
    gap: float, ratio: float, rate: float, below: bool
) -> None:
    """Around the middle of the two last weights, and uniform."""
    count, stage = 2000, ModelMix(width_ratio=ratio)
    now = torch.full((count,), 1.0, dtype=torch.float64)
    before = now + (gap if below else -gap)
    zero = {"w": torch.zeros(count)}
    mixed, state = stage.mix({"w": before}, {"w": now}, zero, rate, source(1, "mixing", ""))
    tau = ratio * rate
    length = max(1.0, float(((before - now).abs() / tau).floor()[0])) * tau
    places = (mixed["w"] - (now + before) / 2) / length
    assert float(places.abs().max()) <= 0.5 * (1 + 1e-9)
    assert kstest(places.numpy() + 0.5, "uniform").pvalue > 1e-9
    assert torch.equal(state["w"], now)


def test_a_step_is_the_mixed_point_less_the_noised_gradient_at_the_released_weights() -> None:
    """Twice, so that the state carries over; with decay and momentum of released weights. Noise 0 and a narrow uniform."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3).double()
    inputs, targets = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    mixing = ModelMix(width_ratio=1e-9, decay=0.1, momentum=0.5)
    clipping = pg.FlatClipping(max_norm=1e6)
    step = runner(full_batch_plan(8, steps=3, clipping=clipping, mixing=mixing, seed=2), model, LOSS)
    earlier = {name: value.detach().clone() for name, value in model.named_parameters()}
    for _ in range(3):
        now = {name: value.detach().clone() for name, value in model.named_parameters()}
        gradients = loop_gradients(model, LOSS, (inputs, targets))
        release = step.release(*rows(inputs, targets), rate=0.2)
        assert release.weights is not None
        assert release.update is None
        for name, value in release.weights.items():
            middle, gap = (now[name] + earlier[name]) / 2, (earlier[name] - now[name]).abs()
            expected = middle - 0.2 * (gradients[name].mean(0) + 0.1 * now[name]) + 0.5 * (now[name] - earlier[name])
            assert ((value - expected).abs() <= gap / 2 + 1e-6).all()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(release.weights[name])
        earlier = now


@pytest.mark.parametrize("p", [1.0, 25.0])
def test_the_noise_on_the_clipped_sum_is_the_gaussian_plus_the_uniform(p: float) -> None:
    """Its variance is s^2 + W^2 / 12 in every coordinate of every parameter, in units of the sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 1))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    mixing = ModelMix(width_ratio=3.0)
    plan = poisson_plan(clipping=pg.CoordinateClipping(max_norm=2.0, p=p), steps=1, mixing=mixing)
    step = runner(plan, model, lambda m, batch: 0 * m(batch[0])[:, 0])
    release = step.release(*rows(torch.randn(5, 100)), rate=0.01)
    assert release.weights is not None
    wanted = (1.0 * 2.0) ** 2 + (3.0 * 10.0) ** 2 / 12
    for value in release.weights.values():
        if value.numel() > 50:
            sums = value.double() * plan.divisor / 0.01
            assert float(sums.var()) == pytest.approx(wanted, rel=0.05 if value.numel() > 1000 else 0.4)


REFUSED = [
    (
        {"sampling": pg.FixedSizeSampling(batch_size=5, dataset_size=50), "accountant": "rdp"},
        "proven for Poisson sampling",
    ),
    (
        {"sampling": pg.TruncatedPoissonSampling(rate=0.5, divisor=9.0, max_batch_size=9, dataset_size=50)},
        "Poisson sampling",
    ),
    ({"sampling": pg.ShuffledBatches(batch_size=5, dataset_size=50)}, "proven for Poisson sampling"),
    ({"adjacency": "replace_one"}, "not proven under replace_one"),
    ({"clipping": pg.LayerwiseClipping()}, "blocks that only the model counts"),
    (
        {
            "clipping": pg.LayerwiseClipping((1.0, 2.0)),
            "noise": pg.GaussianNoise(multiplier=1.0, allocation="dimension"),
        },
        "same noise in every coordinate",
    ),
    ({"clipping": pg.AutomaticClipping()}, "'flat', 'l2_linf' and 'layerwise'"),
    ({"compression": pg.GradientEmbedding()}, "turns coordinates"),
    ({"thresholds": pg.QuantileThresholds()}, "fixed clipping norms"),
]


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_what_is_not_proven_is_refused(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(pg.RefusedError, match=reason):
        poisson_plan(**changes)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=1e-4),
        lambda p: torch.optim.Adam(p, lr=0.1),
        lambda p: torch.optim.SGD([{"params": q, "lr": 0.1 * (i + 1)} for i, q in enumerate(p)], lr=0.1),
    ],
)
def test_other_optimizers_are_refused(optimizer: object) -> None:
    model = nn.Linear(6, 3)
    data = TensorDataset(torch.randn(20, 6), torch.randint(3, (20,)))
    with pytest.raises(pg.RefusedError, match="mixing needs"):
        pg.make_private(model, optimizer(model.parameters()), data, poisson_plan(), LOSS)  # type: ignore[operator]


def test_a_training_moves_every_parameter_and_a_rate_of_zero_is_refused() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    data = TensorDataset(torch.randn(20, 6), torch.randint(3, (20,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = pg.make_private(model, optimizer, data, poisson_plan(), LOSS)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    batches = private.batches()
    private.step(next(batches))
    for name, value in model.named_parameters():
        assert (value != before[name]).all(), name
        assert value.grad is None
    with pytest.raises(pg.RefusedError, match="use step"):
        private.backward(next(batches))
    optimizer.param_groups[0]["lr"] = 0.0
    batch = private._pending
    assert batch is not None
    charged = private.ledger.count
    with pytest.raises(pg.PrivgradError, match="learning rate is 0"):
        private.step(batch)
    assert private.ledger.count == charged, "refused before anything is charged"


def test_epsilon_falls_with_the_width() -> None:
    found = [poisson_plan(mixing=ModelMix(width_ratio=ratio), steps=20).epsilon() for ratio in (0.1, 0.5, 2.0)]
    assert found[0] > found[1] > found[2]
    assert found[0] <= dataclasses.replace(poisson_plan(steps=20), mixing=None).epsilon()


def to_calibrate(**changes: object) -> Plan:
    """The specification's plan without its width, and fewer steps."""
    stages = {
        "sampling": pg.PoissonSampling(rate=0.03, divisor=1500.0),
        "steps": 100,
        "noise": pg.GaussianNoise(multiplier=0.335),
        "clipping": pg.CoordinateClipping(max_norm=20.0, p=100.0),
        "mixing": ModelMix(width_ratio="calibrate"),
    }
    return poisson_plan(**(stages | changes))


@pytest.mark.parametrize("target", [1.0, 3.0])
def test_the_width_is_calibrated_to_the_smallest_that_keeps_epsilon(target: float) -> None:
    found = to_calibrate().calibrate(target)
    assert found.mixing is not None
    assert found.noise == to_calibrate().noise
    width = float(found.mixing.width_ratio)
    assert found.epsilon() <= target
    assert found.with_width(width / 1.002).epsilon() > target
    assert Plan.from_json(json.loads(json.dumps(found.to_json()))) == found


@settings(deadline=None, max_examples=4)
@given(st.floats(0.01, 2.0), st.integers(2, 50))
def test_epsilon_falls_from_a_width_to_its_multiples(ratio: float, times: int) -> None:
    """Up to what the accountant says that it may overstate."""
    plan = to_calibrate(accountant="rdp")
    assert plan.with_width(times * ratio).epsilon() <= plan.with_width(ratio).epsilon() * 1.02


def test_widths_that_cannot_be_calibrated_are_refused() -> None:
    with pytest.raises(pg.PrivgradError, match=r"the widest gives 0\.\d+; raise noise"):
        to_calibrate(steps=3400).calibrate(0.3)
    with pytest.raises(pg.PrivgradError, match="the noise alone has epsilon"):
        to_calibrate(noise=pg.GaussianNoise(multiplier=5.0)).calibrate(3.0)
    with pytest.raises(pg.PrivgradError, match="the width follows from epsilon"):
        to_calibrate(noise=pg.GaussianNoise()).calibrate(3.0)
    with pytest.raises(pg.PrivgradError, match="width_ratio is not set"):
        to_calibrate().epsilon()
    with pytest.raises(pg.PrivgradError, match="width_ratio is 'calibrated'; expected"):
        ModelMix(width_ratio="calibrated")  # type: ignore[arg-type]


def test_the_commands_calibrate_the_width(capsys: pytest.CaptureFixture[str]) -> None:
    changed = ["--set", "plan.steps=100", "--set", "plan.mixing.width_ratio=calibrate", "--set", "privacy.epsilon=2"]
    assert run(["calibrate", str(FIXTURE), *changed, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["noise_multiplier"] == 0.335
    assert 1.99 < found["epsilon"] <= 2
    assert run(["epsilon", str(FIXTURE), *changed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epsilon"] == found["epsilon"]
    assert (
        run(
            [
                "epsilon",
                str(FIXTURE),
                *changed[:2],
                "--set",
                f"plan.mixing.width_ratio={found['width_ratio']}",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["epsilon"] == found["epsilon"]
    assert run(["calibrate", str(FIXTURE)]) == 2
    assert "nothing to calibrate" in capsys.readouterr().err

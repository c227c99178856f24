"""Statistics of private records: what a unit contributes, what is released, and what it is charged."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.files import read_json
from privgrad.gradients.contract import Fold
from privgrad.gradients.moments import Watched, unit_moments
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.states import ClippedSum, Consumer
from privgrad.mechanism.step import StepRunner
from privgrad.nn import PrivateBatchNorm, convert
from privgrad.privacy.accounting import Precision
from tests.helpers import as_vector, full_batch_plan, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)
SLOT = "statistics/side"
HUGE = 1e6


def network(to: str | None = "private_statistics", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 3))
    return model if to is None else convert(model, to).model


def images(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def plan(count: int = 5, *, multiplier: float = 0.0, statistics: object = None, **stages: object) -> Plan:
    chosen = pg.PrivateStatistics() if statistics is None else statistics
    noise = stages.pop("noise", pg.GaussianNoise(multiplier=multiplier, insecure_seed=3))
    return full_batch_plan(count, steps=40, noise=noise, statistics=chosen, **stages)


def watched(model: nn.Module, mean: float = 0.0, deviation: float = 1.0) -> list[Watched]:
    layers = [module for module in model.modules() if isinstance(module, PrivateBatchNorm | nn.BatchNorm2d)]
    return [
        Watched(m, torch.full_like(m.running_mean, mean), torch.full_like(m.running_mean, deviation)) for m in layers
    ]


def moments(model: nn.Module, batch: tuple[Tensor, Tensor], fold: Fold | None = None) -> Tensor:
    """[units, 2 * channels]."""
    chosen = Fold.identity(len(batch[0])) if fold is None else fold
    return torch.cat(list(unit_moments(model.eval(), LOSS, batch, chosen, watched(model), together=False)))


def side(step: StepRunner, batch: tuple[Tensor, Tensor]) -> tuple[ClippedSum, Tensor]:
    sums = step.clipped_sum(*rows(*batch))
    return sums, sums.values[SLOT]


# What a unit contributes.


def test_a_rows_moments_are_those_of_its_own_activations() -> None:
    model = network().eval()
    inputs, targets = images(3)
    found = moments(model, (inputs, targets))
    first = model[0](inputs)
    deeper = model[3](model[2](model[1](first)))
    parts = [torch.cat([x.mean((2, 3)), x.square().mean((2, 3)) - 1], dim=1) for x in (first, deeper)]
    torch.testing.assert_close(found, torch.cat(parts, dim=1), rtol=1e-5, atol=1e-5)


def test_moments_are_measured_against_what_was_released() -> None:
    model, batch = network().eval(), images(3)
    (found,) = unit_moments(model, LOSS, batch, Fold.identity(3), watched(model, 2.0, 3.0)[:1], together=False)
    scaled = (model[0](batch[0]) - 2.0) / 3.0
    expected = torch.cat([scaled.mean((2, 3)), scaled.square().mean((2, 3)) - 1], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_records_moments_do_not_move_with_the_others() -> None:
    """To the last bit."""
    model, batch = network(), images(5)
    others = (100 * images(5, 2)[0], images(5, 2)[1])
    others[0][0] = batch[0][0]
    found, again = moments(model, batch), moments(model, others)
    assert torch.equal(found[0], again[0])
    assert not torch.equal(found[1], again[1])


@pytest.mark.parametrize("release", [False, True], ids=["the constants", "after a release"])
def test_a_records_gradient_does_not_move_with_the_others(release: bool) -> None:
    """The whole step: with released statistics in the layers, two batches that share one record differ by the others' sum."""
    step = runner(plan(5, multiplier=0.5 if release else 0.0, clipping=pg.FlatClipping(HUGE)), network().eval(), LOSS)
    if release:
        step.release(*rows(*images(5, 7)))
    first, others, more = images(1), images(4, 2), (100 * images(4, 3)[0], images(4, 3)[1])

    def summed(*batches: tuple[Tensor, Tensor]) -> Tensor:
        return as_vector(step.clipped_sum(*rows(*(torch.cat(leaves) for leaves in zip(*batches, strict=True)))))

    alone = summed(first)
    torch.testing.assert_close(summed(first, others) - summed(others), alone, rtol=1e-4, atol=1e-4)
    scale = float(summed(more).abs().max())
    torch.testing.assert_close(summed(first, more) - summed(more), alone, rtol=1e-4, atol=1e-5 * scale)


def test_a_model_that_vmap_cannot_run_is_measured_row_by_row() -> None:
    class ByValue(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            return inputs if float(inputs.sum()) > 0 else inputs + 0.0

    model, batch = network(), images(4)
    stubborn = nn.Sequential(ByValue(), *model)
    torch.testing.assert_close(moments(stubborn, batch), moments(model, batch), rtol=1e-5, atol=1e-5)


def test_an_exception_for_one_record_does_not_move_the_others_moments() -> None:
    """Under vmap a matrix that cannot be factored raises for all rows, and a model that catches it takes all another way."""

    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normalization, self.layer = PrivateBatchNorm(4), nn.Linear(4, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            try:
                factors = torch.linalg.cholesky(inputs.view(-1, 2, 2))
            except torch.linalg.LinAlgError:
                factors = 5 - inputs.view(-1, 2, 2)
            outputs: Tensor = self.layer(self.normalization(factors.flatten(1)))
            return outputs

    model = Factored()
    inputs, labels = torch.tensor([[2.0, 0.0, 0.0, 2.0]]).repeat(6, 1), torch.zeros(6, dtype=torch.int64)
    with_another = torch.cat([inputs[:5], -inputs[:1]])
    torch.testing.assert_close(moments(model, (with_another, labels))[:5], moments(model, (inputs, labels))[:5])


def test_a_units_rows_are_averaged_before_the_clip() -> None:
    """A user's records, or an example's views."""
    model, batch = network(), images(5)
    fold = Fold(torch.tensor([0, 0, 0, 2, 2]), 3, torch.tensor([1 / 3] * 3 + [0.5] * 2))
    each, units = moments(model, batch), moments(model, batch, fold)
    expected = torch.stack([each[:3].mean(0), torch.zeros(24), each[3:].mean(0)])
    torch.testing.assert_close(units, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [None, pg.RandomGroups(1)], ids=["each unit", "groups"])
def test_one_clip_over_all_layers_bounds_what_a_unit_adds(groups: pg.RandomGroups | None) -> None:
    bounded = plan(1, statistics=pg.PrivateStatistics(max_norm=0.7), groups=groups)
    batch = images(1)
    sums, added = side(runner(bounded, network(), LOSS), (1e3 * batch[0], batch[1]))
    assert float(added.norm()) == pytest.approx(0.7, rel=1e-5)
    part = next(part for part in sums.parts if part.consumer is Consumer.STATISTICS)
    assert sums.distance(part) == (0.7 if groups is None else 1.4)


def test_the_vector_is_scaled_by_the_number_of_channels() -> None:
    """Its squared norm is a mean over channels, so that one clipping norm suits narrow and wide networks."""
    model, batch = network(), images(1)
    _, added = side(runner(plan(1, statistics=pg.PrivateStatistics(max_norm=HUGE)), model, LOSS), batch)
    torch.testing.assert_close(added, moments(model, batch)[0] / math.sqrt(12), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [None, pg.RandomGroups(3)], ids=["each unit", "groups"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_moments_that_are_not_finite_weigh_nothing(groups: pg.RandomGroups | None, poison: float) -> None:
    model, batch = network(), images(4)
    poisoned = (torch.cat([batch[0], torch.full((1, 2, 6, 6), poison)]), torch.cat([batch[1], torch.tensor([0])]))
    if groups is None:
        _, found = side(runner(plan(4), model, LOSS), poisoned)
        _, expected = side(runner(plan(4), model, LOSS), batch)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    else:  # the poisoned record's group is lost, the others are there
        _, found = side(runner(plan(4, groups=groups), model, LOSS), poisoned)
    assert bool(found.isfinite().all())


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = network(None).train()
    step = runner(plan(4, groups=pg.RandomGroups(2)), model, LOSS)
    step.refresh()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step.clipped_sum(*rows(*images(4)))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


# What is released.


def test_before_the_first_release_mean_is_0_and_variance_1() -> None:
    model = network(None)
    for layer in (model[1], model[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(2.0, 3.0)
    model = convert(model, "private_statistics").model
    runner(plan(), model, LOSS).refresh()
    for layer in (model[1], model[4]):
        assert torch.equal(layer.running_mean, torch.zeros_like(layer.running_mean))
        assert torch.equal(layer.running_var, torch.ones_like(layer.running_var))


def test_without_noise_and_clipping_the_statistics_become_those_of_the_records() -> None:
    """Layer by layer: the first after one release, the second once the first stands still. BatchNorm then agrees."""
    model, twin, batch = network().eval(), network(None), images(50)
    step = runner(plan(50, statistics=pg.PrivateStatistics(max_norm=HUGE, decay=0.0)), model, LOSS)
    step.release(*rows(*batch))
    step.finalize()
    outputs = model[0](batch[0])
    torch.testing.assert_close(model[1].running_mean, outputs.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model[1].running_var, outputs.var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-5)
    step.release(*rows(*batch))
    step.finalize()
    twin[7].eval()
    torch.testing.assert_close(model(batch[0]), twin(batch[0]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("groups", [None, pg.RandomGroups(8)], ids=["each unit", "groups"])
def test_clipped_and_noised_they_come_near(groups: pg.RandomGroups | None) -> None:
    """From far off: means of 5, deviations of 0.5 and 3."""
    model, count = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)), 400
    if groups is None:
        model = convert(model, "private_statistics").model
    with torch.no_grad():
        model[0].weight.copy_(torch.diag(torch.tensor([0.5, 3.0])))
        model[0].bias.copy_(torch.tensor([5.0, 5.0]))
    torch.manual_seed(0)
    batch = (torch.randn(count, 2), torch.zeros(count, dtype=torch.long))
    statistics, multiplier = pg.PrivateStatistics(max_norm=1.0, decay=0.9), 0.5 if groups is None else 0.02
    chosen = plan(count, multiplier=multiplier, statistics=statistics, groups=groups)
    step = runner(chosen, model.train(), LOSS)
    for _ in range(40):
        step.release(*rows(*batch))
    step.finalize()
    torch.testing.assert_close(model[1].running_mean, torch.tensor([5.0, 5.0]), rtol=0, atol=1.0)
    assert (model[1].running_var.sqrt() / torch.tensor([0.5, 3.0])).log().abs().max() < 0.5


def test_the_divisor_is_the_constant_never_the_realised_size() -> None:
    """Five records where ten are expected: the moments come out at half."""
    model, batch = network(), images(5)
    step = runner(plan(10, statistics=pg.PrivateStatistics(max_norm=HUGE, decay=0.0)), model, LOSS)
    step.release(*rows(*batch))
    step.finalize()
    half = model[0](batch[0]).sum((0, 2, 3)) / 16 / 10
    torch.testing.assert_close(model[1].running_mean, half, rtol=1e-4, atol=1e-5)


def test_what_is_installed_has_the_noise_that_is_claimed() -> None:
    """Empty batches: the release is noise alone, of z / sqrt(share) * R, in units of sqrt(channels) / divisor."""
    noise = pg.GaussianNoise(multiplier=2.0, side_share=0.2)
    chosen = plan(50, noise=noise, statistics=pg.PrivateStatistics(max_norm=0.7, decay=0.0))
    model = nn.Sequential(nn.Linear(3, 2000), nn.BatchNorm1d(2000), nn.Linear(2000, 2))
    model = convert(model, "private_statistics").model
    step = runner(dataclasses.replace(chosen, steps=1), model, LOSS)
    step.release(*rows(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)))
    step.finalize()
    expected = 2.0 / math.sqrt(0.2) * 0.7 * math.sqrt(2000) / 50
    assert float(model[1].running_mean.std()) == pytest.approx(expected, rel=0.08)
    assert abs(float(model[1].running_mean.mean())) < 4 * expected / math.sqrt(2000)


def test_the_variance_is_floored_and_moves_at_most_tenfold() -> None:
    model, batch = network(), images(20)
    with torch.no_grad():
        model[0].weight[0] = 0.0
        model[0].bias[0] = 0.0
        model[0].weight[1] *= 1e3
    step = runner(plan(20, statistics=pg.PrivateStatistics(max_norm=HUGE, decay=0.0, floor=0.05)), model, LOSS)
    step.release(*rows(*batch))
    step.finalize()
    assert float(model[1].running_var[0]) == pytest.approx(0.1)
    assert float(model[1].running_var[1]) == pytest.approx(10.0)
    step.release(*rows(*batch))
    step.finalize()
    assert float(model[1].running_var[0]) == pytest.approx(0.05)


def test_the_average_gives_the_nth_release_at_least_3_in_n_plus_2() -> None:
    """So that the constants at the start are soon forgotten; later ones weigh 1 - decay."""
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2))
    model = convert(model, "private_statistics").model
    step = runner(plan(2, statistics=pg.PrivateStatistics(max_norm=HUGE, decay=0.4)), model, LOSS)
    expected = 0.0
    for number, value in enumerate([1.0, 3.0, -2.0, 5.0]):
        inputs = torch.tensor([[value - 1], [value + 1]])
        step.release(*rows(inputs, torch.zeros(2, dtype=torch.long)))
        step.finalize()
        keep = min(0.4, number / (number + 3))
        expected = keep * expected + (1 - keep) * value
        assert float(model[0].running_mean) == pytest.approx(expected, rel=1e-4)


# What it is charged.


@given(
    share=st.floats(0.01, 0.9),
    multiplier=st.floats(0.3, 20.0),
    norm=st.floats(0.1, 10.0),
    every=st.integers(1, 3),
    groups=st.sampled_from([None, pg.RandomGroups(2)]),
    thresholds=st.sampled_from([None, pg.QuantileThresholds()]),
    layerwise=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_joint_multiplier_of_every_step_is_the_plans(
    share: float, multiplier: float, norm: float, every: int, groups: Any, thresholds: Any, layerwise: bool
) -> None:
    """1/z^2 = 1/z_gradient^2 + 1/z_statistics^2 (+ 1/z_thresholds^2); where nothing else is released the gradient has it all."""
    noise = pg.GaussianNoise(multiplier=multiplier, side_share=share)
    clipping = pg.LayerwiseClipping(0.3) if layerwise else pg.FlatClipping(0.3)
    stages = {"groups": groups, "thresholds": thresholds, "clipping": clipping, "noise": noise}
    chosen = plan(4, statistics=pg.PrivateStatistics(max_norm=norm, every=every), **stages)
    step = runner(chosen, network(), LOSS)
    for number in range(1, 4):
        sums = step.clipped_sum(*rows(*images(4)))
        scales = noise.scales(sums)
        releases = (number - 1) % every == 0
        assert any(part.consumer is Consumer.STATISTICS for part in sums.parts) == releases
        together = dict.fromkeys(Consumer, 0.0)
        for part in sums.parts:
            moved = (2 if groups else 1) * (norm if part.consumer is Consumer.STATISTICS else part.bound.radius)
            together[part.consumer] += (moved / scales[part.name]) ** 2
        sides = releases + (thresholds is not None)
        assert sum(together.values()) == pytest.approx(multiplier**-2, rel=1e-9)
        if releases:
            assert together[Consumer.STATISTICS] == pytest.approx(share / sides / multiplier**2, rel=1e-9)
        assert together[Consumer.UPDATE] == pytest.approx((1 - share * (sides > 0)) / multiplier**2, rel=1e-9)
        step.release(*rows(*images(4)))
    assert step.ledger.record.events == chosen.events(3)


@given(share=st.floats(0.01, 0.9), gradient=st.floats(0.5, 8.0), every=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_releases_never_lower_epsilon(share: float, gradient: float, every: int) -> None:
    """At equal noise on the gradient; and at an equal joint multiplier epsilon is that of the plan without them."""
    sampling = pg.PoissonSampling(rate=0.02, divisor=20.0)
    alone = Plan(sampling=sampling, steps=30, noise=pg.GaussianNoise(multiplier=gradient))
    joint = 1 / math.sqrt(gradient**-2 * (1 + share / (1 - share)))
    noise = pg.GaussianNoise(multiplier=joint, side_share=share)
    both = Plan(sampling=sampling, steps=30, noise=noise, statistics=pg.PrivateStatistics(every=every))
    flat = Plan(sampling=sampling, steps=30, noise=pg.GaussianNoise(multiplier=joint))
    assert both.epsilon(precision=Precision.COARSE) >= alone.epsilon(precision=Precision.COARSE)
    assert both.event() == flat.event()


def test_the_plan_survives_its_json_and_the_certificate_says_what_is_charged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    chosen = Plan(
        sampling=pg.PoissonSampling(expected_batch_size=20),
        steps=4,
        statistics=pg.PrivateStatistics(max_norm=0.5, every=2),
        noise=pg.GaussianNoise(multiplier=2.0, side_share=0.1),
    )
    assert Plan.from_json(chosen.to_json()) == chosen
    model = network()
    training = pg.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(*images(60)),
        chosen,
        LOSS,
        directory=tmp_path / "run",
        quiet=True,
    )
    training.fit()
    certificate = read_json(tmp_path / "run" / "certificate.json")
    said = certificate["mechanism"]["statistics"]
    assert "noised first and second moments" in said
    assert "at most 0.5" in said
    assert said.endswith("part of the release, and of its noise multiplier, every 2 steps")
    assert certificate["plan"]["statistics"]["every"] == 2
    assert training.run.verify().mismatches == []
    state = training.private.runner.states["statistics"]
    assert int(state["releases"]) == 2
    assert torch.equal(model[1].running_mean, state["1.running_mean"])


def test_a_resumed_run_goes_on_with_the_released_statistics(tmp_path: Path) -> None:
    def training(*, resume: bool) -> pg.Trainer:
        model = network(seed=5 if resume else 0)
        chosen = Plan(
            sampling=pg.PoissonSampling(expected_batch_size=20),
            steps=6,
            statistics=pg.PrivateStatistics(),
            noise=pg.GaussianNoise(multiplier=1.0, insecure_seed=1),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data, directory = TensorDataset(*images(60)), tmp_path / "run"
        return pg.Trainer(model, optimizer, data, chosen, LOSS, directory=directory, quiet=True, resume=resume)

    begun = training(resume=False)
    batches = begun.private.batches()
    for _ in range(3):
        begun.private.step(next(batches))
    begun._save()
    begun.private.ledger.close()
    before = begun.private.runner.states["statistics"]
    resumed = training(resume=True)
    after = resumed.private.runner.states["statistics"]
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    resumed.fit()
    assert int(resumed.private.runner.states["statistics"]["releases"]) == 6


# What is refused.


def test_what_has_no_proof_or_no_layer_is_refused_in_words() -> None:
    with pytest.raises(pg.RefusedError, match=r"mixing is not proven beside statistics of the private records"):
        plan(mixing=pg.ModelMix(), multiplier=1.0)
    with pytest.raises(pg.PrivgradError, match=r"no layer that takes statistics.*private_statistics"):
        runner(plan(), network("group"), LOSS).clipped_sum(*rows(*images(5)))
    with pytest.raises(pg.PrivgradError, match=r"PrivateBatchNorm.*kind = 'private'"):
        runner(full_batch_plan(5), network(), LOSS)
    for wrong in ({"max_norm": 0.0}, {"every": 0}, {"decay": 1.0}, {"floor": 0.0}, {"max_norm": math.nan}):
        with pytest.raises(pg.PrivgradError, match=f"statistics.{next(iter(wrong))}"):
            pg.PrivateStatistics(**wrong)  # type: ignore[arg-type]


def test_batch_norm_in_train_mode_stays_refused_where_each_unit_is_clipped() -> None:
    model = network(None).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen = Plan(
        sampling=pg.PoissonSampling(expected_batch_size=20),
        steps=2,
        statistics=pg.PrivateStatistics(),
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    with pytest.raises(pg.RefusedError, match="BatchNorm"):
        pg.make_private(model, optimizer, TensorDataset(*images(60)), chosen, LOSS)


class Streaming(nn.Module):
    """At inference it keeps what it saw for the next call, as a recurrent layer may; vmap cannot run it."""

    def __init__(self) -> None:
        super().__init__()
        self.state = 0.0

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            return inputs
        before = self.state
        self.state = 0.5 * before + float(inputs.sum())
        return inputs + before


def test_a_model_that_remembers_records_in_eval_mode_is_refused() -> None:
    """It is in train mode when it is searched for coupling, and records are measured in eval mode: one moved them by 6 R."""
    model = nn.Sequential(Streaming(), PrivateBatchNorm(3), nn.Linear(3, 2))
    plan = pg.Plan(
        sampling=pg.FullBatch(), steps=1, statistics=pg.PrivateStatistics(), noise=pg.GaussianNoise(multiplier=1.0)
    )
    dataset = TensorDataset(torch.randn(6, 3), torch.zeros(6, dtype=torch.int64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(pg.RefusedError, match="state would take up the records"):
        pg.make_private(model, optimizer, dataset, plan, pg.supervised(nn.functional.cross_entropy))
    assert model.training
    assert model[0].state == 0.0

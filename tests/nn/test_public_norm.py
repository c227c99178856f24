"""Normalization that costs no privacy: every record by itself, with statistics of public data where it needs some."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.gradients.contract import Engine, Fold, Identity, Request, Sums, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.nn.convert import NORMALIZATIONS, convert
from privgrad.nn.models import build_model
from tests.helpers import as_vector, full_batch_plan, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)
BY_ITSELF = [*sorted(set(NORMALIZATIONS) - {"batch", "test_batch"}), "frozen"]


def network(normalization: str = "batch", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 3))
    for layer in (model[1], model[4]):
        nn.init.normal_(layer.weight, 1.0, 0.3)
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return model if normalization == "batch" else convert(model, normalization).model


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 2, 6, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def plan(**stages: object) -> pg.Plan:
    return full_batch_plan(5, steps=4, statistics=pg.PublicStatistics(rows=16), **stages)


class FirstOnly:
    """A rule that lets the first unit through and no other, and keeps its norm."""

    separable = False

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        self.norm = norms[0].clone()
        weights = torch.zeros_like(norms)
        weights[0] = 1.0
        return weights


def first_gradient(model: nn.Module, engine: Engine, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    shapes = {name: parameter.shape for name, parameter in trainable(model).items()}
    sink, rule = Sums(shapes, torch.device("cpu"), torch.float32), FirstOnly()
    fold = Fold.identity(len(batch[0]))
    engine.accumulate(model, LOSS, Request(batch, fold, Identity(shapes), [tuple(shapes)], rule, sink))
    return as_vector(sink), rule.norm


@pytest.mark.parametrize("normalization", BY_ITSELF)
@pytest.mark.parametrize("engine", [OnePassEngine, lambda: VmapEngine(2**30)], ids=["onepass", "vmap"])
def test_a_records_gradient_does_not_move_with_the_others(normalization: str, engine: type[Engine]) -> None:
    """To the last bit, in train mode, with public or released statistics installed."""
    model = network(normalization).train()
    if normalization == "public_batch":
        runner(plan(), model, LOSS, public=images(16, 9)).refresh()
    if normalization == "private_statistics":
        released = full_batch_plan(5, noise=pg.GaussianNoise(multiplier=1.0), statistics=pg.PrivateStatistics())
        step = runner(released, model, LOSS)
        step.release(*rows(*images(5, 4)))
        step.finalize()
    inputs, targets = images(5, 1)
    others, other_targets = images(5, 2)
    others, other_targets = 100 * others, other_targets
    others[0], other_targets[0] = inputs[0], targets[0]
    first, norm = first_gradient(model, engine(), (inputs, targets))
    again, same_norm = first_gradient(model, engine(), (others, other_targets))
    assert torch.equal(first, again)
    assert torch.equal(norm, same_norm)
    assert first.any()


def test_the_statistics_are_those_of_the_public_batch_at_the_weights_of_the_step() -> None:
    """BatchNorm in train mode on the public batch gives the same outputs as the converted network with its statistics."""
    model, twin = network("public_batch"), network("batch")
    public = images(16, 9)
    step = runner(plan(), model, LOSS, public=public)
    for move in (0.0, 0.5):
        with torch.no_grad():
            model[0].weight += move
            twin[0].weight += move
        step.refresh()
        torch.testing.assert_close(model(public[0]), twin.train()(public[0]), rtol=1e-4, atol=1e-5)
        assert model.training


def test_a_channel_that_is_dead_on_public_data_is_floored() -> None:
    model = network("public_batch")
    with torch.no_grad():
        model[0].weight[3] = 0.0
    step = runner(full_batch_plan(5, statistics=pg.PublicStatistics(floor=0.25)), model, LOSS, public=images(16, 9))
    step.refresh()
    assert float(model[1].running_var[3]) == 0.25


def test_private_steps_leave_the_statistics_alone_and_the_end_has_its_own() -> None:
    model = network("public_batch")
    step = runner(plan(noise=pg.GaussianNoise(multiplier=1.0)), model, LOSS, public=images(16, 9))
    step.release(*rows(*images(5, 1)))
    kept = model[1].running_mean.clone()
    step.release(*rows(*(1e3 * leaf for leaf in images(5, 2)[:1]), images(5, 2)[1]))
    assert torch.equal(model[1].running_mean, kept), "the weights did not move, so the statistics do not either"
    with torch.no_grad():
        model[0].bias += 3.0
    step.finalize()
    torch.testing.assert_close(model[1].running_mean, kept + 3.0, rtol=1e-4, atol=1e-4)


def test_every_few_steps_is_every_few_steps() -> None:
    model = network("public_batch")
    noise = pg.GaussianNoise(multiplier=1.0)
    lazy = full_batch_plan(5, steps=4, noise=noise, statistics=pg.PublicStatistics(every=2))
    step = runner(lazy, model, LOSS, public=images(16, 9))
    seen = []
    for _ in range(4):
        step.release(*rows(*images(5, 1)))
        seen.append(float(model[1].running_mean[0]))
        with torch.no_grad():
            model[0].bias += 1.0
    assert seen[0] == seen[1] != seen[2] == seen[3]


def test_batch_norm_in_groups_gets_public_statistics_for_inference(tmp_path: Path) -> None:
    """In training it has its group's; the stored model has the public batch's at the final weights."""
    torch.manual_seed(0)
    data, public = TensorDataset(*images(60, 1)), images(16, 9)
    model = network()
    for layer in (model[1], model[4]):
        layer.reset_running_stats()
    noise = pg.GaussianNoise(multiplier=1.0)
    stages = {"groups": pg.RandomGroups(2), "statistics": pg.PublicStatistics(rows=16), "noise": noise}
    training = pg.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        data,
        pg.Plan(sampling=pg.PoissonSampling(expected_batch_size=20), steps=3, **stages),
        LOSS,
        directory=tmp_path / "run",
        public=public,
        quiet=True,
    )
    training.fit()
    expected = model[0](public[0]).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_batch_norm_that_would_have_no_statistics_is_refused_before_the_training(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    grouped = pg.Plan(
        sampling=pg.PoissonSampling(expected_batch_size=20),
        steps=3,
        groups=pg.RandomGroups(2),
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(pg.PrivgradError, match=r"2 would have no statistics at inference.*public_batch"):
        pg.Trainer(model, optimizer, TensorDataset(*images(60, 1)), grouped, LOSS, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(pg.PrivgradError, match=r"PublicBatchNorm.*add plan.statistics"):
        runner(full_batch_plan(5), network("public_batch"), LOSS)
    with pytest.raises(pg.RefusedError, match="needs public data"):
        runner(plan(), network("public_batch"), LOSS)
    with pytest.raises(pg.PrivgradError, match="no layer that takes statistics"):
        runner(plan(), network("group"), LOSS, public=images(16, 9)).refresh()
    endless = images(16, 9)
    endless[0][0] = math.inf
    with pytest.raises(pg.PrivgradError, match="statistics that are not finite"):
        runner(plan(), network("public_batch"), LOSS, public=endless).refresh()
    with pytest.raises(pg.PrivgradError, match="rows"):
        pg.PublicStatistics(rows=1)


@pytest.mark.parametrize("normalization", ["frozen", "public_batch"])
def test_what_a_layer_had_moves_over(normalization: str) -> None:
    before = network()
    inputs = images(4, 3)[0]
    expected = before.eval()(inputs)
    weight = before[1].weight
    model = convert(before, normalization).model.train()
    assert model[1].weight is weight
    torch.testing.assert_close(model(inputs), expected)
    assert model.state_dict().keys() == {k for k in network().state_dict() if "num_batches" not in k}


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet20"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_reference_models_take_every_normalization(name: str, normalization: str) -> None:
    if (name, normalization) in (("mlp", "instance"), ("lenet5", "instance")):
        with pytest.raises(pg.PrivgradError, match="would erase BatchNorm1d's features"):
            build_model(name, (1, 16, 16), 10, {"normalization": normalization})
        return
    torch.manual_seed(0)
    model = build_model(name, (1, 16, 16), 10, {"normalization": normalization})
    assert model(torch.randn(3, 1, 16, 16)).shape == (3, 10)
    probe = pg.nn.SyntheticProbe.like((torch.zeros(1, 1, 16, 16), torch.zeros(1).long()))
    assert bool(pg.nn.find_coupling(model, LOSS, probe)) == (normalization in ("batch", "test_batch"))

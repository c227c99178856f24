"""Batch Clipping: what a group's vector is, and that groups do not speak to each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.gradients.contract import Fold
from privgrad.mechanism.groups import RandomGroups
from privgrad.mechanism.randomness import source
from tests.helpers import as_vector, full_batch_plan, loop_gradients, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)


class Fixed(RandomGroups):
    """Groups that a test chooses."""

    def assign(self, fold: Fold, source: object) -> Fold:
        return Fold(torch.tensor(self.chosen), self.count)  # type: ignore[attr-defined]


def fixed(*chosen: int, **options: object) -> RandomGroups:
    groups = Fixed(max(chosen) + 1, **options)  # type: ignore[arg-type]
    object.__setattr__(groups, "chosen", chosen)
    return groups


def normalised() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3))


def images(count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 1, 6, 6), torch.randint(3, (count,))


def test_groups_of_one_example_are_individual_clipping() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3))
    batch = images(6)
    grouped = runner(full_batch_plan(6, groups=fixed(*range(6))), model, LOSS).clipped_sum(*rows(*batch))
    alone = runner(full_batch_plan(6), model, LOSS).clipped_sum(*rows(*batch))
    torch.testing.assert_close(as_vector(grouped), as_vector(alone), rtol=1e-6, atol=1e-6)


def test_one_group_is_the_clipped_gradient_of_the_batch() -> None:
    model = normalised()
    batch = images(8)
    sums = runner(full_batch_plan(8, groups=fixed(*[0] * 8)), model, LOSS).clipped_sum(*rows(*batch))
    nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.cat([value.flatten() for value in gradients.values() if value is not None]).norm()
    for name, gradient in gradients.items():
        assert gradient is not None
        torch.testing.assert_close(sums.values[name], gradient / norm.clamp(min=1.0), rtol=1e-5, atol=1e-6)


def test_a_group_does_not_see_the_others() -> None:
    """BatchNorm's buffers are as they were, before each group and after the step; another group changes nothing."""
    model = normalised()
    before = {name: value.clone() for name, value in model.named_buffers()}
    inputs, labels = images(8)
    chosen = fixed(0, 1, 0, 1, 0, 1, 0, 1)
    both = as_vector(runner(full_batch_plan(8, groups=chosen), model, LOSS).clipped_sum(*rows(inputs, labels)))
    first = runner(full_batch_plan(4, groups=fixed(0, 0, 0, 0)), model, LOSS).clipped_sum(
        *rows(inputs[::2], labels[::2])
    )
    second = runner(full_batch_plan(4, groups=fixed(0, 0, 0, 0)), model, LOSS).clipped_sum(
        *rows(inputs[1::2], labels[1::2])
    )
    torch.testing.assert_close(both, as_vector(first) + as_vector(second))
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_a_group_of_one_does_not_crash_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    batch = (torch.randn(3, 4), torch.randint(3, (3,)))
    sums = runner(full_batch_plan(3, groups=fixed(0, 1, 1)), model, LOSS).clipped_sum(*rows(*batch))
    assert as_vector(sums).isfinite().all()
    assert as_vector(sums).abs().sum() > 0


def test_empty_groups_and_an_empty_batch_contribute_nothing() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    inputs, labels = images(2)
    sums = runner(full_batch_plan(50, groups=RandomGroups(40)), model, LOSS).clipped_sum(*rows(inputs, labels))
    assert 0 < float(as_vector(sums).norm()) <= 2.0 + 1e-6
    step = runner(full_batch_plan(50, groups=RandomGroups(40)), model, LOSS)
    assert step.release(None, Fold.identity(0)).divisor == 40.0


def test_local_steps_are_the_change_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    batch = images(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = full_batch_plan(4, groups=fixed(0, 0, 0, 0, local_steps=3, local_rate=0.05), clipping=pg.FlatClipping(1e6))
    sums = runner(plan, model, LOSS).clipped_sum(*rows(*batch))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), "the weights move by the release only"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(sums.values[name], before[name] - value, rtol=1e-4, atol=1e-6)


def test_units_draw_groups_independently_and_uniformly() -> None:
    draws = torch.stack(
        [RandomGroups(4).assign(Fold.identity(50), source(7, "groups", "").at(step)).index for step in range(400)]
    )
    counts = torch.stack([(draws == group).float().mean(0) for group in range(4)])
    assert (counts - 0.25).abs().max() < 0.11
    together = (draws[:, :1] == draws[:, 1:]).float().mean()
    assert together == pytest.approx(0.25, abs=0.02)
    with_one_less = RandomGroups(4).assign(Fold.identity(49), source(7, "groups", "").at(1)).index
    assert torch.equal(with_one_less, draws[1][:49]), "the last unit's presence moves no other"


def test_a_users_records_stay_in_one_group() -> None:
    fold = Fold(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    found = RandomGroups(5).assign(fold, source(3, "groups", "").at(1)).index
    assert len({*found[:3].tolist()}) == 1
    assert len({*found[4:].tolist()}) == 1


def test_training_with_batch_norm_moves_no_buffer() -> None:
    model = normalised()
    before = {name: value.clone() for name, value in model.named_buffers()}
    inputs, labels = images(64)
    plan = pg.Plan(
        sampling=pg.PoissonSampling(expected_batch_size=32, dataset_size=64),
        steps=4,
        groups=RandomGroups(4),
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    private = pg.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), TensorDataset(inputs, labels), plan, LOSS
    )
    for batch in private.batches():
        private.step(batch)
    assert private.spent().steps == 4
    for name, value in model.named_buffers():
        assert torch.equal(value, before[name]), name


def test_epsilon_of_groups_is_that_of_twice_the_distance() -> None:
    """z is s / 2C already: at equal z a grouped plan costs what an ungrouped one does."""
    sampling = pg.PoissonSampling(expected_batch_size=32, dataset_size=1000)

    def spent(**stages: object) -> float:
        return pg.Plan(sampling=sampling, steps=50, noise=pg.GaussianNoise(multiplier=1.1), **stages).epsilon()  # type: ignore[arg-type]

    assert spent(groups=RandomGroups(4)) == spent()
    assert spent(groups=RandomGroups(4)) == spent(groups=RandomGroups(4), clipping=pg.LayerwiseClipping(max_norm=0.3))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, r"groups\.count is not given"),
        ({"count": -1}, r"groups\.count is -1"),
        ({"count": 1.5}, r"groups\.count is 1\.5"),
        ({"count": 2, "local_steps": 3}, "belong together"),
        ({"count": 2, "local_rate": 0.1}, "belong together"),
        ({"count": 2, "local_steps": 2, "local_rate": -1.0}, "local_rate is -1"),
    ],
)
def test_wrong_groups_are_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(pg.PrivgradError, match=says):
        RandomGroups(**arguments)  # type: ignore[arg-type]


def test_more_groups_than_the_batch_has_units_are_refused() -> None:
    sampling = pg.PoissonSampling(expected_batch_size=8, dataset_size=100)
    with pytest.raises(pg.PrivgradError, match="most groups would be empty"):
        pg.Plan(sampling=sampling, steps=1, groups=RandomGroups(9))


def test_the_engine_of_groups_takes_a_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    batch = images(4)
    plan = full_batch_plan(4, groups=fixed(0, 0, 1, 1), clipping=pg.FlatClipping(1e6))
    sums = runner(plan, model, LOSS).clipped_sum(*rows(*batch))
    gradients = loop_gradients(model, LOSS, batch)
    for name, value in gradients.items():
        torch.testing.assert_close(sums.values[name], value[:2].mean(0) + value[2:].mean(0), rtol=1e-5, atol=1e-6)

"""Augmentation multiplicity: a record's views are averaged before they are clipped, so that it counts once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import privgrad as pg
from privgrad.gradients.contract import Fold
from privgrad.mechanism.randomness import source as source_of
from privgrad.training.units import RowUnits, UserUnits, Views

C = 0.5


class Turning(Dataset[tuple[Tensor]]):
    """Each time that a record is read it is another view of it: x, -x, x, ..."""

    def __init__(self, inputs: Tensor, weights: tuple[float, ...]) -> None:
        self.inputs, self.weights, self.reads = inputs, weights, [0] * len(inputs)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor]:
        self.reads[index] += 1
        return (self.inputs[index] * self.weights[self.reads[index] % len(self.weights)],)


def linear_loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """The gradient of a row's loss is the row."""
    outputs: Tensor = model(batch[0])
    return outputs.squeeze(1)


def release(dataset: Dataset[tuple[Tensor]], views: int) -> Tensor:
    model = nn.Linear(3, 1, bias=False)
    plan = pg.Plan(
        sampling=pg.FullBatch(divisor=1.0),
        steps=1,
        clipping=pg.FlatClipping(max_norm=C),
        noise=pg.GaussianNoise(multiplier=0.0),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    probe = (torch.randn(4, 3),)
    private = pg.make_private(model, optimizer, dataset, plan, linear_loss, views=views, probe=probe)
    private.backward(next(private.batches()))
    gradient = model.weight.grad
    assert gradient is not None
    return gradient.squeeze(0)


@pytest.mark.parametrize("views", [1, 2, 4])
def test_the_mean_over_views_is_clipped_once(views: int) -> None:
    inputs = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, -8.0]])
    weights = (1.0, 0.5)
    kept = 1.0 if views == 1 else 0.75
    expected = sum(row * kept * min(1.0, C / (row * kept).norm().item()) for row in inputs)
    dataset = Turning(inputs, weights)
    dataset.reads = [1] * 3
    torch.testing.assert_close(release(dataset, views), expected)
    assert dataset.reads == [1 + views] * 3


def test_views_that_cancel_leave_nothing() -> None:
    assert release(Turning(torch.tensor([[9.0, 9.0, 9.0]]), (1.0, -1.0)), 2).norm() < 1e-6


def test_one_record_moves_the_sum_by_one_clipping_norm_however_many_views() -> None:
    inputs = torch.tensor([[100.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    with_it = release(TensorDataset(inputs), 8)
    without = release(TensorDataset(inputs[1:]), 8)
    assert (1 - 1e-5) * C <= (with_it - without).norm() <= (1 + 1e-6) * C


def test_views_of_users_records_stay_with_their_user() -> None:
    source = source_of(3, "records", "")
    users = torch.tensor([0, 1, 1, 1, 2])
    drawn = Views(UserUnits(users, max_records=2), 3).rows(torch.tensor([0, 1]), source)
    fold: Fold = drawn.fold
    assert fold.units == 2
    assert fold.index.tolist() == [0] * 3 + [1] * 6
    assert fold.scale is not None
    assert fold.scale.tolist() == pytest.approx([1 / 3] * 3 + [1 / 6] * 6)
    assert users[drawn.rows].tolist() == fold.index.tolist()


def test_one_view_changes_nothing() -> None:
    source = source_of(3, "records", "")
    assert Views(RowUnits(5), 1).rows(torch.tensor([1, 4]), source).fold.is_identity


@pytest.mark.parametrize("views", [0, -1, 1.5, True])
def test_a_wrong_number_of_views_is_refused(views: object) -> None:
    with pytest.raises(pg.PrivgradError, match="views is"):
        Views(RowUnits(5), views)  # type: ignore[arg-type]

"""Records: any list of rows at once, the same as row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import privgrad as pg
from privgrad.data.records import Records
from privgrad.errors import PrivgradError
from privgrad.gradients.contract import Fold
from privgrad.training.batches import Drawn, sampled_batches
from privgrad.training.evaluation import DeclaredSplit, accuracy
from tests.data.files import pictures

PIXELS = Records(torch.from_numpy(pictures(50, (3, 6, 5))), torch.arange(50) % 4, mean=(0.1, 0.2, 0.3), std=0.25)
FLOATS = Records(torch.randn(50, 7), torch.arange(50) % 4)


def drawn(rows: list[int]) -> Drawn:
    return Drawn(torch.tensor(rows, dtype=torch.int64), Fold.identity(len(rows)))


@pytest.mark.parametrize("records", [PIXELS, FLOATS])
def test_taking_rows_is_collating_them(records: Records) -> None:
    indices = torch.tensor([3, 49, 0, 3])
    inputs, labels = records.take(indices)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.stack([records[index][0] for index in indices.tolist()]))
    assert labels.tolist() == [records[index][1].item() for index in indices.tolist()]
    whole = next(iter(DataLoader(records, batch_size=50)))
    assert torch.equal(whole[0], records.take(torch.arange(50))[0])
    assert records.take(torch.arange(0))[0].shape == (0, *inputs.shape[1:])


def test_pixels_are_scaled_by_the_stated_constants_and_stay_as_they_are() -> None:
    before = PIXELS.inputs.clone()
    inputs, _ = PIXELS.take(torch.arange(50))
    mean = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64).view(3, 1, 1)
    assert torch.allclose(inputs.double(), (before.double() / 255 - mean) / 0.25, atol=1e-5)
    assert torch.equal(PIXELS.inputs, before)


def test_floats_are_copied_so_that_a_batch_cannot_change_the_data() -> None:
    inputs, labels = FLOATS.take(torch.arange(50))
    inputs.zero_()
    labels.zero_()
    assert FLOATS.inputs.abs().sum() > 0
    assert FLOATS.labels.sum() > 0


def test_rows_that_are_not_there_are_refused() -> None:
    with pytest.raises(IndexError):
        PIXELS[50]
    with pytest.raises(IndexError):
        PIXELS.take(torch.tensor([50]))
    assert torch.equal(PIXELS[-1][0], PIXELS[49][0])
    with pytest.raises(PrivgradError, match="3 inputs and 4 labels"):
        Records(torch.zeros(3, 1), torch.zeros(4, dtype=torch.int64))


class Slow(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """The same records, one by one."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.records[index]


class Shifted(Records):
    """A subclass that changes single records: it must not be passed over."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, label = super().__getitem__(index)
        return inputs + 1, label


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("records", [PIXELS, FLOATS])
def test_sampled_batches_are_the_same_as_row_by_row(records: Records, workers: int) -> None:
    draws = [drawn([4, 9, 2]), drawn([]), drawn([49])]
    fast = [batch.data for batch in sampled_batches(records, iter(draws), workers=workers)]
    slow = [batch.data for batch in sampled_batches(Slow(records), iter(draws))]
    assert fast[1] is None
    for one, other in ((fast[0], slow[0]), (fast[2], slow[2])):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_a_subclass_and_a_collate_function_are_heeded() -> None:
    draw = [drawn([4, 9])]
    shifted = Shifted(FLOATS.inputs, FLOATS.labels)
    (batch,) = sampled_batches(shifted, iter(draw))
    assert torch.equal(batch.data[0], FLOATS.inputs[[4, 9]] + 1)
    (batch,) = sampled_batches(FLOATS, iter(draw), collate_fn=lambda rows: torch.stack([row[0] for row in rows]))
    assert torch.equal(batch.data, FLOATS.inputs[[4, 9]])


@pytest.mark.parametrize(
    "wrap", [Slow, lambda records: records, lambda records: TensorDataset(*records.take(torch.arange(50)))]
)
def test_accuracy_is_the_same_however_the_rows_are_taken(wrap: object) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 4))
    expected = (model(PIXELS.take(torch.arange(50))[0]).argmax(1) == PIXELS.labels).float().mean().item()
    found = accuracy(model, DeclaredSplit(wrap(PIXELS)), batch_size=16)  # type: ignore[operator]
    assert found == pytest.approx(expected)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(PrivgradError, match="is empty"):
        accuracy(nn.Linear(7, 4), DeclaredSplit(Records(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64))))


def test_records_train() -> None:
    plan = pg.Plan(
        sampling=pg.PoissonSampling(expected_batch_size=10, dataset_size=50),
        steps=3,
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    private = pg.make_private(model, optimizer, PIXELS, plan, pg.supervised(nn.functional.cross_entropy))
    for batch in private.batches():
        private.step(batch)
    assert private.spent().steps == 3

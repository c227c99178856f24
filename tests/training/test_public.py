"""Private records that are given as public ones, or as the split on which accuracy is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import privgrad as pg
from privgrad.training.evaluation import DeclaredSplit
from privgrad.training.public import is_made_of, public_rows, share_records
from privgrad.training.trainer import Trainer

INPUTS, CLASSES = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 3
DATA = TensorDataset(INPUTS, CLASSES)
OTHER = TensorDataset(INPUTS + 1, CLASSES)


@pytest.mark.parametrize(
    ("private", "public"),
    [
        (DATA, DATA),
        (DATA, TensorDataset(INPUTS[5:6], CLASSES[5:6])),
        (DATA, (INPUTS[5:6], CLASSES[5:6])),
        (DATA, {"x": INPUTS, "y": CLASSES}),
        (DATA, {"labels": CLASSES, "values": INPUTS}),
        (TensorDataset(CLASSES, INPUTS), (INPUTS, CLASSES)),
        (DATA, Subset(DATA, [3])),
        (Subset(DATA, [1, 3]), Subset(DATA, [3, 5])),
        (Subset(DATA, [1, 3]), ConcatDataset([OTHER, Subset(DATA, [3])])),
        (ConcatDataset([OTHER, DATA]), OTHER),
    ],
)
def test_private_records_are_not_public(private: Dataset[Any], public: Any) -> None:
    with pytest.raises(pg.RefusedError, match=r"the private data set itself|share records"):
        public_rows(public, private, None)


@pytest.mark.parametrize(
    ("private", "public"),
    [(DATA, OTHER), (DATA, (INPUTS + 1, CLASSES)), (Subset(DATA, [1, 3]), Subset(DATA, [0, 2])), (DATA, INPUTS[:, :3])],
)
def test_other_records_are(private: Dataset[Any], public: Any) -> None:
    assert public_rows(public, private, None) is not None


def trainer(directory: Path, split: Dataset[Any], private: Dataset[Any] = DATA) -> Trainer:
    model = nn.Linear(4, 3)
    plan = pg.Plan(sampling=pg.FullBatch(divisor=20.0), steps=1, noise=pg.GaussianNoise(multiplier=1.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = pg.supervised(nn.functional.cross_entropy)
    return Trainer(
        model, optimizer, private, plan, loss, directory=directory, test=DeclaredSplit(split, "public"), quiet=True
    )


NEW = TensorDataset(INPUTS[:1] + 1, CLASSES[:1])


@pytest.mark.parametrize(
    "split",
    [
        DATA,
        Subset(DATA, [2, 3]),
        Subset(Subset(DATA, range(10, 20)), [2, 3]),
        TensorDataset(INPUTS.clone(), CLASSES),
        TensorDataset(INPUTS[:2].clone(), CLASSES[:2]),
        ConcatDataset([NEW, TensorDataset(INPUTS[2:].clone(), CLASSES[2:])]),  # one new record does not make it new
    ],
)
def test_accuracy_is_not_measured_on_private_records(tmp_path: Path, split: Dataset[Any]) -> None:
    with pytest.raises(pg.RefusedError, match="made of private records"):
        trainer(tmp_path / "run", split)
    assert not (tmp_path / "run").exists()


def test_a_record_that_occurs_in_both_by_chance_is_no_reason(tmp_path: Path) -> None:
    twin = TensorDataset(INPUTS[:1].clone(), CLASSES[:1])
    trainer(tmp_path / "run", ConcatDataset([twin, OTHER]), Subset(DATA, range(10))).fit()


def test_a_split_without_records_holds_no_private_one() -> None:
    assert not is_made_of(DATA, TensorDataset(INPUTS[:0], CLASSES[:0]))


def table(rows: int, cells: int, seed: int) -> TensorDataset:
    """Records of which there are so many kinds."""
    drawn = torch.randint(cells, (rows,), generator=torch.Generator().manual_seed(seed))
    kinds = torch.randn(cells, 4, generator=torch.Generator().manual_seed(cells))
    return TensorDataset(kinds[drawn], drawn % 3)


@pytest.mark.parametrize("cells", [3, 30, 300, 3000])
def test_equal_records_of_a_table_of_categories_are_no_reason(cells: int) -> None:
    """The shares of such records that come by chance have a largest one, at about a record for each kind."""
    private = ConcatDataset([table(400, cells, 1), Subset(table(400, cells, 1), [0])])
    for seed in range(2, 12):
        assert not is_made_of(private, table(100, cells, seed))
        assert not share_records(private, table(100, cells, seed).tensors)
    if cells >= 300:  # of a few kinds nobody can tell
        copied = TensorDataset(*(leaf.clone() for leaf in table(400, cells, 1).tensors))
        assert is_made_of(private, copied) == (cells == 3000)

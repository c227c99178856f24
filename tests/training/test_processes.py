"""Data parallelism would release n steps for the price of one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.utils.data import TensorDataset

import privgrad as pg


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def private(model: nn.Module) -> None:
    plan = pg.Plan(sampling=pg.FullBatch(divisor=4.0), steps=1, noise=pg.GaussianNoise(multiplier=1.0))
    data = TensorDataset(torch.randn(4, 3), torch.arange(4) % 2)
    loss = pg.supervised(nn.functional.cross_entropy)
    pg.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), data, plan, loss)


@pytest.mark.parametrize("wrap", [nn.parallel.DistributedDataParallel, nn.DataParallel])
def test_wrapped_models_are_refused(group: None, wrap: type[nn.Module]) -> None:
    with pytest.raises(pg.RefusedError, match=rf"{wrap.__name__}.*give the model itself \(model.module\)"):
        private(nn.Sequential(wrap(nn.Linear(3, 2))))


def test_one_of_several_processes_is_told(group: None) -> None:
    private(nn.Linear(3, 2))
    with (
        mock.patch.object(distributed, "get_world_size", return_value=2),
        pytest.warns(UserWarning, match="one of 2 processes"),
    ):
        private(nn.Linear(3, 2))

"""Norms where single precision loses digits: one record's share of the sum is C at most, whatever cancels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import privgrad as pg
from tests.helpers import as_vector, full_batch_plan, rows, runner


def share(model: nn.Module, *batch: Tensor) -> float:
    """The norm of the sum of what the records of a batch add, with a clipping norm of 1."""
    plan = full_batch_plan(len(batch[0]), clipping=pg.FlatClipping(max_norm=1.0))
    loss = lambda model, batch: model(*batch)  # noqa: E731
    return float(as_vector(runner(plan, model, loss).clipped_sum(*rows(*batch))).double().norm())


def cancelling(positions: int) -> Tensor:
    """Small numbers between two large ones that cancel: added up in order, single precision loses all of them."""
    values = torch.full((positions,), 0.06)
    values[0], values[-1] = 2.0**20, -(2.0**20)
    return values


class Tied(nn.Module):
    """A table that is looked up and multiplied by; a weight for each position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 2)

    def forward(self, tokens: Tensor, weights: Tensor, features: Tensor) -> Tensor:
        looked_up = (self.table(tokens) * weights).sum((1, 2))
        return looked_up + F.linear(features, self.table.weight).sum(1)


@pytest.mark.parametrize("positions", [52, 2002])
def test_a_tied_table(positions: int) -> None:
    weights = torch.zeros(1, positions, 2)
    weights[0, :, 0] = cancelling(positions)
    assert share(Tied(), torch.zeros(1, positions, dtype=torch.long), weights, torch.zeros(1, 2)) <= 1 + 1e-5


class Positions(nn.Module):
    """A linear layer over positions, with a weight for each."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs, bias=False)

    def forward(self, inputs: Tensor, weights: Tensor) -> Tensor:
        return (self.layer(inputs)[:, :, :1] * weights).sum((1, 2))


@pytest.mark.parametrize("size", [300, 1700])
@pytest.mark.parametrize("records", [1, 3])
def test_a_product_over_positions(size: int, records: int) -> None:
    positions = 60 if size == 300 else 200
    inputs, weights = torch.zeros(records, positions, size), torch.zeros(records, positions, 1)
    inputs[:, :, 0] = 1.0
    weights[-1, :, 0] = cancelling(positions)  # the others add nothing
    assert share(Positions(size, size), inputs, weights) <= 1 + 1e-5


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_a_gram_matrix_of_many_equal_numbers(value: float) -> None:
    model = Positions(150_528, 16)
    assert share(model, torch.full((1, 2, 150_528), value), torch.ones(1, 2, 1)) <= 1 + 2e-6


class Deep(nn.Module):
    """Many small gradients, and a large one that the backward pass meets first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.first = nn.Linear(2, 300, bias=False)
        self.layers = nn.ParameterList([nn.Parameter(torch.zeros(4, 4)) for _ in range(layers)])

    def forward(self, inputs: Tensor) -> Tensor:
        total = inputs.new_zeros(len(inputs))
        for weight in self.layers:
            total = total + F.linear(inputs[:, 2:], weight)[:, 0]
        return total + self.first(inputs[:, :2]).sum(1)


def test_the_squares_of_many_weights() -> None:
    inputs = torch.zeros(1, 6)
    inputs[0, 0], inputs[0, 2] = 1.0, 1.4e-5**0.5
    assert share(Deep(1000), inputs) <= 1 + 2e-6

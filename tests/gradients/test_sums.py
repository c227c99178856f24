"""Sums that come to exist with what is added first."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import privgrad as pg
from privgrad.gradients.contract import Sums
from tests.helpers import full_batch_plan, rows, runner

SHAPES = {"weight": torch.Size([3, 2]), "bias": torch.Size([3]), "scale": torch.Size([])}


def make(dtype: torch.dtype = torch.float32) -> Sums:
    return Sums(SHAPES, torch.device("cpu"), dtype)


def test_what_nothing_was_added_to_is_zero_and_slots_keep_their_order() -> None:
    sums = make()
    sums.add("scale", torch.tensor(2.0))
    assert list(sums.values) == list(SHAPES)
    assert {slot: value.shape for slot, value in sums.values.items()} == SHAPES
    assert not sums.values["weight"].any()
    assert sums.values["scale"] == 2


def test_a_sum_is_nobody_elses_memory() -> None:
    value, sums = torch.ones(3, 2), make()
    sums.add("weight", value)
    sums.add("weight", value)
    assert torch.equal(value, torch.ones(3, 2))
    value.zero_()
    assert torch.equal(sums.values["weight"], torch.full((3, 2), 2.0))
    held = sums.values["weight"]
    sums.add("weight", torch.ones(3, 2))
    assert held is sums.values["weight"]


def test_a_sum_of_another_shape_is_not_broadcast() -> None:
    """It was clipped as the vector that it is, and would be as long as many."""
    with pytest.raises(pg.PrivgradError, match=r"a sum of shape \(1,\) for 'bias'; expected \(3,\)"):
        make().add("bias", torch.ones(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_values_and_products_add_up_in_any_order_and_layout(order: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    left, weights, right = (torch.rand(*shape, generator=generator) for shape in ((5, 3), (5,), (5, 2)))
    value = torch.rand(2, 3, generator=generator).T
    sums = make(dtype)
    additions: list[Callable[[], None]] = [
        lambda: sums.add("weight", value),
        lambda: sums.add("weight", value.bfloat16()),
        lambda: sums.add_product("weight", left, weights, right),
    ]
    for place in order:
        additions[place]()
    expected = value.double() + value.bfloat16().double() + (left * weights[:, None]).double().T @ right.double()
    assert sums.values["weight"].dtype == dtype
    assert sums.values["weight"].is_contiguous()
    assert torch.allclose(sums.values["weight"].double(), expected, rtol=1e-6, atol=1e-6)


def test_an_empty_batch_is_noised_in_every_slot_by_the_same_numbers_as_a_full_one() -> None:
    def released(inputs: Tensor) -> dict[str, Tensor]:
        torch.manual_seed(0)
        plan = full_batch_plan(4, noise=pg.GaussianNoise(multiplier=1.0, insecure_seed=7))
        loss = pg.supervised(lambda *pair, **options: 0 * F.cross_entropy(*pair, **options))
        step = runner(plan, torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)), loss)
        labels = torch.zeros(len(inputs), dtype=torch.int64)
        return step.release(*rows(inputs, labels)).update or {}

    empty, full = released(torch.ones(0, 4)), released(torch.ones(4, 4))
    assert list(empty) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert all(bool((value != 0).all()) for value in empty.values())
    assert all(torch.equal(value, full[name]) for name, value in empty.items())

"""Models that ask what a value is take the way that was made for graphs, where it leads to the same."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privgrad.gradients.batched import as_if_compiled
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from tests.gradients.compare import Recording, accumulate, agrees, covered
from tests.gradients.operators import Around, squares
from tests.gradients.test_not_covered import data_dependent


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _unless_compiled(m: nn.Module, x: Tensor) -> Tensor:
    """Attention in short: saves the work for a mask that hides nothing, where it may ask."""
    hidden = x < -1
    if not torch.compiler.is_compiling() and not hidden.any():
        return m.linear(x)
    return m.linear(x.masked_fill(hidden, 0.0))


@pytest.mark.parametrize("fold", [None, Fold(torch.tensor([0, 0, 0, 1, 2]), 3, torch.rand(5))])
@pytest.mark.parametrize("kind", ["flat", "tensor"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_asks_unless_it_is_compiled_is_covered(kind: str, fold: Fold | None, compiled: bool) -> None:
    model: Any = Around(_unless_compiled, linear=nn.Linear(3, 6))
    if compiled:
        model.compile(backend="eager")
    inputs = torch.randn(5, 2, 3)
    assert 0 < (inputs < -1).flatten(1).any(1).sum() < 5
    with torch.compiler.set_stance("force_eager"):
        covered(OnePassEngine(), model, squares, (inputs,), kind=kind, fold=fold)
    assert not torch.compiler.is_compiling()


def test_only_models_that_ask_go_the_way_for_graphs() -> None:
    ways: list[bool] = []

    def noted(m: nn.Module, x: Tensor) -> Tensor:
        ways.append(torch.compiler.is_compiling())
        return m.linear(x)

    covered(OnePassEngine(), Around(noted, linear=nn.Linear(6, 6)), squares, (torch.randn(5, 6),))
    assert ways
    assert not any(ways)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, KeyError])
def test_a_model_that_fails_on_both_ways_leaves_nothing_behind(error: type[Exception]) -> None:
    def fails(m: nn.Module, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            raise error("not for graphs")
        return data_dependent(m, x)

    with pytest.warns(UserWarning, match="control flow"):
        agrees(OnePassEngine(), Around(fails, linear=nn.Linear(6, 6)), squares, (torch.randn(5, 6),))
    assert not torch.compiler.is_compiling()


@pytest.mark.parametrize("asked", [False, True])
def test_a_model_that_fails_later_only_goes_on_more_slowly(asked: bool) -> None:
    """Of longer inputs it asks, whatever way it goes. asked: it went the way for graphs before."""

    def later(m: nn.Module, x: Tensor) -> Tensor:
        return data_dependent(m, x) if x.shape[1] > 2 else _unless_compiled(m, x) if asked else m.linear(x)

    model, engine = Around(later, linear=nn.Linear(6, 6)), OnePassEngine()
    covered(engine, model, squares, (torch.randn(5, 2, 6),))
    with pytest.warns(UserWarning, match=r"does not cover this model \(its forward pass raises RuntimeError\)"):
        agrees(engine, model, squares, (torch.randn(5, 3, 6),))


def test_what_a_model_says_of_a_record_is_not_repeated() -> None:
    def tells(m: nn.Module, x: Tensor) -> Tensor:
        if torch._C._functorch.is_batchedtensor(x):
            raise ValueError("patient 4711")
        return m.linear(x)

    with pytest.warns(UserWarning, match="raises ValueError") as caught:
        agrees(OnePassEngine(), Around(tells, linear=nn.Linear(6, 6)), squares, (torch.randn(5, 6),))
    assert not [warning for warning in caught if "4711" in str(warning.message)]


@pytest.mark.filterwarnings("ignore:the one-pass engine does not cover")
def test_the_way_is_that_of_every_kind_of_request() -> None:
    """Only long inputs ask; those of units come first and do not."""

    def long(m: nn.Module, x: Tensor) -> Tensor:
        return _unless_compiled(m, x) if x.shape[1] > 2 else m.linear(x)

    model, engine = Around(long, linear=nn.Linear(6, 6)), OnePassEngine()
    covered(engine, model, squares, (torch.randn(5, 3, 6),))
    covered(engine, model, squares, (torch.randn(5, 2, 6),), fold=Fold(torch.tensor([0, 0, 1, 1, 1]), 2, torch.rand(5)))
    covered(engine, model, squares, (torch.randn(5, 3, 6),))


@pytest.mark.parametrize("factor", [2.0, float("nan")])
def test_a_way_for_graphs_that_leads_elsewhere_is_not_taken(factor: float) -> None:
    def elsewhere(m: nn.Module, x: Tensor) -> Tensor:
        y = _unless_compiled(m, x)
        return factor * y if torch.compiler.is_compiling() else y

    with pytest.warns(UserWarning, match="does not cover this model"):
        agrees(OnePassEngine(), Around(elsewhere, linear=nn.Linear(6, 6)), squares, (torch.randn(5, 6),))


def test_dropout_is_no_other_way() -> None:
    """Its draws differ from engine to engine, and modules are in the mode in which they were."""

    def dropped(m: nn.Module, x: Tensor) -> Tensor:
        return _unless_compiled(m, m.dropout(x))

    model = Around(dropped, linear=nn.Linear(60, 6), dropout=nn.Dropout(0.5))
    model.linear.eval()
    rule = Recording(torch.ones(5, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulate(OnePassEngine(), model, squares, (torch.randn(5, 60),), rule)
    assert (model.dropout.training, model.linear.training) == (True, False)


def test_threads_take_the_flag_back_together() -> None:
    inside, go = threading.Barrier(2), threading.Event()

    def first() -> None:
        with as_if_compiled():
            inside.wait()
            go.wait()

    other = threading.Thread(target=first)
    other.start()
    with as_if_compiled():
        inside.wait()
    assert torch.compiler.is_compiling()
    go.set()
    other.join()
    assert not torch.compiler.is_compiling()


def test_rows_are_counted_for_chunks_where_counting_fails_midway() -> None:
    """torch.func.grad does not go together with counting; what was counted until then is of use."""

    def own(m: nn.Module, x: Tensor) -> Tensor:
        y = m.linear(x)
        for _ in range(20):
            y = y.tanh()
        return torch.func.grad(lambda z: z.sin().sum())(y)

    model, engine = Around(own, linear=nn.Linear(6, 60)), OnePassEngine(memory=100_000)
    covered(engine, model, squares, (torch.randn(200, 6),))
    assert max(engine._rows_per_chunk.values()) < 50

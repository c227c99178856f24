"""Whatever a forward pass leaves behind, or draws, no record changes what another one adds."""

from __future__ import annotations

import copy
import itertools
import random
import warnings
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.gradients.contract import Engine
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.vmap import VmapEngine
from tests.helpers import as_vector, full_batch_plan, rows, runner

ENGINES: list[type] = [OnePassEngine, VmapEngine, StreamedEngine]


class Base(nn.Module):
    """Every record's gradient is a vector of ones, times a factor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.factor(inputs) * self.layer(inputs).sum(1)

    def factor(self, inputs: Tensor) -> float:
        raise NotImplementedError


class Counting(Base):
    """The sign goes by the number of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def factor(self, inputs: Tensor) -> float:
        self.calls += 1
        return 1.0 if self.calls % 2 else -1.0


class Python(Base):
    """The sign is a coin of Python's."""

    def factor(self, inputs: Tensor) -> float:
        return 1.0 if random.random() < 0.5 else -1.0


class Numpy(Base):
    """The sign is a coin of numpy's."""

    def factor(self, inputs: Tensor) -> float:
        return 1.0 if numpy.random.rand() < 0.5 else -1.0


class Listing(Base):
    """The sign goes by the length of a list that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = {"calls": []}

    def factor(self, inputs: Tensor) -> float:
        self.seen["calls"].append(0)
        return 1.0 if len(self.seen["calls"]) % 2 else -1.0


class LongListing(Listing):
    """A list of more entries than anybody would look into."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"calls": [0] * 20_000}


def engine_of(kind: type) -> Engine:
    """In chunks of five or six records."""
    engines = {
        OnePassEngine: lambda: OnePassEngine(128),
        VmapEngine: lambda: VmapEngine(1024),
        StreamedEngine: StreamedEngine,
    }
    made: Engine = engines[kind]()
    return made


def total(model: nn.Module, engine: Engine, inputs: Tensor) -> Tensor:
    plan = full_batch_plan(len(inputs), clipping=pg.FlatClipping(max_norm=1.0))
    return as_vector(
        runner(plan, model, lambda model, batch: model(batch[0]), engine=engine).clipped_sum(*rows(inputs))
    )


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("model", [Counting, Python, Numpy, Listing, LongListing])
def test_no_record_moves_what_the_others_add(model: type[Base], kind: type) -> None:
    """The number of forward passes follows from the number of records: a record more must not be another coin for all."""
    for seed in range(3):
        totals = []
        for count in range(1, 12):
            random.seed(seed)
            numpy.random.seed(seed)
            torch.manual_seed(0)
            totals.append(total(model(), engine_of(kind), torch.ones(count, 4)))
        moved = [float((one - other).norm()) for one, other in itertools.pairwise(totals)]
        assert max(moved) <= 1 + 1e-5


class Keeping(nn.Module):
    """Keeps what it saw: by name, in a container, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4, bias=False)
        self.kept: dict[str, Tensor] = {}
        self.register_buffer("state", torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        self.last = inputs
        self.register_buffer("first", inputs.detach().sum())
        self.kept["inputs"] = inputs
        self.state = self.state + 1
        return self.layer(inputs).sum(1)


@pytest.mark.parametrize("kind", ENGINES)
def test_nothing_of_the_records_stays_in_the_model(kind: type) -> None:
    model = Keeping()
    total(model, engine_of(kind), torch.ones(5, 4))
    assert not hasattr(model, "last")
    assert set(model.state_dict()) == {"layer.weight", "state"}
    assert model.kept == {}
    assert float(model.state) == 0
    copy.deepcopy(model)  # a tensor of vmap's could not be


with warnings.catch_warnings():
    warnings.simplefilter("ignore")

    @torch.jit.script  # torch functions inside of it are not seen by anybody who watches torch functions
    def scripted_inverse(matrices: Tensor) -> Tensor:
        return torch.linalg.inv(matrices)


def unseen_inverse(matrices: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return torch.linalg.inv(matrices)


class Inverting(nn.Module):
    """All matrices of a batch are inverted at once; where one of them cannot be, all go another way."""

    def __init__(self, inverse: Callable[[Tensor], Tensor] = torch.linalg.inv) -> None:
        super().__init__()
        self.inverse = inverse
        self.layer = nn.Linear(2, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        matrices = inputs.view(-1, 2, 2)
        try:
            inverse = self.inverse(matrices)
        except RuntimeError:  # a LinAlgError, or TorchScript's
            inverse = -10 * torch.linalg.pinv(matrices)
        return self.layer(inverse).sum((1, 2))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("inverse", [torch.linalg.inv, scripted_inverse, unseen_inverse])
def test_an_exception_for_one_record_is_no_other_way_for_all(inverse: Callable[[Tensor], Tensor]) -> None:
    """Under vmap an operator raises for all rows at once."""
    torch.manual_seed(0)
    model = Inverting(inverse)
    inputs = torch.eye(2).flatten() + 0.1 * torch.randn(40, 4)
    without = total(model, OnePassEngine(), inputs)
    with pytest.warns(UserWarning, match="raises an exception.*StreamedEngine takes its place"):
        found = total(model, OnePassEngine(), torch.cat([inputs, torch.zeros(1, 4)]))
    assert float((found - without).norm()) <= 1 + 1e-4
    with pytest.raises(pg.PrivgradError, match="raises an exception for some row"):
        total(model, VmapEngine(), torch.cat([inputs, torch.zeros(1, 4)]))


def test_a_computed_weight_that_changes_in_place_between_two_uses() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4))

        def forward(self, inputs: Tensor) -> Tensor:
            weight = self.weight.clone()
            first = nn.functional.linear(inputs, weight)
            weight.mul_(3)
            return (first.sin() + nn.functional.linear(inputs, weight).cos()).sum(1)

    torch.manual_seed(0)
    model, inputs = Changing(), torch.randn(5, 4)
    with pytest.warns(UserWarning, match="changes in place a weight"):
        found = total(model, OnePassEngine(), inputs)
    torch.testing.assert_close(found, total(model, StreamedEngine(), inputs))


def test_a_computed_weight_that_is_finished_in_place() -> None:
    """As weight standardisation is written: what another weight brings in place counts, too."""

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 1))

        def forward(self, inputs: Tensor) -> Tensor:
            weight = self.weight * 2
            weight.sub_(weight.mean(1, keepdim=True)).add_(self.shift)
            return nn.functional.linear(inputs, weight).sin().sum(1)

    torch.manual_seed(0)
    model, inputs = Standardised(), torch.randn(5, 4)
    torch.testing.assert_close(total(model, OnePassEngine(), inputs), total(model, StreamedEngine(), inputs))


def test_sparse_gradients_of_a_table() -> None:
    torch.manual_seed(0)
    table = nn.Embedding(5, 3, sparse=True)
    model, tokens = nn.Sequential(table, nn.Flatten(1)), torch.tensor([[1, 2], [0, 1], [4, 4]])

    def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(batch[0]).sum(1)

    plan = full_batch_plan(3, clipping=pg.FlatClipping(max_norm=1.0))
    found = [
        as_vector(runner(plan, model, loss, engine=engine).clipped_sum(*rows(tokens)))
        for engine in (OnePassEngine(), StreamedEngine())
    ]
    torch.testing.assert_close(found[0], found[1])


def test_a_hook_on_autograds_graph_has_its_effect() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)  # gradients below the bound: a factor is seen

        def forward(self, inputs: Tensor) -> Tensor:
            outputs: Tensor = self.layer(inputs).tanh()
            if outputs.grad_fn is not None:
                outputs.grad_fn.register_prehook(lambda gradients: tuple(7 * gradient for gradient in gradients))
            return outputs.sum(1)

    torch.manual_seed(0)
    model, inputs = Hooked(), 1e-3 * torch.randn(5, 4)
    with pytest.warns(UserWarning, match="grad_fn"):
        found = total(model, OnePassEngine(), inputs)
    torch.testing.assert_close(found, total(model, StreamedEngine(), inputs))

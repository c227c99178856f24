"""The vmap engine against a loop of batch-of-one backward passes."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import privgrad as pg
from privgrad.gradients.contract import Fold, Identity, LossFn, Request, Sums, trainable
from privgrad.gradients.memory import budget, rows_within
from privgrad.gradients.vmap import VmapEngine
from privgrad.nn.models import LeNet5
from tests.helpers import Direction, as_vector, full_batch_plan, linear_loss, loop_gradients, rows, runner

cross_entropy = pg.supervised(F.cross_entropy)


class Recording:
    """A rule that keeps the norms it was given and answers with given weights."""

    separable = False

    def __init__(self, weights: Tensor | None = None) -> None:
        self.norms: list[Tensor] = []
        self.weights = weights
        self.seen = 0

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        self.norms.append(norms)
        chosen = torch.ones_like(norms) if self.weights is None else self.weights[self.seen : self.seen + len(norms)]
        self.seen += len(norms)
        return chosen.to(norms)


def accumulate(model: nn.Module, batch: tuple[Tensor, ...], rule: Recording) -> Sums:
    shapes = {name: p.shape for name, p in trainable(model).items()}
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    sink = Sums(shapes, torch.device("cpu"), dtype)
    blocks = [(name,) for name in shapes]
    request = Request(batch, Fold.identity(len(batch[0])), Identity(shapes), blocks, rule, sink)
    VmapEngine(memory=1).accumulate(model, cross_entropy, request)
    return sink


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(5, 5)
        self.two = nn.Linear(5, 5)
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(x).tanh()).tanh())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    return model


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), (5,)),
    "tied": (Tied, (5,)),
    "frozen": (frozen, (5,)),
    "group norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(36, 3)),
        (2, 5, 5),
    ),
    "in-place": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), (5,)),
    "lenet5": (lambda: LeNet5((1, 8, 8), 3), (1, 8, 8)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_agrees_with_a_loop(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make().to(dtype)
    batch = (torch.randn(7, *shape, dtype=dtype), torch.randint(3, (7,)))
    reference = loop_gradients(model, cross_entropy, batch)
    weights = torch.rand(7, len(reference), dtype=dtype)
    rule = Recording(weights)
    sink = accumulate(model, batch, rule)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    expected_norms = torch.stack([g.flatten(1).norm(dim=1) for g in reference.values()], dim=1)
    torch.testing.assert_close(torch.cat(rule.norms), expected_norms, **tolerance)
    for column, (parameter, gradient) in enumerate(reference.items()):
        expected = torch.einsum("u,u...->...", weights[:, column], gradient)
        torch.testing.assert_close(sink.values[parameter], expected, **tolerance)


def test_a_record_of_equal_pixels_is_no_longer_than_its_bound() -> None:
    model = nn.Linear(1_000_000, 1, bias=False)
    step = runner(full_batch_plan(1, clipping=pg.FlatClipping(1.0)), model, _ten_times, engine=VmapEngine())
    sums = step.clipped_sum(*rows(torch.full((1, 1_000_000), 0.37)))
    assert float(as_vector(sums).double().norm()) <= 1 + 2e-7


def _ten_times(model: nn.Module, batch: tuple[torch.Tensor]) -> torch.Tensor:
    return 10 * model(batch[0]).square().sum(1)


@pytest.mark.parametrize("name", MODELS)
def test_flat_clipping_takes_the_norm_over_all_tensors_together(name: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    model = make()
    batch = (torch.randn(7, *shape), torch.randint(3, (7,)))
    flat = torch.cat([gradient.flatten(1) for gradient in loop_gradients(model, cross_entropy, batch).values()], dim=1)
    norms = flat.norm(dim=1, keepdim=True)
    limit = float(norms.median())
    plan = full_batch_plan(7, clipping=pg.FlatClipping(max_norm=limit))
    sums = runner(plan, model, cross_entropy, engine=VmapEngine()).clipped_sum(*rows(*batch))
    torch.testing.assert_close(as_vector(sums), (flat * (limit / norms).clamp(max=1)).sum(0), rtol=1e-5, atol=1e-5)


def test_tied_weights_count_once_with_their_whole_gradient() -> None:
    model = Tied()
    assert [name for name in trainable(model) if "weight" in name] == ["one.weight", "head.weight"]


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6).eval(), nn.Dropout(0.5), nn.Linear(6, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accumulate(model, (torch.randn(7, 5), torch.randint(3, (7,))), Recording())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@given(st.integers(1, 9), st.data())
@settings(max_examples=25, deadline=None)
def test_chunks_and_folds_change_nothing(rows_per_chunk: int, data: st.DataObject) -> None:
    """Any division into units, units without rows among them, at any chunk size, gives the same sums."""
    torch.manual_seed(0)
    units = data.draw(st.integers(1, 6))
    index = torch.tensor(sorted(data.draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=9))))
    count = len(index)
    scale = torch.rand(count)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    batch = (torch.randn(count, 5), torch.randint(3, (count,)))
    reference = loop_gradients(model, cross_entropy, batch)
    engine = VmapEngine()
    engine._rows_per_chunk = rows_per_chunk
    shapes = {name: p.shape for name, p in trainable(model).items()}
    sink = Sums(shapes, torch.device("cpu"), torch.float32)
    weights = torch.rand(units, 1)
    request = Request(batch, Fold(index, units, scale), Identity(shapes), [tuple(shapes)], Recording(weights), sink)
    engine.accumulate(model, cross_entropy, request)
    for name, gradient in reference.items():
        scaled = gradient * scale.view(-1, *[1] * (gradient.dim() - 1))
        folded = torch.zeros(units, *gradient.shape[1:]).index_add_(0, index, scaled)
        torch.testing.assert_close(
            sink.values[name], torch.einsum("u,u...->...", weights[:, 0], folded), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_gradient_contributes_exactly_zero(poison: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    inputs, targets = torch.randn(6, 5), torch.randint(3, (6,))
    poisoned = inputs.clone()
    poisoned[2] = poison
    keep = torch.tensor([0, 1, 3, 4, 5])
    step = runner(full_batch_plan(6), model, cross_entropy, engine=VmapEngine())
    with_poison = as_vector(step.clipped_sum(*rows(poisoned, targets)))
    without = as_vector(step.clipped_sum(*rows(inputs[keep], targets[keep])))
    assert with_poison.isfinite().all()
    torch.testing.assert_close(with_poison, without)


def test_low_precision_models_accumulate_in_float32() -> None:
    """4,000 gradients of norm 1e-2: a sum in bfloat16 would stall at about 256 times one of them."""
    inputs = torch.full((4000, 4), 0.005, dtype=torch.bfloat16)
    step = runner(full_batch_plan(4000), Direction(4).to(torch.bfloat16), linear_loss, engine=VmapEngine())
    sums = step.clipped_sum(*rows(inputs))
    assert as_vector(sums).dtype == torch.float32
    torch.testing.assert_close(as_vector(sums), inputs.float().sum(0), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_recurrent_nets_agree_or_are_refused_in_words() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(7, 4, 5), torch.randint(3, (7,)))
    model = Recurrent()
    reference = loop_gradients(model, cross_entropy, batch)
    sink = accumulate(model, batch, Recording())
    for name, gradient in reference.items():
        torch.testing.assert_close(sink.values[name], gradient.sum(0), rtol=1e-4, atol=1e-5)
    with pytest.raises(pg.PrivgradError, match="vmap engine"):
        accumulate(model.double(), (batch[0].double(), batch[1]), Recording())


def test_models_that_vmap_cannot_batch_are_named_not_traced() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, momentum=0.5), nn.Linear(4, 3))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    inputs = torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(pg.PrivgradError, match="vmap engine"):
        accumulate(Permuted(model), inputs, Recording())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Permuted(nn.Module):
    """Applies a model to the rows of each record: [1, T, d] -> [1, classes, T]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[0]).T[None]


def test_rows_within_follows_the_budget() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 3))
    row = torch.randn(1, 100)
    few, many = rows_within(10**5, model, row, 10_000), rows_within(10**8, model, row, 10_000)
    assert few == 1
    assert 500 < many < 1250
    assert 0 < budget(torch.device("cpu")) <= 256 * 2**20


class Averaging(nn.Module):
    """Fills a buffer with its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(5, 3)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.mean(0)
        return self.last(inputs)


def test_a_buffer_that_a_model_fills_with_records_keeps_its_value() -> None:
    model = Averaging()
    runner(full_batch_plan(4), model, cross_entropy).release(*rows(torch.randn(4, 5), torch.randint(3, (4,))))
    assert torch.equal(model.mean, torch.zeros(5))


@pytest.mark.parametrize(
    ("loss_fn", "got"),
    [
        (lambda model, batch: model(batch[0]).mean(), r"\(\)"),
        (lambda model, batch: model(batch[0]), r"\(1, 3\)"),
        (lambda model, batch: 0.5, "float"),
    ],
)
def test_losses_that_are_not_one_number_per_row_are_refused_before_anything_is_charged(
    loss_fn: LossFn, got: str
) -> None:
    step = runner(full_batch_plan(4), nn.Linear(5, 3), loss_fn)
    with pytest.raises(pg.PrivgradError, match=rf"loss_fn returned {got} for 1 row.*one loss per row"):
        step.release(*rows(torch.randn(4, 5), torch.randint(3, (4,))))
    assert step.ledger.count == 0

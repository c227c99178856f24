"""The one-pass engine against a loop of batch-of-one backward passes."""

from __future__ import annotations

import gc
import math
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import privgrad as pg
from privgrad.gradients import collector
from privgrad.gradients.contract import Fold, Identity, Need, Request, Sums, trainable
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.rules import per_row
from privgrad.gradients.rules.convolution import Convolution
from privgrad.gradients.rules.windows import Geometry
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.terms import Lookup, Outer
from tests.gradients.compare import Recording, agrees
from tests.gradients.networks import NETWORKS
from tests.gradients.operators import CASES, Around, Sequence, squares
from tests.helpers import as_vector, full_batch_plan, loop_gradients, rows, runner

cross_entropy = pg.supervised(F.cross_entropy)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def covered(engine: OnePassEngine | None = None, /, *args: Any, **kwargs: Any) -> Recording:
    """`agrees`, and the model did not fall back: it would agree whatever the rules do."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return agrees(engine or OnePassEngine(), *args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["flat", "tensor", "spanning"])
@pytest.mark.parametrize("name", CASES)
def test_operators_agree_with_a_loop(name: str, kind: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    model = case.make().to(dtype)
    covered(None, model, squares, case.batch(dtype), kind=kind, separable=kind == "spanning")


@pytest.mark.parametrize("kind", ["flat", "tensor", "spanning"])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_a_loop(name: str, kind: str) -> None:
    make, batch = NETWORKS[name]
    covered(None, make().double(), cross_entropy, batch(), kind=kind, separable=kind == "tensor")


@pytest.mark.parametrize("name", ["vision transformer", "gpt-2", "lstm"])
def test_networks_agree_with_a_loop_in_float32(name: str) -> None:
    """Networks without kinks: a rectifier near zero would turn rounding into another gradient."""
    make, batch = NETWORKS[name]
    narrow = tuple(leaf.float() if leaf.is_floating_point() else leaf for leaf in batch())
    covered(None, make(), cross_entropy, narrow, tolerance=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "linear [T, d]",
        "conv2d",
        "layer norm [T, d]",
        "group norm",
        "multi-head attention",
        "embedding, tied to the output",
        "lstm",
        "transformer layer",
        "rms norm",
    ],
)
@pytest.mark.parametrize("autocast", [True, False])
def test_low_precision(name: str, autocast: bool) -> None:
    """Under autocast, and with parameters in bfloat16: as near as bfloat16 allows, in float32 sums."""
    case = CASES[name]
    model = case.make()
    if not autocast:
        covered(None, model.bfloat16(), squares, case.batch(torch.bfloat16), kind="tensor", tolerance=3e-2)
        return

    def cast(m: nn.Module, *batch: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m.model(*batch)

    covered(None, Around(cast, model=model), squares, case.batch(torch.float32), kind="tensor", tolerance=2e-2)


# Architectures drawn at random.

ACTIVATIONS = [nn.Tanh, nn.GELU, nn.Softplus, lambda: nn.ELU(inplace=True), nn.Identity]


@st.composite
def image_networks(draw: st.DrawFn) -> nn.Module:
    """Convolutions of any kind, normalization, activations; the same layer sometimes twice. For inputs [4, 7, 7]."""
    layers: list[nn.Module] = []
    channels = 4
    for _ in range(draw(st.integers(1, 3))):
        groups, after = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([4, 8]))
        kernel = draw(st.sampled_from([1, 2, 3]))
        options = {"groups": groups, "dilation": draw(st.integers(1, 2)), "bias": draw(st.booleans())}
        if draw(st.booleans()):
            layers.append(nn.Conv2d(channels, after, kernel, draw(st.integers(1, 2)), padding=2, **options))
        else:
            layers.append(nn.ConvTranspose2d(channels, after, kernel, draw(st.integers(1, 2)), padding=0, **options))
        channels = after
        layers.append(
            draw(st.sampled_from([nn.Identity(), nn.GroupNorm(2, after), nn.InstanceNorm2d(after, affine=True)]))
        )
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if draw(st.booleans()):
            twice = nn.Conv2d(after, after, 3, padding=1)
            layers += [twice, nn.Tanh(), twice]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3))


@st.composite
def sequence_networks(draw: st.DrawFn) -> nn.Module:
    """Token mixers, channel mixers and normalization in any order; layers shared and frozen. For inputs [5, 8]."""
    makers: list[Callable[[], nn.Module]] = [
        lambda: nn.Linear(8, 8),
        lambda: nn.LayerNorm(8),
        lambda: nn.RMSNorm(8),
        lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True),
        lambda: Around(lambda m, x: m.rnn(x)[0], rnn=nn.GRU(8, 8, batch_first=True)),
        lambda: Around(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=nn.Conv1d(8, 8, 3, padding=1)),
        lambda: Around(lambda m, x: x * m.scale + m.shift, scale=(8,), shift=(5, 1)),
        lambda: Around(lambda m, x: x @ m.weight, weight=(8, 8)),
    ]
    layers = [draw(st.sampled_from(makers))() for _ in range(draw(st.integers(1, 3)))]
    if draw(st.booleans()):
        layers.append(layers[0])
    if len(layers) > 1 and draw(st.booleans()):
        next(layers[1].parameters()).requires_grad_(False)
    layers.append(draw(st.sampled_from(ACTIVATIONS))())
    return nn.Sequential(*layers, nn.Linear(8, 3))


@given(
    image_networks() | sequence_networks(), st.sampled_from(["flat", "tensor", "spanning"]), st.booleans(), st.data()
)
@settings(max_examples=60, deadline=None)
def test_drawn_networks_agree(model: nn.Module, kind: str, separable: bool, data: st.DataObject) -> None:
    first = next(module for module in model.modules() if not list(module.children()))
    images = isinstance(first, nn.Conv2d | nn.ConvTranspose2d)
    index, units = data.draw(folds())
    inputs = torch.randn(len(index), *((4, 7, 7) if images else (5, 8)), dtype=torch.float64)
    scale = torch.rand(len(index)) if data.draw(st.booleans()) else None
    engine = OnePassEngine(memory=data.draw(st.sampled_from([1, 10**5, 10**9])))
    covered(engine, model.double(), squares, (inputs,), kind=kind, separable=separable, fold=Fold(index, units, scale))


# Rows that fold into units.


@st.composite
def folds(draw: st.DrawFn) -> tuple[Tensor, int]:
    """Any division of a few rows into units, as many each or not, some without rows."""
    if draw(st.booleans()):
        units, each = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        return torch.arange(units).repeat_interleave(each), units
    units = draw(st.integers(1, 5))
    index = sorted(draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=7)))
    return torch.tensor(index), index[-1] + 1


@pytest.mark.parametrize(
    "name",
    [
        "linear [T, d]",
        "linear [T, d], many positions",
        "conv2d, groups",
        "conv1d",
        "conv2d, many weights on a small map",
        "conv_transpose1d",
        "group norm",
        "embedding, tied to the output",
        "multi-head attention",
        "lstm",
        "weight norm",
    ],
)
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("index", [[0, 0, 1, 1, 2, 2], [0, 0, 0, 2, 3, 3], [1, 1, 1, 1, 1, 1]])
def test_rows_fold_into_units(name: str, index: list[int], scaled: bool) -> None:
    case = CASES[name]
    fold = Fold(torch.tensor(index), index[-1] + 1, torch.rand(6, dtype=torch.float64) if scaled else None)
    covered(None, case.make().double(), squares, case.batch(torch.float64, 6), kind="tensor", fold=fold)


# What must not happen.


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear [T, d]",
        "conv2d",
        "conv2d, many weights on a small map",
        "lstm",
        "layer norm [T, d]",
        "group norm",
        "multi-head attention",
        "linear, tied",
        "scale and shift",
        "conv2d, standardized",
    ],
)
def test_a_non_finite_gradient_contributes_exactly_zero(name: str, poison: float) -> None:
    case = CASES[name]
    model = case.make()
    (inputs,) = case.batch(torch.float32, 6)
    poisoned = inputs.clone()
    poisoned[2] = poison
    keep = torch.tensor([0, 1, 3, 4, 5])

    def huge(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        # A finite input of 1e30 may leave a finite gradient behind; this one does not.
        return squares(model, batch) * (1 + batch[0].flatten(1).square().sum(1))

    step = runner(full_batch_plan(6), model, huge, engine=OnePassEngine())
    with_poison = as_vector(step.clipped_sum(*rows(poisoned)))
    without = as_vector(step.clipped_sum(*rows(inputs[keep])))
    assert with_poison.isfinite().all()
    torch.testing.assert_close(with_poison, without, rtol=1e-4, atol=1e-6)


def test_norms_survive_cancellation() -> None:
    """Gradients of positions that nearly cancel: a Gram matrix alone would see rounding, and let the unit pass unclipped."""
    model = nn.Linear(60, 50, bias=False)
    inputs = (torch.ones(4, 4, 60) + 1e-5 * torch.randn(4, 4, 60)).double()
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]

    def cancelling(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return (model(batch[0]) * signs.to(batch[0])).flatten(1).sum(1)

    truth = loop_gradients(model.double(), cancelling, (inputs.float().double(),))["weight"]
    model.float()
    rule = Recording(torch.ones(4, 1))
    accumulate(OnePassEngine(), model, cancelling, (inputs.float(),), rule)
    norms, exact = rule.norms[:, 0].double(), truth.flatten(1).norm(dim=1)
    largest = 4 * math.sqrt(60 * 50)
    assert bool((norms >= 0.99 * exact).all())
    assert bool((norms <= 1.01 * exact + 1e-6 * largest).all())


@pytest.mark.parametrize("left_over", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("kind", ["product", "lookup", "convolution"])
def test_rounding_lets_no_unit_contribute_more_than_its_norm(kind: str, left_over: float) -> None:
    """The sum is added up in another order than the norm: of positions that cancel, a unit's share of it came out at 1.5 C."""
    torch.manual_seed(0)
    largest = 0.0
    for positions, width in [(4, 8), (16, 64), (64, 32)] * 8:
        apart = torch.rand(1, positions // 2, 1) + 0.5
        left, right = torch.randn(1, positions // 2, width), torch.randn(1, positions // 2, width)
        left = torch.cat([left, left * apart], dim=1)
        right = torch.cat([right, -right / apart], dim=1) + left_over * torch.randn(1, positions, width)
        term: Any = Outer(left, right)
        if kind == "lookup":
            parts = torch.randn(1, positions, width)
            parts[:, -1] = left_over * torch.randn(width) - parts[:, :-1].sum(1)
            term = Lookup(torch.zeros(1, positions, dtype=torch.int64), parts, 3)
        if kind == "convolution":
            geometry = Geometry(torch.Size([width, width, 1]), (1,), (0,), (1,), 1, 1)
            term = Convolution(left.transpose(1, 2).contiguous(), right.transpose(1, 2).contiguous(), geometry)
        weight = 1 / term.squares().sqrt()
        largest = max(largest, float(term.weighted_sum(weight, None).double().norm()))
    assert largest <= 1 + 1e-6


def test_the_norm_of_a_product_does_not_leave_the_range_of_floats() -> None:
    tiny, huge = torch.full((1, 1, 1), 2e-23), torch.full((1, 1, 1), 1e19)
    torch.testing.assert_close(Outer(tiny, huge).squares().sqrt(), torch.tensor([2e-4]))


def accumulate(
    engine: OnePassEngine, model: nn.Module, loss_fn: Any, batch: tuple[Tensor, ...], rule: Recording
) -> Sums:
    shapes = {name: p.shape for name, p in trainable(model).items()}
    sink = Sums(shapes, torch.device("cpu"), torch.float32)
    blocks = [tuple(shapes)] if rule.weights.shape[1] == 1 else [(name,) for name in shapes]
    engine.accumulate(
        model, loss_fn, Request(batch, Fold.identity(len(batch[0])), Identity(shapes), blocks, rule, sink)
    )
    return sink


def test_nothing_is_left_behind() -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6).eval(), nn.Dropout(0.5), nn.Linear(6, 3))
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    held = model[0].weight.grad
    before = {name: value.clone() for name, value in model.state_dict().items()}
    accumulate(
        OnePassEngine(), model, cross_entropy, (torch.randn(7, 5), torch.zeros(7).long()), Recording(torch.ones(7, 1))
    )
    assert model[0].weight.grad is held
    assert (held == 7.0).all()
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not model[0].weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counting(nn.Module):
    """Writes into a buffer in every forward pass, which is allowed, and must be forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def _without_counting(model: Counting, loss_fn: Any, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {f"linear.{name}": value for name, value in loop_gradients(model.linear, loss_fn, batch).items()}


def test_buffers_are_as_they_were() -> None:
    model = Counting()
    batch = (torch.randn(7, 5), torch.zeros(7).long())
    covered(None, model, cross_entropy, batch, reference=_without_counting)
    assert model.calls == 0


def test_dropout_draws_for_every_row_and_norms_are_of_what_is_summed() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    batch = (torch.randn(1, 5).expand(6, 5).contiguous(), torch.zeros(6).long())
    engine = OnePassEngine()
    norms = []
    for unit in range(6):
        torch.manual_seed(1)
        rule = Recording(torch.eye(6)[:, unit : unit + 1])
        sink = accumulate(engine, model, cross_entropy, batch, rule)
        torch.testing.assert_close(as_vector(sink).norm(), rule.norms[unit, 0])
        norms.append(float(rule.norms[unit, 0]))
    assert len(set(norms)) > 1, "equal rows have different masks"


def test_looking_at_sizes_does_not_move_the_generator() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).train()
    batch = (torch.randn(6, 5), torch.zeros(6).long())
    engine, sums = OnePassEngine(), []
    for _ in range(2):
        torch.manual_seed(1)
        sums.append(as_vector(accumulate(engine, model, cross_entropy, batch, Recording(torch.ones(6, 1)))))
    assert torch.equal(*sums)


def test_a_step_leaves_no_cycle_that_holds_memory() -> None:
    """Without the garbage collector: activations and gradients must go when the step ends."""
    model = nn.Sequential(
        nn.Linear(6, 6), nn.GroupNorm(2, 6), Around(lambda m, x: x @ m.w.exp() * m.s, w=(6, 6), s=(6,))
    )
    seen: list[weakref.ref[Any]] = []

    def watched(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        losses = squares(model, batch)
        seen.append(weakref.ref(losses))
        return losses

    class Watched(Recording):
        def __call__(self, norms: Tensor, blocks: Any) -> Tensor:
            seen.append(weakref.ref(norms))
            return super().__call__(norms, blocks)

    engine = OnePassEngine()
    accumulate(engine, model, watched, (torch.randn(5, 6),), Watched(torch.ones(5, 1)))
    gc.collect()
    gc.disable()
    try:
        seen.clear()
        accumulate(engine, model, watched, (torch.randn(5, 6),), Watched(torch.ones(5, 1)))
        assert len(seen) == 2
        assert all(reference() is None for reference in seen)
    finally:
        gc.enable()


def test_a_separable_rule_is_called_inside_backward_last_layer_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "TOGETHER", 0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    rule = covered(None, model, squares, (torch.randn(5, 6),), kind="tensor", separable=True)
    assert [column // 2 for (column,) in rule.calls] == [2, 2, 1, 1, 0, 0]
    flat = covered(None, model, squares, (torch.randn(5, 6),), kind="tensor", separable=False)
    assert flat.calls == [(0, 1, 2, 3, 4, 5)]


def test_every_block_is_asked_for_also_where_nothing_was_used() -> None:
    model = Around(lambda m, x: m.used(x), used=nn.Linear(6, 3), idle=nn.Linear(6, 3))
    for separable in (True, False):
        rule = covered(None, model, squares, (torch.randn(5, 6),), kind="tensor", separable=separable)
        assert (rule.norms[:, :2] > 0).all()
        assert (rule.norms[:, 2:] == 0).all()


def test_a_loss_of_no_parameter_at_all() -> None:
    rule = Recording(torch.ones(5, 1))
    sink = accumulate(
        OnePassEngine(), Around(lambda m, x: x, idle=nn.Linear(6, 3)), squares, (torch.randn(5, 6),), rule
    )
    assert (rule.norms == 0).all()
    assert (as_vector(sink) == 0).all()


# Encodings.


class Halves:
    """Wants the coordinates of some parameters, and gives their first half as one slot; the others stay as they are."""

    def __init__(self, shapes: dict[str, torch.Size], wanted: set[str]) -> None:
        self.shapes, self.wanted = shapes, wanted

    def slots(self) -> dict[str, torch.Size]:
        native = {name: shape for name, shape in self.shapes.items() if name not in self.wanted}
        return {"half": torch.Size([sum(self.shapes[name].numel() // 2 for name in self.wanted)])} | native

    def places(self, parameter: str) -> None:
        return None

    def need(self, parameter: str) -> Need:
        return Need.COORDINATES if parameter in self.wanted else Need.NORMS

    def encode(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        half = [g.flatten(1)[:, : g[0].numel() // 2] for name, g in gradients.items() if name in self.wanted]
        return {"half": torch.cat(half, dim=1)} | {n: g for n, g in gradients.items() if n not in self.wanted}

    def decode(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        raise NotImplementedError


@pytest.mark.parametrize("separable", [True, False])
@pytest.mark.parametrize("wanted", [{"0.weight"}, {"0.weight", "0.bias", "2.weight", "2.bias"}])
def test_encodings_get_the_coordinates_that_they_ask_for(wanted: set[str], separable: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    batch = (torch.randn(5, 6, dtype=torch.float64),)
    shapes = {name: p.shape for name, p in trainable(model).items()}
    encoding = Halves(shapes, wanted)
    vectors = encoding.encode(loop_gradients(model, squares, batch))
    weights = torch.rand(5, len(vectors), dtype=torch.float64)
    rule = Recording(weights, separable=separable)
    sink = Sums(encoding.slots(), torch.device("cpu"), torch.float64)
    blocks = [(slot,) for slot in vectors]
    OnePassEngine().accumulate(model, squares, Request(batch, Fold.identity(5), encoding, blocks, rule, sink))
    for column, (slot, vector) in enumerate(vectors.items()):
        torch.testing.assert_close(rule.norms[:, column], vector.flatten(1).norm(dim=1))
        torch.testing.assert_close(sink.values[slot], torch.einsum("u,u...->...", weights[:, column], vector))


# Operators of one's own, and what is not covered.


def scaled(inputs: Tensor, scale: Tensor) -> Tensor:
    """An operator of one's own: torch functions that look for a mode are seen by the engine."""
    if torch.overrides.has_torch_function((inputs, scale)):
        return torch.overrides.handle_torch_function(scaled, (inputs, scale), inputs, scale)
    return inputs * scale.exp()


def test_a_rule_for_an_own_operator_in_five_lines() -> None:
    calls = []

    def scaled_gradient(output_gradient: Tensor, inputs: Tensor, scale: Tensor) -> list[Tensor]:
        calls.append(output_gradient.shape)
        return [(output_gradient * inputs * scale.exp()).flatten(1, -2).sum(1)]

    engine = OnePassEngine(rules={scaled: per_row(scaled, scaled_gradient)})
    model = Around(lambda m, x: scaled(m.before(x), m.scale), before=nn.Linear(6, 6), scale=(6,))
    scale = torch.rand(5)
    covered(engine, model, squares, (torch.randn(5, 4, 6),), kind="tensor", fold=Fold(torch.arange(5), 5, scale))
    assert torch.Size([5, 1, 4, 6]) in calls


class Plain(torch.autograd.Function):
    """Written before torch.func: vmap cannot run it, and its use of a parameter is out of the engine's sight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        return inputs * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inputs, weight = ctx.saved_tensors
        return gradient * weight, (gradient * inputs).flatten(0, -2).sum(0)


def _data_dependent(m: nn.Module, x: Tensor) -> Tensor:
    return m.linear(x) if x.sum() > 0 else m.linear(-x)


def _own_gradient(m: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: m.linear(z).sin().sum())(x)


class Scripted(nn.Module):
    """TorchScript calls its operators out of sight."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.inner = torch.jit.script(nn.Linear(6, 6))
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x).tanh())


UNCOVERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "scripted": (Scripted, "inner.weight is used by"),
    "old autograd function": (lambda: Around(lambda m, x: Plain.apply(x, m.w), w=(6,)), "setup_context"),
    "control flow": (lambda: Around(_data_dependent, linear=nn.Linear(6, 6)), "control flow"),
    "own gradient": (lambda: Around(_own_gradient, linear=nn.Linear(6, 6)), "torch.func"),
    "own vmap": (lambda: Around(lambda m, x: torch.func.vmap(m.l)(x), l=nn.Linear(6, 6)), "torch.func itself"),
    "checkpoint": (
        lambda: Around(lambda m, x: checkpoint(m.b, m.a(x), use_reentrant=False), a=nn.Linear(6, 6), b=nn.Linear(6, 6)),
        "StreamedEngine",
    ),
    "lstm with projections": (lambda: Sequence(nn.LSTM(6, 4, proj_size=2, batch_first=True)), "lstm"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:LSTM with projections")
@pytest.mark.parametrize("name", UNCOVERED)
def test_what_is_not_covered_falls_back_and_says_so_once(name: str) -> None:
    make, words = UNCOVERED[name]
    model, engine = make(), OnePassEngine()
    batch = (torch.randn(5, *((3, 6) if "lstm" in name or "vmap" in name else (6,))),)
    with pytest.warns(UserWarning, match="does not cover this model") as caught:
        agrees(engine, model, squares, batch, kind="tensor")
    (message,) = [str(w.message) for w in caught if "does not cover" in str(w.message)]
    assert words in message
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not cover")
        agrees(engine, model, squares, batch, kind="tensor")


@pytest.mark.parametrize("kind", ["flat", "tensor"])
def test_rows_without_positions_have_gradients_of_zero(kind: str) -> None:
    model = Around(lambda m, x: m.a(x).sum(1) + m.b(x.sum(1)), a=nn.Linear(6, 3), b=nn.Linear(6, 3))
    covered(None, model, squares, (torch.randn(5, 0, 6),), kind=kind, separable=kind == "tensor")


class Copying(torch.autograd.Function):
    """The identity, with a backward pass of its own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return inputs.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        pass


class InPlace(Copying):
    """Writes over the gradient that it got, where another branch may have it, too."""

    factor = 50.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(InPlace.factor) if InPlace.factor != 1 else gradient


class Branches(nn.Module):
    """`first` gets its gradient before the other branch writes over it."""

    def __init__(self) -> None:
        super().__init__()
        self.second, self.first, self.top = nn.Linear(6, 300), nn.Linear(6, 300), nn.Linear(300, 400)

    def forward(self, x: Tensor) -> Tensor:
        hidden = InPlace.apply(1e-6 * self.second(x))
        return self.top(self.first(x) + hidden)


@pytest.mark.filterwarnings("ignore:the one-pass engine does not cover")
@pytest.mark.parametrize(("clipping", "bound"), [(pg.FlatClipping(1.0), 1.0), (pg.LayerwiseClipping(1.0), 6**0.5)])
def test_gradients_that_the_model_writes_over_after_they_were_measured_exceed_no_bound(
    clipping: Any, bound: float
) -> None:
    """One unit alone has a gradient; its sum was fifty times the bound."""
    inputs = torch.zeros(500, 6)
    inputs[3] = torch.randn(6)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return squares(model, batch) * batch[0][:, 0].abs()

    step = runner(full_batch_plan(500, clipping=clipping), Branches(), loss)
    assert 0 < as_vector(step.clipped_sum(*rows(inputs))).norm() <= bound * (1 + 1e-5)


@pytest.mark.filterwarnings("ignore:the one-pass engine does not cover")
@pytest.mark.parametrize("clipping", [pg.FlatClipping(1.0), pg.LayerwiseClipping(1.0), pg.CoordinateClipping(1.0, 4.0)])
def test_whole_steps_of_what_is_not_covered_are_those_of_a_loop(clipping: Any) -> None:
    model, batch = UNCOVERED["checkpoint"][0](), rows(torch.randn(5, 6))
    plan = full_batch_plan(5, clipping=clipping)
    found, expected = (runner(plan, model, squares, engine=engine) for engine in (OnePassEngine(), StreamedEngine()))
    assert torch.allclose(
        as_vector(found.clipped_sum(*batch)), as_vector(expected.clipped_sum(*batch)), rtol=1e-4, atol=1e-6
    )


def test_gradients_that_the_model_writes_over_in_some_steps_only_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Branches(), (torch.randn(500, 6),)
    monkeypatch.setattr(InPlace, "factor", 1.0)
    engine = OnePassEngine()
    covered(engine, model, squares, batch, kind="tensor", separable=True)
    monkeypatch.setattr(InPlace, "factor", 50.0)
    monkeypatch.setattr(collector, "TOGETHER", 4 * 500 * (300 + 400))  # the top's are settled, the others wait
    with pytest.raises(pg.PrivgradError, match=r"in the midst of a step.*in place.*return a new tensor"):
        agrees(engine, model, squares, batch, kind="tensor", separable=True)


class SometimesHidden(nn.Module):
    """Uses its parameter in sight at first, and out of sight later."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.script: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return (self.linear if self.script is None else self.script)(x)


def test_a_use_that_goes_out_of_sight_later_is_noticed_in_time() -> None:
    model, engine, batch = SometimesHidden(), OnePassEngine(), (torch.randn(5, 6),)
    covered(engine, model, squares, batch, kind="tensor", separable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.__dict__["script"] = torch.jit.script(model.linear)
    with pytest.warns(UserWarning, match="does not cover this model"):
        agrees(engine, model, squares, batch, kind="tensor", separable=True)


def test_compiled_models_run_uncompiled() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), backend="eager")
    covered(None, model, squares, (torch.randn(5, 6),), kind="tensor")


class Accumulating(Copying):
    """Calls backward() by itself, on a parameter that it hides."""

    hidden: nn.Parameter

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        with torch.enable_grad():
            (Accumulating.hidden * 2).sum().backward()
        return gradient


def test_a_backward_pass_with_side_effects_is_refused() -> None:
    model = Around(lambda m, x: Accumulating.apply(m.linear(x)), linear=nn.Linear(6, 6))
    Accumulating.hidden = model.linear.weight
    rule = Recording(torch.ones(5, 1))
    with pytest.raises(pg.PrivgradError, match="by itself"):
        accumulate(OnePassEngine(), model, squares, (torch.randn(5, 6),), rule)
    assert model.linear.weight.grad is None
    assert (rule.norms == -1).all()


def test_embeddings_that_change_in_forward_are_refused() -> None:
    with pytest.raises(pg.RefusedError, match="max_norm"):
        accumulate(
            OnePassEngine(),
            nn.Embedding(11, 6, max_norm=1.0),
            squares,
            (torch.zeros(5, 4).long(),),
            Recording(torch.ones(5, 1)),
        )


def test_rows_are_not_taken_for_positions_where_they_are_as_many() -> None:
    """As many rows as positions, and time first: the layout that an engine by shapes gets wrong."""
    model = Around(lambda m, x: m.l(x.transpose(0, 1)).sum(0), l=nn.Linear(6, 3)).double()
    covered(None, model, squares, (torch.randn(4, 4, 6, dtype=torch.float64),), kind="tensor")


def test_a_loss_per_batch_is_refused_in_words() -> None:
    with pytest.raises(pg.PrivgradError, match="one loss per row"):
        accumulate(
            OnePassEngine(),
            nn.Linear(6, 3),
            lambda m, b: m(b[0]).mean(),
            (torch.randn(5, 6),),
            Recording(torch.ones(5, 1)),
        )


def test_a_use_in_place_after_the_operator_is_noticed_by_autograd() -> None:
    """The input that an operator saved is changed in place: an error, as without the engine, and never a wrong gradient."""

    def model(m: nn.Module, x: Tensor) -> Tensor:
        hidden = m.a(x)
        output = m.b(hidden)
        hidden.mul_(2)
        return output + hidden

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        agrees(OnePassEngine(), Around(model, a=nn.Linear(6, 6), b=nn.Linear(6, 6)), squares, (torch.randn(5, 6),))

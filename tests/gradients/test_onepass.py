"""The one-pass engine against a loop of batch-of-one backward passes."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import privgrad as pg
from privgrad.gradients import collector
from privgrad.gradients.contract import Fold, Need, Request, Sums, trainable
from privgrad.gradients.norms import norms_of
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.rules.convolution import Convolution
from privgrad.gradients.rules.windows import Geometry
from privgrad.gradients.terms import Lookup, Outer
from tests.gradients.compare import Recording, accumulate, covered
from tests.gradients.networks import NETWORKS
from tests.gradients.operators import CASES, Around, squares
from tests.helpers import as_vector, full_batch_plan, loop_gradients, rows, runner

cross_entropy = pg.supervised(F.cross_entropy)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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

    around, batch = Around(cast, model=model), case.batch(torch.float32)
    try:
        around(*batch)
    except RuntimeError as error:  # torch's own LSTM, on a processor whose oneDNN has no bfloat16 (AVX2 and less)
        if "could not create a primitive" not in str(error):
            raise
        pytest.skip(f"torch cannot run this operator under autocast on this processor: {error}")
    covered(None, around, squares, batch, kind="tensor", tolerance=2e-2)


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


def masked(left: Tensor, right: Tensor) -> Any:
    """An outer product of which nothing is masked, multiplied out where it has several positions."""
    mask = torch.ones(left.shape[2], right.shape[2])
    return Outer(left, right).masked(mask, lambda rows, shape, like: like.new_empty(rows, *shape))


def convolved(left: Tensor, right: Tensor) -> Convolution:
    """The same product as that of a convolution of one pixel."""
    geometry = Geometry(torch.Size([left.shape[2], right.shape[2], 1]), (1,), (0,), (1,), 1, 1)
    return Convolution(right.transpose(1, 2).contiguous(), left.transpose(1, 2).contiguous(), geometry)


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
            term = convolved(right, left)
        weight = 1 / term.squares().sqrt()
        largest = max(largest, float(term.weighted_sum(weight, None).double().norm()))
    assert largest <= 1 + 1e-6


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("width", [1, 2, 1000])
@pytest.mark.parametrize("form", [Outer, masked, convolved])
def test_the_norm_of_a_product_does_not_leave_the_range_of_floats(form: Any, width: int, positions: int) -> None:
    """One factor's squares are no numbers of float32, and the other is as large as its may be: in the sum they are seen."""
    tiny, huge = torch.full((1, positions, width), 2e-23), torch.full((1, positions, width), 1e18 / width)
    term = form(tiny, huge)
    assert float(term.squares().sqrt()) >= float(term.weighted_sum(torch.ones(1), None).double().norm()) > 0
    zero = form(torch.zeros_like(tiny), torch.ones_like(huge))
    assert float(zero.squares().sqrt()) < 1e-10


@pytest.mark.parametrize("count", [300, 1024, 150_528, 10_000_003])
def test_norms_of_many_equal_numbers_are_not_too_small(count: int) -> None:
    """Added up in order, float32 squares of ten million equal numbers lose a hundredth of their sum."""
    for value in (0.7, 1 / 3, 0.1):
        numbers = torch.full((1, count), value)
        exact = float(numbers.double().norm())
        assert exact <= float(norms_of(numbers)) <= exact * (1 + 1e-5)


@pytest.mark.parametrize("count", [64, 1000, 65_536])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_order_of_squares_makes_a_norm_too_small(count: int, rows: int) -> None:
    """Squares that are half of what is seen next to the first one are lost one by one, wherever they are in memory."""
    numbers = torch.full((rows, count), 0.999 * 2.0**-12)
    numbers[:, 0] = 1.0
    for layout in (numbers, numbers.T.contiguous().T):
        assert bool((norms_of(layout).double() >= layout.double().norm(dim=1)).all())


@pytest.mark.parametrize("same", [False, True])
def test_a_record_of_many_tokens_is_no_longer_than_its_bound(same: bool) -> None:
    """Added up in single precision, 65,536 look-ups of one token came to 1.007 C, of different ones to 1.002 C."""
    count = 65_536
    parts = torch.full((1, count, 1), 2.0**-24 if same else 0.999 * 2.0**-12)
    parts[:, 0] = 1.0
    index = torch.zeros(1, count, dtype=torch.int64) if same else torch.arange(count)[None]
    term = Lookup(index, parts, count)
    exact = term.dense().double().norm() if not same else parts.double().sum()
    assert float(term.squares().sqrt().double()) >= float(exact)
    assert float(term.weighted_sum(1 / term.squares().sqrt(), None).double().norm()) <= 1 + 1e-6


def test_norms_of_nothing_are_zero() -> None:
    assert norms_of(torch.ones(3, 0)).tolist() == [0, 0, 0]
    assert norms_of(torch.ones(0, 5)).tolist() == []
    assert norms_of(torch.ones(2)).tolist() == pytest.approx([1, 1], rel=1e-5)


@pytest.mark.parametrize("sizes", [(12_288, 10), (150_528, 2), (1_000_000, 1), (3, 200_000)])
@pytest.mark.parametrize("compression", [None, pg.RandomSparsification(0.1, ramp=False)])
def test_a_record_of_equal_pixels_is_no_longer_than_its_bound(sizes: tuple[int, int], compression: Any) -> None:
    model = nn.Linear(*sizes, bias=False)
    plan = full_batch_plan(1, clipping=pg.FlatClipping(1.0), compression=compression)
    step = runner(plan, model, lambda m, batch: 10 * squares(m, batch))
    assert float(as_vector(step.clipped_sum(*rows(torch.full((1, sizes[0]), 0.37)))).double().norm()) <= 1 + 2e-7


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
        torch.testing.assert_close(as_vector(sink).norm(), rule.norms[unit, 0], rtol=5e-6, atol=0)
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


# Layouts.


@pytest.mark.parametrize("kind", ["flat", "tensor"])
def test_rows_without_positions_have_gradients_of_zero(kind: str) -> None:
    model = Around(lambda m, x: m.a(x).sum(1) + m.b(x.sum(1)), a=nn.Linear(6, 3), b=nn.Linear(6, 3))
    covered(None, model, squares, (torch.randn(5, 0, 6),), kind=kind, separable=kind == "tensor")


def test_rows_are_not_taken_for_positions_where_they_are_as_many() -> None:
    """As many rows as positions, and time first: the layout that an engine by shapes gets wrong."""
    model = Around(lambda m, x: m.l(x.transpose(0, 1)).sum(0), l=nn.Linear(6, 3)).double()
    covered(None, model, squares, (torch.randn(4, 4, 6, dtype=torch.float64),), kind="tensor")


def test_compiled_models_run_uncompiled() -> None:
    model = torch.compile(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), backend="eager")
    covered(None, model, squares, (torch.randn(5, 6),), kind="tensor")

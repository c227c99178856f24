"""Operators of one's own, and what the one-pass engine does not cover: slower engines take over, or the step is refused."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import privgrad as pg
from privgrad.gradients import collector
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.rules import per_row
from privgrad.gradients.streamed import StreamedEngine
from tests.gradients.compare import Recording, accumulate, agrees, covered
from tests.gradients.operators import Around, Sequence, squares
from tests.helpers import as_vector, full_batch_plan, rows, runner


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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


def test_a_rule_that_answers_in_another_shape_is_refused() -> None:
    engine = OnePassEngine(rules={scaled: per_row(scaled, lambda gradient, x, scale: [gradient.flatten(1).sum(1)])})
    model = Around(lambda m, x: scaled(m.before(x), m.scale), before=nn.Linear(6, 6), scale=(6,))
    with pytest.raises(pg.PrivgradError, match=r"scaled answers .* shape \(1,\); expected \(1, 6\)"):
        accumulate(engine, model, squares, (torch.randn(5, 6),), Recording(torch.ones(5, 1)))


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


def data_dependent(m: nn.Module, x: Tensor) -> Tensor:
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
    "control flow": (lambda: Around(data_dependent, linear=nn.Linear(6, 6)), "control flow"),
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


def test_the_warning_says_nothing_about_the_record() -> None:
    """torch's own words do: which index is out of bounds, which matrix is singular."""

    def looked_up(m: nn.Module, x: Tensor) -> Tensor:
        return m.linear(x).gather(1, x[:, :1].long())

    model = Around(looked_up, linear=nn.Linear(6, 6))
    with pytest.warns(UserWarning, match="does not cover this model") as caught, contextlib.suppress(RuntimeError):
        accumulate(OnePassEngine(), model, squares, (torch.full((5, 6), 31.0),), Recording(torch.ones(5, 1)))
    assert not any("31" in str(warning.message) for warning in caught)


@pytest.mark.filterwarnings("ignore:the one-pass engine does not cover")
@pytest.mark.parametrize("kind", ["flat", "tensor"])
def test_rows_of_a_unit_are_alone_with_a_model_that_asks_about_its_batch(kind: str) -> None:
    """Taken together they would all go the way that their sum decides."""
    model = UNCOVERED["control flow"][0]()
    fold = Fold(torch.tensor([0, 0, 0, 1, 2, 2]), 3, torch.rand(6))
    agrees(OnePassEngine(), model, squares, (torch.randn(6, 6),), kind=kind, fold=fold)


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


def test_masks_that_come_later_do_not_make_it_choose_again() -> None:
    plan = pg.Plan(
        sampling=pg.PoissonSampling(rate=0.5, divisor=2.0),
        steps=6,
        compression=pg.RandomSparsification(0.5),
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    step = runner(plan, UNCOVERED["own gradient"][0](), squares, engine=OnePassEngine())
    with pytest.warns(UserWarning, match="does not cover this model"):
        step.release((torch.randn(4, 6),), Fold.identity(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            step.release((torch.randn(4, 6),), Fold.identity(4))


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

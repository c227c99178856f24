"""What a clipping stage answers, and what becomes of it."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import privgrad as pg
from privgrad.gradients.contract import Engine, Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.precision import check_precision, exact_convolutions
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.mechanism.clipping import ClippingRule
from tests.helpers import as_vector, full_batch_plan, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)

NORMS = torch.tensor([[0.0], [0.5], [2.0], [1e30], [math.inf], [math.nan]])


@pytest.mark.parametrize("answer", [1.0, 1e9, -1e9, math.inf, -math.inf, math.nan])
def test_a_stage_that_does_not_clip_is_clipped(answer: float) -> None:
    class Believed(pg.FlatClipping):
        def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
            return torch.full_like(norms, answer)

    weights = ClippingRule(Believed(), torch.tensor([1.5], dtype=torch.float64))(NORMS, [0])
    assert (weights[1:4].abs() * NORMS[1:4] <= 1.5 * (1 + 1e-6)).all()
    assert weights.isfinite().all()
    assert not weights[4:].any()


def test_flat_clipping_is_left_as_it_is() -> None:
    weights = ClippingRule(pg.FlatClipping(), torch.tensor([1.5], dtype=torch.float64))(NORMS, [0])
    assert weights.flatten().tolist() == pytest.approx([1.0, 1.0, 0.75, 1.5e-30, 0.0, 0.0])


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_unit_with_one_norm_that_is_not_finite_contributes_nothing(bad: float) -> None:
    """To all blocks where they are decided together, and to the side release."""
    sums = torch.zeros(2, dtype=torch.float64)
    side = (pg.PrivateThresholds(limit=3.0), {}, sums)
    rule = ClippingRule(pg.FlatClipping(), torch.tensor([1.0, 1.0], dtype=torch.float64), side)
    norms = torch.tensor([[bad, 0.5], [2.0, 0.5]], dtype=torch.float64)
    assert rule(norms, [0, 1]).tolist() == [[0.0, 0.0], [0.5, 1.0]]
    assert sums.tolist() == [2.0, 0.5]


@pytest.mark.parametrize("engine", [OnePassEngine, VmapEngine, StreamedEngine])
@pytest.mark.parametrize("max_norm", [1e-16, 1e-3])
def test_contributions_of_any_size_are_clipped_with_all_their_digits(max_norm: float, engine: type[Engine]) -> None:
    """Inputs and output gradients from 1e-38 to 1e38, each the other's partner."""
    torch.manual_seed(0)
    model = nn.Linear(1, 1, bias=False)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (model(batch[0]) * batch[1]).squeeze(1)

    plan = dataclasses.replace(full_batch_plan(1, steps=1), clipping=pg.FlatClipping(max_norm=max_norm))
    step = runner(plan, model, loss, engine=engine())
    reached = 0
    for _ in range(200):
        batch = tuple(10 ** torch.empty(2, 1, 1, dtype=torch.float64).uniform_(-38, 38))
        (value,) = step.clipped_sum(tuple(part.float() for part in batch), Fold.identity(1)).values.values()
        assert abs(float(value)) <= max_norm * (1 + 1e-6)
        reached += abs(float(value)) > 0.99 * max_norm
    assert reached > 20


def test_a_norm_too_small_to_be_clipped_to_is_refused() -> None:
    """Rounding made contributions of 1.8 C at C = 1e-39, and of 1.003 C at 1e-25."""
    plan = dataclasses.replace(full_batch_plan(4, steps=1), clipping=pg.FlatClipping(max_norm=1e-17))
    model = nn.Linear(3, 2)
    step = runner(plan, model, LOSS)
    with pytest.raises(pg.PrivgradError, match=r"clipping norm is 1e-17.* larger clipping\.max_norm"):
        step.release((torch.randn(4, 3), torch.tensor([0, 1, 0, 1])), Fold.identity(4))
    assert step.ledger.count == 0


@pytest.mark.parametrize("p", [1.0, 4.0, 1000.0])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    "engine", [OnePassEngine(memory=1), OnePassEngine(), VmapEngine()], ids=["rows", "all", "vmap"]
)
def test_coordinates_are_cut_after_the_norm(p: float, grouped: bool, engine: Engine) -> None:
    """The sum of algorithm 2 of arXiv:2210.03843, unit by unit, from ordinary gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 4))
    inputs, targets = 2 * torch.randn(7, 1, 6, 6), torch.randint(4, (7,))
    inputs[3] = math.nan
    groups = pg.RandomGroups(3) if grouped else None
    clipping = pg.CoordinateClipping(max_norm=0.5, p=p)
    plan = full_batch_plan(7, clipping=clipping, groups=groups, noise=pg.GaussianNoise(multiplier=0.0, insecure_seed=3))
    running = runner(plan, model, LOSS, engine=engine)
    fold = Fold.identity(7)
    found = running.clipped_sum((inputs, targets), fold)
    if groups is not None:
        fold = groups.assign(fold, running.source("groups").at(1))
    expected = 0.0
    for unit in range(fold.units):
        rows = fold.index == unit
        if not rows.any():
            continue
        parameters = list(model.parameters())
        gradient = torch.autograd.grad(LOSS(model, (inputs[rows], targets[rows])).mean(), parameters)
        flat = torch.cat([part.flatten() for part in gradient])
        if flat.isfinite().all():
            vector = (flat * (0.5 / flat.norm()).clamp(max=1.0)).clamp(-0.5 / math.sqrt(p), 0.5 / math.sqrt(p))
            assert vector.norm() <= 0.5 * (1 + 1e-6)
            expected = expected + vector
    assert torch.allclose(as_vector(found), expected, atol=1e-6)
    assert as_vector(found).abs().max() <= fold.units * clipping.max_coordinate * (1 + 1e-6)


def test_a_step_inside_autocast_is_refused_and_charges_nothing() -> None:
    """In bfloat16 a sum of 500 is rounded to a multiple of 2: one record would move it by more than C."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.randint(2, (4,)))
    step = runner(full_batch_plan(4), model, LOSS, engine=VmapEngine())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(pg.PrivgradError, match=r"autocast.*loss_fn"):
        step.release(batch, Fold.identity(4))
    assert step.ledger.count == 0


def test_a_step_with_products_of_fewer_bits_is_refused() -> None:
    step = runner(full_batch_plan(4), nn.Linear(3, 2), LOSS)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("high", "medium"):
            torch.set_float32_matmul_precision(precision)
            with pytest.raises(pg.PrivgradError, match=f"{precision}.*'highest'"):
                step.release((torch.randn(4, 3), torch.randint(2, (4,))), Fold.identity(4))
    finally:
        torch.set_float32_matmul_precision(before)
    assert step.ledger.count == 0


NEWER = ["mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn", "mkldnn", "cuda.matmul", ""]


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9 has no such setting")
@pytest.mark.parametrize("place", NEWER)
def test_fewer_bits_are_noticed_by_their_newer_names(place: str) -> None:
    """Once one is set, torch does not let the older name be read: that must not be an error of its own."""
    code = f"""
import torch, privgrad
from operator import attrgetter
from privgrad.gradients.precision import check_precision, exact_convolutions
place = attrgetter({place!r})(torch.backends) if {place!r} else torch.backends
for precision, refused in (("tf32", True), ("ieee", False)):
    place.fp32_precision = precision
    try:
        check_precision(torch.device("cpu"))
        assert not refused
    except privgrad.PrivgradError as error:
        assert refused and precision in str(error), error
torch.backends.fp32_precision = "tf32"
with exact_convolutions():
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
torch.backends.cudnn.conv.fp32_precision = "tf32"
torch.backends.cudnn.rnn.fp32_precision = "ieee"
with exact_convolutions():
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
assert torch.backends.cudnn.conv.fp32_precision == "tf32"
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_convolutions_are_summed_with_all_bits_of_float32() -> None:
    cudnn: Any = torch.backends.cudnn
    newer = hasattr(cudnn, "conv")
    before = cudnn.conv.fp32_precision if newer else cudnn.allow_tf32
    with exact_convolutions():
        assert cudnn.conv.fp32_precision == "ieee" if newer else not cudnn.allow_tf32
    assert before == (cudnn.conv.fp32_precision if newer else cudnn.allow_tf32)
    assert cudnn.allow_tf32


def test_torch_before_2_9_has_no_newer_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matmul", "conv", "rnn"):
        monkeypatch.delattr(type(torch.backends.mkldnn), name, raising=False)
    check_precision(torch.device("cpu"))


def test_autocast_inside_the_loss_leaves_sums_in_full_precision() -> None:
    """One record more moves the sum by no more than C, however large it is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(50, 20), nn.Tanh(), nn.Linear(20, 5))
    inputs, labels = torch.randn(1, 50) + 0.1 * torch.randn(512, 50), torch.zeros(512, dtype=torch.int64)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none").float()

    for engine in (OnePassEngine, VmapEngine):
        more, less = (
            runner(full_batch_plan(512), model, loss, engine=engine()).clipped_sum(
                (inputs[first:], labels[first:]), Fold.identity(512 - first)
            )
            for first in (0, 1)
        )
        # (Rows that change place in a batch of another size may round otherwise in bfloat16: a hundredth.)
        assert float((as_vector(more) - as_vector(less)).norm()) < 1.05, engine


def test_a_stage_that_answers_in_another_shape_is_refused() -> None:
    """[units] against [units, blocks] would be broadcast to [units, units]: one unit's norm would set the others' weights."""

    class Flattened(pg.FlatClipping):
        def weights(self, norms: Tensor, thresholds: Tensor) -> Tensor:
            return (thresholds / norms).flatten()

    class Side(pg.PrivateThresholds):
        def side(self, state: Any, norms: Tensor, thresholds: Tensor) -> Tensor:
            return norms.sum(1)

    limits = torch.tensor([1.5], dtype=torch.float64)
    with pytest.raises(pg.PrivgradError, match=r"Flattened\.weights answered in another shape"):
        ClippingRule(Flattened(), limits)(NORMS, [0])
    with pytest.raises(pg.PrivgradError, match=r"Side\.side answered in another shape"):
        ClippingRule(pg.FlatClipping(), limits, (Side(limit=3.0), {}, torch.zeros(1)))(NORMS, [0])


@pytest.mark.parametrize(
    "stages",
    [
        {"clipping": pg.AutomaticClipping(max_norm=1e37, stability=1e-12)},
        {"clipping": pg.FlatClipping(max_norm=1e26)},
        {"thresholds": pg.PrivateThresholds(limit=1e30)},
    ],
)
def test_norms_whose_sums_would_overflow_are_refused(stages: dict[str, Any]) -> None:
    """35 contributions of 1e37 are infinite, 34 are not: the epsilon charged would be of no step that is seen."""
    plan = dataclasses.replace(full_batch_plan(3), **stages)
    with pytest.raises(pg.PrivgradError, match=r"sums are numbers of single precision; take a norm .* at most 1e\+25"):
        runner(plan, nn.Linear(4, 2), LOSS).clipped_sum(*rows(torch.randn(3, 4), torch.tensor([0, 1, 1])))

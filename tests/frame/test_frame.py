"""The frame is proven before it is furnished: each toy runs through the unchanged plan, step and engine contract."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import privgrad as pg
from privgrad.gradients.contract import Fold
from privgrad.gradients.vmap import VmapEngine
from privgrad.mechanism.states import Consumer, Release
from privgrad.mechanism.step import Reduce, StepRunner
from privgrad.privacy.ledger import Receipt
from tests.frame.toys import (
    BySlot,
    HookedEngine,
    MidpointMixing,
    NormStatistics,
    PublicMean,
    StreamedGroups,
    ToyEmbedding,
    ToyGroups,
)
from tests.helpers import Direction, as_vector, full_batch_plan, linear_loss, loop_gradients, rows, runner


def clipped(vectors: Tensor, norm: float) -> Tensor:
    return vectors * (norm / vectors.norm(dim=1, keepdim=True)).clamp(max=1)


def test_embedding_has_two_clipped_parts_and_a_public_basis() -> None:
    torch.manual_seed(0)
    public, private = torch.randn(3, 6), 4 * torch.randn(5, 6)
    plan = full_batch_plan(5, compression=ToyEmbedding(), clipping=BySlot(max_norms=(2.0, 0.5)))
    step = runner(plan, Direction(6), linear_loss, public=(public,))
    update = step.release(*rows(private)).update["weight"]

    basis = torch.linalg.qr(public[:2].T)[0]
    embedding = private @ basis
    residual = private - embedding @ basis.T
    expected = (clipped(embedding, 2.0) @ basis.T + clipped(residual, 0.5)).sum(0) / 5
    torch.testing.assert_close(update, expected)


def test_embedding_is_charged_jointly() -> None:
    plan = full_batch_plan(5, multiplier=0.7, compression=ToyEmbedding(), clipping=BySlot(max_norms=(3.0, 4.0)))
    step = runner(plan, Direction(6), linear_loss, public=(torch.randn(3, 6),))
    sums = step.clipped_sum(*rows(torch.randn(5, 6)))
    scales = plan.noise.scales(sums)
    assert scales == pytest.approx({"embedding": 0.7 * 5.0, "residual": 0.7 * 5.0})


def test_side_release_is_in_the_same_event_and_feeds_the_thresholds() -> None:
    plan = full_batch_plan(4, steps=2, multiplier=1.3, thresholds=NormStatistics(limit=2.0))
    step = runner(plan, Direction(3), linear_loss)
    batch, fold = rows(torch.diag(torch.tensor([0.5, 1.0, 9.0]))[[0, 1, 2, 2]])
    sums = step.clipped_sum(batch, fold)
    side = next(part for part in sums.parts if part.consumer is Consumer.THRESHOLDS)
    assert float(sums.values[side.name]) == pytest.approx(0.5 + 1.0 + 2.0 + 2.0)
    assert sums.distance(side) == 2.0
    noised = plan.noise.add(sums, step.ledger.charge(plan.step_event()), step.source("test"))
    assert noised.multiplier() == pytest.approx(1.3)
    assert (sums.distance(side) / noised.scales[side.name]) ** 2 == pytest.approx(0.05 / 1.3**2)


def test_thresholds_move_by_what_was_released_only() -> None:
    plan = full_batch_plan(4, steps=2, thresholds=NormStatistics(limit=2.0))
    step = runner(plan, Direction(3), linear_loss)
    batch = rows(torch.full((4, 3), 3.0))
    step.release(*batch)
    assert float(step.states["thresholds"]["mean"]) == pytest.approx(2.0)
    (gradient, _) = step.clipped_sum(*batch).parts
    assert gradient.bound.radius == pytest.approx(2.0)


def test_mixing_makes_the_release_the_weights() -> None:
    plan = full_batch_plan(2, steps=3, multiplier=1.0, mixing=MidpointMixing())
    model = Direction(4)
    torch.nn.init.ones_(model.weight)
    data = torch.utils.data.TensorDataset(torch.ones(2, 4))
    private = pg.make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), data, plan, linear_loss)
    releases: list[Release] = []
    original = private.runner.release
    private.runner.release = lambda *a, **k: releases.append(original(*a, **k)) or releases[-1]  # type: ignore[method-assign]
    for batch in private.batches():
        private.step(batch)
    assert all(release.update is None for release in releases), "the noised gradient is never released"
    torch.testing.assert_close(model.weight.data, releases[-1].weights["weight"])
    assert model.weight.grad is None
    assert private.runner.states["mixing"].keys() == {"weight"}


def test_mixing_refuses_backward() -> None:
    plan = full_batch_plan(2, multiplier=1.0, mixing=MidpointMixing())
    model = Direction(4)
    data = torch.utils.data.TensorDataset(torch.ones(2, 4))
    private = pg.make_private(model, torch.optim.SGD(model.parameters(), lr=0.5), data, plan, linear_loss)
    with pytest.raises(pg.RefusedError, match="before mixing"):
        private.backward(next(private.batches()))
    assert private.ledger.count == 0


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 1)
        self.center = torch.zeros(4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last((self.first(inputs) - self.center).tanh())


def test_public_forward_runs_inside_the_step_and_leaves_examples_independent() -> None:
    torch.manual_seed(1)
    model = Centred()
    public = (torch.randn(8, 3),)
    plan = full_batch_plan(3, steps=2, statistics=PublicMean())

    def loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        return model(batch[0]).square().squeeze(1)

    step = runner(plan, model, loss, public=public)
    one, other = torch.randn(3, 3), torch.randn(3, 3)
    other[0] = one[0]
    first = as_vector(step.clipped_sum(*rows(one[:1])))
    torch.testing.assert_close(model.center, model.first(public[0]).mean(0).detach())
    whole = as_vector(step.clipped_sum(*rows(other)))
    rest = as_vector(step.clipped_sum(*rows(other[1:])))
    torch.testing.assert_close(whole - rest, first)


def test_groups_are_streamed_with_their_own_assignment() -> None:
    torch.manual_seed(2)
    inputs = torch.randn(20, 3)
    plan = full_batch_plan(20, groups=ToyGroups(count=4), seed=5)
    step = runner(plan, Direction(3), linear_loss)
    sums = step.clipped_sum(*rows(inputs))
    assert isinstance(step.engine, StreamedGroups)
    assert sums.grouped
    assert sums.distance(sums.parts[0]) == 2.0, "a group's vector can turn around: 2C"
    fold = ToyGroups(count=4).assign(Fold.identity(20), step.source("groups").at(1))
    expected = sum(clipped(inputs[fold.index == group].mean(0, keepdim=True), 1.0)[0] for group in range(4))
    torch.testing.assert_close(sums.values["weight"], expected)
    assert step.release(*rows(inputs)).divisor == 4.0


def test_rows_fold_into_units() -> None:
    """Two views of one example are averaged before clipping; a user's three records are one vector."""
    inputs = torch.tensor([[3.0, 0.0], [0.0, 4.0], [5.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.3, 0.0]])
    views = Fold(torch.tensor([0, 0, 1, 1, 2, 2]), 3, torch.full((6,), 0.5))
    users = Fold(torch.tensor([0, 0, 0, 1, 2, 2]), 3)
    for fold, vectors in [
        (views, torch.tensor([[1.5, 2.0], [2.5, 0.5], [0.15, 1.0]])),
        (users, torch.tensor([[8.0, 4.0], [0.0, 1.0], [0.3, 2.0]])),
    ]:
        for memory in (None, 1):
            step = runner(full_batch_plan(3), Direction(2), linear_loss, engine=VmapEngine(memory))
            sums = step.clipped_sum((inputs,), fold)
            torch.testing.assert_close(sums.values["weight"], clipped(vectors, 1.0).sum(0))


def test_separable_rule_is_called_inside_backward() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
    batch = (torch.randn(6, 3), torch.randint(2, (6,)))
    loss = pg.supervised(nn.functional.cross_entropy)
    plan = full_batch_plan(6, clipping=BySlot(max_norms=(0.3, 0.2)))
    engine = HookedEngine()
    hooked = runner(plan, model, loss, engine=engine).clipped_sum(*rows(*batch))
    reference = runner(plan, model, loss).clipped_sum(*rows(*batch))
    assert engine.calls == [(1,), (0,)], "the last layer's block is clipped first, while backward is under way"
    torch.testing.assert_close(as_vector(hooked), as_vector(reference))
    gradients = loop_gradients(model, loss, batch)
    for name, norm in (("0.weight", 0.3), ("2.weight", 0.2)):
        expected = clipped(gradients[name].flatten(1), norm).sum(0).view_as(gradients[name][0])
        torch.testing.assert_close(hooked.values[name], expected)


def _worker(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    step = _layers(dist.all_reduce)
    half = _inputs()[rank * 3 : rank * 3 + 3]
    torch.save(step.release(*rows(half)).update, f"{out}.{rank}")
    dist.barrier()  # a worker that is through while the other still sends makes gloo abort
    dist.destroy_process_group()


def _layers(reduce: Reduce | None = None) -> StepRunner:
    """Three slots, of which one has no gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model[2].weight)
    return runner(full_batch_plan(6), model, lambda model, batch: model(*batch).sum(1), reduce=reduce)


def _inputs() -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(4))


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "rendezvous"), str(tmp_path / "update")), nprocs=2)
    alone = _layers().release(*rows(_inputs())).update
    assert len(alone) == 3
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"update.{rank}"), alone)


@pytest.mark.parametrize("seed", [None, 0])
def test_workers_that_would_each_add_noise_of_their_own_are_refused(seed: int | None) -> None:
    """The mean of what two workers release of one sum has half the variance. (Seeded alike, they would draw the same coins.)"""
    with pytest.raises(pg.RefusedError, match="reduce"):
        runner(full_batch_plan(6, multiplier=1.0, seed=seed), Direction(3), linear_loss, reduce=lambda flat: None)


def test_the_divisor_is_a_constant() -> None:
    """Whatever the realised batch: two records, or none, are divided by the plan's five."""
    inputs = torch.tensor([[0.5, 0.0], [0.0, 0.25]])
    step = runner(full_batch_plan(5, steps=2), Direction(2), linear_loss)
    torch.testing.assert_close(step.release(*rows(inputs)).update["weight"], torch.tensor([0.1, 0.05]))
    empty = step.release(None, Fold.identity(0))
    torch.testing.assert_close(empty.update["weight"], torch.zeros(2))
    assert step.ledger.count == 2, "an empty batch is charged like any other"


def test_a_release_needs_a_receipt() -> None:
    with pytest.raises(pg.PrivgradError, match="receipt"):
        Release(None, 1.0, update={})  # type: ignore[arg-type]


@pytest.mark.parametrize("weaken", [lambda n, s: {k: v / 2 for k, v in s.items()}, lambda n, s: {**s, "gradient": 0.0}])
def test_nothing_is_released_where_less_noise_was_added_than_charged(weaken: Callable[..., dict[str, float]]) -> None:
    class Weak(pg.GaussianNoise):
        def scales(self, sums: object) -> dict[str, float]:
            return weaken(self, super().scales(sums))  # type: ignore[arg-type]

    plan = full_batch_plan(2, noise=Weak(multiplier=1.0))
    step = runner(plan, Direction(3), linear_loss)
    with pytest.raises(pg.PrivgradError, match="nothing was released"):
        step.release(*rows(torch.ones(2, 3)))


def test_blocks_must_cover_every_slot_once() -> None:
    @dataclasses.dataclass(frozen=True)
    class Partial(BySlot):
        def partition(self, slots: object) -> list[object]:
            return super().partition({"0.weight": torch.Size([4, 3])})  # type: ignore[return-value]

    model = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False))
    plan = full_batch_plan(2, clipping=Partial(max_norms=(1.0,)))
    step = runner(plan, model, pg.supervised(nn.functional.cross_entropy))
    with pytest.raises(pg.PrivgradError, match=r"1\.weight"):
        step.clipped_sum(*rows(torch.ones(2, 3), torch.zeros(2, dtype=torch.long)))


def test_the_receipt_is_written_before_the_noise_is_drawn(tmp_path: Path) -> None:
    from privgrad.mechanism.step import StepRunner
    from privgrad.privacy.ledger import Ledger, read_ledger

    seen: list[int] = []
    path = tmp_path / "ledger.jsonl"

    class Watching(pg.GaussianNoise):
        def add(self, sums: object, receipt: Receipt, source: object) -> object:
            seen.append(read_ledger(path).count)
            return super().add(sums, receipt, source)  # type: ignore[arg-type]

    plan = full_batch_plan(2, steps=2, noise=Watching(multiplier=1.0))
    step = StepRunner(plan, Direction(3), linear_loss, VmapEngine(), Ledger(plan.terms(), path))
    for _ in range(2):
        step.release(*rows(torch.ones(2, 3)))
    assert seen == [1, 2]
    assert os.path.getsize(path) > 0

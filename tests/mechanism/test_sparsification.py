"""Random sparsification: one public mask for all units, before clipping; nothing reaches what is masked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.step import audit_step
from privgrad.gradients.contract import Engine, Fold, Need
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.mechanism.sparsification import STRUCTURES, Kept
from tests.helpers import full_batch_plan, loop_gradients, runner

LOSS = pg.supervised(nn.functional.cross_entropy)


class Tied(nn.Module):
    """A table that is looked up and multiplied with."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)

    def forward(self, tokens: Tensor) -> Tensor:
        return nn.functional.linear(self.norm(self.table(tokens)), self.table.weight).mean(1)


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 7, 7)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(98, 9), nn.Tanh(), nn.Linear(9, 7)), images),
    "positions": (lambda: nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Flatten(), nn.Linear(126, 7)), images),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.GroupNorm(2, 6), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(36, 7)
        ),
        images,
    ),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(243, 7)),
        images,
    ),
    "tied table": (Tied, lambda count: torch.randint(7, (count, 4))),
}


def masked(gradients: dict[str, Tensor], encoding: Kept) -> dict[str, Tensor]:
    """Zero what is not kept, straightforwardly."""
    ones = {name: torch.ones(slot) for name, slot in encoding.slots().items()}
    return {name: value * encoding.decode(ones)[name] for name, value in gradients.items()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    "engine", [OnePassEngine(), OnePassEngine(memory=1), VmapEngine()], ids=["all", "rows", "vmap"]
)
@pytest.mark.parametrize("views", [False, True])
def test_the_sum_is_that_of_masked_then_clipped_gradients(
    network: str, structure: str, engine: Engine, views: bool
) -> None:
    torch.manual_seed(0)
    make, draw = NETWORKS[network]
    model, inputs, targets = make(), draw(6), torch.randint(7, (6,))
    engine = type(engine)(engine.memory)  # type: ignore[call-arg, attr-defined]
    sparse = pg.RandomSparsification(final_ratio=0.6, ramp=False, structure=structure, block=2)
    clipping = pg.LayerwiseClipping(0.3) if views else pg.FlatClipping(0.5)
    step = runner(full_batch_plan(6, compression=sparse, clipping=clipping), model, LOSS, engine=engine)
    fold = Fold(torch.tensor([0, 0, 1, 1, 1, 2]), 3, torch.full((6,), 0.5)) if views else Fold.identity(6)
    found = step.clipped_sum((inputs, targets), fold)
    encoding = step._encode()
    assert isinstance(encoding, Kept)
    gradients = masked(loop_gradients(model, LOSS, (inputs, targets)), encoding)
    if views:
        units = {name: value.new_zeros(3, *value.shape[1:]) for name, value in gradients.items()}
        for name, value in gradients.items():
            units[name].index_add_(0, fold.index, 0.5 * value)
        gradients = units
    together = torch.cat([value.flatten(1) for value in gradients.values()], 1).norm(dim=1)
    for name, value in encoding.decode(found.values).items():
        norms = gradients[name].flatten(1).norm(dim=1) if views else together
        weights = ((0.3 if views else 0.5) / norms).clamp(max=1.0)
        expected = torch.einsum("u,u...->...", weights, gradients[name])
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


def test_a_share_is_kept_of_every_parameter() -> None:
    shapes = {"weight": torch.Size([20, 3]), "bias": torch.Size([20]), "one": torch.Size([1]), "scalar": torch.Size([])}
    for structure, expected in (("elements", 12), ("rows", 4), ("blocks", 4)):
        stage = pg.RandomSparsification(final_ratio=0.8, ramp=False, structure=structure, block=4)
        drawn = {name: stage._drawn(shape, 0.8, torch.Generator()) for name, shape in shapes.items()}
        assert len(drawn["weight"]) == expected
        assert len(drawn["one"]) == len(drawn["scalar"]) == 1
        encoding = Kept(shapes, drawn, by_rows=structure != "elements")
        assert encoding.need("weight") is (Need.PLACES if structure == "elements" else Need.ROWS)
        assert encoding.slots()["scalar"] == torch.Size([])
        back = encoding.decode({name: torch.ones(slot) for name, slot in encoding.slots().items()})
        assert {name: value.shape for name, value in back.items()} == shapes
        assert int(back["weight"].sum()) == 12


def test_the_share_rises_over_the_epochs_and_the_mask_is_drawn_for_each() -> None:
    stage = pg.RandomSparsification(final_ratio=0.8)
    assert [stage.ratio(step, epoch=4, steps=20) for step in range(0, 20, 4)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
    assert stage.ratio(19, epoch=4, steps=20) == 0.8
    assert stage.ratio(0, epoch=20, steps=20) == 0.0
    assert dataclasses.replace(stage, ramp=False).ratio(0, epoch=4, steps=20) == 0.8
    for refreshes, expected in ((1, [0, 4, 8]), (2, [0, 2, 4, 6, 8, 10])):
        plan = pg.Plan(
            sampling=pg.PoissonSampling(rate=0.25, divisor=2.0),
            steps=12,
            compression=pg.RandomSparsification(0.5, ramp=False, refreshes=refreshes),
            noise=pg.GaussianNoise(multiplier=1.0),
        )
        step = runner(plan, nn.Linear(40, 3), linear_loss_of_all)
        seen, changed = torch.empty(0), []
        for number in range(12):
            step.release((torch.randn(3, 40),), Fold.identity(3))
            if not torch.equal(step.states["compression"]["weight"], seen):
                changed.append(number)
            seen = step.states["compression"]["weight"]
        assert changed == expected


def linear_loss_of_all(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return model(batch[0]).sum(1)


@pytest.mark.parametrize("structure", [structure for structure in STRUCTURES if structure != "layers"])
def test_the_mask_knows_no_data_and_what_is_masked_gets_nothing(structure: str) -> None:
    """Another batch, other noise, the same mask; zeros where it masks, noise of the plan's scale where it does not."""
    sparse = pg.RandomSparsification(0.75, ramp=False, structure=structure, block=2)
    clipping, noise = pg.FlatClipping(max_norm=0.5), pg.GaussianNoise(multiplier=3.0)
    updates = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        step = runner(
            full_batch_plan(4, compression=sparse, clipping=clipping, noise=noise),
            nn.Linear(400, 40),
            linear_loss_of_all,
        )
        release = step.release((torch.randn(4, 400),), Fold.identity(4))
        assert release.update is not None
        updates.append(release.update["weight"])
    first, second = updates
    assert torch.equal(first == 0, second == 0)
    kept = first != 0
    assert float(kept.float().mean()) == pytest.approx(0.25)
    assert not torch.equal(first, second)
    assert float(4 * first[kept].std()) == pytest.approx(1.5, rel=0.1)


def tower() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(12, 12) for _ in range(8)))


def test_masked_layers_are_whole_and_others_each_time() -> None:
    """A quarter of eight layers moves in a step, weight and bias together, with noise of the plan's scale; in time all do."""
    sparse = pg.RandomSparsification(0.75, ramp=False, structure="layers", refreshes=8)
    plan = full_batch_plan(4, steps=40, compression=sparse, noise=pg.GaussianNoise(multiplier=3.0))
    model = tower()
    step = runner(plan, model, linear_loss_of_all)
    seen = set()
    for number in range(40):
        torch.manual_seed(number)
        release = step.release((torch.randn(4, 12),), Fold.identity(4))
        assert release.update is not None
        moved = {name for name, value in release.update.items() if bool((value != 0).all())}
        assert all(name in moved or not bool(release.update[name].any()) for name in release.update)
        assert len(moved) == 4
        assert {name.removesuffix("weight") for name in moved if "weight" in name} == {
            name.removesuffix("bias") for name in moved if "bias" in name
        }
        seen |= moved
    assert seen == set(release.update)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_no_gradient_is_computed_below_the_lowest_layer_that_takes_part() -> None:
    reached: list[int] = []

    class Noted(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(inputs: Tensor, place: int) -> Tensor:
            return inputs.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
            ctx.place = inputs[1]

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
            reached.append(ctx.place)
            return gradient, None

    class Marked(nn.Module):
        def __init__(self, place: int) -> None:
            super().__init__()
            self.place = place

        def forward(self, inputs: Tensor) -> Any:
            return Noted.apply(inputs, self.place)

    torch.manual_seed(0)
    layers = [layer for place in range(6) for layer in (nn.Linear(5, 5), Marked(place))]
    model = nn.Sequential(*layers)
    plan = full_batch_plan(4, compression=pg.RandomSparsification(0.7, ramp=False, structure="layers"))
    step = runner(plan, model, linear_loss_of_all)
    step.clipped_sum((torch.randn(4, 5),), Fold.identity(4))
    kept = {int(name.split(".")[0]) // 2 for name, places in step.states["compression"].items() if len(places)}
    reached.clear()
    step.clipped_sum((torch.randn(4, 5),), Fold.identity(4))
    assert len(kept) == 2
    assert min(kept) > 0
    assert sorted(reached) == list(range(min(kept), 6))


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0.0, 0.99),
    st.sampled_from(STRUCTURES),
    st.floats(0.3, 5.0),
    st.sampled_from(list(pg.Adjacency)),
    st.booleans(),
)
def test_epsilon_is_unchanged(
    ratio: float, structure: str, multiplier: float, adjacency: pg.Adjacency, grouped: bool
) -> None:
    plan = pg.Plan(
        sampling=pg.PoissonSampling(rate=0.1, divisor=8.0),
        steps=20,
        noise=pg.GaussianNoise(multiplier=multiplier),
        groups=pg.RandomGroups(2) if grouped else None,
        adjacency=adjacency,
    )
    sparse = dataclasses.replace(plan, compression=pg.RandomSparsification(ratio, structure=structure))
    assert sparse.event() == plan.event()
    assert math.isfinite(sparse.terms().delta)


@pytest.mark.parametrize("structure", ["elements", "rows"])
def test_the_audit_is_below_the_claim_and_tight(structure: str) -> None:
    """The canary has the same coordinate everywhere: whatever is kept of it has norm C after clipping."""
    torch.set_num_threads(1)
    dimension, kept = 16, 4
    plan = pg.Plan(
        sampling=pg.PoissonSampling(rate=0.1, divisor=4.0),
        steps=1,
        compression=pg.RandomSparsification(0.75, ramp=False, structure=structure),
        clipping=pg.FlatClipping(max_norm=0.7),
        noise=pg.GaussianNoise(multiplier=0.4),
    )
    others = torch.zeros(2, dimension)
    inside = torch.cat([1e3 * torch.ones(1, dimension), others])
    direction = torch.full((dimension,), 1 / math.sqrt(kept))
    found = audit_step(plan, inside, others, direction, 0.35, trials=1000)
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"final_ratio": 1.0}, "compression.final_ratio"),
        ({"ramp": 1}, "compression.ramp"),
        ({"refreshes": 0}, "compression.refreshes"),
        ({"structure": "row"}, "did you mean 'rows'"),
        ({"block": 0}, "compression.block"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(pg.PrivgradError, match=message):
        pg.RandomSparsification(**numbers)  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", ["rows", "layers"])
def test_it_works_with_groups_and_thresholds(structure: str) -> None:
    torch.manual_seed(0)
    model = NETWORKS["convolutions"][0]()
    plan = full_batch_plan(
        6,
        steps=3,
        compression=pg.RandomSparsification(0.5, ramp=False, structure=structure),
        groups=pg.RandomGroups(2),
        clipping=pg.LayerwiseClipping(0.3),
        thresholds=pg.QuantileThresholds(),
        noise=pg.GaussianNoise(multiplier=1.0, allocation="dimension"),
    )
    step = runner(plan, model, LOSS)
    for _ in range(3):
        release = step.release((images(6), torch.randint(7, (6,))), Fold.identity(6))
        assert release.update is not None
        assert {name: value.shape for name, value in release.update.items()} == {
            name: parameter.shape for name, parameter in model.named_parameters()
        }

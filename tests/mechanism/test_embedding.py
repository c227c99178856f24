"""Gradient embedding: a public basis, two clipped parts, one Gaussian mechanism over both."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import privgrad as pg
from privgrad.audit.step import audit_step
from privgrad.gradients.contract import Engine, Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.streamed import StreamedEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.gradients.written import unit_gradients
from privgrad.mechanism.embedding import BLOCKS, Embedded, basis_of
from privgrad.mechanism.layerwise import split
from privgrad.mechanism.noise import ALLOCATIONS
from privgrad.mechanism.plan import Plan
from privgrad.privacy.events import MixedGaussianDpEvent
from privgrad.privacy.sensitivity import joint_multiplier
from tests.helpers import as_vector, full_batch_plan, loop_gradients, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)
TWO = {"embedding": ["embedding.*"], "residual": ["residual.*"]}


def two_parts(embedding: float, residual: float) -> pg.LayerwiseClipping:
    return pg.LayerwiseClipping(max_norm=(embedding, residual), blocks=TWO)


def dense() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(18, 9), nn.Tanh(), nn.Linear(9, 7))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 5, 2), nn.GroupNorm(1, 5), nn.Tanh(), nn.Flatten(), nn.Linear(20, 7))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"dense": dense, "convolutions": convolutions}


def images(count: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 2, 3, 3), torch.randint(7, (count,))


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("blocks", ["all", "module"])
@pytest.mark.parametrize(
    "engine", [OnePassEngine(), OnePassEngine(memory=1), VmapEngine()], ids=["all", "rows", "vmap"]
)
@pytest.mark.parametrize("views", [False, True])
def test_the_sum_is_that_of_the_two_clipped_parts(network: str, blocks: str, engine: Engine, views: bool) -> None:
    torch.manual_seed(0)
    model, private, public = NETWORKS[network](), images(6), images(12)
    engine = type(engine)(engine.memory)  # type: ignore[call-arg, attr-defined]
    embedding = pg.GradientEmbedding(rank=3, anchors=12, blocks=blocks)
    plan = full_batch_plan(6, compression=embedding, clipping=two_parts(0.3, 0.2))
    step = runner(plan, model, LOSS, engine=engine, public=public)
    fold = Fold(torch.tensor([0, 0, 1, 1, 1, 2]), 3, torch.full((6,), 0.5)) if views else Fold.identity(6)
    update = step.release(private, fold).update
    bases = step.states["compression"]

    units = loop_gradients(model, LOSS, private)
    if views:
        units = {
            name: value.new_zeros(3, *value.shape[1:]).index_add_(0, fold.index, 0.5 * value)
            for name, value in units.items()
        }
    names = split(blocks, list(units))
    flat = {block: torch.cat([units[name].flatten(1) for name in inside], 1) for block, inside in names.items()}
    within = {block: value @ bases[block].T for block, value in flat.items()}
    left = {block: value - within[block] @ bases[block] for block, value in flat.items()}
    lengths = [torch.cat(list(part.values()), 1).norm(dim=1) for part in (within, left)]
    first, second = ((norm / length).clamp(max=1) for norm, length in zip((0.3, 0.2), lengths, strict=True))
    assert float(first.min()) < 1
    assert float(second.min()) < 1
    assert update is not None
    for block, inside in names.items():
        expected = (first[:, None] * within[block]).sum(0) @ bases[block] + (second[:, None] * left[block]).sum(0)
        found = torch.cat([update[name].flatten() for name in inside])
        torch.testing.assert_close(found, expected / 6, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_decoding_an_encoded_gradient_gives_it_back(blocks: str, dtype: torch.dtype) -> None:
    """Also with a basis that is not orthonormal: what is not in e is in r."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 4)).to(dtype)
    shapes, names = shapes_of(model), split(blocks, list(shapes_of(model)))
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    for exact in (True, False):
        bases = {}
        for block, inside in names.items():
            size = sum(shapes[name].numel() for name in inside)
            bases[block] = torch.linalg.qr(torch.randn(size, 3))[0].T if exact else torch.randn(3, size)
        encoding = Embedded(shapes, names, bases, residual=True)
        gradients = {name: torch.randn(2, *shape, dtype=dtype) for name, shape in shapes.items()}
        encoded = encoding.encode(gradients)
        assert {name: value.shape[1:] for name, value in encoded.items()} == dict(encoding.slots())
        decoded = encoding.decode({name: value.sum(0) for name, value in encoded.items()})
        assert list(decoded) == list(shapes)
        for name, value in gradients.items():
            scale = 1.0 if exact else 50.0
            torch.testing.assert_close(decoded[name], value.sum(0), rtol=0, atol=10 * scale * tolerance)


def test_without_the_residual_the_update_is_the_projection() -> None:
    torch.manual_seed(0)
    shapes = {"w": torch.Size([4, 5]), "b": torch.Size([4])}
    basis = torch.linalg.qr(torch.randn(24, 3))[0].T
    encoding = Embedded(shapes, {"gradient": ["w", "b"]}, {"gradient": basis}, residual=False)
    assert dict(encoding.slots()) == {"embedding.gradient": torch.Size([3])}
    gradients = {name: torch.randn(1, *shape) for name, shape in shapes.items()}
    decoded = encoding.decode({name: value[0] for name, value in encoding.encode(gradients).items()})
    flat = torch.cat([value.flatten() for value in gradients.values()])
    torch.testing.assert_close(torch.cat([value.flatten() for value in decoded.values()]), basis.T @ (basis @ flat))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(-6, 12), st.integers(0, 6), st.floats(1e-20, 1e15), st.integers(1, 3))
def test_the_basis_is_orthonormal_to_rounding(rank: int, more: int, spanned: int, size: float, rounds: int) -> None:
    """Whatever the gradients: of any size, spanning fewer directions than it has, zero, or none."""
    generator = torch.Generator().manual_seed(rank * 100 + spanned)
    gradients = torch.randn(max(0, rank + more), spanned, generator=generator) @ torch.randn(
        spanned, 30, generator=generator
    )
    basis = basis_of(size * gradients, rank, rounds, generator)
    assert basis.shape == (rank, 30)
    torch.testing.assert_close(basis @ basis.T, torch.eye(rank), rtol=0, atol=2e-6)


def test_the_basis_has_the_directions_in_which_public_gradients_are_large() -> None:
    torch.manual_seed(0)
    model, public = dense(), images(40)
    gradients = loop_gradients(model, LOSS, public)
    flat = torch.cat([value.flatten(1) for value in gradients.values()], 1)
    embedding = pg.GradientEmbedding(rank=5, anchors=40, iterations=30)
    step = runner(full_batch_plan(4, compression=embedding), model, LOSS, public=public)
    step.refresh()
    basis = step.states["compression"]["gradient"]
    _, values, _ = torch.linalg.svd(flat)
    assert float((flat @ basis.T).square().sum()) >= 0.99 * float(values[:5].square().sum())


@pytest.mark.parametrize("engine", [OnePassEngine(), OnePassEngine(memory=1), VmapEngine(), StreamedEngine()])
def test_written_gradients_are_those_of_the_rows(engine: Engine) -> None:
    """Of the rows alone: an engine that tries a row out first does not write it twice."""
    torch.manual_seed(0)
    model, batch = convolutions(), images(5)
    found = unit_gradients(engine, model, LOSS, batch, Fold.identity(5))
    for name, expected in loop_gradients(model, LOSS, batch).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6)


def test_the_basis_knows_no_private_data_and_serves_for_so_many_steps() -> None:
    """Another batch and other noise: the same first basis; then a new one every three steps, of the weights of then."""
    torch.manual_seed(0)
    start, public = dense().state_dict(), images(12)
    plan = full_batch_plan(
        6,
        steps=7,
        multiplier=1.0,
        compression=pg.GradientEmbedding(rank=2, anchors=8, every=3),
        clipping=two_parts(1, 1),
    )
    first = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = dense()
        model.load_state_dict(start)
        step = runner(plan, model, LOSS, public=public)
        seen: list[Tensor] = []
        for _ in range(7):
            release = step.release(images(6), Fold.identity(6))
            assert release.update is not None
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter -= 0.1 * release.update[name]
            seen.append(step.states["compression"]["gradient"])
        assert [torch.equal(one, other) for one, other in itertools.pairwise(seen)] == [True, True, False] * 2
        first.append(seen[0])
    assert torch.equal(*first)


def test_both_parts_get_their_own_noise() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(18, 300))
    noise = pg.GaussianNoise(multiplier=3.0, allocation="per_layer")
    embedding = pg.GradientEmbedding(rank=200, anchors=200, iterations=1)
    plan = full_batch_plan(4, steps=2, compression=embedding, clipping=two_parts(2.0, 0.1), noise=noise)
    public, private = (torch.randn(200, 2, 3, 3), torch.randint(300, (200,))), images(4)
    step = runner(plan, model, LOSS, public=public)
    sums = step.clipped_sum(private, Fold.identity(4))
    before = {slot: value.clone() for slot, value in sums.values.items()}
    noised = noise.add(sums, step.ledger.charge(plan.step_event()), step.source("noise"))
    assert noised.multiplier() == pytest.approx(3.0)
    for slot, expected in (("embedding.gradient", 6 * math.sqrt(2)), ("residual.1.weight", 0.3 * math.sqrt(2))):
        added = sums.values[slot] - before[slot]
        assert float(added.std()) == pytest.approx(expected, rel=0.25)


@settings(deadline=None, max_examples=40)
@given(
    st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.1, 20), st.sampled_from(sorted(ALLOCATIONS)), st.booleans()
)
def test_both_parts_are_one_gaussian(
    embedding: float, residual: float, multiplier: float, allocation: str, grouped: bool
) -> None:
    """1/z^2 = (R_e / s_e)^2 + (R_r / s_r)^2; R = C, or 2C for groups."""
    plan = full_batch_plan(
        4,
        groups=pg.RandomGroups(2) if grouped else None,
        compression=pg.GradientEmbedding(rank=2, anchors=4),
        clipping=two_parts(embedding, residual),
        noise=pg.GaussianNoise(multiplier=multiplier, allocation=allocation),
    )
    step = runner(plan, dense(), LOSS, public=images(8))
    scales = plan.noise.scales(step.clipped_sum((torch.zeros(0, 2, 3, 3), torch.zeros(0)), Fold.identity(0)))
    factor = 2 if grouped else 1
    both = (factor * embedding / scales["embedding"]) ** 2 + (factor * residual / scales["residual"]) ** 2
    assert both == pytest.approx(1 / multiplier**2)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.5, 5), st.floats(0.1, 5), st.floats(0.1, 5), st.floats(1.05, 3), st.booleans())
def test_epsilon_grows_with_either_norm_under_the_same_noise(
    scale: float, embedding: float, residual: float, factor: float, first: bool
) -> None:
    def epsilon(norms: tuple[float, float]) -> float:
        z = joint_multiplier([(norms[0], scale), (norms[1], scale / 2)])
        return poisson_plan(clipping=two_parts(*norms), noise=pg.GaussianNoise(multiplier=z)).epsilon()

    larger = (embedding * factor, residual) if first else (embedding, residual * factor)
    assert epsilon(larger) > epsilon((embedding, residual))


def poisson_plan(**stages: object) -> Plan:
    return Plan(
        **{
            "sampling": pg.PoissonSampling(rate=0.1, divisor=4.0),
            "steps": 1,
            "accountant": "rdp",
            "compression": pg.GradientEmbedding(rank=2, anchors=4),
            "clipping": two_parts(1.0, 0.2),
            "noise": pg.GaussianNoise(multiplier=1.0, allocation="per_layer"),
            **stages,
        }  # type: ignore[arg-type]
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 50), st.sampled_from(BLOCKS), st.booleans(), st.sampled_from(list(pg.Adjacency)), st.booleans())
def test_epsilon_is_unchanged_by_the_basis(
    rank: int, blocks: str, residual: bool, adjacency: pg.Adjacency, grouped: bool
) -> None:
    plan = poisson_plan(
        groups=pg.RandomGroups(2) if grouped else None, adjacency=adjacency, accountant="pld", compression=None
    )
    embedding = pg.GradientEmbedding(rank=rank, anchors=50, blocks=blocks, residual=residual)
    assert dataclasses.replace(plan, compression=embedding).event() == plan.event()


Z = 0.4
"""Of the audits: a mu of 2.5 is shown from few trials."""
PUBLIC = (torch.eye(8)[:2] + 1e-3 * torch.eye(8)[:2].flip(0),)
"""Their gradients span the first two axes."""


def attacked(plan: Plan, embedding: float, residual: float) -> object:
    """The canary is huge in the basis and outside of it; the attacker weighs both by the noise that is on them."""
    torch.manual_seed(0)
    z = plan.noise.multiplier
    assert z is not None
    within, left = z * math.sqrt(2) * embedding, z * math.sqrt(2) * residual
    axes = torch.eye(8)
    direction = embedding / (within**2 + left**2) * axes[0] + residual / left**2 * axes[2]
    middle = (embedding**2 / (within**2 + left**2) + residual**2 / left**2) / 2
    others = torch.randn(3, 8) * (axes[1] + axes[4:].sum(0))
    inside = torch.cat([1e4 * (axes[0] + axes[2])[None], others])
    return audit_step(plan, inside, others, direction, middle, public=PUBLIC, trials=1000)


def test_the_joint_attack_stays_below_the_claim_and_comes_near_it() -> None:
    torch.set_num_threads(1)
    noise = pg.GaussianNoise(multiplier=Z, allocation="per_layer")
    found = attacked(poisson_plan(clipping=two_parts(1.0, 0.2), noise=noise), 1.0, 0.2)
    assert found.holds  # type: ignore[attr-defined]
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed  # type: ignore[attr-defined]


def test_two_prices_for_one_are_found() -> None:
    """Noise for z on each of the two, charged as if there were one: what forgetting the other part would be."""
    torch.set_num_threads(1)
    weak = poisson_plan(noise=pg.GaussianNoise(multiplier=Z / math.sqrt(2), allocation="per_layer"))
    assert attacked(weak, 1.0, 0.2).mu_lower > 1 / Z  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"rank": 0}, "compression.rank"),
        ({"rank": 9, "anchors": 8}, "8 anchors span"),
        ({"every": 1.5}, "compression.every"),
        ({"iterations": 0}, "compression.iterations"),
        ({"residual": 1}, "compression.residual is 1"),
        ({"joined": "yes"}, "compression.joined is 'yes'"),
        ({"blocks": "tensors"}, "did you mean 'tensor'"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(numbers: Mapping[str, object], message: str) -> None:
    with pytest.raises(pg.PrivgradError, match=message):
        pg.GradientEmbedding(**numbers)  # type: ignore[arg-type]


def test_what_does_not_fit_model_or_public_data_is_refused_before_anything_is_charged() -> None:
    def step(public: object, **numbers: object) -> None:
        plan = poisson_plan(compression=pg.GradientEmbedding(**numbers))  # type: ignore[arg-type]
        made = runner(plan, dense(), LOSS, public=public)
        try:
            made.release(*rows(*images(3)))
        finally:
            assert made.ledger.count == 0

    with pytest.raises(pg.RefusedError, match="needs public data"):
        step(None, rank=4)
    with pytest.raises(pg.PrivgradError, match=r"block '1\.bias' has 9 coordinates"):
        step(images(20), rank=10, blocks="tensor")
    with pytest.raises(pg.PrivgradError, match="there are 5 public rows"):
        step(images(5), rank=6)
    with pytest.raises(pg.PrivgradError, match="cannot take the public rows"):
        step((torch.randn(20, 5), torch.randint(7, (20,))), rank=4)
    with pytest.raises(pg.PrivgradError, match="cannot take the public rows"):
        step((images(20)[0], torch.full((20,), 11)), rank=4)
    for clipping in (pg.CoordinateClipping(1.0, p=4.0), two_parts(1.0, 0.5)):
        with pytest.raises(pg.RefusedError, match="turns coordinates"):
            poisson_plan(clipping=clipping, mixing=pg.ModelMix(), noise=pg.GaussianNoise(multiplier=1.0))


def test_public_gradients_that_are_not_finite_are_left_out() -> None:
    inputs, targets = images(9)
    inputs[:8] = math.nan
    step = runner(poisson_plan(compression=pg.GradientEmbedding(rank=4)), dense(), LOSS, public=(inputs, targets))
    step.refresh()
    basis = step.states["compression"]["gradient"]
    torch.testing.assert_close(basis @ basis.T, torch.eye(4), rtol=0, atol=2e-6)


def test_it_works_with_groups_thresholds_and_flat_clipping() -> None:
    torch.manual_seed(0)
    choices = (
        {"groups": pg.RandomGroups(2), "clipping": two_parts(1, 1), "thresholds": pg.QuantileThresholds()},
        {"clipping": pg.LayerwiseClipping(0.3), "thresholds": pg.PublicThresholds()},
        {"clipping": pg.FlatClipping(0.5)},
    )
    for stages in choices:
        model = convolutions()
        noise = pg.GaussianNoise(multiplier=1.0, allocation="dimension")
        embedding = pg.GradientEmbedding(rank=2, anchors=20, every=2)
        plan = full_batch_plan(6, steps=3, compression=embedding, noise=noise, **stages)
        step = runner(plan, model, LOSS, public=images(30))
        for _ in range(3):
            release = step.release(images(6), Fold.identity(6))
            assert release.update is not None
            assert {name: value.shape for name, value in release.update.items()} == shapes_of(model)


# Joined: put together again for each unit, before the sum.


@pytest.mark.parametrize(
    "engine", [OnePassEngine(), OnePassEngine(memory=1), VmapEngine()], ids=["all", "rows", "vmap"]
)
@pytest.mark.parametrize("p", [1.0, 60.0])
@pytest.mark.parametrize("views", [False, True])
def test_joined_units_are_cut_coordinate_by_coordinate(engine: Engine, p: float, views: bool) -> None:
    torch.manual_seed(0)
    model, private, public = convolutions(), images(6), images(12)
    engine = type(engine)(engine.memory)  # type: ignore[call-arg, attr-defined]
    clipping = pg.LayerwiseClipping(max_norm=(0.3, 0.4), blocks=TWO, p=p)
    embedding = pg.GradientEmbedding(rank=3, anchors=12, joined=True)
    step = runner(
        full_batch_plan(6, compression=embedding, clipping=clipping), model, LOSS, engine=engine, public=public
    )
    fold = Fold(torch.tensor([0, 0, 1, 1, 1, 2]), 3, torch.full((6,), 0.5)) if views else Fold.identity(6)
    sums = step.clipped_sum(private, fold)
    assert [(part.name, part.bound.radius) for part in sums.parts] == [("gradient", pytest.approx(0.5))]
    basis = step.states["compression"]["gradient"]
    flat = torch.cat([value.flatten(1) for value in loop_gradients(model, LOSS, private).values()], 1)
    if views:
        flat = flat.new_zeros(3, flat.shape[1]).index_add_(0, fold.index, 0.5 * flat)
    within = flat @ basis.T
    left = flat - within @ basis
    within, left = (
        part * (norm / part.norm(dim=1, keepdim=True)).clamp(max=1) for part, norm in ((within, 0.3), (left, 0.4))
    )
    units = within @ basis + left
    cap = 0.5 / math.sqrt(p)
    assert bool((units.abs() > cap).any()) is (p > 1)
    expected = units.clamp(-cap, cap).sum(0)
    torch.testing.assert_close(
        torch.cat([value.flatten() for value in sums.values.values()]), expected, rtol=1e-4, atol=1e-6
    )
    update = step.release(private, fold).update
    assert update is not None
    torch.testing.assert_close(
        torch.cat([value.flatten() for value in update.values()]), expected / 6, rtol=1e-4, atol=1e-6
    )


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 10), st.floats(0.01, 10), st.floats(1, 40), st.floats(1e-3, 1e3), st.floats(0.1, 30))
def test_the_bounds_of_joined_units_rest_on_no_basis(
    embedding: float, residual: float, p: float, size: float, stretched: float
) -> None:
    """A basis that is anything but orthonormal: still in the ball and in the cube."""
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    clipping = pg.LayerwiseClipping(max_norm=(embedding, residual), blocks=TWO, p=p)
    plan = full_batch_plan(1, compression=pg.GradientEmbedding(rank=2, joined=True, every=9), clipping=clipping)
    step = runner(plan, model, lambda m, batch: size * m(batch[0]).square().sum(1), public=(torch.randn(9, 6),))
    step.states = {**step.states, "compression": {"gradient": stretched * torch.randn(2, 21)}}
    step.refresh = lambda: None  # type: ignore[method-assign]
    found = as_vector(step.clipped_sum((torch.randn(1, 6),), Fold.identity(1)))
    radius = math.hypot(embedding, residual)
    assert float(found.norm()) <= radius * (1 + 1e-6)
    assert float(found.abs().max()) <= radius / math.sqrt(p) * (1 + 1e-6)


def test_the_attack_on_joined_units_stays_below_the_claim_and_comes_near_it() -> None:
    torch.set_num_threads(1)
    plan = poisson_plan(
        compression=pg.GradientEmbedding(rank=2, anchors=4, joined=True),
        clipping=pg.LayerwiseClipping(max_norm=(0.6, 0.8), blocks=TWO, p=2.0),
        noise=pg.GaussianNoise(multiplier=Z, allocation="per_layer"),
    )
    axes = torch.eye(8)
    canary = torch.zeros(1, 8)
    canary[0, [0, 2]] = 1e4
    moved = torch.tensor([0.6, 1 / math.sqrt(2)])  # the residual of 0.8 is cut
    direction = (moved[0] * axes[0] + moved[1] * axes[2]) / moved.norm()
    others = torch.zeros(3, 8)
    found = audit_step(
        plan, torch.cat([canary, others]), others, direction, float(moved.norm()) / 2, public=PUBLIC, trials=3000
    )
    assert found.holds
    assert found.mu_lower_95 >= 0.8 * found.mu_claimed


@pytest.mark.parametrize("grouped", [False, True])
def test_joined_units_may_be_mixed(grouped: bool) -> None:
    """The event has R = sqrt(C_e^2 + C_r^2), doubled for groups, and p as it is."""
    mixed = poisson_plan(
        groups=pg.RandomGroups(2) if grouped else None,
        compression=pg.GradientEmbedding(rank=2, anchors=8, joined=True),
        clipping=pg.LayerwiseClipping(max_norm=(0.3, 0.4), blocks=TWO, p=25.0),
        mixing=pg.ModelMix(width_ratio=0.2),
        steps=2,
    )
    divisor, radius = (2.0, 1.0) if grouped else (4.0, 0.5)
    assert mixed.step_event().event == MixedGaussianDpEvent(1.0, pytest.approx(0.2 * divisor / radius), 25.0)
    model = convolutions()
    step = runner(mixed, model, LOSS, public=images(12))
    for _ in range(2):
        release = step.release(*rows(*images(6)), rate=0.1)
        assert release.update is None
        assert release.weights is not None
        assert {name: value.shape for name, value in release.weights.items()} == shapes_of(model)

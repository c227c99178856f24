"""Blocks, allocations and adaptive thresholds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import privgrad as pg
from privgrad.mechanism.layerwise import split
from privgrad.mechanism.noise import ALLOCATIONS
from privgrad.mechanism.plan import Plan
from privgrad.privacy.sensitivity import joint_multiplier
from tests.helpers import Direction, as_vector, full_batch_plan, linear_loss, loop_gradients, rows, runner

LOSS = pg.supervised(nn.functional.cross_entropy)
SLOTS = ["conv1.weight", "conv1.bias", "norm.weight", "fc.weight", "fc.bias"]
POSITIVE = st.floats(1e-3, 1e3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def data(count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


@settings(deadline=None)
@given(
    st.lists(st.tuples(POSITIVE, st.integers(1, 10**6)), min_size=1, max_size=40), POSITIVE, st.sampled_from([1.0, 2.0])
)
def test_every_allocation_has_the_joint_multiplier_that_is_charged(
    layers: list[tuple[float, int]], multiplier: float, factor: float
) -> None:
    distances = [factor * norm for norm, _ in layers]
    sizes = [size for _, size in layers]
    for allocation in ALLOCATIONS.values():
        scales = [multiplier * share for share in allocation(distances, sizes)]
        assert joint_multiplier(zip(distances, scales, strict=True)) == pytest.approx(multiplier)


@given(st.lists(st.tuples(POSITIVE, st.integers(1, 10**6)), min_size=2, max_size=20))
def test_dimension_adds_the_least_noise(layers: list[tuple[float, int]]) -> None:
    distances, sizes = zip(*layers, strict=True)

    def energy(name: str) -> float:
        return sum(size * scale**2 for size, scale in zip(sizes, ALLOCATIONS[name](distances, sizes), strict=True))

    assert energy("dimension") <= min(energy("uniform"), energy("per_layer")) * (1 + 1e-9)


def test_the_papers_convention_pays_sqrt_l() -> None:
    """s_l = 2 C_l sigma for groups is z = sigma / sqrt(L)."""
    sigma, norms = 1.3, (0.5, 2.0, 1.0, 0.1)
    plan = full_batch_plan(
        40,
        clipping=pg.LayerwiseClipping(max_norm=norms),
        groups=pg.RandomGroups(2),
        noise=pg.GaussianNoise(multiplier=sigma / math.sqrt(4), allocation="per_layer"),
    )
    sums = runner(plan, network(), LOSS).clipped_sum(*rows(*data(8)))
    scales = plan.noise.scales(sums)  # type: ignore[attr-defined]
    assert list(scales.values()) == pytest.approx([2 * norm * sigma for norm in norms])


@settings(deadline=None, max_examples=20)
@given(
    st.lists(POSITIVE, min_size=4, max_size=4),
    st.sampled_from(sorted(ALLOCATIONS)),
    st.sampled_from(list(pg.Adjacency)),
)
def test_epsilon_of_a_layerwise_plan_is_that_of_the_flat_plan(
    norms: list[float], allocation: str, adjacency: pg.Adjacency
) -> None:
    noise = pg.GaussianNoise(multiplier=0.9, allocation=allocation)
    sampling = pg.PoissonSampling(rate=0.02, divisor=20.0)

    def plan(**stages: object) -> Plan:
        return Plan(sampling=sampling, steps=20, adjacency=adjacency, noise=noise, **stages)  # type: ignore[arg-type]

    layerwise = plan(clipping=pg.LayerwiseClipping(max_norm=tuple(norms)))
    assert layerwise.event() == plan().event()
    sums = runner(layerwise, network(), LOSS).clipped_sum(*rows(*data(4)))
    scales = noise.scales(sums)
    z = joint_multiplier((sums.distance(part), scales[part.name]) for part in sums.parts)
    assert z == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        ("all", {"gradient": SLOTS}),
        ("tensor", {slot: [slot] for slot in SLOTS}),
        ("module", {"conv1": SLOTS[:2], "norm": SLOTS[2:3], "fc": SLOTS[3:]}),
        ({"body": ["conv*", "norm.*"], "head": ["fc.*"]}, {"body": SLOTS[:3], "head": SLOTS[3:]}),
    ],
)
def test_blocks(blocks: str | Mapping[str, Sequence[str]], expected: dict[str, list[str]]) -> None:
    assert split(blocks, SLOTS) == expected


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        ({"body": ["conv*"], "tail": ["tail.*"]}, r"blocks\.tail is \['tail\.\*'\] and matches no parameter"),
        ({"body": ["conv*", "norm.*"]}, r"in none: fc\.weight, fc\.bias"),
        ({"body": ["*"], "head": ["fc.*"]}, r"in several: fc\.bias, fc\.weight"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(blocks: Mapping[str, Sequence[str]], says: str) -> None:
    with pytest.raises(pg.PrivgradError, match=says):
        split(blocks, SLOTS)


@pytest.mark.parametrize("blocks", ["layer", [], {}, 3, {"a": "fc"}])
def test_blocks_that_mean_nothing_are_refused(blocks: object) -> None:
    with pytest.raises(pg.PrivgradError, match=r"clipping\.blocks"):
        pg.LayerwiseClipping(blocks=blocks)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [0.0, -1.0, math.nan, (1.0, 0.0), (), "1"])
def test_norms_that_mean_nothing_are_refused(norm: object) -> None:
    with pytest.raises(pg.PrivgradError, match=r"clipping\.max_norm is"):
        pg.LayerwiseClipping(max_norm=norm)  # type: ignore[arg-type]


def test_a_wrong_number_of_norms_is_refused() -> None:
    plan = full_batch_plan(4, clipping=pg.LayerwiseClipping(max_norm=(1.0, 2.0)))
    with pytest.raises(pg.PrivgradError, match="has 2 numbers, and there are 4 blocks"):
        runner(plan, network(), LOSS).clipped_sum(*rows(*data(4)))


@pytest.mark.parametrize("blocks", ["tensor", "module", "all", {"first": ["0.*"], "rest": ["2.*"]}])
def test_blocks_are_clipped_one_by_one(blocks: str) -> None:
    batch = data(7)
    gradients = loop_gradients(network(), LOSS, batch)
    sums = runner(full_batch_plan(7, clipping=pg.LayerwiseClipping(0.3, blocks=blocks)), network(), LOSS).clipped_sum(
        *rows(*batch)
    )
    for slots in split(blocks, list(gradients)).values():
        norms = torch.cat([gradients[slot].flatten(1) for slot in slots], dim=1).norm(dim=1)
        weights = (0.3 / norms).clamp(max=1.0)
        for slot in slots:
            torch.testing.assert_close(sums.values[slot], torch.einsum("n,n...->...", weights, gradients[slot]))


def test_automatic_clipping_divides_by_the_norm() -> None:
    batch = data(7)
    gradients = loop_gradients(network(), LOSS, batch)
    norms = torch.cat([value.flatten(1) for value in gradients.values()], dim=1).norm(dim=1)
    plan = full_batch_plan(7, clipping=pg.AutomaticClipping(max_norm=2.0, stability=0.1))
    sums = runner(plan, network(), LOSS).clipped_sum(*rows(*batch))
    for name, value in gradients.items():
        torch.testing.assert_close(sums.values[name], torch.einsum("n,n...->...", 2.0 / (norms + 0.1), value))


def test_a_contribution_whose_norm_is_lost_is_bounded_by_automatic_clipping_too() -> None:
    """Its square is 0 in float32; with a stability of 1e-30 it was made 1.7e6 C long."""
    with pytest.raises(pg.PrivgradError, match="stability"):
        pg.AutomaticClipping(stability=1e-13)
    plan = full_batch_plan(1, clipping=pg.AutomaticClipping(stability=1e-12))
    tiny = torch.full((1, 3), 1e-24)
    assert float(as_vector(runner(plan, Direction(3), linear_loss).clipped_sum(*rows(tiny))).norm()) <= 1.0


def test_public_thresholds_follow_the_norms_of_public_data() -> None:
    public = data(30, seed=5)
    model = network()
    plan = full_batch_plan(4, steps=3, clipping=pg.LayerwiseClipping(0.5), thresholds=pg.PublicThresholds(every=2))
    step = runner(plan, model, LOSS, public=public)
    batch = data(4)
    gradients = loop_gradients(model, LOSS, public)
    means = torch.stack([value.flatten(1).norm(dim=1).mean() for value in gradients.values()])
    expected = (0.5 * means / means.max()).tolist()
    bounds = [part.bound.radius for part in step.clipped_sum(*rows(*batch)).parts]
    assert bounds == pytest.approx(expected, rel=1e-4)
    step.release(*rows(*batch))
    with torch.no_grad():
        model[0].weight.mul_(3.0)  # type: ignore[union-attr, operator]
    step.release(*rows(*batch))
    changed = [part.bound.radius for part in step.clipped_sum(*rows(*batch)).parts]
    assert changed != pytest.approx(expected, rel=1e-2), "two steps later they are taken anew, at the new weights"


def test_public_thresholds_of_groups_are_norms_of_groups() -> None:
    """A group's mean gradient is shorter than an example's: the same kind of unit as in training."""
    torch.manual_seed(0)
    public = data(400, seed=5)
    shares = {}
    for groups in (None, pg.RandomGroups(2)):
        plan = full_batch_plan(100, clipping=pg.LayerwiseClipping(0.5), thresholds=pg.PublicThresholds(), groups=groups)
        step = runner(plan, network(), LOSS, public=public)
        found = step._public_norms(public, torch.Generator().manual_seed(0))
        shares[groups is None] = (len(found), float(found.mean()))
    assert shares[True][0] == 400
    assert 4 <= shares[False][0] <= 8
    assert shares[False][1] < shares[True][1]


def test_public_thresholds_need_public_data() -> None:
    plan = full_batch_plan(4, thresholds=pg.PublicThresholds())
    with pytest.raises(pg.RefusedError, match="needs public data, and none is given"):
        runner(plan, network(), LOSS)


def test_private_thresholds_learn_from_noised_norms() -> None:
    batch = data(9)
    gradients = loop_gradients(network(), LOSS, batch)
    norms = torch.stack([value.flatten(1).norm(dim=1) for value in gradients.values()], dim=1).clamp(max=1.5)
    thresholds = pg.PrivateThresholds(limit=1.5, decay=0.0)
    step = runner(
        full_batch_plan(9, steps=2, clipping=pg.LayerwiseClipping(0.5), thresholds=thresholds), network(), LOSS
    )
    first = step.clipped_sum(*rows(*batch))
    assert [part.bound.radius for part in first.parts][:4] == pytest.approx([0.5] * 4)
    assert first.parts[-1].bound.radius == pytest.approx(1.5 * 2)
    step.release(*rows(*batch))
    means = norms.mean(0)
    then = [part.bound.radius for part in step.clipped_sum(*rows(*batch)).parts][:4]
    assert then == pytest.approx((0.5 * means / means.max()).tolist(), rel=1e-4)


def test_a_units_bits_move_by_half_and_a_groups_by_one() -> None:
    """For each of L blocks: an absent unit contributes 0, a group's bit flips from -1/2 to +1/2."""
    for groups, expected in ((None, 1.0), (pg.RandomGroups(2), 2.0)):
        plan = full_batch_plan(4, clipping=pg.LayerwiseClipping(), thresholds=pg.QuantileThresholds(), groups=groups)
        sums = runner(plan, network(), LOSS).clipped_sum(*rows(*data(4)))
        assert sums.distance(sums.parts[-1]) == pytest.approx(expected)
        assert sums.values["thresholds/side"].abs().max() <= 2.0


def test_quantiles_are_reached() -> None:
    batch = data(50)
    gradients = loop_gradients(network(), LOSS, batch)
    norms = torch.stack([value.flatten(1).norm(dim=1) for value in gradients.values()], dim=1)
    thresholds = pg.QuantileThresholds(quantile=0.3, rate=0.3)
    step = runner(
        full_batch_plan(50, steps=200, clipping=pg.LayerwiseClipping(5.0), thresholds=thresholds), network(), LOSS
    )
    for _ in range(150):
        step.release(*rows(*batch))
    found = torch.tensor([part.bound.radius for part in step.clipped_sum(*rows(*batch)).parts][:4])
    below = (norms <= found).float().mean(0)
    assert (below - 0.3).abs().max() <= 0.05


def test_no_threshold_falls_to_nothing() -> None:
    thresholds = pg.PrivateThresholds(limit=1.0, decay=0.0)
    values = thresholds.values({"means": torch.tensor([0.0, 1.0, 1e-9])}, torch.full((3,), 2.0, dtype=torch.float64))
    assert values.tolist() == pytest.approx([2e-3, 2.0, 2e-3])
    nothing = thresholds.values({"means": torch.zeros(2)}, torch.full((2,), 2.0, dtype=torch.float64))
    assert nothing.tolist() == [2.0, 2.0]
    quantile = pg.QuantileThresholds()
    low = quantile.values({"logarithms": torch.tensor([math.log(1e-3)])}, torch.ones(1, dtype=torch.float64))
    assert float(low) == pytest.approx(1e-3)


STAGES = [
    {"clipping": pg.LayerwiseClipping(max_norm=(1.0, 2.0))},
    {"clipping": pg.LayerwiseClipping(blocks={"a": ["0.*"], "b": ["2.*"]})},
    {"clipping": pg.AutomaticClipping(blocks="module")},
    {"clipping": pg.LayerwiseClipping(), "thresholds": pg.QuantileThresholds(quantile=0.7)},
    {"thresholds": pg.PrivateThresholds(limit=3.0)},
    {"thresholds": pg.PublicThresholds(every=7), "noise": pg.GaussianNoise(allocation="dimension")},
    {"groups": pg.RandomGroups(3), "clipping": pg.LayerwiseClipping()},
    {"groups": pg.RandomGroups(3, local_steps=2, local_rate=0.1)},
]


@pytest.mark.parametrize("stages", STAGES)
def test_plans_are_read_back_as_they_were(stages: dict[str, object]) -> None:
    plan = Plan(sampling=pg.PoissonSampling(rate=0.1, divisor=20.0), steps=3, **stages)  # type: ignore[arg-type]
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.digest() == plan.digest()
    assert again == plan
    assert all(isinstance(text, str) and text for text in plan.words.values())


def test_public_data_that_are_private_are_refused() -> None:
    private = TensorDataset(*data(20))
    plan = full_batch_plan(20, thresholds=pg.PublicThresholds())
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for public in (private, TensorDataset(*(torch.cat([part, part[:1] + 1]) for part in data(20)))):
        with pytest.raises(pg.RefusedError, match="private data"):
            pg.make_private(model, optimizer, private, plan, LOSS, public=public)
    accepted = pg.make_private(model, optimizer, private, plan, LOSS, public=TensorDataset(*data(5, seed=9)))
    for batch in accepted.batches():
        accepted.step(batch)
    assert accepted.spent().steps == 1


def test_a_data_set_of_your_own_is_not_both() -> None:
    class Own(Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return torch.full((6,), float(index)), torch.tensor(0)

    dataset, model = Own(), network()
    plan = full_batch_plan(20, thresholds=pg.PublicThresholds())
    with pytest.raises(pg.RefusedError, match="the public data are the private data set itself"):
        pg.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), dataset, plan, LOSS, public=dataset)
    with pytest.raises(pg.PrivgradError, match="expected a Dataset or a batch"):
        pg.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), dataset, plan, LOSS, public="mnist")

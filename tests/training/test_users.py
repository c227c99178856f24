"""Protecting users: whoever has many records is one unit, whatever the number and the content of its records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import privgrad as pg
from privgrad.audit.gaussian import mu_lower_bound
from privgrad.audit.step import Direction, linear_loss
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.randomness import SecureSource
from privgrad.training.batches import sampled_batches
from privgrad.training.private import Private
from privgrad.training.units import UserUnits, units_of
from tests.helpers import as_vector, full_batch_plan

C = 0.7
DIMENSION = 3
SOME = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def plan(steps: int = 1, multiplier: float = 1.0, cap: int = 8, **changes: object) -> Plan:
    return Plan(
        sampling=pg.FullBatch(divisor=10.0),
        steps=steps,
        protects=pg.User("customer", max_records=cap),
        clipping=pg.FlatClipping(max_norm=C),
        noise=pg.GaussianNoise(multiplier=multiplier),
        **changes,  # type: ignore[arg-type]
    )


def private(records: Tensor, keys: object, chosen: Plan) -> Private:
    """A model whose gradient for a record is the record itself."""
    model = Direction(records.shape[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return pg.make_private(model, optimizer, TensorDataset(records), chosen, linear_loss, keys=keys)  # type: ignore[arg-type]


def sums(records: Tensor, keys: object, chosen: Plan) -> Iterator[Tensor]:
    """The noised sums of a plan's steps."""
    running = private(records, keys, chosen)
    for batch in running.batches():
        running.backward(batch)
        gradient = running.model.get_parameter("weight").grad
        assert gradient is not None
        yield gradient * chosen.divisor


def generated(users: int = 20) -> tuple[Tensor, list[str]]:
    """1 to 50 records a user, in a mixed order."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 51, (users,), generator=generator).tolist()
    counts[0], counts[1] = 1, 50
    keys = [f"user {user}" for user, count in enumerate(counts) for _ in range(count)]
    order = torch.randperm(len(keys), generator=generator).tolist()
    return torch.randn(len(keys), DIMENSION, generator=generator), [keys[place] for place in order]


keys_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=60)


@SOME
@given(keys_of_rows, st.integers(1, 12), st.randoms(use_true_random=False))
def test_a_drawn_users_rows_are_its_own_and_weigh_one_together(keys, cap, random):
    units = UserUnits(torch.tensor(keys).unique(return_inverse=True)[1], cap)
    names = sorted(set(keys))
    assert units.count == len(names)
    drawn = torch.tensor(sorted(random.sample(range(units.count), random.randint(0, units.count))), dtype=torch.int64)
    found = units.rows(drawn, SecureSource())
    assert found.fold.units == len(drawn)
    for place, user in enumerate(drawn.tolist()):
        rows = found.rows[found.fold.index == place].tolist()
        own = [row for row, key in enumerate(keys) if key == names[user]]
        assert len(rows) == len(set(rows)) == min(cap, len(own))
        assert set(rows) <= set(own)
        assert found.fold.scale is not None
        assert float(found.fold.scale[found.fold.index == place].sum()) == pytest.approx(1.0)
    assert (found.fold.index[1:] >= found.fold.index[:-1]).all()


@SOME
@given(keys_of_rows, st.integers(1, 12), st.floats(0, 1e6), st.integers(0, 2**32))
def test_one_users_records_move_the_sum_by_the_clipping_norm_at_most(keys, cap, scale, seed):
    """Whatever they are and however many: taken away (C), or replaced by any others (2C)."""
    generator = torch.Generator().manual_seed(seed)
    records = torch.randn(len(keys), DIMENSION, generator=generator)
    victim = torch.tensor([key == keys[0] for key in keys])
    quiet = plan(multiplier=0.0, cap=max(cap, len(keys)))
    (whole,) = sums(records, keys, quiet)
    other = records.clone()
    other[victim] = scale * torch.randn(int(victim.sum()), DIMENSION, generator=generator)
    (replaced,) = sums(other, keys, quiet)
    assert float((whole - replaced).norm()) <= 2 * C * (1 + 1e-5)
    rest = [key for key in keys if key != keys[0]]
    if rest:
        (without,) = sums(records[~victim], rest, quiet)
        assert float((whole - without).norm()) <= C * (1 + 1e-5)


def test_the_cap_draws_a_users_records_alike_and_anew_in_each_step():
    units, steps, count, cap = UserUnits(torch.zeros(10, dtype=torch.int64), 3), 3000, 10, 3
    source, seen = SecureSource(), torch.zeros(count)
    for _ in range(steps):
        seen[units.rows(torch.tensor([0]), source).rows] += 1
    expected = steps * cap / count
    assert float(((seen - expected) ** 2 / expected).sum()) < chi2.isf(1e-6, count)


@pytest.mark.parametrize("adjacency", [pg.Adjacency.ZERO_OUT, pg.Adjacency.REPLACE_ONE])
@pytest.mark.parametrize("victim", ["user 0", "user 1"], ids=["1 record", "50 records"])
def test_an_audit_of_a_user_is_below_the_claim_and_tight(adjacency: pg.Adjacency, victim: str) -> None:
    """1 to 50 records a user; all records of one user pull as hard as they can, or the other way, or are not there."""
    trials = 1000
    records, keys = generated(users=8)
    axis = torch.tensor([1.0, 0.0, 0.0])
    mine = torch.tensor([key == victim for key in keys])
    records[~mine, 0] = 0.0
    inside = records.clone()
    inside[mine] = 1e3 * axis
    if adjacency is pg.Adjacency.REPLACE_ONE:
        outside, outside_keys, midpoint, claimed = inside.clone(), keys, 0.0, 4.0
        outside[mine] = -1e3 * axis
    else:
        outside = inside[~mine]
        outside_keys, midpoint, claimed = [key for key in keys if key != victim], C / 2, 2.0
    chosen = plan(steps=trials, multiplier=0.5, cap=5, adjacency=adjacency)
    scores = [
        [float(total @ axis) for total in sums(rows, names, chosen)]
        for rows, names in ((inside, keys), (outside, outside_keys))
    ]
    assert mu_lower_bound(*scores, midpoint, 1 - 1e-6) <= claimed
    assert mu_lower_bound(*scores, midpoint, 0.95) >= 0.8 * claimed


def test_users_are_sampled_and_not_records() -> None:
    """At q = 1/2 a user with 50 records is in as many steps as one with a single record, and never in part of its fold."""
    records, keys = generated()
    chosen = Plan(
        sampling=pg.PoissonSampling(expected_batch_size=10),
        steps=400,
        protects=pg.User("customer", max_records=50),
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    running = private(records, keys, chosen)
    assert running.plan.sampling == pg.PoissonSampling(expected_batch_size=10, dataset_size=20)
    together = 0
    sizes = set()
    for batch in running.batches():
        together += batch.fold.units
        sizes.add(len(batch.fold.index))
        running.backward(batch)
    assert abs(together - 400 * 10) < 6 * math.sqrt(400 * 20 / 4)
    assert len(sizes) > 100


def test_the_certificate_speaks_of_users(tmp_path) -> None:
    records, keys = generated()
    model = Direction(DIMENSION)
    trained = pg.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        TensorDataset(records),
        plan(steps=2),
        linear_loss,
        keys=keys,
        directory=tmp_path / "run",
        quiet=True,
    )
    trained.fit()
    text = (tmp_path / "run" / "certificate.md").read_text()
    assert "for each user of the training data" in text
    assert "at most 8 of its records" in text
    assert "every user takes part in every step" in text


@pytest.mark.parametrize(
    ("keys", "protects", "says"),
    [
        (None, pg.User("customer"), "give keys"),
        ([1, 2, 3], pg.Example(), "protects each record by itself"),
        ([1, 2], pg.User("customer"), "2 keys are given for 3 records"),
        ([[1], [2], [3]], pg.User("customer"), "a key is a list"),
        (torch.zeros(3, 1), pg.User("customer"), "a key is a list"),
        (numpy.zeros((3, 1)), pg.User("customer"), "a key is a ndarray"),
        ([object(), object(), object()], pg.User("customer"), "a key is a object"),
        ([("h", math.nan)] * 3, pg.User("customer"), "a key is NaN"),
        ([1, 1, None], pg.User("customer"), "a key is missing"),
        ([("h", 1), ("h", " "), ("h", 2)], pg.User("customer"), "a key is missing"),
        ([b"a", b"b", b""], pg.User("customer"), "a key is missing"),
        (numpy.array(["NaT", 1, 1], "datetime64[s]"), pg.User("customer"), "a key is NaN"),
        ([7, "7", 7], pg.User("customer"), "of several kinds .number and text."),
        (["a", b"a", "a"], pg.User("customer"), "of several kinds .bytes and text."),
    ],
)
def test_keys_and_plan_must_fit(keys: object, protects: object, says: str) -> None:
    with pytest.raises(pg.PrivgradError, match=says):
        units_of(TensorDataset(torch.zeros(3)), protects, keys)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{}, {"key": ""}, {"key": 3}, {"key": "a", "max_records": 0}])
def test_a_user_needs_a_key_and_a_cap(arguments: dict[str, object]) -> None:
    with pytest.raises(pg.PrivgradError, match=r"protects\."):
        pg.User(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys",
    [
        torch.tensor([7, 7, -1, 3]),
        ["a", "a ", "b", "c"],
        [1.5, 1.5, 2, 3],
        list(torch.tensor([7, 7, -1, 3])),  # compared by identity, each would be a user of its own
        [torch.tensor(1), torch.tensor(1.0), torch.tensor(2), torch.tensor(3)],
        numpy.array(["a", "a", "b", "c"]),
        numpy.array([1, 1, 2, 3], "datetime64[s]"),
        [("h", 1), ("h", torch.tensor(1)), ("h", 2), ("g", 1)],
        [Decimal(1), 1, 2, 3],
        (key for key in (UUID(int=0), UUID(int=0), UUID(int=1), UUID(int=2))),
    ],
)
def test_keys_may_be_numbers_text_or_tensors(keys: object) -> None:
    units = units_of(TensorDataset(torch.zeros(4)), pg.User("customer"), keys)  # type: ignore[arg-type]
    assert units.count == 3
    assert units.rows(torch.tensor([0]), SecureSource()).rows.tolist() == [0, 1]


def test_an_empty_draw_of_users_is_a_step_like_any_other() -> None:
    units = UserUnits(torch.tensor([0, 0, 1]), 2)
    empty = units.rows(torch.empty(0, dtype=torch.int64), SecureSource())
    (batch,) = sampled_batches(TensorDataset(torch.zeros(3)), iter([empty]))
    assert batch.data is None
    assert batch.fold.units == 0


def test_a_key_that_is_no_number_is_refused() -> None:
    """NaN is not equal to itself: each would be a user of its own."""
    dataset = TensorDataset(torch.zeros(3, 2))
    with pytest.raises(pg.PrivgradError, match="a key is NaN"):
        units_of(dataset, pg.User("who"), torch.tensor([1.0, float("nan"), float("nan")]))


class Store(Dataset[Any]):
    """Answers a list of rows in its own order, as a database does."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: int) -> Any:
        return (self.values[index],)

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in sorted(indices)]


def test_a_row_is_its_users_whatever_order_the_data_set_answers_in() -> None:
    """Rows of users that take turns: in the order of the store, one user's rows would count as all others'."""

    def total(values: Tensor) -> Tensor:
        keys = [index % 4 for index in range(len(values))]
        model = nn.Linear(3, 1, bias=False)
        plan = full_batch_plan(4, protects=pg.User("who", max_records=8), clipping=pg.FlatClipping(max_norm=1.0))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        private = pg.make_private(model, optimizer, Store(values), plan, lambda m, b: m(b[0]).squeeze(1), keys=keys)
        batch = next(private.batches())
        return as_vector(private.runner.clipped_sum(batch.data, batch.fold))

    values = 1e-3 * torch.ones(16, 3)
    changed = values.clone()
    changed[::4] = 1e3 * torch.tensor([1.0, -1.0, 0.0])
    assert float((total(changed) - total(values)).norm()) <= 1.01

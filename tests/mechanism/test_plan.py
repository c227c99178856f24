"""Plans: what they refuse, what they cost, and that JSON gives the same mechanism back."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import privgrad as pg
from privgrad.privacy.accounting import Precision
from privgrad.privacy.certificate import statement


def plan(**changes: object) -> pg.Plan:
    given = {"sampling": pg.PoissonSampling(expected_batch_size=10, dataset_size=100), "steps": 20} | changes
    return pg.Plan(**given)  # type: ignore[arg-type]


@given(
    st.floats(0.5, 20),
    st.integers(1, 10**6),
    st.floats(0.01, 100),
    st.floats(1e-9, 0.1),
    st.sampled_from(pg.Accountant),
)
@settings(max_examples=50, deadline=None)
def test_json_round_trip(norm: float, steps: int, multiplier: float, delta: float, accountant: pg.Accountant) -> None:
    one = plan(
        steps=steps,
        clipping=pg.FlatClipping(max_norm=norm),
        noise=pg.GaussianNoise(multiplier=multiplier),
        delta=delta,
        accountant=accountant,
    )
    other = pg.Plan.from_json(json.loads(json.dumps(one.to_json())))
    assert other == one
    assert other.digest() == one.digest()


def test_whole_numbers_and_floats_are_one_plan() -> None:
    assert plan(clipping=pg.FlatClipping(max_norm=1)).digest() == plan(clipping=pg.FlatClipping(max_norm=1.0)).digest()


def test_every_number_is_in_the_digest() -> None:
    base = plan(noise=pg.GaussianNoise(multiplier=1.0))
    changed = [
        dataclasses.replace(base, steps=21),
        dataclasses.replace(base, delta=1e-6),
        dataclasses.replace(base, adjacency="replace_one"),
        dataclasses.replace(base, accountant="rdp"),
        base.with_multiplier(1.1),
        dataclasses.replace(base, clipping=pg.FlatClipping(max_norm=2.0)),
        dataclasses.replace(base, sampling=pg.PoissonSampling(expected_batch_size=11, dataset_size=100)),
    ]
    digests = {p.digest() for p in (base, *changed)}
    assert len(digests) == 1 + len(changed)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"delta": float("nan")}, "delta"),
        ({"adjacency": "add"}, "adjacency"),
        ({"accountant": "pdl"}, "did you mean 'pld'"),
        ({"clipping": 1.0}, "clipping"),
        ({"noise": None}, "multiplier|noise"),
        ({"sampling": 0.1}, "sampling"),
        ({"adjacency": "replace_one", "accountant": "rdp"}, "replace_one"),
    ],
)
def test_wrong_plans_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(pg.PrivgradError, match=words):
        plan(**changes).step_event()


def test_a_plan_must_be_calibrated_before_it_costs_something() -> None:
    with pytest.raises(pg.PrivgradError, match="calibrate"):
        plan().epsilon()


def test_calibrate_keeps_the_budget_and_states_delta() -> None:
    calibrated = plan().calibrate(2.0, 1e-6)
    assert calibrated.delta == 1e-6
    assert 1.98 < calibrated.epsilon() <= 2.0


def test_dp_sgd_is_the_short_way() -> None:
    import torch

    data = torch.utils.data.TensorDataset(torch.zeros(100, 3))
    short = pg.dp_sgd(data, epsilon=2.0, delta=1e-5, epochs=2, batch_size=10, max_norm=0.5)
    assert short.steps == 20
    assert short.epsilon() <= 2.0
    assert short.clipping == pg.FlatClipping(max_norm=0.5)
    with pytest.raises(pg.RefusedError, match="add_remove"):
        pg.dp_sgd(data, epsilon=2.0, delta=1e-5, epochs=2, batch_size=10, adjacency="add_remove")
    with pytest.raises(pg.PrivgradError, match="epochs or steps"):
        pg.dp_sgd(data, epsilon=2.0, delta=1e-5, batch_size=10)


def test_charged_steps_cost_what_the_plan_says() -> None:
    one = plan(noise=pg.GaussianNoise(multiplier=1.0))
    costs = [one.epsilon(steps=steps, precision=Precision.COARSE) for steps in (0, 1, 5, 20)]
    assert costs[0] == 0.0
    assert costs == sorted(costs)
    assert costs[-1] == one.epsilon(precision=Precision.COARSE)


@pytest.mark.parametrize("words", [None, "", 3])
def test_a_stage_without_words_is_refused_before_it_trains(words: object) -> None:
    class Silent(pg.FlatClipping):
        pass

    Silent.words = words  # type: ignore[assignment, method-assign]
    with pytest.raises(pg.PrivgradError, match=r"Silent \(clipping\) does not say what it does"):
        pg.Plan(sampling=pg.PoissonSampling(rate=0.1, divisor=4.0), steps=1, clipping=Silent())


def test_a_training_whose_epsilon_could_not_be_told_is_not_begun() -> None:
    sampling = pg.PoissonSampling(rate=0.001, divisor=4.0)
    long = pg.Plan(sampling=sampling, steps=1_000_001, noise=pg.GaussianNoise(multiplier=30.0))
    with pytest.raises(pg.PrivgradError, match="too many for privacy loss distributions; use accountant = 'rdp'"):
        long.terms()
    by_rdp = dataclasses.replace(long, accountant=pg.Accountant.RDP)
    by_rdp.terms()
    assert 0 < by_rdp.epsilon() < 10


def test_shuffled_users_are_refused_under_replace_one() -> None:
    """A user with another key takes another number, and moves those between to other batches."""
    given: dict[str, Any] = {
        "sampling": pg.ShuffledBatches(batch_size=5),
        "steps": 4,
        "noise": pg.GaussianNoise(multiplier=1.0),
    }
    with pytest.raises(pg.RefusedError, match="numbered by their keys"):
        pg.Plan(**given, protects=pg.User("who"), adjacency="replace_one")
    assert pg.Plan(**given, protects=pg.User("who"))
    assert pg.Plan(**given, adjacency="replace_one")


def test_mechanisms_of_the_users_own_are_named_where_people_read_it() -> None:
    class Believed(pg.FlatClipping):
        pass

    own = pg.Plan(
        sampling=pg.FullBatch(divisor=5.0),
        steps=4,
        noise=pg.GaussianNoise(multiplier=1.0),
        clipping=Believed(),
    )
    facts = own.facts()
    (name,) = facts.own
    assert name.endswith("Believed")
    assert facts.words["clipping"].startswith(f"a mechanism of the user's own ({name})")
    assert dataclasses.replace(own, clipping=pg.FlatClipping()).facts().own == ()
    claim = {
        "guarantee": True,
        "epsilon": 1.0,
        "delta": 1e-5,
        "unit": "example",
        "noise": {"secret_seed": False},
        "disclosed": [],
    }
    assert f"mechanisms of the user's own ({name})" in statement({**claim, "own_mechanisms": list(facts.own)})
    assert "own" not in statement(claim)

"""The certificate: what it says is never more than was proven, and nothing in it can be changed unseen."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent
from hypothesis import example, given, settings
from hypothesis import strategies as st

from privgrad.files import digest
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.certificate import (
    Evaluation,
    PlanFacts,
    make_certificate,
    meaning,
    rounded_epsilon,
    statement,
    success_of_100,
    to_markdown,
)
from privgrad.privacy.events import _TABLE, Accountant, Sampler
from privgrad.privacy.ledger import Ledger, Terms

PURE = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def certificate_of(
    event=None,
    *,
    adjacency: Adjacency = Adjacency.ZERO_OUT,
    accountant: Accountant = Accountant.RDP,
    sampler: Sampler = Sampler.FULL_BATCH,
    delta: float = 1e-5,
    seeded: bool = False,
    unit: str = "record",
    evaluation: Evaluation | None = None,
) -> dict[str, Any]:
    """A certificate of three charged steps, two of them applied. RDP by default: it takes no time."""
    event = GaussianDpEvent(4.0) if event is None else event
    ledger = Ledger(Terms("ab" * 32, sampler, adjacency, accountant, delta))
    for _ in range(3):
        ledger.charge(event)
    facts = PlanFacts(
        plan={"steps": 3, "noise": {"kind": "gaussian", "multiplier": 4.0}},
        words={"sampling": "every record takes part in every step", "noise": "Gaussian noise"},
        unit=unit,
        noise_multiplier=4.0,
        seeded=seeded,
        steps=3,
    )
    return make_certificate(
        ledger.record,
        facts,
        steps_applied=2,
        data="handwritten digits",
        model_digest="cd" * 32,
        evaluation=evaluation,
        created="2025-01-02T03:04:05Z",
    )


MEASURED = Evaluation("test", "held-out", {"accuracy": 0.875, "mean_loss": 0.25})
PLAIN = certificate_of(evaluation=MEASURED)
NO_GUARANTEE = certificate_of(NonPrivateDpEvent())
SEEDED = certificate_of(seeded=True)
SAMPLED = certificate_of(
    PoissonSampledDpEvent(0.1, GaussianDpEvent(2.0)), accountant=Accountant.PLD, sampler=Sampler.POISSON
)
ALL = {"plain": PLAIN, "no guarantee": NO_GUARANTEE, "seeded": SEEDED, "sampled": SAMPLED}


# The claim


def claimed(text: str) -> Fraction:
    """The epsilon of the claim, as the text has it."""
    found = re.findall(r"epsilon = ([0-9.]+),", text)
    assert len(found) == 1
    return Fraction(found[0])


@pytest.mark.parametrize("name", ["plain", "seeded", "sampled"])
def test_the_claim_is_the_exact_epsilon_rounded_up_to_two_digits(name):
    certificate = ALL[name]
    exact = Fraction(certificate["epsilon"])
    for text in (statement(certificate), to_markdown(certificate)):
        assert exact <= claimed(text) < exact + Fraction(1, 100)
    assert f"| epsilon (exact) | {certificate['epsilon']} |" in to_markdown(certificate)


@PURE
@given(st.floats(0.0, 1e12))
@example(math.nextafter(21.06, math.inf))
@example(0.01)
def test_rounding_goes_up_by_less_than_a_hundredth(epsilon):
    """From the shortest decimal form of the float, also where epsilon * 100 as a float would round downwards."""
    rounded = Fraction(rounded_epsilon({"epsilon": epsilon}))
    exact = Fraction(repr(epsilon))
    assert exact <= rounded < exact + Fraction(1, 100)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 3.0, 8.25, 100.0])
def test_what_has_two_digits_stays_as_it_is(epsilon):
    assert float(rounded_epsilon({"epsilon": epsilon})) == epsilon


@pytest.mark.parametrize(
    "delta",
    [1e-5, 1 / 60_000, 1 / 30_000, 0.5, 1.2345644e-7, 1e-12, 9e-13, 3e-21, 1e-25],
)
def test_the_claimed_delta_is_not_below_the_proven_one(delta):
    said = re.search(r"delta = (\d+(?:\.\d*)?(?:e-\d+)?),", statement(certificate_of(delta=delta)))
    assert said is not None
    assert delta <= float(said[1]) <= delta * 1.01


@PURE
@given(st.floats(0.5, 1.0))
def test_success_of_100_is_rounded_up(chance):
    said = success_of_100({"attack_success": chance})
    assert isinstance(said, int)
    assert 50 <= said <= 100
    assert chance * 100 - 1e-6 <= said < chance * 100 + 1


def test_success_of_100_in_numbers():
    wanted = {0.5: 50, 0.51: 51, 0.5101: 52, 0.69146: 70, 0.99: 99, 0.9901: 100, 0.99999: 100, 1.0: 100}
    assert {chance: success_of_100({"attack_success": chance}) for chance in wanted} == wanted


@pytest.mark.parametrize("name", ["plain", "seeded", "sampled"])
def test_the_text_gives_the_chance_of_an_attacker_rounded_up(name):
    certificate = ALL[name]
    said = re.search(r"at most (\d+) times in 100", to_markdown(certificate))
    assert said is not None
    assert 50 < int(said[1]) < 100
    assert int(said[1]) == success_of_100(certificate) >= 100 * certificate["attack_success"] - 1e-9


# Variants that say what they are


def test_without_a_guarantee_the_text_says_so_and_claims_nothing():
    assert NO_GUARANTEE["guarantee"] is False
    assert NO_GUARANTEE["epsilon"] is None
    assert NO_GUARANTEE["attack_success"] == 1.0
    text = to_markdown(NO_GUARANTEE)
    assert "NO GUARANTEE" in statement(NO_GUARANTEE)
    assert "NO GUARANTEE" in text
    assert "with differential privacy" not in text
    assert not re.search(r"epsilon = ", text)
    assert "Nothing can be said" in text
    assert "stay well below" not in text


def test_a_guarantee_that_lets_an_attacker_be_certain_is_no_comfort_either():
    weak = certificate_of(GaussianDpEvent(0.1))
    assert weak["guarantee"] is True
    assert success_of_100(weak) == 100
    assert "Nothing can be said" in meaning(weak)
    assert "stay well below" not in to_markdown(weak)


def test_with_noise_the_text_claims_a_guarantee():
    for certificate in (PLAIN, SEEDED, SAMPLED):
        assert certificate["guarantee"] is True
        assert "NO GUARANTEE" not in to_markdown(certificate)


def test_a_seeded_run_says_that_the_seed_must_stay_secret():
    assert SEEDED["noise"]["secret_seed"] is True
    assert "only while the seed of the noise stays secret" in statement(SEEDED)
    assert "only while the seed of the noise stays secret" in to_markdown(SEEDED)
    assert PLAIN["noise"]["secret_seed"] is False
    assert "seed" not in to_markdown(PLAIN)


@pytest.mark.parametrize("adjacency", list(Adjacency))
def test_the_text_names_unit_adjacency_and_what_the_coin_decides(adjacency):
    certificate = certificate_of(adjacency=adjacency, unit="customer")
    text = to_markdown(certificate)
    assert "{unit}" not in text
    assert "for each customer of the training data" in text
    assert adjacency.words.format(unit="customer") in text
    assert f"`{adjacency.value}`" in text
    replaced = "which of two particular customers was used" in meaning(certificate)
    assert replaced is (adjacency is Adjacency.REPLACE_ONE)


@pytest.mark.parametrize("accountant", list(Accountant))
@pytest.mark.parametrize("sampler", list(Sampler))
def test_every_sampler_and_accountant_has_its_words(sampler, accountant):
    if not any(accountant in accountants for (row, _), (_, accountants) in _TABLE.items() if row is sampler):
        pytest.skip("not in the table")
    text = to_markdown(certificate_of(NonPrivateDpEvent(), sampler=sampler, accountant=accountant))
    assert {"shuffled": "each epoch"}.get(sampler.value, sampler.value.split("_")[0]) in text.lower()
    assert accountant.value.upper() in text


def test_the_text_has_the_facts_of_the_reporting_list():
    """Steps charged and applied, ledger, plan, model, library, data, what was measured, what is not covered."""
    text = to_markdown(PLAIN)
    for fact in (
        "3 planned, 3 charged to the ledger, 2 applied",
        PLAIN["ledger"]["head"],
        PLAIN["plan_digest"],
        PLAIN["model_sha256"],
        PLAIN["digest"],
        PLAIN["accounting"]["library"],
        "handwritten digits",
        "declared held-out (not protected)",
        "accuracy: 0.8750",
        "mean loss: 0.2500",
        "2025-01-02T03:04:05Z",
        *PLAIN["not_covered"],
    ):
        assert fact in text
    for words in ("hyper-parameters", "Floating-point", "evaluation split"):
        assert any(words in item for item in PLAIN["not_covered"])
    assert "What was measured" not in to_markdown(SEEDED)


def test_the_figures_are_those_of_the_ledger():
    ledger = Ledger(Terms("ab" * 32, Sampler.FULL_BATCH, Adjacency.ZERO_OUT, Accountant.RDP, 1e-5))
    for _ in range(3):
        ledger.charge(GaussianDpEvent(4.0))
    assert PLAIN["epsilon"] == ledger.record.spent()
    assert PLAIN["attack_success"] == ledger.record.attack_success()
    assert PLAIN["ledger"] == {"steps": 3, "head": ledger.head}
    assert PLAIN["plan_digest"] == "ab" * 32


# The digest and the JSON


def leaves(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value that holds no other; empty containers count as values."""
    children = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    if not children:
        yield path
    for key, value in children:
        yield from leaves(value, (*path, key))


def with_leaf(data: Any, path: tuple[Any, ...], change) -> Any:
    changed = copy.deepcopy(data)
    holder = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = change(holder[path[-1]])
    return changed


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return math.nextafter(value, math.inf)
    if isinstance(value, str):
        return value + " "
    return "something" if value is None else [*value, "something"]


@pytest.mark.parametrize("name", list(ALL))
def test_the_digest_covers_every_field(name):
    content = {key: value for key, value in ALL[name].items() if key != "digest"}
    assert ALL[name]["digest"] == digest(content)
    paths = list(leaves(content))
    assert len(paths) > 30
    for path in paths:
        assert digest(with_leaf(content, path, other_value)) != ALL[name]["digest"], path


def test_the_digest_covers_the_keys():
    content = {key: value for key, value in PLAIN.items() if key != "digest"}
    for key in content:
        assert digest({k: v for k, v in content.items() if k != key}) != PLAIN["digest"]
    assert digest({**content, "note": None}) != PLAIN["digest"]
    assert digest(dict(reversed(content.items()))) == PLAIN["digest"]


@pytest.mark.parametrize("name", list(ALL))
def test_the_certificate_is_strict_json(name):
    """No infinity, no NaN, also where epsilon is infinite; and reading it back gives the same digest."""
    text = json.dumps(ALL[name], allow_nan=False)
    again = json.loads(text)
    assert again == ALL[name]
    assert digest({key: value for key, value in again.items() if key != "digest"}) == again["digest"]
    assert to_markdown(again) == to_markdown(ALL[name])


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_no_number_is_said_in_words(loss):
    """A model that diverged on its test data is certified all the same."""
    certificate = certificate_of(evaluation=Evaluation("test", "public", {"loss": loss, "accuracy": 0.5}))
    assert json.loads(json.dumps(certificate, allow_nan=False)) == certificate
    assert "loss: not a number" in to_markdown(certificate)
    assert "accuracy: 0.5000" in to_markdown(certificate)


def test_a_metric_cannot_overwrite_how_the_data_was_declared():
    certificate = certificate_of(evaluation=Evaluation("test", "held-out", {"declared": 1.0, "split": 0.5}))
    assert certificate["evaluation"]["declared"] == "held-out"
    assert "On the split `test`, declared held-out" in to_markdown(certificate)

"""The committed table of audits is of the library as it is, and every row of it says what the text says."""

from __future__ import annotations

import json
import random

import pytest
import torch

from privgrad.mechanism.kinds import KINDS
from tests.audit.table import (
    ALONE,
    MULTIPLIER,
    PAGE,
    RESULTS,
    STAGES,
    TIGHT,
    audited,
    chosen_stages,
    page,
    smallest_loss_found,
    trained,
)

ROWS = json.loads(RESULTS.read_text())
NEAR = [
    row
    for row in ROWS["steps"]
    if row["reason"] is None
    and row["scale"] == "mu"
    and row["trials"] == ALONE
    and row["lower"] >= 0.9 * row["claimed"]
]
"""Rows of canaries side by side that came near their claim, with room for chance."""


def test_no_claim_is_refuted_and_every_gaussian_mechanism_is_tight() -> None:
    for row in ROWS["steps"]:
        assert row["reason"] or 0 <= row["asserted"] <= row["claimed"], row
        if len(row["mechanisms"]) == 1 and row["scale"] == "mu":
            assert row["lower"] >= TIGHT * row["claimed"], row
    for row in ROWS["runs"]:
        assert row["reason"] or 0 <= row["lower"] <= row["claimed"], row


def test_the_table_has_every_kind_and_every_pair() -> None:
    for slot in ("groups", "compression", "clipping", "thresholds", "mixing", "statistics"):
        known = {stage.kind for place, stage in STAGES.values() if place == slot}
        assert known == set(KINDS[slot]), slot
    slots = [[STAGES[name][0] for name in names] for names in chosen_stages()]
    expected = [
        list(names) for names, taken in zip(chosen_stages(), slots, strict=True) if len(set(taken)) == len(taken)
    ]
    assert [row["mechanisms"] for row in ROWS["steps"]] == expected
    assert [row["mechanism"] for row in ROWS["runs"]] == list(STAGES)


def test_the_page_is_of_the_results() -> None:
    assert PAGE.read_text() == page(ROWS)


@pytest.mark.parametrize("row", random.Random(5).sample(NEAR, 6), ids=lambda row: ", ".join(row["mechanisms"]))
def test_a_row_can_be_had_again(row: dict[str, object]) -> None:
    torch.set_num_threads(1)
    again = audited(*row["mechanisms"])  # type: ignore[misc]
    assert again is not None
    assert again["claimed"] == row["claimed"]
    assert again["asserted"] <= again["claimed"]
    assert again["lower"] >= TIGHT * again["claimed"]


@pytest.mark.parametrize(
    "row", [row for row in ROWS["steps"] if row["reason"]][:8], ids=lambda row: ", ".join(row["mechanisms"])
)
def test_a_refusal_is_the_plans_own(row: dict[str, object]) -> None:
    assert audited(*row["mechanisms"]) == row  # type: ignore[misc]


def test_a_training_can_be_had_again() -> None:
    assert trained("automatic clipping")["lower"] >= 2.0


def test_more_trials_find_smaller_losses() -> None:
    losses = [smallest_loss_found(trials, 1 / MULTIPLIER) for trials in (1_000, 5_000, 60_000)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] <= 0.05

"""A sample of the grid, tried again; and that the committed page is of the committed results, and these of the grid."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from privgrad.mechanism.kinds import KINDS
from tests.grid import (
    CLIPPING,
    PROTECTS,
    SAMPLERS,
    STATISTICS,
    THRESHOLDS,
    Cell,
    promises,
    stages,
    statistics,
    try_out,
    write_data,
)
from tests.grid.__main__ import PAGE, RESULTS, page

SAMPLE = [
    *random.Random(3).sample(stages(), 12),
    *random.Random(4).sample(promises(), 8),
    *random.Random(5).sample(statistics(), 6),
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("grid")
    write_data(found)
    return found


@pytest.mark.parametrize("cell", SAMPLE, ids=lambda cell: "-".join(asdict(cell).values()).replace(" ", ""))
def test_a_combination_trains_or_is_refused_as_the_committed_grid_says(cell: Cell, directory: Path) -> None:
    rows = [row for kind in json.loads(RESULTS.read_text()).values() for row in kind]
    row = next(row for row in rows if all(row[key] == value for key, value in asdict(cell).items()))
    outcome = try_out(cell, directory)
    assert outcome.reason == row["reason"]
    expected = row["epsilon"]
    assert outcome.epsilon == (None if expected is None else pytest.approx(expected, rel=1e-6))


def test_the_grid_has_every_kind() -> None:
    for slot, choices in (("sampling", SAMPLERS), ("protects", PROTECTS), ("clipping", CLIPPING)):
        assert set(choices) == set(KINDS[slot])
    assert set(THRESHOLDS) == {*KINDS["thresholds"], "fixed"}
    assert set(STATISTICS) == set(KINDS["statistics"])


def test_the_page_is_of_the_results_and_the_results_are_of_the_grid() -> None:
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results)
    names = list(asdict(stages()[0]))
    for kind, cells in (("stages", stages()), ("promises", promises()), ("statistics", statistics())):
        assert [{key: row[key] for key in names} for row in results[kind]] == [asdict(cell) for cell in cells]

"""No changed bit and no missing end goes unnoticed. (A sample; every byte is `python -m tests.faults.flips`.)"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from privgrad.errors import PrivgradError
from privgrad.training.checkpoint import load_tree
from privgrad.training.run import Run
from tests.faults.flips import COVERED, finished_run, noticed, unnoticed_cuts, unnoticed_flips


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory.mktemp("flips") / "run")


@pytest.fixture
def run(original: Run, tmp_path: Path) -> Run:
    return Run(Path(shutil.copytree(original.directory, tmp_path / "run")))


@pytest.mark.parametrize("name", COVERED)
def test_one_changed_bit_is_noticed(run: Run, name: str) -> None:
    assert not noticed(run)
    assert unnoticed_flips(run, name, stride=1 + (run.directory / name).stat().st_size // 250, seed=1) == []
    assert not noticed(run)


@pytest.mark.parametrize("name", COVERED)
def test_a_missing_end_is_noticed(run: Run, name: str) -> None:
    assert unnoticed_cuts(run, name, stride=1 + (run.directory / name).stat().st_size // 60) == []


def test_every_changed_byte_of_a_checkpoint_is_refused_by_its_loader(run: Run) -> None:
    raw = run.checkpoint.read_bytes()
    for place in range(0, len(raw), 17):
        run.checkpoint.write_bytes(raw[:place] + bytes([raw[place] ^ 255]) + raw[place + 1 :])
        with pytest.raises(PrivgradError, match="is damaged"):
            load_tree(run.checkpoint)


@pytest.mark.parametrize("change", [lambda run: run.metrics.unlink(), lambda run: run.metrics.write_text("nothing\n")])
def test_what_holds_no_part_of_the_guarantee_is_not_looked_at(run: Run, change: Callable[[Run], None]) -> None:
    """As docs/guarantees/crash_safety.md says."""
    change(run)
    run.config.write_text("[plan]\nsteps = 9\n")
    assert not noticed(run)

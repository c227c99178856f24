"""What a private step holds at once, and what it leaves for the next."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from benchmarks.memory import most_held
from torch import nn
from torch.nn import functional as F

import privgrad as pg
from privgrad.gradients import collector
from privgrad.gradients.contract import Fold
from privgrad.gradients.onepass import OnePassEngine
from privgrad.mechanism.sparsification import STRUCTURES
from tests.gradients.operators import squares
from tests.helpers import full_batch_plan, rows, runner

_FAULTS = """
import resource, sys, torch
from privgrad.gradients.memory import keep_pages
if sys.argv[1] == "kept":
    keep_pages()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step():
    blocks = [torch.zeros(2**20) for _ in range(8)]
    return sum(float(block[0]) for block in blocks)
step(), step()
before = faults()
for _ in range(10):
    step()
print(faults() - before)
"""


@pytest.mark.parametrize(
    ("clipping", "widths", "times"),
    [
        (pg.FlatClipping(1.0), (784, 1024, 1024, 10), 1.3),
        (pg.LayerwiseClipping(1.0), (784, 1024, 1024, 10), 1.3),
        (pg.LayerwiseClipping(1.0), (256,) * 10, 1.1),
    ],
    ids=["flat", "layerwise", "layerwise, deep"],
)
def test_a_private_step_of_linear_layers_holds_little_more_than_a_plain_one(
    clipping: Any, widths: Sequence[int], times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that nothing was added to, copies of bias gradients, inputs of layers that are done with: none of it is held."""
    if len(widths) > 4:
        monkeypatch.setattr(collector, "TOGETHER", 0)
    layers = [nn.Linear(*pair) for pair in pairwise(widths)]
    model = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
    inputs, labels = torch.randn(512, widths[0]), torch.randint(10, (512,))
    private = runner(full_batch_plan(512, clipping=clipping), model, pg.supervised(F.cross_entropy))
    batch, fold = rows(inputs, labels)

    def plain() -> Any:
        return torch.autograd.grad(F.cross_entropy(model(inputs), labels), list(model.parameters()))

    ordinary, most = most_held(plain), most_held(lambda: private.clipped_sum(batch, fold))
    assert sum(parameter.nbytes for parameter in model.parameters()) < ordinary
    assert most < times * ordinary


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("compression", [None, pg.RandomSparsification(0.5, ramp=False)], ids=["all", "masked"])
def test_units_of_several_rows_stay_within_the_memory_that_was_given(views: int, compression: Any) -> None:
    """A masked linear layer is a product for one row and is multiplied out for two."""
    limit = 32 * 2**20
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 10))
    engine = OnePassEngine(memory=limit)
    plan = full_batch_plan(64, compression=compression)
    step = runner(plan, model, pg.supervised(F.cross_entropy), engine=engine)
    fold = Fold(torch.arange(64).repeat_interleave(views), 64, torch.full((64 * views,), 1 / views))
    batch = torch.randn(64 * views, 1024), torch.randint(10, (64 * views,))
    sums = sum(p.nbytes for p in model.parameters())
    assert most_held(lambda: step.clipped_sum(batch, fold)) < 1.5 * limit + 2 * sums


@pytest.mark.parametrize("structure", STRUCTURES)
def test_chunks_are_of_one_size_whatever_is_masked(structure: str) -> None:
    """A training that is resumed has seen other masks, and must give the same numbers."""
    layers = [nn.Conv2d(before, 64, 3, padding=1) for before in (3, 64, 64)]
    plan = pg.Plan(
        sampling=pg.PoissonSampling(rate=0.5, divisor=64.0),
        steps=8,
        compression=pg.RandomSparsification(0.9, structure=structure),
        noise=pg.GaussianNoise(multiplier=1.0),
    )
    step = runner(plan, nn.Sequential(*layers), squares, engine=OnePassEngine(memory=16 * 2**20))
    inputs = torch.randn(64, 3, 8, 8)
    for _ in range(7):
        step.release((inputs,), Fold.identity(64))
    through = step.clipped_sum((inputs,), Fold.identity(64)).values
    step.engine = OnePassEngine(memory=16 * 2**20)
    resumed = step.clipped_sum((inputs,), Fold.identity(64)).values
    assert all(torch.equal(through[name], resumed[name]) for name in through)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep their own counsel")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    plain, kept = faults("plain"), faults("kept")
    # Eighty blocks of 1,024 pages. Where a small allocation happens to lie above them glibc cannot give them back anyway.
    if plain < 20_000:
        pytest.skip("this system's pages are large, or stay without being asked to")
    assert kept < plain / 10


def faults(how: str) -> int:
    """Page faults of ten steps in a process of its own, with the allocator as it comes."""
    tuned = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD", "THP_MEM_ALLOC_ENABLE")
    untouched = {name: value for name, value in os.environ.items() if not name.startswith(tuned)}
    command = [sys.executable, "-c", _FAULTS, how]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=untouched).stdout)

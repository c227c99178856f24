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

"""What one step frees is there for the next: on glibc, without another page fault."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

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

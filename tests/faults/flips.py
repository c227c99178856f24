"""Change one bit of a finished run, in every byte of every file: `python -m tests.faults.flips [--json FILE]`.

`verify` must notice each of them in what it vouches for (`COVERED`). config.toml
and metrics.jsonl hold no part of the guarantee; a change there is not noticed (docs/guarantees/crash_safety.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.errors import VerificationError
from privgrad.training.run import Run
from privgrad.training.trainer import Trainer

COVERED = (
    "ledger.jsonl",
    "plan.json",
    "certificate.json",
    "certificate.md",
    "certificate.html",
    "model.safetensors",
    "checkpoint/latest.safetensors",
)


def finished_run(directory: Path) -> Run:
    """A small one, with everything that a run can hold."""
    inputs = torch.randn(24, 3)
    data = TensorDataset(inputs, (inputs[:, 0] > 0).long())
    model = nn.Linear(3, 2)
    noise = pg.GaussianNoise(multiplier=1.0)
    plan = pg.Plan(sampling=pg.PoissonSampling(rate=0.5, divisor=12.0), steps=4, noise=noise)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loss_fn = pg.supervised(F.cross_entropy)
    test = pg.DeclaredSplit(TensorDataset(-inputs, (inputs[:, 0] < 0).long()))
    Trainer(model, optimizer, data, plan, loss_fn, directory=directory, test=test, quiet=True).fit()
    return Run(directory)


def noticed(run: Run) -> bool:
    """What `privgrad verify` makes of the run, where True is exit code 1."""
    try:
        return bool(run.verify().mismatches)
    except VerificationError:
        return True


def unnoticed_flips(run: Run, name: str, stride: int = 1, seed: int = 0) -> list[tuple[int, int]]:
    """(byte, bit) of each change that nobody notices: one random bit in every `stride`-th byte, and in the last one."""
    chance = random.Random(f"{seed}:{name}")
    path = run.directory / name
    raw = path.read_bytes()
    missed = []
    for place in sorted({*range(chance.randrange(stride), len(raw), stride), len(raw) - 1}):
        bit = chance.randrange(8)
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :])
        if not noticed(run):
            missed.append((place, bit))
    path.write_bytes(raw)
    return missed


def unnoticed_cuts(run: Run, name: str, stride: int = 1) -> list[int]:
    """The lengths to which a file can be cut without anybody noticing."""
    path = run.directory / name
    raw = path.read_bytes()
    missed = []
    for length in range(0, len(raw), stride):
        path.write_bytes(raw[:length])
        if not noticed(run):
            missed.append(length)
    path.write_bytes(raw)
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result there")
    arguments = parser.parse_args()
    begun = time.monotonic()
    files: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        run = finished_run(Path(folder) / "run")
        assert not noticed(run)
        for name in COVERED:
            flips, cuts = unnoticed_flips(run, name), unnoticed_cuts(run, name)
            files[name] = {"bytes": (run.directory / name).stat().st_size, "unnoticed": flips, "unnoticed_cuts": cuts}
        assert not noticed(run)
    result = {
        "command": "python -m tests.faults.flips",
        "flips": sum(found["bytes"] for found in files.values()),
        "cuts": sum(found["bytes"] for found in files.values()),
        "unnoticed": sum(len(found["unnoticed"]) + len(found["unnoticed_cuts"]) for found in files.values()),
        "files": files,
        "seconds": round(time.monotonic() - begun),
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{result['flips']} bits and {result['cuts']} ends changed, {result['unnoticed']} not noticed")
    return 1 if result["unnoticed"] else 0


if __name__ == "__main__":
    sys.exit(main())

"""The grid of combinations, each trained on digits for two steps or refused in words: `python -m tests.grid`.

Every choice of six stages together (under zero_out), every sampler with every adjacency and accountant, and the statistics of
normalization layers with what they meet.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from sklearn.datasets import load_digits

from privgrad.cli import run

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "poisson": {"rate": 0.1, "divisor": 32.0},
    "truncated_poisson": {"rate": 0.1, "divisor": 32.0, "max_batch_size": 40, "dataset_size": 600},
    "fixed_size": {"batch_size": 32},
    "shuffled": {"batch_size": 32},
    "full_batch": {"divisor": 64.0},
}
PROTECTS: Mapping[str, Mapping[str, Any]] = {
    "example": {"kind": "example"},
    "user": {"kind": "user", "key": "writer", "max_records": 3},
}
GROUPS: Mapping[str, Mapping[str, Any] | None] = {
    "each unit": None,
    "groups": {"kind": "random", "count": 4},
    "groups, local steps": {"kind": "random", "count": 4, "local_steps": 2, "local_rate": 0.1},
}
CLIPPING: Mapping[str, Mapping[str, Any]] = {
    "flat": {},
    "layerwise": {},
    "automatic": {"blocks": "module"},
    "l2_linf": {"p": 16.0},
}
ALLOCATIONS = ("uniform", "per_layer", "dimension")
THRESHOLDS = ("fixed", "public", "private", "quantile")
STATISTICS = ("public_batch", "private")
MIXING = ("none", "modelmix")

_FEATURES = [f"pixel_{number}" for number in range(64)]
_TABLE = {
    "target": "digit",
    "classes": list(range(10)),
    "columns": {name: [0, 16] for name in _FEATURES},
}
_PARTS = {"private": slice(0, 600), "test": slice(600, 700), "public": slice(700, 800)}
_RECORDS_OF_A_WRITER = 4


@dataclass(frozen=True)
class Cell:
    """One combination, by names."""

    sampler: str
    protects: str
    groups: str
    clipping: str
    allocation: str
    thresholds: str
    adjacency: str = "zero_out"
    accountant: str = "pld"
    statistics: str = "none"
    mixing: str = "none"

    def config(self, directory: Path) -> dict[str, Any]:
        """The configuration file, as tables, for the data that `write_data` put into `directory`."""
        noise = {"kind": "gaussian", "multiplier": 2.0, "allocation": self.allocation}
        plan: dict[str, Any] = {
            "steps": 2,
            "protects": PROTECTS[self.protects],
            "sampling": {"kind": self.sampler, **self._numbers()},
            "clipping": {"kind": self.clipping, **CLIPPING[self.clipping]},
            "noise": noise,
        }
        groups = GROUPS[self.groups]
        if groups is not None:
            plan["groups"] = groups
        if self.thresholds != "fixed":
            plan["thresholds"] = {"kind": self.thresholds}
        arguments: dict[str, Any] = {"hidden": [8]}
        if self.statistics != "none":
            plan["statistics"] = {"kind": self.statistics}
            given = "public_batch" if self.statistics == "public_batch" else "private_statistics"
            arguments["normalization"] = given if groups is None else "batch"
        if self.mixing != "none":
            plan["mixing"] = {"kind": self.mixing}
        config: dict[str, Any] = {
            "data": {
                "source": str(directory / "private.csv"),
                "test_source": str(directory / "test.csv"),
                "table": _TABLE,
            },
            "model": {"name": "mlp", "arguments": arguments},
            "privacy": {"adjacency": self.adjacency, "accountant": self.accountant},
            "plan": plan,
            "optimizer": {"name": "sgd", "lr": 0.1},
            "training": {"evaluations": 1, "averaging": "none"},
        }
        if "public" in (self.thresholds, self.statistics.removesuffix("_batch")):
            config["public"] = {"source": str(directory / "public.csv")}
        return config

    def _numbers(self) -> Mapping[str, Any]:
        numbers = dict(SAMPLERS[self.sampler])
        if "dataset_size" in numbers and self.adjacency != "add_remove":
            numbers.pop("dataset_size")  # only add_remove wants an upper bound to be stated
        return numbers


def stages() -> list[Cell]:
    """Six stages in all combinations, under zero_out, each sampler with the first accountant that it has."""
    choices = (SAMPLERS, PROTECTS, GROUPS, CLIPPING, ALLOCATIONS, THRESHOLDS)
    return [
        Cell(*names, accountant="rdp" if names[0] == "fixed_size" else "pld") for names in itertools.product(*choices)
    ]


def promises() -> list[Cell]:
    """Samplers, adjacencies and accountants in all combinations, for examples and users, with and without groups."""
    choices = itertools.product(SAMPLERS, PROTECTS, ("each unit", "groups"), ("zero_out", "add_remove", "replace_one"))
    return [
        Cell(sampler, protects, groups, "flat", "uniform", "fixed", adjacency, accountant)
        for sampler, protects, groups, adjacency in choices
        for accountant in ("pld", "rdp")
    ]


def statistics() -> list[Cell]:
    """Statistics of normalization layers with samplers, units, groups and thresholds; and with mixing, where there are none."""
    choices = itertools.product(SAMPLERS, PROTECTS, GROUPS, THRESHOLDS, STATISTICS, MIXING)
    return [
        Cell(
            sampler,
            protects,
            groups,
            "flat",
            "uniform",
            thresholds,
            accountant="rdp" if sampler == "fixed_size" else "pld",
            statistics=taken,
            mixing=mixing,
        )
        for sampler, protects, groups, thresholds, taken, mixing in choices
        if mixing == "none" or (thresholds == "fixed" and sampler in ("poisson", "full_batch"))
    ]


def write_data(directory: Path) -> None:
    """Digits as tables, with a writer for every few records."""
    digits = load_digits()
    rows = np.column_stack([digits.data, digits.target]).astype(int)
    header = ",".join([*_FEATURES, "digit", "writer"])
    for name, part in _PARTS.items():
        writers = (f"{name}{place // _RECORDS_OF_A_WRITER}" for place in range(len(rows)))
        lines = [f"{','.join(map(str, row))},{writer}" for row, writer in zip(rows[part], writers, strict=False)]
        (directory / f"{name}.csv").write_text("\n".join([header, *lines]) + "\n")


@dataclass(frozen=True)
class Outcome:
    """epsilon: of `epsilon --json` and of the certificate, which must be the same; None where both refuse, with the reason."""

    epsilon: float | None
    reason: str | None


def try_out(cell: Cell, directory: Path) -> Outcome:
    """Ask for the cell's epsilon, and train it. Raises AssertionError where the two commands do not agree, or do neither."""
    config = directory / "cell.toml"
    config.write_text(tomli_w.dumps(cell.config(directory)))
    shutil.rmtree(directory / "run", ignore_errors=True)
    asked = _run("epsilon", str(config), "--json")
    trained = _run("train", str(config), "--json", "--out", str(directory / "run"))
    assert asked[0] == trained[0], f"{asdict(cell)}: epsilon {asked}, train {trained}"
    if asked[0] == 0:
        epsilon = json.loads(asked[1])["epsilon"]
        assert json.loads(trained[1])["epsilon"] == epsilon, f"{asdict(cell)}: {asked} {trained}"
        return Outcome(epsilon, None)
    assert (asked[0], asked[2]) == (2, trained[2]), f"{asdict(cell)}: epsilon {asked}, train {trained}"
    return Outcome(None, asked[2].removeprefix("privgrad: "))


def _run(*arguments: str) -> tuple[int, str, str]:
    """(exit code, last line of standard output, last line of standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(list(arguments))
    return code, *(stream.getvalue().strip().rpartition("\n")[2] for stream in (out, err))

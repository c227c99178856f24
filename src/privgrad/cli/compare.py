"""privgrad compare: train several plans with several seeds, and put them side by side."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privgrad.cli.config import Config, assign, complete, read_config, resolved, section_of, without_none
from privgrad.cli.numbers import Json, Settings
from privgrad.cli.output import plain, print_json
from privgrad.cli.train import run_training
from privgrad.errors import PrivgradError, check_count, check_number
from privgrad.files import canonical_json, digest, make_directory, read_json, write_atomically
from privgrad.mechanism.mixing import CALIBRATE
from privgrad.privacy.certificate import round_up
from privgrad.privacy.ledger import read_ledger
from privgrad.report.comparison import Cell, Row, rows_of, to_csv, to_svg
from privgrad.training.run import Run

_FILES = ("comparison.json", "results.csv", "results.json", "results.svg")
"""What stands beside the plans' directories."""


def compare(
    configs: Annotated[list[Path], typer.Argument(help="Configuration files, or a directory of them.")],
    seeds: Annotated[int, typer.Option(help="Trainings of each plan: seeds 0, 1, ...")] = 3,
    epsilon: Annotated[float | None, typer.Option(help="The budget of every plan that does not say its own.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The directory of the comparison; runs/compare-NAME by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the comparison in --out.")] = False,
    settings: Settings = None,
    json_: Json = False,
) -> None:
    """Train each plan with each seed, and end with a table, a picture, a CSV. Finished trainings are never repeated."""
    check_count("--seeds", seeds)
    if epsilon is not None:
        check_number("--epsilon", epsilon, above=0)
    plans = {path.stem: _config(path, epsilon, settings or []) for path in _files(configs)}
    directory = out or Path("runs") / f"compare-{configs[0].resolve().stem}"
    _open(directory, plans, seeds, resume=resume)
    cells = [_cell(directory, plan, config, seed) for plan, config, seed in _grid(plans, seeds, directory)]
    cells += _others(directory, cells)
    rows = rows_of(cells)
    _write(directory, rows, cells)
    if json_:
        print_json({"rows": [asdict(row) for row in rows], "trainings": len(cells), "out": str(directory)})
    else:
        _show(rows, len(cells), directory)


def _files(paths: list[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [file for file in sorted(path.glob("*.toml")) if not file.name.startswith(("_", "."))]
            if not inside:
                raise PrivgradError(f"{path} holds no configuration (*.toml); expected one for each plan")
            found += inside
        else:
            found.append(path)
    names = [path.stem for path in found]
    taken = sorted({*names} & {*_FILES})
    if taken:
        raise PrivgradError(
            f"a plan is called like its file, and {taken[0]!r} is a file of every comparison; rename {taken[0]}.toml"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PrivgradError(
            f"two configurations are called {twice[0]!r}, and a plan is called like its file; rename one"
        )
    return found


def _config(path: Path, epsilon: float | None, settings: list[str]) -> Config:
    given = read_config(path)
    for setting in settings:
        assign(given, setting)
    privacy = section_of(given, "privacy")
    plan = section_of(given, "plan")
    noise, mixing = (plan.get(name, {}) for name in ("noise", "mixing"))
    known = isinstance(noise, dict) and noise.get("multiplier") is not None
    by_width = isinstance(mixing, dict) and mixing.get("width_ratio") == CALIBRATE
    own = "epsilon" in privacy or (known and not by_width)
    if epsilon is not None and not own:
        privacy["epsilon"] = epsilon
    return resolved(complete(given), path.parent)


def _open(directory: Path, plans: dict[str, Config], seeds: int, *, resume: bool) -> None:
    """Make the directory, or check that what is in it is the same comparison (more seeds and more plans are welcome)."""
    stamp = directory / "comparison.json"
    asked = {name: digest(without_none(config)) for name, config in plans.items()}
    if stamp.exists():
        if not resume:
            raise PrivgradError(
                f"{directory} already holds a comparison; go on with --resume, or choose another (--out)"
            )
        known = read_json(stamp).get("plans")
        if not isinstance(known, dict):
            raise PrivgradError(f"{stamp} does not say which plans the comparison has; use another directory (--out)")
        changed = sorted(
            name for name, value in asked.items() if known.get(name, value) != value and _has_begun(directory / name)
        )
        if changed:
            raise PrivgradError(
                f"the configuration of {', '.join(changed)} is not the one that {directory} was started with; "
                "use another directory (--out)"
            )
        asked = {**known, **asked}
    elif resume:
        raise PrivgradError(f"{directory} holds no comparison to resume; start one without --resume")
    elif any(directory.glob("*/seed-*/result.json")):
        raise PrivgradError(
            f"{directory} holds trainings, and comparison.json, which says of which plans, is gone; choose another (--out)"
        )
    try:
        make_directory(directory)
    except OSError as error:
        raise PrivgradError(f"{directory} cannot be made: {error.strerror or error}") from error
    write_atomically(stamp, canonical_json({"plans": asked, "seeds": seeds}) + "\n")


def _has_begun(plan: Path) -> bool:
    """Whether any training of a plan has charged something: before that, its configuration may still be mended."""
    return any(Run(seed).begun for seed in plan.glob("seed-*"))


def _grid(plans: dict[str, Config], seeds: int, directory: Path) -> Iterator[tuple[str, Config, int]]:
    """Every cell, seed by seed, so that a comparison that is stopped has something of each plan; with words on the way."""
    total, begun, trained = len(plans) * seeds, time.monotonic(), 0
    for number, (seed, (plan, config)) in enumerate(
        ((seed, item) for seed in range(seeds) for item in plans.items()), start=1
    ):
        finished = _result_file(directory, plan, seed).exists()
        left = ""
        if trained:
            minutes = (time.monotonic() - begun) / trained * (total - number + 1) / 60
            left = f", about {minutes:.0f} min left for all"
        state = "finished before" if finished else f"training{left}"
        print(f"privgrad: {number}/{total}  {plan}, seed {seed}: {state}", file=sys.stderr, flush=True)
        trained += not finished
        yield plan, config, seed


def _result_file(directory: Path, plan: str, seed: int) -> Path:
    return directory / plan / f"seed-{seed}" / "result.json"


def _cell(directory: Path, plan: str, config: Config, seed: int) -> Cell:
    file = _result_file(directory, plan, seed)
    if file.exists():
        return _finished(file)
    run = Run(file.parent)
    config = _seeded(config, plan, seed)
    begun = time.monotonic()
    with _told(plan, seed):
        before = read_ledger(run.ledger).count if run.begun else 0
        result = run_training(config, run.directory, resume=run.begun)
    # Where a part was trained before a stop, the time of the rest stands for the whole; of none it cannot.
    rest = result.steps - before
    seconds = round((time.monotonic() - begun) * result.steps / rest, 3) if rest else None
    cell = Cell(plan, seed, result.epsilon, result.delta, result.steps, result.test_accuracy, seconds)
    write_atomically(file, json.dumps(plain(asdict(cell))) + "\n")
    return cell


def _seeded(config: Config, plan: str, seed: int) -> Config:
    """The configuration of one training. Where noise comes from a seed, each has another: equal noise would cancel."""
    noise = dict(config["plan"]["noise"])
    if noise.get("insecure_seed") is not None:
        noise["insecure_seed"] = int(digest([noise["insecure_seed"], plan, seed])[:12], 16)
    return {
        **config,
        "plan": {**config["plan"], "noise": noise},
        "training": {**config["training"], "seed": seed},
    }


def _finished(file: Path) -> Cell:
    """The result of a training that ended before."""
    known = read_json(file)
    try:
        certificate = read_json(Run(file.parent).certificate)
        claimed = certificate["epsilon"], certificate["delta"], certificate["steps"]["charged"]
        if (known["epsilon"], known["delta"], known["steps"]) != claimed:
            raise TypeError("its certificate says something else")
        for name in ("test_accuracy", "seconds"):
            if known[name] is not None and not isinstance(known[name], int | float):
                raise TypeError(f"{name} is {known[name]!r}")
        return Cell(**{**known, "epsilon": math.inf if known["epsilon"] is None else known["epsilon"]})
    except (KeyError, TypeError) as error:
        raise PrivgradError(
            f"{file} is not the result of a training ({error}); remove it, and its training ends again"
        ) from error


def _others(directory: Path, cells: list[Cell]) -> list[Cell]:
    """Results of the same comparison that were not asked for this time: they are in the table, and cost their epsilon, too."""
    known = {(cell.plan, cell.seed) for cell in cells}
    names = read_json(directory / "comparison.json")["plans"]
    files = [file for name in names for file in sorted((directory / name).glob("seed-*/result.json"))]
    return [cell for cell in map(_finished, files) if (cell.plan, cell.seed) not in known]


@contextmanager
def _told(plan: str, seed: int) -> Iterator[None]:
    """Errors of one training say which one it is."""
    try:
        yield
    except PrivgradError as error:
        error.args = (f"{plan}, seed {seed}: {error}",)
        raise


def _write(directory: Path, rows: list[Row], cells: list[Cell]) -> None:
    write_atomically(directory / "results.csv", to_csv(cells))
    write_atomically(directory / "results.json", json.dumps(plain([asdict(row) for row in rows]), indent=2) + "\n")
    if any(row.mean is not None for row in rows):
        budget = max(row.epsilon for row in rows)
        delta = f"δ = {rows[0].delta!r}" if len({row.delta for row in rows}) == 1 else "each plan at its own δ"
        title = f"{directory.name}: {delta}, ε at most {round_up(budget, 2)}"
        write_atomically(directory / "results.svg", to_svg(rows, cells, title))


def _show(rows: list[Row], trainings: int, directory: Path) -> None:
    table = Table("plan", "mean", "spread", "seeds", "epsilon", "delta", "steps", "seconds")
    for row in sorted(rows, key=lambda row: -(row.mean or 0.0)):
        table.add_row(
            escape(row.plan),
            _percent(row.mean),
            _percent(row.spread),
            str(row.seeds),
            round_up(row.epsilon, 3),
            repr(row.delta),
            str(row.steps),
            "" if row.seconds is None else f"{row.seconds:.0f}",
        )
    Console(width=max(80, Console().width)).print(table)
    print(f"picture, CSV and every run: {directory}")
    if trainings > 1:
        print(
            f"{trainings} trainings on the same data, and each epsilon is of one: a choice by private data costs all of them."
        )


def _percent(share: Any) -> str:
    return "" if share is None else f"{share:.2%}"

"""What `epsilon` and `calibrate` share: a plan from a configuration or from plain numbers on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from privgrad.cli.build import build_plan, count_units, plan_for_numbers
from privgrad.cli.config import DEFAULTS, assign, complete, read_config, resolved, section_of
from privgrad.errors import PrivgradError
from privgrad.mechanism.kinds import stage_from_json
from privgrad.mechanism.plan import Plan

ConfigPath = Annotated[
    Path | None, typer.Argument(help="A configuration file; or give the numbers.", show_default=False)
]
SamplingRate = Annotated[float | None, typer.Option(help="q: the chance of a record to be in a step.")]
Steps = Annotated[int | None, typer.Option(help="T: how many steps.")]
Delta = Annotated[float | None, typer.Option(help="delta, 1e-5 by default.")]
AccountantName = Annotated[str | None, typer.Option("--accountant", help="pld (default) or rdp.")]
AdjacencyName = Annotated[str | None, typer.Option("--adjacency", help="zero_out (default), add_remove, replace_one.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="section.key=value, over the configuration; can be repeated (keys: docs/configuration.md)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def plan_from(
    config_path: Path | None,
    settings: list[str] | None,
    *,
    rate: float | None,
    steps: int | None,
    delta: float | None,
    accountant: str | None,
    adjacency: str | None,
    multiplier: float | None = None,
    epsilon: float | None = None,
) -> tuple[Plan, float | None]:
    """The plan (not calibrated) and the target epsilon, from a configuration or from numbers. Data is read for its size only."""
    if config_path is None:
        return _from_numbers(rate, steps, delta, accountant, adjacency, multiplier, settings), epsilon
    if rate is not None or steps is not None:
        raise PrivgradError("both a configuration and plain numbers are given; change the configuration's with --set")
    given: dict[str, Any] = read_config(config_path)
    for setting in settings or []:
        assign(given, setting)
    over = {"delta": delta, "accountant": accountant, "adjacency": adjacency, "epsilon": epsilon}
    section_of(given, "privacy").update({key: value for key, value in over.items() if value is not None})
    if multiplier is not None:
        section_of(section_of(given, "plan"), "noise")["multiplier"] = multiplier
    config = complete(given)
    known = stage_from_json("sampling", config["plan"]["sampling"], own=True).sampled is not None
    units = None if known else count_units(resolved(config, config_path.parent))
    plan = build_plan(config, units, calibrated=False)
    target = config["privacy"]["epsilon"]
    return plan, None if target is None else float(target)


def _from_numbers(
    rate: float | None,
    steps: int | None,
    delta: float | None,
    accountant: str | None,
    adjacency: str | None,
    multiplier: float | None,
    settings: list[str] | None,
) -> Plan:
    if settings:
        raise PrivgradError("--set changes a configuration, and none is given")
    if rate is None or steps is None:
        raise PrivgradError("give a configuration file, or --sampling-rate and --steps")
    privacy = DEFAULTS["privacy"]
    return plan_for_numbers(
        rate,
        steps,
        privacy["delta"] if delta is None else delta,
        adjacency or privacy["adjacency"],
        accountant or privacy["accountant"],
        multiplier,
    )

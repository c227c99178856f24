"""privgrad epsilon: what a plan costs."""

from __future__ import annotations

from typing import Annotated

import typer

from privgrad.cli.config import DEFAULT_EPSILON
from privgrad.cli.numbers import (
    AccountantName,
    AdjacencyName,
    ConfigPath,
    Delta,
    Json,
    SamplingRate,
    Settings,
    Steps,
    plan_from,
)
from privgrad.cli.output import print_json
from privgrad.errors import PrivgradError, command
from privgrad.privacy.certificate import round_up


def epsilon(
    config: ConfigPath = None,
    sampling_rate: SamplingRate = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="z: noise over sensitivity.")] = None,
    steps: Steps = None,
    delta: Delta = None,
    accountant: AccountantName = None,
    adjacency: AdjacencyName = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """The epsilon of a plan, from a configuration or from plain numbers. Trains nothing."""
    plan, target = plan_from(
        config,
        settings,
        rate=sampling_rate,
        steps=steps,
        delta=delta,
        accountant=accountant,
        adjacency=adjacency,
        multiplier=noise_multiplier,
    )
    if not plan.is_calibrated:
        if config is None:
            raise PrivgradError(f"--noise-multiplier is missing; or use `{command()} calibrate` to find it")
        plan = plan.calibrate(DEFAULT_EPSILON if target is None else target)
    spent = plan.epsilon()
    if json:
        print_json(
            {
                "epsilon": spent,
                "delta": plan.delta,
                "accountant": plan.accountant.value,
                "adjacency": plan.adjacency.value,
                "steps": plan.steps,
                "noise_multiplier": plan.noise.multiplier,
            }
        )
    else:
        print(
            f"epsilon = {round_up(spent, 3)} at delta = {plan.delta!r} ({plan.steps} steps, {plan.accountant}, {plan.adjacency})"
        )

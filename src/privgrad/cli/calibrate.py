"""privgrad calibrate: how much noise, or how wide a mixing, a budget needs."""

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
from privgrad.errors import PrivgradError
from privgrad.privacy.certificate import round_up


def calibrate(
    config: ConfigPath = None,
    sampling_rate: SamplingRate = None,
    steps: Steps = None,
    epsilon: Annotated[float | None, typer.Option(help="The budget, 3 by default.")] = None,
    delta: Delta = None,
    accountant: AccountantName = None,
    adjacency: AdjacencyName = None,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """The smallest noise multiplier (or width of mixing, where that is "calibrate") within the budget. Trains nothing."""
    plan, target = plan_from(
        config,
        settings,
        rate=sampling_rate,
        steps=steps,
        delta=delta,
        accountant=accountant,
        adjacency=adjacency,
        epsilon=epsilon,
    )
    if plan.is_calibrated:
        raise PrivgradError(
            "the configuration gives plan.noise.multiplier, so there is nothing to calibrate; leave it out"
        )
    by_width = plan.calibrates_width
    plan = plan.calibrate(DEFAULT_EPSILON if target is None else target)
    if json:
        print_json(
            {
                "noise_multiplier": plan.noise.multiplier,
                **({"width_ratio": plan.mixing.width_ratio} if by_width and plan.mixing is not None else {}),
                "epsilon": plan.epsilon(),
                "delta": plan.delta,
                "accountant": plan.accountant.value,
                "adjacency": plan.adjacency.value,
                "steps": plan.steps,
            }
        )
    else:
        found = f"noise multiplier = {round_up(plan.noise.multiplier or 0.0, 6)}"
        if by_width and plan.mixing is not None:
            found = f"width ratio = {round_up(float(plan.mixing.width_ratio), 6)}"
        print(f"{found} (epsilon = {round_up(plan.epsilon(), 4)} at delta = {plan.delta!r})")

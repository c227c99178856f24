"""privgrad verify: recompute epsilon from a run's ledger, and compare every file with it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from privgrad.cli.numbers import Json
from privgrad.cli.output import print_json
from privgrad.errors import PrivgradError, VerificationError
from privgrad.privacy.certificate import round_up
from privgrad.training.run import Run


def verify(
    run: Annotated[Path, typer.Argument(help="The run directory.")],
    own: Annotated[bool, typer.Option(help="Run the code of mechanisms of its author's own; trust them.")] = False,
    json: Json = False,
) -> None:
    """Recompute epsilon from the ledger alone. Exit code 1 where any file of the run does not fit it."""
    if not run.is_dir():
        raise PrivgradError(f"{run} is not a directory; expected a run directory, such as privgrad train makes")
    try:
        verified = Run(run).verify(own=own)
    except VerificationError as error:
        _fail([str(error)], json, None, None)
        return
    if verified.mismatches:
        _fail(verified.mismatches, json, verified.epsilon, verified.steps)
    if json:
        print_json({"ok": True, "epsilon": verified.epsilon, "steps": verified.steps, "finished": verified.finished})
    else:
        spent = f"epsilon = {round_up(verified.epsilon, 3)} after {verified.steps} steps"
        if verified.finished:
            print(f"verified: {spent}; ledger, plan, certificate and model agree")
        else:
            print(f"not finished, there is no certificate yet: {spent} so far; ledger and plan agree")


def _fail(mismatches: list[str], json: bool, epsilon: float | None, steps: int | None) -> None:
    for line in mismatches:
        print(f"privgrad: NOT VERIFIED: {line}", file=sys.stderr)
    if json:
        print_json({"ok": False, "epsilon": epsilon, "steps": steps, "mismatches": mismatches})
    raise typer.Exit(1)

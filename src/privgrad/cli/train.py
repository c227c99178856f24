"""privgrad train: a private model and its certificate from one command."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tomli_w
import torch
import typer

from privgrad.cli.build import (
    build_averaging,
    build_data,
    build_device,
    build_engine,
    build_optimizer,
    build_plan,
    build_public,
    check_schedule,
    check_units,
    units_in,
)
from privgrad.cli.config import Config, assign, complete, read_config, resolved, section_of, without_none
from privgrad.cli.numbers import Json, Settings
from privgrad.cli.output import print_json
from privgrad.errors import PrivgradError, check_count, check_number, command
from privgrad.files import read_json
from privgrad.mechanism.plan import Plan
from privgrad.nn.models import MODELS, build_model
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.certificate import round_up
from privgrad.training.evaluation import DeclaredSplit, check_declared
from privgrad.training.loss import supervised
from privgrad.training.run import Run, differences
from privgrad.training.stops import InterruptedRunError
from privgrad.training.trainer import Result, Trainer


def train(
    config: Annotated[Path | None, typer.Argument(help="A configuration file.", show_default=False)] = None,
    data: Annotated[
        str | None, typer.Option(help="The private data: an embedded name, or a path (in $PRIVGRAD_DATA or here).")
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"{', '.join(MODELS)}, or package.module:factory.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="The privacy budget; 3 by default.")] = None,
    delta: Annotated[float | None, typer.Option(help="delta; 1e-5 by default.")] = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The run directory; a new one under runs/ by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    json: Json = False,
) -> None:
    """Train a model privately and certify it. Without arguments: handwritten digits at epsilon 3, in seconds.

    Everything that can be set, with its default, is in docs/configuration.md.
    """
    if out is not None and not out.name:
        raise PrivgradError(
            f"--out is {str(out)!r}, no name of a directory; give one, or leave it out for a new one under runs/"
        )
    given = read_config(config) if config is not None else {}
    options = {
        ("data", "source"): data,
        ("model", "name"): model,
        ("privacy", "epsilon"): epsilon,
        ("privacy", "delta"): delta,
    }
    for (section, key), value in options.items():
        if value is not None:
            section_of(given, section)[key] = value
    notes = [assign(given, setting) for setting in settings or []]
    # What is named on the command line is not looked for beside the configuration file.
    beside = config.parent if config is not None and data is None else None
    if resume:
        if out is None:
            raise PrivgradError("--resume needs the run directory; give it as --out RUN")
        complete_config = _resumed_config(Run(out), given, beside)
    else:
        complete_config = resolved(complete(given), beside)
    for note in filter(None, notes):
        print(f"privgrad: {note}", file=sys.stderr)
    finished = resume and out is not None and Run(out).complete
    result = run_training(complete_config, out, resume=resume)
    if finished:
        print(f"privgrad: the run in {out} was finished already; nothing was changed", file=sys.stderr)
    if json:
        print_json(
            {
                "epsilon": result.epsilon,
                "delta": result.delta,
                "test_accuracy": result.test_accuracy,
                "steps": result.steps,
                "noise_multiplier": result.noise_multiplier,
                "run": str(result.run),
            }
        )
    else:
        _tell(result)


def run_training(config: Config, out: Path | None, *, resume: bool) -> Result:
    """Everything behind `privgrad train`: data, plan, model, optimizer, and the run."""
    training, workers = config["training"], config["run"]["workers"]
    check_count("training.seed", training["seed"], at_least=0)
    check_number("training.seed", training["seed"], at_most=2**63 - 1)
    check_count("training.views", training["views"], at_most=256)
    if training["views"] > 1 and not config["data"]["images"]["augment"]:
        raise PrivgradError(
            f"training.views is {training['views']}, and all views of a record would be the same; give data.images.augment, such "
            "as ['flip', 'shift'], or leave training.views out"
        )
    check_count("training.evaluations", training["evaluations"])
    check_count("run.workers", workers, at_least=0, at_most=256)
    check_declared(config["data"]["test"])
    device = build_device(config)
    engine = build_engine(config)
    earlier = None
    if resume and out is not None:
        earlier = Plan.from_json(read_json(Run(out).plan), own=True).with_seed(
            config["plan"]["noise"].get("insecure_seed")
        )
        check_units(config, earlier)
    source = build_data(config)
    run = Run(out or _new_directory(source.name))
    split = DeclaredSplit(source.test, config["data"]["test"])
    torch.manual_seed(training["seed"])
    model = build_model(config["model"]["name"], source.input_shape, source.classes, config["model"]["arguments"])
    model.to(device)
    optimizer, schedule = build_optimizer(config, model)
    plan = build_plan(config, units_in(source)) if earlier is None else earlier
    check_schedule(config, plan.steps)
    _warn(plan, units_in(source))
    try:
        trainer = Trainer(
            model,
            optimizer,
            source.train,
            plan,
            supervised(torch.nn.functional.cross_entropy),
            keys=source.keys,
            public=build_public(config, source),
            directory=run.directory,
            test=split,
            schedule=schedule,
            workers=workers,
            views=training["views"],
            engine=engine,
            averaging=build_averaging(config),
            evaluations=training["evaluations"],
            data_name=f"{source.name}; {source.scaling}",
            config=tomli_w.dumps(without_none(config)),
            resume=resume,
        )
        return trainer.fit()
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"stopped at once; what was charged is in the ledger; go on with: {command()} train --resume --out {run.directory}"
            if run.begun
            else "stopped before the first step; nothing was charged"
        ) from None


def _resumed_config(run: Run, given: dict[str, Any], beside: Path | None) -> Config:
    """The configuration that the run was started with; a given one must be the same."""
    if not run.begun:
        raise PrivgradError(f"{run.directory} holds no run to resume; start one without --resume")
    before = complete(read_config(run.config))
    if given:
        changed = differences(without_none(before), without_none(resolved(complete(given), beside)))
        if changed:
            raise PrivgradError(
                f"the settings differ from those of the run in {run.directory}: {', '.join(changed)}; resume with the same "
                "settings (or none), or start another run"
            )
    return before


def _new_directory(name: str) -> Path:
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    directory = Path("runs") / f"{name}-{stamp}"
    number = 2
    while directory.exists():
        directory = Path("runs") / f"{name}-{stamp}-{number}"
        number += 1
    return directory


def _warn(plan: Plan, size: int) -> None:
    if (
        plan.adjacency is Adjacency.ADD_REMOVE
    ):  # the number of units is private: what was stated, and not what was counted
        probability, normaliser = getattr(plan.sampling, "rate", None), plan.sampling.normaliser
        if not probability or normaliser is None:
            return
        size = max(1, round(normaliser / probability))
    if plan.delta >= 1 / size:
        print(
            f"privgrad: warning: delta = {plan.delta!r} is not below 1/n = {1 / size:.2g}: a mechanism that publishes one record "
            "at random would pass; choose a smaller delta",
            file=sys.stderr,
        )


def _tell(result: Result) -> None:
    accuracy = "" if result.test_accuracy is None else f", test accuracy {result.test_accuracy:.1%}"
    print(f"epsilon = {round_up(result.epsilon, 3)} at delta = {result.delta!r}{accuracy}")
    print(f"certificate: {result.run / 'certificate.html'}")
    print(f"check it:    {command()} verify {result.run}")

"""privgrad audit: what can an attacker show of a plan, a training, a model?"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy
import torch
import typer
from torch import nn
from torch.nn import functional
from torch.utils.data import Dataset

from privgrad.audit.membership import MembershipAudit, loss_scores, membership
from privgrad.audit.mixing import MixingAudit, audit_mixing
from privgrad.audit.one_run import OneRunAudit, audit_run
from privgrad.audit.step import StepAudit
from privgrad.audit.worst import audit_plan
from privgrad.cli.build import build_data, build_public, units_in
from privgrad.cli.config import DEFAULT_EPSILON, Config, assign, complete, read_config, resolved
from privgrad.cli.numbers import Json, Settings, plan_from
from privgrad.cli.output import print_json
from privgrad.data.source import Source
from privgrad.errors import PrivgradError, RefusedError, check_count, check_number, nearest
from privgrad.files import read_json, write_atomically
from privgrad.gradients.contract import trainable
from privgrad.mechanism.plan import Plan
from privgrad.nn.models import build_model
from privgrad.own import check_trusted
from privgrad.privacy.certificate import round_up
from privgrad.report.audit_picture import Picture, to_svg
from privgrad.training.batches import collated, size_of
from privgrad.training.checkpoint import load_weights
from privgrad.training.loss import supervised
from privgrad.training.progress import display
from privgrad.training.public import public_rows
from privgrad.training.run import Run

_COMPANIONS = 256
_CHUNK = 1024
_ASSERTED = 1 - 1e-6
"""The confidence at which a step audit is called a failure: one in a million is a false alarm."""


@dataclass(frozen=True)
class Subject:
    """What is audited: a plan, its configuration, and its run where it has one."""

    plan: Plan
    config: Config
    run: Run | None
    own: bool
    """Code of its author's own may run."""


@dataclass(frozen=True)
class Finding:
    """What every kind of audit says. more: figures of its own. holds: the claim was not refuted."""

    epsilon_claimed: float
    epsilon_lower: float
    delta: float
    confidence: float
    trials: int
    holds: bool
    words: str
    more: dict[str, Any]
    picture: Picture


def audit(
    target: Annotated[Path, typer.Argument(help="A configuration file, or a run directory.")],
    kind: Annotated[str, typer.Option(help="step (default), one-run, or membership (reads private records).")] = "step",
    trials: Annotated[
        int | None,
        typer.Option(help="step: trials in each world; one-run: canaries; membership: records of each kind."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the lower bound that is printed.")] = 0.95,
    picture: Annotated[
        Path | None, typer.Option(help="An SVG; in the run directory by default (of membership: none).")
    ] = None,
    settings: Settings = None,
    own: Annotated[bool, typer.Option(help="Run the code of its author's own that a run names; trust it.")] = False,
    json: Json = False,
) -> None:
    """A lower bound on epsilon by attack, beside the claimed one. Exit code 1 where the claim is refuted.

    step and one-run train on records that are made up, and cost no privacy. membership asks the model about private records.
    """
    if kind not in KINDS:
        raise PrivgradError(f"--kind is {kind!r}; {nearest(kind, KINDS)}")
    check_number("--confidence", confidence, above=0, below=1)
    if trials is not None:
        check_count("--trials", trials, at_least=20, at_most=10**8)
    if picture is not None and not picture.name:
        raise PrivgradError(f"--picture is {str(picture)!r}, no name of a file; give one, or leave it out")
    subject = _subject(target, settings or [], own=own)
    found = KINDS[kind](subject, trials, confidence)
    path = picture
    # That of membership shows private records without noise: never where a certificate speaks for everything.
    if path is None and subject.run is not None and kind != "membership":
        path = subject.run.directory / f"audit-{kind}.svg"
    if path is not None:
        try:
            write_atomically(path, to_svg(found.picture))
        except PrivgradError as error:  # the finding took long, and must not be lost with its picture
            print(f"privgrad: warning: no picture: {error}", file=sys.stderr)
            path = None
    if json:
        shared = {name: getattr(found, name) for name in ("epsilon_claimed", "epsilon_lower", "confidence", "trials")}
        rest = {
            "delta": found.delta,
            "holds": found.holds,
            **found.more,
            "picture": None if path is None else str(path),
        }
        print_json({"kind": kind, **shared, **rest})
    else:
        print(found.words)
        if path is not None:
            print(f"picture: {path}")
    if not found.holds:
        print(
            "privgrad: REFUTED: an attack shows more than is claimed; this is a defect, please report it",
            file=sys.stderr,
        )
        raise typer.Exit(1)


def _subject(target: Path, settings: list[str], *, own: bool) -> Subject:
    if not target.is_dir():
        numbers: dict[str, Any] = dict.fromkeys(("rate", "steps", "delta", "accountant", "adjacency"))
        plan, epsilon = plan_from(target, settings, **numbers)
        if plan.noise.multiplier is None:
            plan = plan.calibrate(DEFAULT_EPSILON if epsilon is None else epsilon)
        given = read_config(target)
        for setting in settings:
            assign(given, setting)
        return Subject(_seedless(plan), resolved(complete(given), target.parent), None, own=True)
    if settings:
        raise PrivgradError("--set changes a configuration, and a run has its settings; leave it out")
    run = Run(target)
    if not run.begun:
        raise PrivgradError(f"{target} holds no run; expected a configuration file, or what `train` makes")
    given = read_config(run.config)
    if not own:
        _check_trusted(given)
    plan = Plan.from_json(read_json(run.plan), own=own)
    return Subject(_seedless(plan), complete(given), run, own)


def _check_trusted(given: Mapping[str, Any]) -> None:
    """A run may come from somebody else: what it names of their own is not imported unasked."""
    plan = given.get("plan")
    stages = plan if isinstance(plan, dict) else {}
    named = {"model.name": _in(given.get("model"), "name")}
    named |= {f"plan.{slot}.kind": _in(stage, "kind") for slot, stage in stages.items()}
    for key, name in named.items():
        if isinstance(name, str):
            check_trusted(key, name)


def _in(table: Any, key: str) -> Any:
    """A file may hold anything; `complete` says later what is wrong with it."""
    return table.get(key) if isinstance(table, dict) else None


def _seedless(plan: Plan) -> Plan:
    """With noise that nobody can repeat: an audit must not use up what a secret seed gives, nor know it."""
    noise: Any = plan.noise
    return dataclasses.replace(plan, noise=dataclasses.replace(noise, insecure_seed=None))


def _step(subject: Subject, trials: int | None, confidence: float) -> Finding:
    plan = subject.plan
    found: StepAudit | MixingAudit
    if plan.mixing is not None:
        default = 2_000 if plan.groups is not None else 50_000
        found = audit_mixing(plan, trials=trials or default, confidence=confidence, progress=display())
        holds = found.at(_ASSERTED) <= found.epsilon_claimed
        delta, more = found.delta, {}
    else:
        found = audit_plan(
            plan, sizes=_sizes(subject), trials=trials or 5_000, confidence=confidence, progress=display()
        )
        holds = found.at(_ASSERTED) <= found.mu_claimed
        delta, more = plan.delta, {"mu_claimed": found.mu_claimed, "mu_lower": found.mu_lower}
    words = (
        f"one step (every record in it): an attack shows epsilon = {_down(found.epsilon_lower)} of the claimed "
        f"{round_up(found.epsilon_claimed, 3)} at delta = {delta!r} "
        f"({found.trials:,} trials in each world, {100 * confidence:.6g} % sure)"
    )
    picture = Picture(
        "One step, with a canary in and out",
        found.inside,
        found.outside,
        found.epsilon_claimed,
        found.epsilon_lower,
        confidence,
        delta,
        words="log-likelihood ratio of the release (scaled)",
    )
    return Finding(
        found.epsilon_claimed, found.epsilon_lower, delta, confidence, found.trials, holds, words, more, picture
    )


def _one_run(subject: Subject, trials: int | None, confidence: float) -> Finding:
    source = build_data(subject.config)
    model = _model(subject.config, source)
    public = public_rows(build_public(subject.config, source), source.train, None)
    found: OneRunAudit = audit_run(
        subject.plan,
        canaries=trials or 5_000,
        model=model,
        loss_fn=supervised(functional.cross_entropy),
        companions=_made_up(source),
        public=None if public is None else tuple(public),
        confidence=confidence,
        progress=display(),
    )
    claimed = found.epsilon_claimed
    assert claimed is not None
    words = (
        f"one whole training: {found.canaries:,} canaries show epsilon = {_down(found.best)} of the claimed "
        f"{round_up(claimed, 3)} at delta = {found.delta!r} "
        f"({found.correct} of {found.guesses} guesses right, {100 * confidence:.6g} % sure)"
    )
    more = {
        "guesses": found.guesses,
        "correct": found.correct,
        "epsilon_lower_any_mechanism": found.epsilon_lower,
        "epsilon_lower_gaussian": found.epsilon_lower_gaussian,
    }
    inside, outside = found.scores[found.inside].tolist(), found.scores[~found.inside].tolist()
    picture = Picture(
        "One whole training, its canaries in and out",
        inside,
        outside,
        claimed,
        found.best,
        confidence,
        found.delta,
        words="released gradients along each canary's direction, summed over all steps",
    )
    return Finding(claimed, found.best, found.delta, confidence, found.canaries, found.holds, words, more, picture)


def _membership(subject: Subject, trials: int | None, confidence: float) -> Finding:
    run = subject.run
    if run is None or not run.model.exists():
        raise RefusedError("membership inference asks a trained model; give the directory of a finished run")
    verified = run.verify(own=subject.own)
    print(
        "privgrad: this audit asks the model about private records, and what it prints is disclosed WITHOUT noise: it is not "
        "covered by the run's guarantee",
        file=sys.stderr,
    )
    source = build_data(subject.config)
    model = _model(subject.config, source)
    load_weights(run.model, model)
    count = min(trials or 10_000, size_of(source.train), size_of(source.test))
    members, others = (loss_scores(_losses(model.eval(), part, count)) for part in (source.train, source.test))
    found: MembershipAudit = membership(members, others, delta=subject.plan.delta, confidence=confidence)
    words = (
        f"membership by loss: AUC {found.auc:.3f}, "
        + ", ".join(f"{tpr:.2%} found at {rate:.1%} false alarms" for rate, tpr in found.tpr.items())
        + f"; it shows epsilon = {_down(found.epsilon_lower)} of {round_up(verified.epsilon, 3)} at delta = {found.delta!r} "
        f"({found.trials:,} records, {100 * confidence:.6g} % sure)"
    )
    more = {
        "auc": found.auc,
        "true_positive_rates": {str(rate): tpr for rate, tpr in found.tpr.items()},
        "disclosed_without_noise": True,
    }
    picture = Picture(
        "Membership inference by loss: private records, shown WITHOUT noise",
        found.members.tolist(),
        found.others.tolist(),
        verified.epsilon,
        found.epsilon_lower,
        confidence,
        found.delta,
        ("trained on", "held out"),
        "minus the loss of a record",
    )
    holds = found.epsilon_lower <= verified.epsilon
    return Finding(
        verified.epsilon, found.epsilon_lower, found.delta, confidence, found.trials, holds, words, more, picture
    )


KINDS: dict[str, Callable[[Subject, int | None, float], Finding]] = {
    "step": _step,
    "one-run": _one_run,
    "membership": _membership,
}


def _model(config: Config, source: Source) -> nn.Module:
    torch.manual_seed(config["training"]["seed"])
    return build_model(config["model"]["name"], source.input_shape, source.classes, config["model"]["arguments"])


def _sizes(subject: Subject) -> dict[str, int] | None:
    """The tensors of the configured model, where the plan's blocks are named after them; None: any will do."""
    clipping: Any = subject.plan.clipping
    blocks, norms = getattr(clipping, "blocks", "all"), getattr(clipping, "max_norm", 1.0)
    if isinstance(blocks, str) and not isinstance(norms, tuple):
        return None
    model = _model(subject.config, build_data(subject.config))
    return {name: min(parameter.numel(), 16) for name, parameter in trainable(model).items()}


def _made_up(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    """Random records in the shape of the data's: the canaries' company, of whom nothing need be protected."""
    count = min(_COMPANIONS, units_in(source))
    return torch.randn(count, *source.input_shape), torch.randint(source.classes, (count,))


def _losses(model: nn.Module, dataset: Dataset[Any], count: int) -> torch.Tensor:
    """[count]: of records that are spread over the data set."""
    rows = numpy.linspace(0, size_of(dataset) - 1, count).round().astype(numpy.int64)
    found = []
    with torch.no_grad():
        for first in range(0, count, _CHUNK):
            inputs, labels = collated(dataset, rows[first : first + _CHUNK])
            found.append(functional.cross_entropy(model(inputs), labels, reduction="none"))
    return torch.cat(found)


def _down(epsilon: float) -> str:
    """Rounded downwards, as a lower bound is."""
    return f"{math.floor(1000 * epsilon) / 1000:.3f}"

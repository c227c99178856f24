"""privgrad advise: what public data and theory say about a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils import _pytree as pytree

from privgrad.cli.build import (
    build_data,
    build_device,
    build_engine,
    build_optimizer,
    build_plan,
    build_public,
    units_in,
)
from privgrad.cli.config import Config, assign, complete, read_config, resolved
from privgrad.cli.numbers import Json, Settings
from privgrad.cli.output import print_json
from privgrad.data.generators import GENERATORS
from privgrad.errors import PrivgradError, check_count
from privgrad.nn.models import build_model
from privgrad.training.advice import Advised
from privgrad.training.advice import advise as advise_on
from privgrad.training.loss import supervised
from privgrad.training.outlook import MEASURED, Effect, Outlook
from privgrad.training.public import public_rows


def advise(
    config: Annotated[Path, typer.Argument(help="A configuration file with public data.", show_default=False)],
    steps: Annotated[
        int, typer.Option(help="So many noise-free steps on public data stand for the training's later weights.")
    ] = 30,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Whether noise dominates, and what that says for masks, clipping norm, learning rate and batch. Trains nothing privately.

    Works from [public] data and theory alone: of the private data only their shapes, classes and number are used.
    """
    check_count("--steps", steps, at_least=0)
    given = read_config(config)
    for setting in settings or []:
        assign(given, setting)
    complete_config = resolved(complete(given), config.parent)
    if complete_config["public"]["source"] is None:
        raise PrivgradError(
            "advice is computed from public data, and the configuration names none; for images add [public] source = "
            "'dead_leaves' (drawn from a random process, no data needed), otherwise public data of the same shape"
        )
    advised, facts = _advised(complete_config, steps)
    if json:
        print_json({**facts, **_plain(advised)})
    else:
        _tell(advised, facts)


def _advised(config: Config, steps: int) -> tuple[Advised, dict[str, Any]]:
    """The advice, and what it rests on."""
    device = build_device(config)
    private = build_data(config)
    plan = build_plan(config, units_in(private))
    # Refuses public data that hold private records; what is measured below is public.
    rows = public_rows(build_public(config, private), private.train, None)
    public = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, rows)
    random_labels = config["public"]["source"] in GENERATORS
    torch.manual_seed(config["training"]["seed"])
    model = build_model(config["model"]["name"], private.input_shape, private.classes, config["model"]["arguments"])
    model.to(device)
    optimizer, _ = build_optimizer(config, model)
    loss = supervised(torch.nn.functional.cross_entropy)
    # What is learned from random labels is not where the training will go.
    later = 0 if random_labels else steps
    advised = advise_on(plan, model, optimizer, loss, public, build_engine(config), steps=later)
    labels = pytree.tree_leaves(public)[-1]
    return advised, {
        "public": {
            "source": Path(config["public"]["source"]).name,
            "rows": min(MEASURED, len(labels)),
            "labels": "random" if random_labels else "given",
        },
        "noise_multiplier": plan.noise.multiplier,
    }


def _plain(advised: Advised) -> dict[str, Any]:
    return {
        "noise_dominates": advised.noise_dominates,
        "start": _figures(advised.start),
        "later": None if advised.later is None else _figures(advised.later),
        "later_steps": advised.later_steps,
        "advice": {
            item.topic: {"suggested": item.suggested, "reason": item.reason.removesuffix(".")}
            for item in advised.advice
        },
    }


def _figures(seen: Outlook) -> dict[str, Any]:
    low, middle, high = seen.norms
    return {
        "gradient_norms": {"q10": low, "q50": middle, "q90": high},
        "mean_gradient": seen.mean,
        "gradient_deviation": seen.deviation,
        "step": _effect(seen.step),
        "by_clipping_factor": [{"factor": factor, **_effect(effect)} for factor, effect in seen.by_factor.items()],
        "by_ratio": [{"ratio": ratio, **_effect(effect)} for ratio, effect in seen.by_ratio.items()],
    }


def _effect(effect: Effect) -> dict[str, Any]:
    return {
        "resolved": effect.resolved,
        "signal": effect.signal,
        "clipped_mean": effect.length,
        "sampling_noise": effect.sampling,
        "noise": effect.noise,
        "noise_over_clipped_mean": effect.noise_over_signal,
        "progress": effect.progress,
    }


def _tell(advised: Advised, facts: dict[str, Any]) -> None:
    public = facts["public"]
    step = advised.start.step
    print(
        f"{public['rows']} records of {public['source']} (public, {public['labels']} labels), noise multiplier "
        f"{facts['noise_multiplier']:.4g}"
    )
    later = advised.later
    words = (
        "" if later is None else f"; after {advised.later_steps} public steps {later.step.noise_over_signal:.3g} times"
    )
    print(
        f"noise {'dominates' if advised.noise_dominates else 'does not dominate'}: a step's noise is {step.noise:.3g}, "
        f"{'' if step.resolved else 'at least '}{step.noise_over_signal:.3g} times the clipped mean gradient at the initial "
        f"weights{words}"
    )
    for item in advised.advice:
        print(f"{item.topic.replace('_', ' ')}: {item.reason}")
    if public["labels"] == "random":
        print("labels of generated images are random: they show noise and norms, and no signal")

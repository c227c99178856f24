"""From a configuration to the objects of a run."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import Dataset

from privgrad.cli.config import DEFAULT_EPSILON, DEFAULT_STEPS, Config
from privgrad.data.generators import GENERATORS
from privgrad.data.settings import read_settings
from privgrad.data.source import Source, generated, load, load_public, training_size
from privgrad.errors import PrivgradError, RefusedError, check_count, check_number, choice, nearest, reason_of
from privgrad.gradients.contract import Engine
from privgrad.gradients.onepass import OnePassEngine
from privgrad.gradients.vmap import VmapEngine
from privgrad.mechanism.kinds import KINDS, stage_from_json
from privgrad.mechanism.noise import SECRET
from privgrad.mechanism.plan import Plan
from privgrad.mechanism.sampling import ShuffledBatches
from privgrad.mechanism.stage import Sampling
from privgrad.privacy.accounting import MOST_STEPS
from privgrad.privacy.adjacency import Adjacency, User
from privgrad.training.averaging import ExponentialAverage

_TRIED = 20_000
"""So many steps of a schedule are tried beforehand."""

ENGINES: dict[str, Callable[[int | None], Engine]] = {
    "auto": OnePassEngine,
    "onepass": OnePassEngine,
    "vmap": VmapEngine,
}
"""Gradient engines by their name in a configuration file, made from the bytes that a micro-batch may take."""


def build_plan(config: Config, size: int | None = None, *, calibrated: bool = True) -> Plan:
    """The plan of a configuration, for a data set of `size` records where that is known.

    calibrated: give the noise the multiplier that [privacy] epsilon asks for, where plan.noise.multiplier is not given; or mixing
    the width, where that is "calibrate".
    """
    privacy, plan = config["privacy"], config["plan"]
    stages = {slot: stage_from_json(slot, plan[slot], own=True) for slot in KINDS if plan[slot] is not None}
    if size is not None:
        probe = Plan(steps=1, adjacency=privacy["adjacency"], accountant=privacy["accountant"], **stages)
        stages["sampling"] = probe.for_dataset(size).sampling
    built = Plan(
        steps=_steps(plan["steps"], plan["epochs"], stages["sampling"]),
        adjacency=privacy["adjacency"],
        accountant=privacy["accountant"],
        delta=privacy["delta"],
        disclose=privacy["disclose"],
        **stages,
    )
    epsilon = privacy["epsilon"]
    if epsilon is not None and built.is_calibrated:
        raise PrivgradError(
            "both privacy.epsilon and plan.noise.multiplier are given; one follows from the other: leave one out"
        )
    if stages["noise"].insecure_seed == SECRET:
        raise PrivgradError(
            "plan.noise.insecure_seed is 'secret', a stored plan without its seed; expected a whole number"
        )
    if epsilon is not None:
        check_number("privacy.epsilon", epsilon, above=0)
    if built.is_calibrated or not calibrated:
        return built
    return built.calibrate(DEFAULT_EPSILON if epsilon is None else float(epsilon))


def _steps(steps: Any, epochs: Any, sampling: Sampling) -> int:
    if steps is not None and epochs is not None:
        raise PrivgradError("both plan.steps and plan.epochs are given; leave one out")
    if epochs is not None:
        check_number("plan.epochs", epochs, above=0)
        try:
            return sampling.steps_in(float(epochs))
        except OverflowError:
            raise PrivgradError(
                f"plan.epochs is {epochs!r}, with these batches too many steps to count; expected at most {MOST_STEPS:,} steps"
            ) from None
    if steps is None:
        return DEFAULT_STEPS
    check_count("plan.steps", steps, at_most=MOST_STEPS)
    return int(steps)


def build_data(config: Config) -> Source:
    """The private data and its declared split, with the unit of each record where the plan protects users.

    Raises:
        RefusedError: batches in a public order of records whose place in it follows from what they hold.
    """
    protects = stage_from_json("protects", config["plan"]["protects"])
    key = protects.key if isinstance(protects, User) else None
    adjacency = _adjacency(config)
    source = load(read_settings(config["data"]), adjacency, key=key)
    if (
        source.by_name
        and adjacency is Adjacency.REPLACE_ONE
        and config["plan"]["sampling"]["kind"] == ShuffledBatches.kind
    ):
        raise RefusedError(
            "shuffled batches of a folder under replace_one: an image's number follows from its class and file name, so that one "
            "that comes instead of another moves those between them to other batches; use Poisson sampling, or adjacency zero_out"
        )
    return source


def check_units(config: Config, plan: Plan) -> None:
    """Refuse to read the data of a run that goes on in other units than its plan has: who counts as one follows from these.

    Raises:
        PrivgradError: the configuration was changed since.
    """
    stated: dict[str, Any] = {
        "plan.protects": stage_from_json("protects", config["plan"]["protects"]),
        "privacy.adjacency": _adjacency(config),
        "plan.sampling.kind": config["plan"]["sampling"]["kind"],
    }
    planned = {
        "plan.protects": plan.protects,
        "privacy.adjacency": plan.adjacency,
        "plan.sampling.kind": plan.to_json()["sampling"]["kind"],
    }
    changed = [name for name, value in planned.items() if stated[name] != value]
    if changed:
        raise PrivgradError(
            f"config.toml and plan.json of the run differ in {', '.join(changed)}; put config.toml back as it was when the run "
            "began"
        )


def build_public(config: Config, private: Source) -> Dataset[Any] | None:
    """The data of [public]: generated, or read as [data] is; None where none are given.

    Raises:
        PrivgradError: other shapes or classes than the private data's; generated images for data that are no images.
    """
    source = config["public"]["source"]
    if source is None:
        return None
    settings = read_settings({**config["data"], "source": source, "test_source": None, "test_share": None})
    if source in GENERATORS:
        count, seed = config["public"]["count"], config["public"]["seed"]
        check_count("public.count", count)
        check_count("public.seed", seed, at_least=0)
        return generated(settings, source, private, count, seed)
    found = load_public(settings)
    if found.input_shape != private.input_shape or found.classes != private.classes:
        raise PrivgradError(
            f"public.source has records of shape {list(found.input_shape)} in {found.classes} classes, and the private data "
            f"{list(private.input_shape)} in {private.classes}; expected the same"
        )
    return found.train


def count_units(config: Config) -> int:
    """The number of units in the training data, by no more reading than it takes."""
    if config["plan"]["protects"]["kind"] == User.kind:
        return units_in(build_data(config))
    return training_size(read_settings(config["data"]), _adjacency(config))


def units_in(source: Source) -> int:
    """How many units of privacy a source holds: users where it has their keys, records otherwise."""
    return source.size if source.users is None else source.users


def _adjacency(config: Config) -> Adjacency:
    return choice("adjacency", Adjacency, config["privacy"]["adjacency"])


def build_device(config: Config) -> torch.device:
    """The device of [run], "auto" being a GPU where there is one."""
    name = config["run"]["device"]
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(str(name))
        torch.zeros(1, device=device).item()
    except (RuntimeError, ImportError, TypeError, ValueError, AssertionError, OverflowError) as error:
        reason = reason_of(error).split(". ")[0]  # torch goes on with all that it could do
        raise PrivgradError(f"run.device is {name!r}, which cannot be used: {reason}") from error
    return device


def build_engine(config: Config) -> Engine:
    """The gradient engine of [run]."""
    run = config["run"]
    if not isinstance(run["engine"], str) or run["engine"] not in ENGINES:
        raise PrivgradError(f"run.engine is {run['engine']!r}; {nearest(str(run['engine']), ENGINES)}")
    memory = run["memory"]
    if memory == "auto":
        memory = None
    else:
        check_count("run.memory (bytes)", memory)
    return ENGINES[run["engine"]](memory)


def build_averaging(config: Config) -> ExponentialAverage | None:
    """The averaging of [training]: { kind = "ema", decay = ... }, or "none"."""
    given = config["training"]["averaging"]
    if given == "none":
        return None
    if not isinstance(given, dict) or given.get("kind") != ExponentialAverage.kind or set(given) - {"kind", "decay"}:
        raise PrivgradError(
            f"training.averaging is {given!r}; expected {{ kind = 'ema', decay = 0.95 }}, or 'none' for the last weights"
        )
    return ExponentialAverage(**{key: value for key, value in given.items() if key != "kind"})


def build_optimizer(config: Config, model: nn.Module) -> tuple[Optimizer, LRScheduler | None]:
    """Any class of torch.optim by its name (upper and lower case alike), with its schedule."""
    arguments = {key: value for key, value in config["optimizer"].items() if key not in ("name", "schedule")}
    optimizer_class = _named(torch.optim, Optimizer, "optimizer.name", config["optimizer"]["name"])
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if "lr" in arguments:
        check_number("optimizer.lr", arguments["lr"], at_least=0)
    optimizer: Optimizer = _make("optimizer", optimizer_class, parameters, arguments)
    _try_step(optimizer_class, arguments)
    schedule = config["optimizer"].get("schedule")
    if schedule is None:
        return optimizer, None
    if not isinstance(schedule, dict) or "name" not in schedule:
        raise PrivgradError(f"optimizer.schedule is {schedule!r}; expected a table with a 'name'")
    scheduler_class = _named(torch.optim.lr_scheduler, LRScheduler, "optimizer.schedule.name", schedule["name"])
    options = {key: value for key, value in schedule.items() if key != "name"}
    return optimizer, _make("optimizer.schedule", scheduler_class, optimizer, options)


def _try_step(optimizer_class: type[Optimizer], arguments: dict[str, Any]) -> None:
    """Some optimizers look at their arguments only when they step: two steps on a parameter of its own, before any charge."""
    if optimizer_class in (torch.optim.LBFGS, torch.optim.SparseAdam):
        return  # refused with their own reasons
    parameter = nn.Parameter(torch.ones(2, 2))
    parameter.grad = torch.ones(2, 2)
    try:
        optimizer = optimizer_class([parameter], **arguments)
        for _ in range(2):  # momentum shows in the second one
            optimizer.step()
    except Exception as error:
        raise PrivgradError(
            f"optimizer: {optimizer_class.__name__} cannot take a step with {arguments}: {reason_of(error)}"
        ) from error
    if not bool(parameter.isfinite().all()):
        raise PrivgradError(
            f"optimizer: two steps of {optimizer_class.__name__} with {arguments} take a weight of 1 out of range; "
            "expected smaller, finite settings"
        )


def check_schedule(config: Config, steps: int) -> None:
    """Run the schedule of a configuration beforehand, on an optimizer of its own: one that fails later would cost a run.

    Raises:
        PrivgradError: at which step it fails, or gives a learning rate that is no number.
    """
    schedule = config["optimizer"].get("schedule")
    if schedule is None or str(schedule.get("name")).lower() == ReduceLROnPlateau.__name__.lower():
        return  # the trainer refuses that one with its reason
    optimizer, trial = build_optimizer(config, nn.Linear(1, 1))
    assert trial is not None
    for step in range(1, min(steps, _TRIED) + 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                trial.step()
            rates = [float(group["lr"]) for group in optimizer.param_groups]
        except Exception as error:
            raise PrivgradError(
                f"optimizer.schedule: {type(trial).__name__} fails at step {step} of {steps} "
                f"({reason_of(error)}); expected one for all steps of the plan"
            ) from error
        if not all(map(math.isfinite, rates)):
            raise PrivgradError(
                f"optimizer.schedule: {type(trial).__name__} gives the learning rate {rates[0]} at step {step} of {steps}; "
                "expected finite ones"
            )


def _named(module: Any, base: type[Any], key: str, name: Any) -> type[Any]:
    classes = {
        known.lower(): value
        for known, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base
    }
    if str(name).lower() not in classes:
        raise PrivgradError(f"{key} is {name!r}; {nearest(str(name).lower(), classes)}")
    return classes[str(name).lower()]


def _make(key: str, cls: type[Any], first: Any, arguments: dict[str, Any]) -> Any:
    try:
        return cls(first, **arguments)
    except Exception as error:
        raise PrivgradError(f"{key}: {cls.__name__} cannot be made with {arguments}: {reason_of(error)}") from error


def plan_for_numbers(
    rate: float, steps: int, delta: float, adjacency: str, accountant: str, multiplier: float | None
) -> Plan:
    """The plan that plain numbers on the command line describe: Poisson sampled Gaussian steps."""
    plan = build_plan(
        {
            "privacy": {
                "epsilon": None,
                "delta": delta,
                "adjacency": adjacency,
                "accountant": accountant,
                "disclose": (),
            },
            "plan": {
                **dict.fromkeys(KINDS),
                "protects": {"kind": "example"},
                "clipping": {"kind": "flat"},
                "noise": {"kind": "gaussian"},
                "steps": steps,
                "epochs": None,
                "sampling": {"kind": "poisson", "rate": rate, "divisor": 1.0},
            },
        },
        calibrated=False,
    )
    return plan if multiplier is None else plan.with_multiplier(multiplier)

"""Configurations that mean nothing, and what is known of each value: written from docs/configuration.md, not from the code."""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tomli_w

BASE: dict[str, dict[str, Any]] = {
    "data": {"source": "digits", "test": "held-out"},
    "model": {"name": "logistic_regression", "arguments": {}},
    "privacy": {"delta": 1e-5, "adjacency": "zero_out", "accountant": "rdp"},
    "plan": {
        "steps": 2,
        "sampling": {"kind": "poisson", "expected_batch_size": 8},
        "clipping": {"kind": "flat", "max_norm": 1.0},
        "noise": {"kind": "gaussian", "multiplier": 1.0},
    },
    "optimizer": {"name": "sgd", "lr": 0.1},
    "training": {"seed": 0, "evaluations": 1, "averaging": "none"},
    "run": {"device": "cpu", "memory": "auto", "engine": "auto", "workers": 0},
}
"""Trains in a tenth of a second."""
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {"kind": "poisson", "rate": 0.01, "divisor": 8.0},
    {"kind": "truncated_poisson", "expected_batch_size": 8, "max_batch_size": 20},
    {"kind": "fixed_size", "batch_size": 8},
    {"kind": "shuffled", "batch_size": 8},
    {"kind": "full_batch"},
)

MECHANISMS: tuple[dict[str, dict[str, Any]], ...] = (
    {"groups": {"kind": "random", "count": 2}},
    {"groups": {"kind": "random", "count": 2, "local_steps": 2, "local_rate": 0.1}},
    {"clipping": {"kind": "layerwise", "max_norm": 0.5}, "thresholds": {"kind": "quantile"}},
    {"clipping": {"kind": "automatic"}, "thresholds": {"kind": "private", "limit": 2.0}},
)


def number(value: Any, low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False) -> bool:
    """A finite number in an interval, by comparisons that also hold for integers beyond floats."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == math.inf:
        return False
    above = value > low if open_low else value >= low
    return above and (value < high if open_high else value <= high) and abs(value) <= 1.8e308


def count(value: Any, low: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def among(*names: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in names


KEYS: dict[str, Callable[[Any], bool]] = {
    "data.source": lambda value: isinstance(value, str),
    "data.test": among("public", "held-out"),
    "data.cache": lambda value: isinstance(value, str),
    "data.test_share": lambda value: number(value, 0, 1, open_low=True, open_high=True),
    "data.test_source": lambda value: isinstance(value, str),
    "data.images.mode": among("as-is", "gray", "color"),
    "data.images.mean": lambda value: number(value, -math.inf) or isinstance(value, list),
    "data.images.std": lambda value: number(value, 0, open_low=True) or isinstance(value, list),
    "data.images.size": lambda value: isinstance(value, list) and len(value) == 2 and all(count(n) for n in value),
    "data.features.kind": among("scattering"),
    "data.features.scale": count,
    "data.features.groups": lambda value: count(value, 0),
    "data.npz.inputs": lambda value: isinstance(value, str),
    "data.table.target": lambda value: isinstance(value, str),
    "model.name": lambda value: isinstance(value, str),
    "model.arguments": lambda value: isinstance(value, dict),
    "model.arguments.hidden": lambda value: isinstance(value, list) and all(count(width) for width in value),
    "privacy.epsilon": lambda value: number(value, 0, open_low=True),
    "privacy.delta": lambda value: number(value, 0, 1, open_low=True, open_high=True),
    "privacy.adjacency": among("zero_out", "add_remove", "replace_one"),
    "privacy.accountant": among("pld", "rdp"),
    "privacy.disclose": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "plan.steps": count,
    "plan.epochs": lambda value: number(value, 0, open_low=True),
    "plan.protects.kind": among("example", "user"),
    "plan.protects.key": lambda value: isinstance(value, str),
    "plan.protects.max_records": count,
    "plan.sampling.kind": among("poisson", "truncated_poisson", "fixed_size", "shuffled", "full_batch"),
    "plan.sampling.expected_batch_size": lambda value: number(value, 0, open_low=True),
    "plan.sampling.dataset_size": count,
    "plan.sampling.rate": lambda value: number(value, 0, 1, open_low=True),
    "plan.sampling.divisor": lambda value: number(value, 0, open_low=True),
    "plan.sampling.max_batch_size": count,
    "plan.sampling.batch_size": count,
    "plan.sampling.order": lambda value: count(value, 0),
    "plan.groups.kind": among("random"),
    "plan.groups.count": count,
    "plan.groups.local_steps": lambda value: count(value, 0),
    "plan.groups.local_rate": lambda value: number(value, 0, open_low=True),
    "plan.clipping.kind": among("flat", "layerwise", "automatic", "l2_linf"),
    "plan.clipping.max_norm": lambda value: number(value, 0, open_low=True) or isinstance(value, list),
    "plan.clipping.blocks": lambda value: isinstance(value, str | dict),
    "plan.clipping.stability": lambda value: number(value, 1e-12),
    "plan.thresholds.kind": among("public", "private", "quantile"),
    "plan.mixing.kind": among("modelmix"),
    "plan.mixing.width_ratio": lambda value: number(value, 0, open_low=True) or value == "calibrate",
    "plan.mixing.decay": lambda value: number(value, 0),
    "plan.mixing.momentum": lambda value: number(value, 0, 1, open_high=True),
    "plan.compression.kind": among("random_sparsification", "embedding"),
    "plan.compression.rank": count,
    "plan.compression.anchors": count,
    "plan.compression.every": count,
    "plan.compression.iterations": count,
    "plan.compression.residual": lambda value: isinstance(value, bool),
    "plan.compression.blocks": among("all", "tensor", "module"),
    "plan.compression.final_ratio": lambda value: number(value, 0, 1, open_high=True),
    "plan.compression.ramp": lambda value: isinstance(value, bool),
    "plan.compression.refreshes": count,
    "plan.compression.structure": among("elements", "rows", "blocks", "layers"),
    "plan.compression.block": count,
    "plan.statistics.kind": among("public_batch", "private"),
    "plan.statistics.rows": lambda value: count(value, 2),
    "plan.statistics.every": count,
    "plan.statistics.floor": lambda value: number(value, 0, open_low=True),
    "plan.statistics.max_norm": lambda value: number(value, 0, open_low=True),
    "plan.statistics.decay": lambda value: number(value, 0, 1, open_high=True),
    "public.count": count,
    "public.seed": lambda value: count(value, 0),
    "model.arguments.normalization": lambda value: isinstance(value, str),
    "plan.thresholds.every": count,
    "plan.thresholds.limit": lambda value: number(value, 0, open_low=True),
    "plan.thresholds.quantile": lambda value: number(value, 0, 1, open_low=True, open_high=True),
    "plan.noise.allocation": among("uniform", "per_layer", "dimension"),
    "public.source": lambda value: isinstance(value, str),
    "plan.noise.kind": among("gaussian"),
    "plan.noise.multiplier": lambda value: number(value, 0),
    "plan.noise.side_share": lambda value: number(value, 0, 1, open_low=True, open_high=True),
    "plan.noise.insecure_seed": lambda value: count(value, 0),
    "optimizer.name": lambda value: isinstance(value, str),
    "optimizer.lr": lambda value: number(value, 0),
    "optimizer.momentum": lambda value: True,
    "optimizer.betas": lambda value: True,
    "optimizer.weight_decay": lambda value: True,
    "optimizer.capturable": lambda value: True,
    "optimizer.differentiable": lambda value: True,
    "optimizer.foreach": lambda value: True,
    "optimizer.schedule": lambda value: isinstance(value, dict) and isinstance(value.get("name"), str),
    "training.seed": lambda value: count(value, 0) and value < 2**63,
    "training.evaluations": count,
    "training.views": count,
    "data.images.augment": lambda value: isinstance(value, list) and all(name in ("flip", "shift") for name in value),
    "training.averaging": lambda value: value == "none" or (isinstance(value, dict) and value.get("kind") == "ema"),
    "training.averaging.decay": lambda value: number(value, 0, 1, open_high=True),
    "run.device": lambda value: isinstance(value, str),
    "run.memory": lambda value: value == "auto" or count(value),
    "run.engine": lambda value: isinstance(value, str),
    "run.workers": lambda value: count(value, 0),
}
"""What each key can hold by itself. A value that cannot must be refused; one that can may still not fit the others."""
UNKNOWN = ("plan.step", "privacy.epsilom", "plan.noise.multiplyer", "plan.sampling.size", "plann.steps", "run.worker")
VALUES: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 100, 10**6, 10**9, 10**12, 2**31, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(
        -(10**30),
        -(10**400),
        True,
        False,
        0.0,
        -0.0,
        0.5,
        0.999999,
        1.0,
        1.0000001,
        1.5,
        -1.5,
        1e-5,
        1e-300,
        5e-324,
        1e300,
    ),
    *(
        math.nan,
        math.inf,
        -math.inf,
        "",
        " ",
        "nan",
        "1",
        "auto",
        "none",
        "poisson",
        "x" * 5000,
        "é😀\u0000\n",
        "../../etc",
    ),
    *([], [1], [0], [-1], [1.5], ["a"], [10**9], [10**12], [2**63], [[1], [2]], [1] * 300, {}, {"kind": "poisson"}),
    *({"kind": 3}, {"name": "steplr", "step_size": 1}, {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 1}),
    *({"name": "LambdaLR", "lr_lambda": "x"}, {"kind": "ema", "decay": 2}, {"a": {"b": {"c": 1}}}),
    *(datetime.datetime(2020, 1, 1), datetime.date(2020, 1, 1), datetime.time(1, 2)),
)
NAMES: dict[str, tuple[Any, ...]] = {
    "model.name": (
        "mlp",
        "lenet5",
        "MLP",
        "no.such:thing",
        "torch.nn:Linear",
        ":",
        "a:",
        ":b",
        "torch:nn",
        "..x:y",
        "ml p",
    ),
    "optimizer.name": (
        "adam",
        "AdamW",
        "adagrad",
        "RMSprop",
        "lbfgs",
        "SparseAdam",
        "Optimizer",
        "muon",
        "rprop",
        "asgd",
    ),
    "run.device": ("cpu", "cuda", "cuda:99", "meta", "mps", "cpu:7", "gpu", "xla", "vulkan"),
    "plan.sampling.kind": ("poisson", "truncated_poisson", "fixed_size", "shuffled", "full_batch"),
    "plan.protects.kind": ("user",),
    "plan.groups.kind": ("random",),
    "plan.clipping.kind": ("layerwise", "automatic", "l2_linf", "flat"),
    "plan.clipping.blocks": ("tensor", "module", "all", {"a": ["*"]}, {"a": ["w*"], "b": []}, {"a": 3}),
    "plan.thresholds.kind": ("public", "private", "quantile"),
    "plan.noise.allocation": ("per_layer", "dimension"),
    "public.source": ("digits", "nowhere", "dead_leaves", "coloured_noise"),
    "plan.statistics.kind": ("public_batch", "private"),
    "plan.compression.kind": ("random_sparsification",),
    "plan.mixing.kind": ("modelmix",),
    "privacy.disclose": (["training_loss"], ["batch_size", "gradient_norm"], ["nothing"], "training_loss"),
    "data.test_share": (0.2,),
    "data.features.kind": ("scattering",),
    "data.cache": ("auto", "none", "/nowhere/at/all"),
    "privacy.adjacency": ("zero_out", "add_remove", "replace_one"),
}


@dataclass
class Nonsense:
    """A configuration, and why it must be refused where that is known.

    trains: it asks for no more than a moment of training.
    """

    text: str
    settings: list[str] = field(default_factory=list)
    refused_because: str = ""
    trains: bool = True


def nonsense(chance: random.Random, *, calibrated: bool) -> Nonsense:
    """One configuration: changed values, changed text, or both. calibrated: its noise comes from the budget."""
    tables = _copy(BASE)
    if calibrated:
        del tables["plan"]["noise"]["multiplier"]
    if chance.random() < 0.4:
        tables["plan"]["sampling"] = dict(chance.choice(SAMPLINGS))
        if tables["plan"]["sampling"]["kind"] == "truncated_poisson":
            tables["privacy"]["accountant"] = "pld"
    if chance.random() < 0.15:
        tables["plan"].update(chance.choice(MECHANISMS))
    set_values: dict[str, Any] = {}
    if chance.random() < 0.85:
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            _change_a_value(tables, set_values, chance)
    made = Nonsense("", [f"{key}={_as_setting(value)}" for key, value in set_values.items()])
    for key in (*KEYS, *UNKNOWN):
        value = set_values.get(key, _at(tables, key))
        if value is not _MISSING and not KEYS.get(key, lambda _: False)(value):
            made.refused_because = f"{key} cannot be {value!r}"[:200]
    steps = [set_values.get(f"plan.{name}", tables["plan"].get(name, 1)) for name in ("steps", "epochs")]
    made.trains = all(not isinstance(value, int | float) or value <= 3 for value in steps)
    try:
        made.text = tomli_w.dumps(tables)
    except ValueError:  # an integer with more digits than Python writes
        made.text = ""
    if chance.random() < 0.3 or not made.text:
        made.text = _change_the_text(made.text, chance)
        made.refused_because, made.trains = "", False  # nobody knows any more
    return made


_MISSING = object()


def _at(node: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return _MISSING
        node = node[part]
    return node


def _change_a_value(tables: dict[str, Any], set_values: dict[str, Any], chance: random.Random) -> None:
    key = chance.choice(tuple(KEYS) if chance.random() < 0.93 else UNKNOWN)
    value = chance.choice(NAMES[key]) if key in NAMES and chance.random() < 0.6 else chance.choice(VALUES)
    if key == "plan.epochs" and chance.random() < 0.7:
        tables["plan"].pop("steps", None)
    if key == "privacy.epsilon" and chance.random() < 0.7 and isinstance(tables["plan"].get("noise"), dict):
        tables["plan"]["noise"].pop("multiplier", None)
    if chance.random() < 0.25 and _as_setting(value) is not None:
        set_values[key] = value
        return
    *path, last = key.split(".")
    node = tables
    for part in path:
        if not isinstance(node.get(part), dict):
            node[part] = {}
        node = node[part]
    node[last] = value


def _as_setting(value: Any) -> str | None:
    """As a user types it; None for what would be read as something else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    return None


def _change_the_text(text: str, chance: random.Random) -> str:
    pieces = (
        "\0",
        "\ud7ff",
        "[",
        "]",
        "{",
        "}",
        "=",
        '"',
        "'",
        "\n",
        "#",
        ".",
        "-",
        "1e999",
        "nan",
        "[plan]",
        "[[plan]]",
        "9" * 5000,
    )
    for _ in range(chance.choice((1, 1, 2, 5, 20))):
        at = chance.randint(0, len(text))
        match chance.randrange(5):
            case 0:
                text = text[:at] + chance.choice(pieces) + text[at:]
            case 1:
                text = text[:at] + text[at + chance.randint(1, 30) :]
            case 2:
                text = (
                    text[:at]
                    + chr(chance.choice((chance.randrange(32, 127), chance.randrange(0x110000))))
                    + text[at + 1 :]
                )
            case 3:
                lines = text.splitlines(keepends=True)
                lines.insert(chance.randint(0, len(lines)), chance.choice(lines or ["x"]))
                text = "".join(lines)
            case _:
                text = text[:at]
    return text


def _copy(node: Any) -> Any:
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, dict) else node

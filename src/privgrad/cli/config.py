"""The configuration file: one TOML file describes a run. Every key has a default; an unknown key is an error."""

from __future__ import annotations

import copy
import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privgrad.data.generators import GENERATORS
from privgrad.data.settings import read_settings
from privgrad.data.source import located
from privgrad.errors import PrivgradError, nearest
from privgrad.mechanism.kinds import KINDS, stage_class

DEFAULTS: dict[str, dict[str, Any]] = {
    "data": {
        "source": "digits",
        "test": "held-out",
        "test_source": None,
        "test_share": None,
        "cache": "auto",
        "images": {
            "column": None,
            "label": "label",
            "classes": None,
            "size": None,
            "mode": "as-is",
            "mean": 0.5,
            "std": 0.5,
            "augment": [],
        },
        "npz": {"inputs": "x", "labels": "y", "classes": None},
        "table": None,
        "features": None,
    },
    "public": {"source": None, "count": 1024, "seed": 0},
    "model": {"name": "mlp", "arguments": {}},
    "privacy": {"epsilon": None, "delta": 1e-5, "adjacency": "zero_out", "accountant": "pld", "disclose": []},
    "plan": {
        "steps": None,
        "epochs": None,
        "protects": {"kind": "example"},
        "sampling": {"kind": "poisson", "expected_batch_size": 512},
        "groups": None,
        "compression": None,
        "clipping": {"kind": "flat", "max_norm": 1.0},
        "thresholds": None,
        "noise": {"kind": "gaussian"},
        "mixing": None,
        "statistics": None,
    },
    "optimizer": {"name": "sgd", "lr": 1.2},
    "training": {"seed": 0, "views": 1, "evaluations": 10, "averaging": {"kind": "ema", "decay": 0.95}},
    "run": {"device": "auto", "memory": "auto", "engine": "auto", "workers": 0},
}
DEFAULT_EPSILON = 3.0
DEFAULT_STEPS = 150

Config = dict[str, dict[str, Any]]


def read_config(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. `include = "OTHER.toml"` at its top: that file's tables, under its own.

    OTHER.toml lies beside the file that includes it, and may include one itself.

    Raises:
        PrivgradError: a file that cannot be read, that is not TOML, or that includes itself in the end.
    """
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    given = _tables(path)
    if path.resolve() in above:
        raise PrivgradError(f"{path} includes itself in the end; take one include out")
    if "include" not in given:
        return given
    name = given.pop("include")
    if not isinstance(name, str):
        raise PrivgradError(f"include is {name!r} in {path}; expected the name of a configuration file")
    return _merged(_read(path.parent / name, (*above, path.resolve())), given)


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Tables over tables, key by key; a table of another kind replaces the whole."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and _same_kind(below, value):
            merged[key] = _merged(below, value)
        else:
            merged[key] = value
    return merged


def _same_kind(under: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return bool(over.get("kind", under.get("kind")) == under.get("kind"))


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors begin a file with a byte order mark
    except OSError as error:
        raise PrivgradError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # tomllib: also endless numbers, and tables in tables in tables
        raise PrivgradError(f"{path} is not valid TOML: {error}") from error


def complete(given: Mapping[str, Any]) -> Config:
    """The defaults with everything that was given put over them.

    Raises:
        PrivgradError: an unknown section, key or kind (with the nearest known one).
    """
    config: Config = copy.deepcopy(DEFAULTS)
    for section, values in given.items():
        if section not in config:
            raise PrivgradError(f"[{section}] is an unknown section; {nearest(section, config)}")
        if not isinstance(values, Mapping):
            raise PrivgradError(f"{section} is {values!r}; expected a table, [{section}]")
        for key, value in values.items():
            _put(config, section, key, value)
    read_settings(config["data"])  # refuses what is unknown or impossible inside its tables
    return config


def resolved(config: Config, beside: Path | None) -> Config:
    """The configuration with absolute paths to its data. beside: the directory of the configuration file.

    Raises:
        PrivgradError: data that is not found, with the places that were looked at.
    """
    public = config["public"]
    if public["source"] is not None and public["source"] not in [*GENERATORS]:
        found = located({**config["data"], "source": public["source"], "test_source": None}, beside)["source"]
        public = {**public, "source": found}
    return {**config, "data": located(config["data"], beside), "public": public}


def _put(config: Config, section: str, key: str, value: Any) -> None:
    known = config[section]
    if section == "optimizer":
        known[key] = value  # the rest are arguments of the optimizer's class, which knows them
        return
    if key not in known:
        elsewhere = [other for other, keys in config.items() if key in keys]
        hint = f"did you mean {elsewhere[0]}.{key}?" if elsewhere else nearest(key, known)
        raise PrivgradError(f"{section}.{key} is an unknown key; {hint}")
    if section == "plan" and key in KINDS:
        known[key] = _stage(key, known[key], value)
        return
    if key in ("arguments", "images", "npz", "table", "features") and not isinstance(value, Mapping):
        raise PrivgradError(f"{section}.{key} is {value!r}; expected a table")
    known[key] = {**known[key], **value} if key in ("images", "npz") else value


def _stage(slot: str, default: Mapping[str, Any] | None, value: Any) -> dict[str, Any]:
    """A stage's table over its default: another kind drops the default's numbers, the same kind keeps those not given."""
    if not isinstance(value, Mapping):
        raise PrivgradError(f"plan.{slot} is {value!r}; expected a table with a 'kind'")
    if default is None and "kind" not in value:
        raise PrivgradError(f"plan.{slot} has no 'kind'; {nearest('', KINDS[slot])}")
    kind = value.get("kind", (default or {}).get("kind"))
    fields = [field.name for field in dataclasses.fields(stage_class(slot, str(kind), own=True))]
    for key in value:
        if key != "kind" and key not in fields:
            raise PrivgradError(f"plan.{slot}.{key} is an unknown key for kind {kind!r}; {nearest(key, fields)}")
    same = default is not None and kind == default.get("kind")
    merged = {**(default or {}), **value} if same else dict(value)
    if slot == "sampling" and "rate" in value and "expected_batch_size" not in value:
        merged.pop("expected_batch_size", None)  # the other way to say how large a batch is
    return merged


def section_of(given: dict[str, Any], name: str) -> dict[str, Any]:
    """One section of what was given, made where there is none."""
    section = given.setdefault(name, {})
    if not isinstance(section, dict):
        raise PrivgradError(f"{name} is {section!r}; expected a table, [{name}]")
    return section


def assign(given: dict[str, Any], setting: str) -> str | None:
    """Apply one `--set key=value` to what was given. A note for the user where it drops keys of another kind."""
    path, separator, text = setting.partition("=")
    keys = path.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise PrivgradError(f"--set {setting!r} is not understood; expected section.key=value, such as plan.steps=300")
    node = given
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise PrivgradError(f"--set {setting!r}: {key} is not a table")
    value = _value(text.strip())
    note = None
    if keys[-1] == "kind" and node.get("kind", value) != value:
        dropped = sorted(key for key in node if key != "kind")
        node.clear()
        if dropped:
            note = f"--set {setting}: dropped the other kind's {', '.join(dropped)}"
    node[keys[-1]] = value
    return note


def _value(text: str) -> Any:
    """A TOML value; what is none is text."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if read.keys() == {"value"} else text


def without_none(node: Any) -> Any:
    """The same tables without empty entries: TOML has no null."""
    if isinstance(node, Mapping):
        return {key: without_none(value) for key, value in node.items() if value is not None}
    return node

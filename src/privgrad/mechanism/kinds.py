"""The stages that a configuration can name, and those of the user's own: to plain numbers and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from privgrad.errors import PrivgradError, nearest
from privgrad.mechanism import stage as protocols
from privgrad.mechanism.clipping import CoordinateClipping, FlatClipping
from privgrad.mechanism.embedding import GradientEmbedding
from privgrad.mechanism.groups import RandomGroups
from privgrad.mechanism.layerwise import AutomaticClipping, LayerwiseClipping
from privgrad.mechanism.mixing import ModelMix
from privgrad.mechanism.noise import SECRET, GaussianNoise
from privgrad.mechanism.private_statistics import PrivateStatistics
from privgrad.mechanism.sampling import (
    FixedSizeSampling,
    FullBatch,
    PoissonSampling,
    ShuffledBatches,
    TruncatedPoissonSampling,
)
from privgrad.mechanism.sparsification import RandomSparsification
from privgrad.mechanism.statistics import PublicStatistics
from privgrad.mechanism.thresholds import PrivateThresholds, PublicThresholds, QuantileThresholds
from privgrad.own import check_trusted, imported
from privgrad.privacy.adjacency import Example, User

KINDS: dict[str, dict[str, type[Any]]] = {
    "protects": {"example": Example, "user": User},
    "sampling": {
        stage.kind: stage
        for stage in (PoissonSampling, TruncatedPoissonSampling, FixedSizeSampling, ShuffledBatches, FullBatch)
    },
    "groups": {"random": RandomGroups},
    "compression": {stage.kind: stage for stage in (RandomSparsification, GradientEmbedding)},
    "clipping": {
        stage.kind: stage for stage in (FlatClipping, LayerwiseClipping, AutomaticClipping, CoordinateClipping)
    },
    "thresholds": {stage.kind: stage for stage in (PublicThresholds, PrivateThresholds, QuantileThresholds)},
    "noise": {"gaussian": GaussianNoise},
    "mixing": {ModelMix.kind: ModelMix},
    "statistics": {stage.kind: stage for stage in (PublicStatistics, PrivateStatistics)},
}
"""What can be chosen for each stage, by its name in a configuration file. A new mechanism is one file and one entry.

(One of the user's own needs no entry: it is "package.module:Class" there.)
"""

PROTOCOLS: dict[str, type[Any]] = {
    "sampling": protocols.Sampling,
    "groups": protocols.Groups,
    "compression": protocols.Compression,
    "clipping": protocols.Clipping,
    "thresholds": protocols.Thresholds,
    "noise": protocols.Noise,
    "mixing": protocols.Mixing,
    "statistics": protocols.Statistics,
}


def kind_of(slot: str, stage: Any) -> str:
    """A stage's name: one of KINDS; that of its class where it is the user's own, so that ledger and certificate can tell."""
    known = next((kind for kind, cls in KINDS[slot].items() if type(stage) is cls), None)
    return f"{type(stage).__module__}:{type(stage).__qualname__}" if known is None else known


def told_first(slot: str, stage: Any) -> str:
    """What the certificate says first of a mechanism that is not this library's; nothing of one that is."""
    if stage is None or type(stage) in KINDS[slot].values():
        return ""
    return f"a mechanism of the user's own ({kind_of(slot, stage)}), which says of itself: "


def stage_to_json(slot: str, value: Any) -> dict[str, Any]:
    return {
        "kind": kind_of(slot, value),
        **{field.name: plain(field, getattr(value, field.name)) for field in dataclasses.fields(value)},
    }


def plain(field: dataclasses.Field[Any], value: Any) -> Any:
    """The value as JSON knows it. 1 and 1.0 are the same number to a float field, and must give the same digest."""
    if field.name == "insecure_seed" and value is not None:
        return SECRET  # plans are published; whoever has the seed can take the noise away
    if isinstance(value, int) and not isinstance(value, bool) and "float" in str(field.type):
        return float(value)
    return list(value) if isinstance(value, tuple) else value


def stage_class(slot: str, kind: str, *, own: bool) -> type[Any]:
    """The class of a kind. own: import a mechanism of the user's own, "package.module:Class"; a plan of unknown origin must not
    have code run.

    Raises:
        PrivgradError: a kind that there is not (with the nearest known one), or that may not or cannot be imported.
    """
    if kind in KINDS[slot]:
        return KINDS[slot][kind]
    if ":" not in kind or slot not in PROTOCOLS:
        hint = " (your own: 'package.module:Class')" if slot in PROTOCOLS else ""
        raise PrivgradError(f"plan.{slot}.kind is {kind!r}; {nearest(kind, KINDS[slot])}{hint}")
    if not own:
        check_trusted(f"plan.{slot}.kind", kind)
    found = imported(f"plan.{slot}.kind", kind)
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise PrivgradError(f"plan.{slot}.kind is {kind!r}, which is no dataclass; a stage is one of its numbers")
    if f"{found.__module__}:{found.__qualname__}" != kind:
        raise PrivgradError(
            f"plan.{slot}.kind is {kind!r}; name it where it is: '{found.__module__}:{found.__qualname__}'"
        )
    return found


def stage_from_json(slot: str, data: Any, *, own: bool = False) -> Any:
    """The stage of `{"kind": ..., **its numbers}`. own: see `stage_class`.

    Raises:
        PrivgradError: an unknown kind or key (with the nearest known one), or a missing or wrong number.
    """
    if not isinstance(data, Mapping) or not isinstance(data.get("kind"), str):
        raise PrivgradError(f"plan.{slot} is {data!r}; expected a table with a 'kind'")
    kind = data["kind"]
    cls = stage_class(slot, kind, own=own)
    known = [field.name for field in dataclasses.fields(cls)]
    values = {key: value for key, value in data.items() if key != "kind"}
    for key in values:
        if key not in known:
            raise PrivgradError(f"plan.{slot}.{key} is an unknown key for kind {kind!r}; {nearest(key, known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise PrivgradError(f"plan.{slot}: {error}") from error

"""[data] of a configuration file: where the records are and how they become tensors. No constant comes from private records."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from privgrad.data.augmentation import AUGMENTATIONS
from privgrad.errors import PrivgradError, check_count, check_number, nearest

Classes = int | tuple[str, ...]
"""How many classes there are, or their names in the order of their labels."""
Scalar = float | tuple[float, ...]
"""One number for all channels, or one per channel."""
Value = str | int | float | bool
"""A value of a categorical column or of a target."""

_LARGEST_SIDE = 8192
"""Of an image that is resized: within Pillow's limit on pixels."""
MODES = ("as-is", "gray", "color")
MISSING = ("refuse", "zero")
COLORS = ("as-is", "ycbcr")


@dataclass(frozen=True)
class ImageSettings:
    """[data.images]. column: of the images in a parquet file ("image" or "img" by default); label: of their classes.

    size: (height, width) to resize to; None refuses mixed sizes. mode: "as-is" (8-bit gray or RGB), or convert to "gray" or
    "color". mean, std: of pixels / 255, for all channels or for each.
    augment: random changes of the training images, by name.
    """

    column: str | None = None
    label: str = "label"
    classes: Classes | None = None
    size: tuple[int, int] | None = None
    mode: str = "as-is"
    mean: Scalar = 0.5
    std: Scalar = 0.5
    augment: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.augment, tuple):
            raise PrivgradError(f"data.images.augment is {self.augment!r}; expected a list, such as ['flip']")
        for name in self.augment:
            _one_of("data.images.augment", name, tuple(AUGMENTATIONS))
        if self.size is not None:
            if not isinstance(self.size, tuple) or len(self.size) != 2:
                raise PrivgradError(f"data.images.size is {self.size!r}; expected [height, width] in pixels")
            for side in self.size:
                check_count("data.images.size", side)
                check_number("data.images.size", side, at_most=_LARGEST_SIDE)
        _one_of("data.images.mode", self.mode, MODES)
        _text("data.images.label", self.label)
        if self.column is not None:
            _text("data.images.column", self.column)
        _check_classes("data.images.classes", self.classes)
        for number in _numbers("data.images.mean", self.mean):
            check_number("data.images.mean", number)
        for number in _numbers("data.images.std", self.std):
            check_number("data.images.std", number, above=0)


@dataclass(frozen=True)
class NpzSettings:
    """[data.npz]: the names of the arrays (with _train and _test behind them where one file holds both splits)."""

    inputs: str = "x"
    labels: str = "y"
    classes: Classes | None = None

    def __post_init__(self) -> None:
        _text("data.npz.inputs", self.inputs)
        _text("data.npz.labels", self.labels)
        _check_classes("data.npz.classes", self.classes)


@dataclass(frozen=True)
class Numeric:
    """A number with stated bounds: clamped to them and scaled to [-1, 1]."""

    low: float
    high: float

    def check(self, name: str) -> None:
        """Refuse bounds that are no interval."""
        check_number(f"{name}.low", self.low)
        check_number(f"{name}.high", self.high)
        if not self.low < self.high or not math.isfinite(float(self.high) - float(self.low)):
            raise PrivgradError(f"{name} has low = {self.low!r} and high = {self.high!r}; expected low below high")


@dataclass(frozen=True)
class Categorical:
    """One of the stated values: one-hot, in their order."""

    values: tuple[Value, ...]

    def check(self, name: str) -> None:
        """Refuse values that cannot be told apart."""
        check_values(f"{name}.values", self.values, at_least=1)


Column = Numeric | Categorical
_COLUMN_KINDS: dict[str, type[Column]] = {"numeric": Numeric, "categorical": Categorical}


@dataclass(frozen=True)
class TableSettings:
    """[data.table]. target: the column of the classes, whose values are `classes`, in order.

    columns: the features, in order. missing: "refuse", or "zero": what is no number, or none of the values, counts as 0 (the
    middle of the bounds; no category).
    """

    target: str
    classes: tuple[Value, ...]
    columns: tuple[tuple[str, Column], ...]
    missing: str = "refuse"

    def __post_init__(self) -> None:
        _text("data.table.target", self.target)
        check_values("data.table.classes", self.classes, at_least=2)
        _one_of("data.table.missing", self.missing, MISSING)
        if not self.columns:
            raise PrivgradError("data.table.columns is empty; name at least one column, such as age = [0, 120]")
        for name, column in self.columns:
            if name == self.target:
                raise PrivgradError(
                    f"data.table.columns has {name!r}, which is the target; a model must not see what it is to say"
                )
            column.check(f"data.table.columns.{name}")


@dataclass(frozen=True)
class FeatureSettings:
    """[data.features]. kind: "scattering". scale: J, of the largest wavelets, 2^J pixels. groups: each image's features are
    normalised in so many groups of channels, by that image's own statistics; 0 leaves them as they are. color: "as-is", or
    "ycbcr" (brightness and two color differences, which are less alike than red, green and blue). mirror: the mean of the
    features of the image and of its mirror image."""

    kind: str = "scattering"
    scale: int = 2
    groups: int = 27
    color: str = "as-is"
    mirror: bool = False

    def __post_init__(self) -> None:
        _one_of("data.features.color", self.color, COLORS)
        if not isinstance(self.mirror, bool):
            raise PrivgradError(f"data.features.mirror is {self.mirror!r}; expected true or false")
        _one_of("data.features.kind", self.kind, ("scattering",))
        check_count("data.features.scale", self.scale)
        check_number("data.features.scale", self.scale, at_most=6)
        check_count("data.features.groups", self.groups, at_least=0)

    @property
    def words(self) -> str:
        """What is done, for the certificate."""
        normalised = f", normalised in {self.groups} groups by the image's own statistics" if self.groups else ""
        color = " in YCbCr" if self.color == "ycbcr" else ""
        mirrored = ", the mean with its mirror image's" if self.mirror else ""
        return f"scattering features (J = {self.scale}){color} of each image by itself{normalised}{mirrored}"


@dataclass(frozen=True)
class DataSettings:
    """[data]. source: an embedded name or a path. test_source, test_share: the test split, where the source has none of its own.

    cache: where decoded images are kept: "auto", "none" or a directory.
    """

    source: str = "digits"
    test_source: str | None = None
    test_share: float | None = None
    cache: str = "auto"
    images: ImageSettings = field(default_factory=ImageSettings)
    npz: NpzSettings = field(default_factory=NpzSettings)
    table: TableSettings | None = None
    features: FeatureSettings | None = None

    def __post_init__(self) -> None:
        _text("data.source", self.source)
        _text("data.cache", self.cache)
        if self.test_source is not None:
            _text("data.test_source", self.test_source)
        if self.test_share is not None:
            check_number("data.test_share", self.test_share, above=0, below=1)
        if self.test_source is not None and self.test_share is not None:
            raise PrivgradError("both data.test_source and data.test_share are given; leave one out")


def read_settings(data: Mapping[str, Any]) -> DataSettings:
    """The settings of a [data] table; `test`, the declaration of the split, is not read here.

    Raises:
        PrivgradError: an unknown key at any level (with the nearest known one), or a value that cannot be used.
    """
    given = {key: value for key, value in data.items() if key != "test"}
    _check_keys("data", given, [*_fields(DataSettings), "test"])
    for key, read in (("images", _images), ("npz", _npz), ("table", _table), ("features", _features)):
        if given.get(key) is not None:
            given[key] = read(_mapping(f"data.{key}", given[key]))
        else:
            given.pop(key, None)
    return DataSettings(**given)


def check_values(name: str, values: object, *, at_least: int) -> None:
    """Refuse what is not a list of different values of one kind: texts, numbers, or truth values."""
    if not isinstance(values, tuple) or len(values) < at_least:
        raise PrivgradError(f"{name} is {_shown(values)}; expected a list of at least {at_least} value(s)")
    kinds = {bool if isinstance(v, bool) else float if isinstance(v, int | float) else type(v) for v in values}
    if len(kinds) > 1 or not kinds <= {bool, float, str}:
        raise PrivgradError(f"{name} is {_shown(values)}; expected texts only, numbers only, or true and false")
    if kinds == {str} and any(value != value.strip(" \t") or not value for value in values):
        raise PrivgradError(
            f"{name} is {_shown(values)}; expected texts that are not empty, without spaces around them"
        )
    if kinds == {float}:
        for value in values:
            check_number(name, value)
    if len({float(value) if isinstance(value, int) else value for value in values}) < len(values):
        raise PrivgradError(f"{name} is {_shown(values)}; a value is there twice")


def _images(given: Mapping[str, Any]) -> ImageSettings:
    _check_keys("data.images", given, _fields(ImageSettings))
    return ImageSettings(**{key: _frozen(value) for key, value in given.items()})


def _npz(given: Mapping[str, Any]) -> NpzSettings:
    _check_keys("data.npz", given, _fields(NpzSettings))
    return NpzSettings(**{key: _frozen(value) for key, value in given.items()})


def _features(given: Mapping[str, Any]) -> FeatureSettings:
    _check_keys("data.features", given, _fields(FeatureSettings))
    return FeatureSettings(**given)


def _table(given: Mapping[str, Any]) -> TableSettings:
    _check_keys("data.table", given, _fields(TableSettings))
    for key in ("target", "classes", "columns"):
        if key not in given:
            raise PrivgradError(f"data.table has no {key!r}; a table needs target, classes and columns")
    columns = _mapping("data.table.columns", given["columns"])
    return TableSettings(
        target=given["target"],
        classes=_frozen(given["classes"]),
        columns=tuple((name, _column(f"data.table.columns.{name}", value)) for name, value in columns.items()),
        missing=given.get("missing", "refuse"),
    )


def _column(name: str, given: Any) -> Column:
    """{ kind = ..., ... }; or in short: [low, high], two numbers, or [value, ...], texts."""
    if isinstance(given, list):
        if len(given) == 2 and all(isinstance(bound, int | float) and not isinstance(bound, bool) for bound in given):
            return Numeric(*given)
        if given and all(isinstance(value, str) for value in given):
            return Categorical(tuple(given))
    if not isinstance(given, Mapping):
        raise PrivgradError(
            f"{name} is {_shown(given)}; expected [low, high], a list of texts, or {{ kind = 'numeric' or 'categorical', ... }}"
        )
    kind = given.get("kind")
    if not isinstance(kind, str) or kind not in _COLUMN_KINDS:
        raise PrivgradError(f"{name}.kind is {kind!r}; {nearest(str(kind), _COLUMN_KINDS)}")
    fields = _fields(_COLUMN_KINDS[kind])
    rest = {key: _frozen(value) for key, value in given.items() if key != "kind"}
    _check_keys(name, rest, fields)
    for part in fields:
        if part not in rest:
            raise PrivgradError(f"{name} has no {part!r}; a {kind} column needs {' and '.join(fields)}")
    return _COLUMN_KINDS[kind](**rest)


def _fields(cls: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _check_keys(name: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            raise PrivgradError(f"{name}.{key} is an unknown key; {nearest(key, known)}")


def _mapping(name: str, given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise PrivgradError(f"{name} is {_shown(given)}; expected a table, [{name}]")
    return given


def _check_classes(name: str, classes: object) -> None:
    if classes is None:
        return
    if isinstance(classes, tuple):
        check_values(name, classes, at_least=2)
        if not all(isinstance(value, str) for value in classes):
            raise PrivgradError(f"{name} is {_shown(classes)}; expected the number of classes, or their names as texts")
        return
    check_count(name, classes, at_least=2)


def _text(name: str, value: object) -> None:
    if not isinstance(value, str) or not value:
        raise PrivgradError(f"{name} is {value!r}; expected a text that is not empty")


def _one_of(name: str, value: object, known: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in known:
        raise PrivgradError(f"{name} is {value!r}; {nearest(str(value), known)}")


def _numbers(name: str, value: Any) -> tuple[Any, ...]:
    if value == ():
        raise PrivgradError(f"{name} is []; expected a number, or one per channel")
    return value if isinstance(value, tuple) else (value,)


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _shown(value: object) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 80 else text[:77] + "..."

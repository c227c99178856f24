"""A data set with its declared splits: an embedded one by name, or files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from privgrad.data.cache import Cache
from privgrad.data.features import image_shape, with_features
from privgrad.data.find import Files, expanded, locate, one_split, split_files
from privgrad.data.generators import GENERATORS
from privgrad.data.image_files import open_folder, open_parquet_images
from privgrad.data.npz import holds_both_splits, open_npz
from privgrad.data.part import AS_GIVEN, Part, count_of
from privgrad.data.records import Records
from privgrad.data.settings import Classes, DataSettings, ImageSettings, NpzSettings
from privgrad.data.split import check_share, check_units_apart, dense_units, split
from privgrad.data.tables import open_table
from privgrad.errors import PrivgradError, RefusedError
from privgrad.privacy.adjacency import Adjacency


@dataclass(frozen=True)
class Source:
    """Private training records and a test split that is NOT protected, for classification.

    input_shape: of one record. scaling: what was done to the inputs, in words; constants are fixed, never computed from
    private records. keys: the unit 0..users-1 that each training record belongs to, int64 [size], where a key was asked for.
    by_name: a record's row number follows from what its file is called (see `Part`).
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    size: int
    input_shape: tuple[int, ...]
    classes: int
    scaling: str
    keys: Tensor | None = None
    users: int | None = None
    by_name: bool = False


def digits() -> Source:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels (0..16), 1,437 to train and 360 to test.

    The split is a fixed permutation. Each image is scaled by itself alone: less its own mean, over its own standard deviation,
    times 1.4. (What all images share would use up gradient norm, and so clipping, without telling them apart.)
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32).flatten(1)
    spread = images.std(1, keepdim=True).clamp(min=1.0)
    inputs = (1.4 * (images - images.mean(1, keepdim=True)) / spread).view(-1, 8, 8)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    order = torch.from_numpy(numpy.random.RandomState(0).permutation(len(labels)))
    inputs, labels = inputs[order].unsqueeze(1), labels[order]
    size = 1437
    return Source(
        name="digits",
        train=TensorDataset(inputs[:size], labels[:size]),
        test=TensorDataset(inputs[size:], labels[size:]),
        size=size,
        input_shape=(1, 8, 8),
        classes=10,
        scaling="each image less its own mean, over its own standard deviation",
    )


SOURCES: dict[str, Callable[[], Source]] = {"digits": digits}
"""Embedded data sets by their name in a configuration file."""


def load(settings: DataSettings | str, adjacency: Adjacency = Adjacency.ZERO_OUT, *, key: str | None = None) -> Source:
    """The data set of the settings, or of a name.

    key: the column (or array) that says which unit each record belongs to.

    Raises:
        PrivgradError: what is missing, damaged, or does not fit the settings, in one line. Nothing is written before.
        RefusedError: a split that the adjacency does not allow.
    """
    settings = DataSettings(source=settings) if isinstance(settings, str) else settings
    if settings.source in SOURCES:
        _check_embedded(settings, key)
        return SOURCES[settings.source]()
    path = locate("data.source", settings.source, embedded=SOURCES)
    cache = Cache(settings.cache)
    train, test = _open(path, settings, adjacency, key, cache)
    augment = settings.images.augment
    if augment and settings.features is not None:
        raise PrivgradError(
            "data.images.augment changes images anew in every step, and data.features are computed once; leave one of them out"
        )
    sets = [_records(train, settings, augment), _records(test, settings)]
    (shape, kind), (test_shape, test_kind) = ((tuple(s.inputs.shape[1:]), s.inputs.dtype) for s in sets)
    if (shape, kind) != (test_shape, test_kind):
        raise PrivgradError(
            f"{train.where} has records of shape {list(shape)} ({kind}), and {test.where} of shape {list(test_shape)} "
            f"({test_kind}); expected the same in both splits"
        )
    cache.commit()
    scaling = train.scaling
    if settings.features is not None:
        train_set, test_set = (
            with_features(records, settings.features, cache.directory, part.where)
            for records, part in zip(sets, (train, test), strict=True)
        )
        sets, shape, scaling = [train_set, test_set], tuple(train_set.inputs.shape[1:]), settings.features.words
    keys, users = (None, None) if train.keys is None else dense_units(train.keys)
    return Source(
        name=_name(path),
        train=sets[0],
        test=sets[1],
        size=len(train),
        input_shape=shape,
        classes=count_of(train.classes),
        scaling=scaling,
        keys=keys,
        users=users,
        by_name=train.by_name,
    )


def load_public(settings: DataSettings) -> Source:
    """One split of data that are not private (the training split, where there are two), read like private ones."""
    if settings.source in SOURCES:
        return SOURCES[settings.source]()
    path = locate("public.source", settings.source, embedded=SOURCES)
    cache = Cache(settings.cache)
    files, _ = split_files(path)
    both = files.kind == ".npz" and not files.is_folder and holds_both_splits(files, settings)
    part = _open_part(files, settings, _stated(files, settings), None, cache, "_train" if both else "")
    records = _records(part, settings)
    cache.commit()
    if settings.features is not None:
        records = with_features(records, settings.features, cache.directory, part.where)
    shape = tuple(records.inputs.shape[1:])
    return Source(_name(path), records, records, len(part), shape, count_of(part.classes), part.scaling)


def generated(settings: DataSettings, generator: str, private: Source, count: int, seed: int) -> Records:
    """So many images from a random process, of the shape of the private ones and scaled like them, with random labels.

    Where the private records are features of images, these are features of such images.
    """
    shape = private.input_shape
    if len(shape) != 3:
        raise PrivgradError(
            f"public.source = {generator!r} makes images, and the private records are {list(shape)} numbers; name public data of "
            "that kind"
        )
    if settings.features is not None:
        shape = image_shape(shape, settings.features)
    try:
        images = torch.from_numpy(GENERATORS[generator](count, shape, seed))
    except MemoryError:
        raise PrivgradError(
            f"public.count is {count:,}, and so many images do not fit into memory; ask for fewer"
        ) from None
    labels = torch.from_numpy(numpy.random.default_rng(seed).integers(0, private.classes, count))
    if settings.features is not None:
        return with_features(Records(images, labels), settings.features, None, f"public.source = {generator!r}")
    return Records(images, labels, settings.images.mean, settings.images.std)


def training_size(settings: DataSettings, adjacency: Adjacency = Adjacency.ZERO_OUT) -> int:
    """The number of training records; images are counted and not decoded."""
    if settings.source in SOURCES:
        return load(settings, adjacency).size
    path = locate("data.source", settings.source, embedded=SOURCES)
    return len(_open(path, settings, adjacency, None, Cache(settings.cache))[0])


def located(data: dict[str, Any], beside: Path | None) -> dict[str, Any]:
    """[data] of a configuration with absolute paths instead of names: it means the same from every other directory."""
    found = dict(data)
    if isinstance(data["source"], str) and data["source"] not in SOURCES:
        found["source"] = str(locate("data.source", data["source"], beside=beside, embedded=SOURCES))
    if data["test_source"] is not None:
        found["test_source"] = str(locate("data.test_source", data["test_source"], beside=beside))
    if data["cache"] not in ("auto", "none"):
        found["cache"] = str(expanded("data.cache", Path(data["cache"])).absolute())
    return found


def _open(path: Path, settings: DataSettings, adjacency: Adjacency, key: str | None, cache: Cache) -> tuple[Part, Part]:
    """The two splits: both in the source, or the test split in its own file, or a share of the one file."""
    files, test_files = split_files(path)
    both = files.kind == ".npz" and not files.is_folder and holds_both_splits(files, settings)
    own = both or test_files is not None
    stated = sum((own, settings.test_source is not None, settings.test_share is not None))
    if stated != 1:
        raise PrivgradError(
            f"{path} {'holds a test split of its own' if own else 'has no test split beside it'}; "
            f"{'leave out' if own else 'give'} data.test_source = 'PATH' {'and' if own else 'or'} data.test_share = 0.2"
        )
    if settings.test_share is not None:
        check_share(adjacency, key, files.is_folder)
    if settings.test_source is not None:
        declared = locate("data.test_source", settings.test_source)
        if declared.resolve() == path.resolve():
            raise RefusedError(
                f"data.test_source is {settings.test_source!r}, the private data themselves, whose accuracy would leave "
                "un-noised; name another file, or give data.test_share = 0.2"
            )
        test_files = one_split(declared)
    splits = [files] if test_files is None else [files, test_files]
    _check_sections(settings, path, set().union(*(_sections(split, settings) for split in splits)))
    train = _open_part(files, settings, _stated(files, settings), key, cache, "_train" if both else "")
    _check_image_settings(settings, path, set().union(*(_image_settings(split, train.scaling) for split in splits)))
    if settings.test_share is not None:
        return split(train, settings.test_share)
    test = _open_part(test_files or files, settings, train.classes, key, cache, "_test" if both else "")
    check_units_apart(train, test)
    return train, test


def _check_sections(settings: DataSettings, path: Path, used: set[str]) -> None:
    """Refuse what was stated and would not be heeded."""
    for name, default in (("images", ImageSettings()), ("npz", NpzSettings()), ("table", None), ("features", None)):
        if name not in used and getattr(settings, name) != default:
            raise PrivgradError(f"[data.{name}] is given, and {path} is read without it; leave it out")


def _check_image_settings(settings: DataSettings, path: Path, used: set[str]) -> None:
    """The same for what stands in [data.images]."""
    if settings.features is not None:
        used = used - {"mean", "std"}  # features are of pixels / 255
    for field in fields(ImageSettings):
        if field.name not in used and getattr(settings.images, field.name) != field.default:
            raise PrivgradError(f"data.images.{field.name} is given, and {path} is read without it; leave it out")


def _image_settings(files: Files, scaling: str) -> set[str]:
    """What of [data.images] a file is read by."""
    if files.kind == ".npz" and not files.is_folder:
        return {"augment"} if scaling == AS_GIVEN else {"mean", "std", "augment"}
    every = {field.name for field in fields(ImageSettings)}
    return every - {"column", "label"} if files.is_folder else every


def _sections(files: Files, settings: DataSettings) -> set[str]:
    """The parts of [data] that a file is read by."""
    if files.is_folder:
        return {"images", "features"}
    if files.kind == ".npz":
        return {"npz", "images", "features"}
    return {"table"} if settings.table is not None else {"images", "features"}


def _open_part(
    files: Files, settings: DataSettings, stated: Classes | None, key: str | None, cache: Cache, suffix: str
) -> Part:
    """One split by the reader of its kind. stated: the classes that it must have."""
    if files.is_folder:
        part = open_folder(files, settings.images, stated, key, cache)
    elif files.kind == ".npz":
        part = open_npz(files, settings, stated, key, suffix)
    elif settings.table is not None:
        part = open_table(files, settings.table, key)
    elif files.kind == ".csv":
        raise PrivgradError(f"{files} is a table; say in [data.table] what its target, classes and columns are")
    else:
        part = open_parquet_images(files, settings.images, stated, key, cache)
    if len(part) == 0:
        raise PrivgradError(f"{part.where} holds no records; expected at least one")
    return part


def _stated(files: Files, settings: DataSettings) -> Classes | None:
    return settings.npz.classes if files.kind == ".npz" else settings.images.classes


def _records(part: Part, settings: DataSettings, augment: Sequence[str] = ()) -> Records:
    inputs = part.inputs()
    if len(inputs) != len(part):
        raise PrivgradError(
            f"{part.where} has {len(inputs)} inputs and {len(part)} labels; it changed while it was read"
        )
    return Records(inputs, part.labels, settings.images.mean, settings.images.std, augment)


def _check_embedded(settings: DataSettings, key: str | None) -> None:
    _check_sections(settings, Path(settings.source), set())
    for name, value in (
        ("data.test_source", settings.test_source),
        ("data.test_share", settings.test_share),
        ("key", key),
    ):
        if value is not None:
            raise PrivgradError(
                f"{name} is {value!r}, and {settings.source!r} is an embedded data set with splits of its own and no columns; "
                "leave it out"
            )


def _name(path: Path) -> str:
    """What the certificate calls the data: never the whole path, which may tell of more than the data."""
    name = path.stem if path.is_file() else path.name
    name = path.parent.name if name == "train" else name
    return "".join(letter if letter.isprintable() else "_" for letter in name) or "data"

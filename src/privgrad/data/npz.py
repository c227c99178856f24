"""Arrays in a .npz file: float features as they are, or uint8 pixels."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from privgrad.data import images
from privgrad.data.edges import check_memory, quoted, reading
from privgrad.data.find import Files
from privgrad.data.part import AS_GIVEN, Part, agree, checked_labels
from privgrad.data.settings import Classes, DataSettings
from privgrad.errors import PrivgradError


def holds_both_splits(files: Files, settings: DataSettings) -> bool:
    """Whether the file has x_train and x_test (or as they are named)."""
    names = _names(files)
    return {f"{settings.npz.inputs}_train", f"{settings.npz.inputs}_test"} <= set(names)


def open_npz(files: Files, settings: DataSettings, stated: Classes | None, key: str | None, suffix: str) -> Part:
    """The arrays of one split. suffix: "", or "_train" or "_test" where the file holds both."""
    where = str(files)
    inputs, labels = settings.npz.inputs + suffix, settings.npz.labels + suffix
    classes = agree(where, "data.npz.classes", None, stated)
    found = _array(files, "data.npz.labels", labels)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise PrivgradError(
            f"{where}: array {labels!r} is {_described(found)}; expected labels, whole numbers of shape [records]"
        )
    array = _array(files, "data.npz.inputs", inputs)
    if array.ndim < 2 or len(array) != len(found) or 0 in array.shape[1:]:
        raise PrivgradError(
            f"{where}: array {inputs!r} is {_described(array)}; expected [records, features] or images, "
            f"as many records as {labels!r} has ({len(found)})"
        )
    values = _inputs(where, inputs, array)
    return Part(
        where=where,
        labels=checked_labels(found, classes, _row_in(where, labels)),
        classes=classes,
        inputs=lambda: values,
        scaling=AS_GIVEN if values.dtype.is_floating_point else images.scaling(settings.images),
        keys=None if key is None else _keys(files, key + suffix, len(found)),
    )


def _inputs(where: str, name: str, array: NDArray[Any]) -> Tensor:
    if array.dtype == numpy.uint8:
        return torch.from_numpy(numpy.ascontiguousarray(_channels_first(where, name, array)))
    if array.dtype.kind != "f":
        raise PrivgradError(
            f"{where}: array {name!r} is {_described(array)}; expected floats (features) or uint8 (pixels)"
        )
    with numpy.errstate(over="ignore"):
        values = numpy.ascontiguousarray(array, dtype=numpy.float32)
    bad = ~numpy.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if bad.any():
        raise PrivgradError(
            f"{_row_in(where, name)(int(bad.argmax()))} is not finite; expected float32 numbers without nan and inf"
        )
    return torch.from_numpy(values)


def _channels_first(where: str, name: str, array: NDArray[Any]) -> NDArray[Any]:
    """uint8 pixels as [n, channels, height, width]; two dimensions stay as they are."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4:
        last, first = array.shape[3] in (1, 3), array.shape[1] in (1, 3)
        if last != first:
            return array.transpose(0, 3, 1, 2) if last else array
    elif array.ndim == 2:
        return array
    raise PrivgradError(
        f"{where}: array {name!r} is {_described(array)}; expected pixels as [records, height, width, channels] or "
        "[records, channels, height, width] with 1 or 3 channels"
    )


def _keys(files: Files, name: str, count: int) -> NDArray[Any]:
    keys = _array(files, "key", name)
    if keys.shape != (count,) or keys.dtype.kind not in "iufbUSM":
        raise PrivgradError(f"{files}: array {name!r} is {_described(keys)}; expected one key per record, [{count}]")
    if keys.dtype.kind in "US":  # 'u' and 'u ' are one user, as in other files
        keys = numpy.char.strip(keys)
        missing = numpy.char.str_len(keys) == 0
    else:
        missing = keys != keys  # NaN, NaT
    if missing.any():
        raise PrivgradError(
            f"{_row_in(str(files), name)(int(missing.argmax()))}: the key is missing; every record must belong to a unit"
        )
    return keys


def _names(files: Files) -> list[str]:
    path = files.first
    with reading(str(path)):
        if path.stat().st_size == 0:
            raise PrivgradError(f"{path} is empty; expected at least one record")
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
    for name in names:
        if names.count(name) > 1:
            raise PrivgradError(f"{path} holds two arrays called {quoted(name)}; give each a name of its own")
    return names


def _array(files: Files, key: str, name: str) -> NDArray[Any]:
    """One array. Objects are never unpickled, and its checksum must fit."""
    path, names = files.first, _names(files)
    if name not in names:
        listed = ", ".join(quoted(found) for found in names[:20]) or "none"
        raise PrivgradError(f"{key} asks for the array {name!r}, and {path} has no such array; it has {listed}")
    with reading(f"{path}: array {name!r}"), zipfile.ZipFile(path) as archive:
        member = next(found for found in archive.namelist() if found.removesuffix(".npy") == name)
        check_memory(f"{path}: array {name!r}", archive.getinfo(member).file_size)
        with archive.open(member) as stream:
            array = numpy.lib.format.read_array(stream, allow_pickle=False)
            if stream.read(1):  # and at the end the archive compares the checksum
                raise PrivgradError(f"{path}: array {name!r} is damaged: it holds more than its shape says")
    return numpy.asarray(array)


def _described(array: NDArray[Any]) -> str:
    return f"{array.dtype} of shape {list(array.shape)}"


def _row_in(where: str, name: str) -> Callable[[int], str]:
    return lambda row: f"{where}, array {name!r}, row {row + 1}"

"""One split, opened: its labels are read and checked, its inputs are read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from privgrad.data.edges import quoted
from privgrad.data.settings import Classes
from privgrad.errors import PrivgradError

AS_GIVEN = "as given"
"""How float arrays become tensors: not at all."""


@dataclass(frozen=True)
class Part:
    """One split of a source.

    where: its file, for error texts. labels: [n] int64. inputs: a function that gives float32 [n, *shape], or uint8 pixels.
    keys: [n], the unit of each record, where they were asked for. scaling: what is done to the inputs, in words.
    by_name: rows are in the order of their files' names, so that a record's number follows from what it is called.
    """

    where: str
    labels: Tensor
    classes: Classes
    inputs: Callable[[], Tensor]
    scaling: str
    keys: NDArray[Any] | None = None
    by_name: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, chosen: NDArray[numpy.bool_], read: Callable[[], Tensor]) -> Part:
        """Some of the records. read: the inputs of all of them."""
        index = torch.from_numpy(numpy.flatnonzero(chosen))
        return Part(
            where=self.where,
            labels=self.labels[index],
            classes=self.classes,
            inputs=lambda: read()[index],
            scaling=self.scaling,
            keys=None if self.keys is None else self.keys[chosen],
            by_name=self.by_name,
        )


def count_of(classes: Classes) -> int:
    """How many classes there are."""
    return classes if isinstance(classes, int) else len(classes)


def agree(where: str, key: str, found: tuple[str, ...] | None, stated: Classes | None) -> Classes:
    """The classes of a split, from the names found with it and those stated (in the configuration, or by the training split).

    Never from the labels: the largest label is a function of private records.
    """
    if found is None:
        if stated is None:
            raise PrivgradError(f"{where} has no class names; state them, or how many there are, as {key} = 10")
        return stated
    if stated is None:
        return found
    if count_of(stated) != len(found) or (isinstance(stated, tuple) and stated != found):
        raise PrivgradError(
            f"{where} has the classes {quoted(list(found))}; expected {quoted(stated)}, as stated or in the other split"
        )
    return found


def checked_labels(values: NDArray[Any], classes: Classes, where: Callable[[int], str]) -> Tensor:
    """Labels [n] as int64.

    Raises:
        PrivgradError: a label that is none of the classes, with its row.
    """
    wrong = (values < 0) | (values >= count_of(classes))
    if wrong.any():
        row = int(wrong.argmax())
        last = count_of(classes) - 1
        raise PrivgradError(
            f"{where(row)}: label {values[row]} is out of range; expected 0 to {last} ({last + 1} classes)"
        )
    return torch.from_numpy(values.astype(numpy.int64))

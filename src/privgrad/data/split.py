"""A test split taken from one file, by a fixed pseudo-random hash that no record can change for another."""

from __future__ import annotations

import hashlib
from decimal import Decimal, InvalidOperation
from functools import cache
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from privgrad.data.part import Part
from privgrad.errors import PrivgradError, RefusedError
from privgrad.privacy.adjacency import Adjacency

_PURPOSE = b"privgrad test_share 1: "


def check_share(adjacency: Adjacency, key: str | None, by_name: bool) -> None:
    """Refuse a split under which a neighbouring data set would be no neighbour any more.

    Raises:
        RefusedError: add_remove by row numbers, which one record less would shift for all after it; replace_one by units, where
            the new unit's key may belong to the other side, so that the size changes; or of files in the order of their names
            (by_name), where a record that comes instead of another has another number, and moves those between.
    """
    if adjacency is Adjacency.ADD_REMOVE and key is None:
        raise RefusedError(
            "data.test_share splits by row number, and under add_remove a record less would move the others to the other side; "
            "give a test file (data.test_source), or another privacy.adjacency"
        )
    if adjacency is Adjacency.REPLACE_ONE and key is not None:
        raise RefusedError(
            "data.test_share splits by unit, and under replace_one the unit that comes instead may be on the other side, which "
            "would change the size of the training split; give a test file (data.test_source), or another privacy.adjacency"
        )
    if adjacency is Adjacency.REPLACE_ONE and by_name:
        raise RefusedError(
            "data.test_share splits by row number, which in a folder follows from class and file name: under replace_one an "
            "image that comes instead of another would move those between to the other side; give a test folder "
            "(data.test_source), or another privacy.adjacency"
        )


def split(part: Part, share: float) -> tuple[Part, Part]:
    """(training, test): about `share` of the rows, or of the units where they have keys, for the test.

    Guarantee: on which side a record is depends on its row number or its own unit alone, never on what another record holds.
    """
    test = _hashed_rows(len(part), share) if part.keys is None else _hashed_keys(part.keys, share)
    if test.all() or not test.any():
        raise PrivgradError(
            f"data.test_share is {share:g}, which gives {part.where} {int((~test).sum())} training and {int(test.sum())} test "
            "records; expected at least one of each"
        )
    read = cache(part.inputs)
    return part.rows(~test, read), part.rows(test, read)


def check_units_apart(train: Part, test: Part) -> None:
    """The test split is evaluated without noise: no unit that is protected may have records in it.

    Raises:
        RefusedError: a key that both splits have. 7, 7.0 and the text "7" are one unit.
    """
    if train.keys is None or test.keys is None:
        return
    if _names(train.keys) & _names(test.keys):
        raise RefusedError(
            f"{test.where} holds records of units that {train.where} protects, and accuracy on the test split leaves un-noised; "
            "give it units of its own, or take test_source out and give data.test_share = 0.2, which splits by unit"
        )


def _names(keys: NDArray[Any]) -> set[str | Decimal]:
    """The units, as they are compared over two files, which may write one number in two ways."""
    found: set[str | Decimal] = set()
    for key in map(str, numpy.unique(keys).tolist()):
        try:
            number = Decimal(key)
        except InvalidOperation:
            found.add(key)
        else:
            found.add(number if number.is_finite() else key)
    return found


def dense_units(keys: NDArray[Any]) -> tuple[Tensor, int]:
    """Each record's unit as 0..units-1, int64 [n], and how many units there are."""
    found, units = numpy.unique(keys, return_inverse=True)
    return torch.from_numpy(units.reshape(-1).astype(numpy.int64)), len(found)


def _hashed_rows(count: int, share: float) -> NDArray[numpy.bool_]:
    return numpy.fromiter((_below(b"row %d" % row, share) for row in range(count)), dtype=bool, count=count)


def _hashed_keys(keys: NDArray[Any], share: float) -> NDArray[numpy.bool_]:
    found, units = numpy.unique(keys, return_inverse=True)
    sides = numpy.array([_below(b"unit " + str(key).encode(), share) for key in found])
    return sides[units.reshape(-1)]


def _below(name: bytes, share: float) -> bool:
    number = int.from_bytes(hashlib.sha256(_PURPOSE + name).digest()[:8], "big")
    return number < share * 2**64

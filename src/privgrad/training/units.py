"""What the sampler draws from: the units of a data set, and the rows of each."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Any, Protocol
from uuid import UUID

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset

from privgrad.errors import PrivgradError, check_count
from privgrad.gradients.contract import Fold
from privgrad.mechanism.randomness import Source
from privgrad.privacy.adjacency import Protects, User
from privgrad.training.batches import Drawn, size_of

Keys = Iterable[Hashable] | Tensor
"""One key per row: whose record it is. Numbers, text, bytes, dates, UUIDs, or tuples of these: what is equal is one user."""

_COMPARED = (str, bytes, int, float, Decimal, date, UUID)
"""What is compared by what it says."""


class Units(Protocol):
    """The units of one data set."""

    @property
    def count(self) -> int:
        """How many units there are."""
        ...

    @property
    def several_rows(self) -> bool:
        """Whether a unit may have several rows, so that a row's place says whose it is."""
        ...

    def rows(self, drawn: Tensor, source: Source) -> Drawn:
        """The rows of the units `drawn` (increasing), and how they fold into them."""
        ...


@dataclass(frozen=True)
class RowUnits:
    """Every row is a unit."""

    count: int
    several_rows = False

    def rows(self, drawn: Tensor, source: Source) -> Drawn:
        return Drawn(drawn, Fold.identity(len(drawn)))


class UserUnits:
    """Every user is a unit: the rows that share a key.

    Guarantee: a user's vector in a step depends on that user's rows only: the mean over at most `max_records` of them, drawn
    uniformly and independently of what they and all others hold.
    """

    several_rows = True

    def __init__(self, users: Tensor, max_records: int) -> None:
        """users: [rows] int64, each row's user in 0..users-1."""
        self.max_records = max_records
        self._rows = users.argsort(stable=True)
        self._counts = users.bincount()
        self._ends = self._counts.cumsum(0)

    @property
    def count(self) -> int:
        return len(self._counts)

    def rows(self, drawn: Tensor, source: Source) -> Drawn:
        chosen = [self._records(int(user), source) for user in drawn]
        counts = torch.tensor([len(rows) for rows in chosen], dtype=torch.int64)
        index = torch.arange(len(drawn)).repeat_interleave(counts)
        rows = torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.int64)
        return Drawn(rows, Fold(index, len(drawn), 1.0 / counts.to(torch.float32).repeat_interleave(counts)))

    def _records(self, user: int, source: Source) -> Tensor:
        end, count = int(self._ends[user]), int(self._counts[user])
        rows = self._rows[end - count : end]
        return rows if count <= self.max_records else rows[source.permutation(count)[: self.max_records]].sort().values


class Views:
    """The same units, each row of which is read several times: a data set that augments gives another view each time.

    Guarantee: that of the units. A row's vector is the mean over its views, taken before clipping (arXiv:2204.13650, section 3).
    """

    def __init__(self, units: Units, views: int) -> None:
        check_count("views", views)
        self._units, self._views = units, views

    @property
    def count(self) -> int:
        return self._units.count

    @property
    def several_rows(self) -> bool:
        return self._views > 1 or self._units.several_rows

    def rows(self, drawn: Tensor, source: Source) -> Drawn:
        found = self._units.rows(drawn, source)
        fold, views = found.fold, self._views
        if views == 1:
            return found
        index, rows = fold.index.repeat_interleave(views), found.rows.repeat_interleave(views)
        scale = torch.ones(len(fold.index)) if fold.scale is None else fold.scale
        return Drawn(rows, Fold(index, fold.units, (scale / views).repeat_interleave(views)))


def units_of(dataset: Dataset[Any], protects: Protects, keys: Keys | None) -> Units:
    """The units that a plan protects, in a data set whose rows have `keys`.

    Raises:
        PrivgradError: keys without a plan for users, or the other way round; another number of
            keys than rows; keys that could tell one user from itself (objects, NaN, text and numbers side by side).
    """
    size = size_of(dataset)
    if not isinstance(protects, User):
        if keys is not None:
            raise PrivgradError(
                "keys are given, but the plan protects each record by itself; use protects=User(key), or leave the keys out"
            )
        return RowUnits(size)
    if keys is None:
        raise PrivgradError(
            f"the plan protects users, and nobody said whose record each one is; give keys ({protects.key})"
        )
    users = _dense(keys)
    if len(users) != size:
        raise PrivgradError(f"{len(users)} keys are given for {size} records; expected one each")
    return UserUnits(users, protects.max_records)


def _dense(keys: Keys) -> Tensor:
    """[rows] int64: the users numbered from 0, in the order of their first row."""
    values = keys.tolist() if isinstance(keys, Tensor) else list(keys)
    values = [_plain(value) for value in values]
    kinds = {_kind(value) for value in values}
    if len(kinds) > 1:  # 7 and "7" are one customer, and would be two users
        raise PrivgradError(f"keys are of several kinds ({' and '.join(sorted(kinds))}); write all of them in one way")
    number: dict[Hashable, int] = {}
    return torch.tensor([number.setdefault(value, len(number)) for value in values], dtype=torch.int64)


def _plain(key: Any) -> Hashable:
    """A key as a plain value: tensors and other objects are compared by what they are, not by what they say."""
    if isinstance(key, tuple):
        return tuple(_plain(part) for part in key)
    scalar = isinstance(key, numpy.generic) or (isinstance(key, Tensor) and key.dim() == 0)
    if not scalar and not isinstance(key, _COMPARED) and key is not None:
        raise PrivgradError(f"a key is a {type(key).__name__}; expected one number or text per record")
    if key != key:  # each NaN would be a user of its own
        raise PrivgradError("a key is NaN; every record must belong to a unit: leave such records out")
    if scalar:
        return _plain(key.item())
    if isinstance(key, str | bytes):
        key = key.strip()  # "u" and "u " are one user
    if key is None or key in ("", b""):
        raise PrivgradError("a key is missing; every record must belong to a unit: leave such records out")
    found: Hashable = key
    return found


def _kind(key: Hashable) -> str:
    if isinstance(key, tuple):
        return f"({', '.join(_kind(part) for part in key)})"
    if isinstance(key, int | float | Decimal):
        return "number"
    return "text" if isinstance(key, str) else type(key).__name__

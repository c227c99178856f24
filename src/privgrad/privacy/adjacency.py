"""What is promised: which two data sets are neighbours, and what one unit of privacy is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from privgrad.errors import PrivgradError, check_count


class Adjacency(StrEnum):
    """Which pairs of data sets the guarantee makes hard to tell apart.

    A record that "contributes nothing" holds no slot: it is not sampled, not counted, in no group and in no statistic.
    """

    ZERO_OUT = "zero_out"
    """One record replaced by one that contributes nothing. The size of the data set is public."""
    ADD_REMOVE = "add_remove"
    """One record more or less. The size is private too: rate and normaliser are numbers that the user states."""
    REPLACE_ONE = "replace_one"
    """One record replaced by any other."""

    @property
    def words(self) -> str:
        """The promise in plain words, for the certificate."""
        return {
            Adjacency.ZERO_OUT: "the data with and without the contribution of any one {unit} "
            "(the number of {unit}s is public)",
            Adjacency.ADD_REMOVE: "the data with and without any one {unit} (the number of {unit}s is private too)",
            Adjacency.REPLACE_ONE: "the data with any one {unit} replaced by any other (the number of {unit}s is public)",
        }[self]


@dataclass(frozen=True)
class Example:
    """Protects each record (row, image, document) of the data set by itself."""

    kind: ClassVar[str] = "example"

    @property
    def unit(self) -> str:
        """What one unit is called in the certificate."""
        return "record"

    @property
    def words(self) -> str:
        """What one unit contributes to a step, for the certificate."""
        return "each record by itself"


@dataclass(frozen=True)
class User:
    """Protects each user: all records with one key together, however many they are.

    key: the column that says whose record it is. max_records: how many records of a user enter a step at most, chosen at random
    for each step; a constant that is fixed without looking at the data (it changes what is learned, not what is promised).
    """

    kind: ClassVar[str] = "user"

    key: str = ""
    max_records: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.key, str) or not self.key:
            raise PrivgradError(
                f"protects.key is {self.key!r}; expected the name of the column that says whose record it is"
            )
        check_count("protects.max_records", self.max_records)

    @property
    def unit(self) -> str:
        return "user"

    @property
    def words(self) -> str:
        return (
            f"each user, that is all records with one value of {self.key!r}, as the mean over at most {self.max_records} of "
            "its records, drawn anew in each step"
        )


Protects = Example | User

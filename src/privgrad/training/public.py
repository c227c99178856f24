"""Data that the user declares public: collated once, and refused where it is the private data."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence, Sized
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from privgrad.data.records import Records
from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import Tree
from privgrad.training.batches import collated, size_of, with_dicts

_BY_CHANCE = 1 / math.e
"""Of n draws from cells of one size, at most this share fall into a cell that others, and no further draw, fell into once: the
most of l exp(-l) exp(-m) for any numbers l, m expected in a cell; so it is with cells of many sizes."""


def public_rows(public: Any, private: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None) -> Tree:
    """All rows of the public data as one batch: a Dataset is collated, a tree of tensors is taken as it is, None is None.

    Raises:
        RefusedError: the private data set itself, or data that share a record's inputs with it (looked for where both are held in
            memory: a batch, TensorDataset, what the command line reads, and subsets and concatenations of these; where private
            inputs repeat, more have to be shared than chance explains).
    """
    if public is None:
        return None
    if public is private:
        raise RefusedError("the public data are the private data set itself; give data that are not private")
    if not isinstance(public, Dataset):
        public = with_dicts(public)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(public)):
            raise PrivgradError(
                f"public is a {type(public).__name__}; expected a Dataset or a batch (a tree of tensors)"
            )
    if share_records(private, public):
        raise RefusedError(
            "public and private data share records; what is public of a private record is not protected: give data that are "
            "disjoint from the private ones"
        )
    if not isinstance(public, Dataset):
        return public
    return collated(public, numpy.arange(size_of(public)), collate_fn)


def share_records(private: Dataset[Any], public: Any) -> bool:
    """Whether some of the public records are private ones, as far as can be seen: one is enough."""
    return _same_rows(private, public) or _in_common(private, public, few=0)


def is_made_of(private: Dataset[Any], split: Dataset[Any]) -> bool:
    """Whether a split holds private records, as far as can be seen: the very rows, or more equal ones than come by chance."""
    return _same_rows(private, split) or _in_common(private, split, few=2)


def _same_rows(private: Dataset[Any], other: Any) -> bool:
    """Whether subsets and concatenations lead to the same rows of the same data set."""
    if not isinstance(other, Dataset):
        return False
    return not set(_places(private)).isdisjoint(_places(other))


def _places(data: Dataset[Any]) -> list[tuple[int, int]]:
    """For each record the data set that holds it, and where."""
    if isinstance(data, Subset):
        whole = _places(data.dataset)
        return [whole[int(index)] for index in data.indices]
    if isinstance(data, ConcatDataset):
        return [place for part in data.datasets for place in _places(part)]
    return [(id(data), row) for row in range(len(data))] if isinstance(data, Sized) else []


def _in_common(private: Dataset[Any], other: Any, *, few: int) -> bool:
    """Whether more inputs are equal, bit by bit, than by chance: more than `few` and one in a hundred (none for few = 0), or all.

    Where private inputs repeat (tables of categories) equal ones are no sign; those that occur once on either side are.
    """
    theirs = inputs_in_memory(other)
    ours = inputs_in_memory(private)
    if theirs is None or ours is None or ours.dtype != theirs.dtype or ours.shape[1:] != theirs.shape[1:]:
        return False
    known, asked = Counter(map(_digest, ours)), Counter(map(_digest, theirs))
    rows = len(theirs)
    if len(known) == len(ours):
        found = sum(count for key, count in asked.items() if key in known)
        return found > 0 if few == 0 else found > max(few, rows / 100) or 0 < found == rows
    found = sum(count == 1 and known.get(key) == 1 for key, count in asked.items())
    return found > rows * _BY_CHANCE + 2 * math.sqrt(rows)


def inputs_in_memory(data: Any) -> Tensor | None:
    """[rows, ...]: the inputs that a data set, or a batch, holds in memory; None where it holds none."""
    if type(data) is Records:
        return data.inputs
    if type(data) is TensorDataset:
        return _largest(data.tensors)
    if isinstance(data, Subset):
        whole = inputs_in_memory(data.dataset)
        return None if whole is None else whole[torch.as_tensor(data.indices, dtype=torch.int64)]
    if isinstance(data, ConcatDataset):
        parts = [inputs_in_memory(part) for part in data.datasets]
        shapes = {None if part is None else (part.dtype, part.shape[1:]) for part in parts}
        return (
            torch.cat([part for part in parts if part is not None]) if len(shapes) == 1 and None not in shapes else None
        )
    if isinstance(data, Dataset):
        return None
    return _largest([leaf for leaf in pytree.tree_leaves(data) if isinstance(leaf, Tensor)])


def _largest(tensors: Sequence[Tensor]) -> Tensor | None:
    """Of several tensors with a row for each record, the inputs: labels and masks may come before them, and are smaller."""
    rows = [tensor for tensor in tensors if tensor.dim()]
    return max(rows, key=lambda tensor: tensor[:1].numel(), default=None)


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(
        row.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16
    ).digest()

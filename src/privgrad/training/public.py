"""Data that the user declares public: collated once, and refused where it is the private data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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

_LOOKED_AT = 16
"""So many records of a split are looked for among the private ones: each takes a pass over all of these."""


def public_rows(public: Any, private: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None) -> Tree:
    """All rows of the public data as one batch: a Dataset is collated, a tree of tensors is taken as it is, None is None.

    Raises:
        RefusedError: the private data set itself, or data that share a record's inputs with it (looked for where both are held in
            memory: a batch, TensorDataset, what the command line reads, and subsets and concatenations of these).
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
    theirs = inputs_in_memory(public)
    if theirs is not None and share_records(private, theirs):
        raise RefusedError(
            "public and private data share records; what is public of a private record is not protected: give data that are "
            "disjoint from the private ones"
        )
    if not isinstance(public, Dataset):
        return public
    return collated(public, numpy.arange(size_of(public)), collate_fn)


def share_records(private: Dataset[Any], others: Tensor) -> bool:
    """Whether some of the inputs `others` are inputs of private records, bit by bit, as far as can be seen."""
    ours = _like(private, others)
    if ours is None:
        return False
    known = {_digest(row) for row in others}
    return any(_digest(row) in known for row in ours)


def is_part_of(private: Dataset[Any], others: Tensor) -> bool:
    """Whether the inputs `others` look like a part of the private ones: some of them, spread out, are all found there."""
    ours = _like(private, others)
    if ours is None or not len(others):
        return False
    places = torch.linspace(0, len(others) - 1, min(len(others), _LOOKED_AT)).long()
    return all(bool((ours == row).reshape(len(ours), -1).all(1).any()) for row in others[places])


def _like(private: Dataset[Any], others: Tensor) -> Tensor | None:
    """The private inputs, where they are in memory and of the same form."""
    ours = inputs_in_memory(private)
    same = ours is not None and ours.dtype == others.dtype and ours.shape[1:] == others.shape[1:]
    return ours if same else None


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

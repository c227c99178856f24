"""Data that the user declares public: collated once, and refused where it is the private data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset, TensorDataset

from privgrad.data.records import Records
from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import Tree
from privgrad.training.batches import collated, size_of, with_dicts


def public_rows(public: Any, private: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None) -> Tree:
    """All rows of the public data as one batch: a Dataset is collated, a tree of tensors is taken as it is, None is None.

    Raises:
        RefusedError: the private data set itself, or one that shares a record's inputs with it (looked for where both are held in
            memory: TensorDataset, and what the command line reads).
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
        return public
    ours, theirs = _inputs(private), _inputs(public)
    if ours is not None and theirs is not None and ours.dtype == theirs.dtype and ours.shape[1:] == theirs.shape[1:]:
        known = {_digest(row) for row in theirs}
        if any(_digest(row) in known for row in ours):
            raise RefusedError(
                "public and private data share records; what is public of a private record is not protected: give data "
                "that are disjoint from the private ones"
            )
    return collated(public, numpy.arange(size_of(public)), collate_fn)


def _inputs(dataset: Dataset[Any]) -> Tensor | None:
    if type(dataset) is Records:
        return dataset.inputs
    return dataset.tensors[0] if type(dataset) is TensorDataset else None


def _digest(row: Tensor) -> bytes:
    return hashlib.blake2b(row.contiguous().view(-1).view(torch.uint8).numpy().tobytes(), digest_size=16).digest()

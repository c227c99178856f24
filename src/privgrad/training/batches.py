"""Sampled batches through torch's DataLoader."""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate, get_worker_info

from privgrad.data.records import Records
from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import Fold, Tree
from privgrad.nn.generators import generators_in, reseed
from privgrad.nn.state import same, seed_all

_SEEDS = 8
"""A random partner of two is one's own every other time."""


class SampledBatch:
    """PRIVATE. One step's batch; it can be used once, so that no sample is ever charged once and used twice.

    data: the collated rows (a tree of tensors, rows first), or None where no unit was sampled. fold: rows to units.
    """

    def __init__(self, data: Tree, fold: Fold) -> None:
        self.data = data
        self.fold = fold
        self._used = False

    @property
    def used(self) -> bool:
        """True after a step took the batch."""
        return self._used

    def give_back(self) -> None:
        """Nothing came of the step and nothing was charged: the batch is still to be used."""
        self._used = False

    def take(self) -> tuple[Tree, Fold]:
        """The content, once."""
        if self._used:
            raise PrivgradError("this batch was used already; every sampled batch is good for exactly one step")
        self._used = True
        return self.data, self.fold


@dataclass(frozen=True)
class Drawn:
    """PRIVATE. The rows of one step, in the order of their units, and how they fold into units."""

    rows: Tensor
    fold: Fold


def taker(dataset: Dataset[Any]) -> Callable[[Tensor], Tree] | None:
    """What gives the collated batch of a list of rows at once, where the data set is known to have it.

    (Not for subclasses, which may change single records.)
    """
    if type(dataset) is Records:
        return dataset.take
    if type(dataset) is TensorDataset:
        tensors = dataset.tensors
        return lambda indices: tuple(tensor[indices] for tensor in tensors)
    return None


class _Rows(Dataset[Any]):
    """A map-style data set asked for whole lists of rows: collated in the worker, with empty lists handled.

    (DataLoader's own batching calls collate on an empty list, which fails.)
    """

    def __init__(
        self, dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None, *, in_order: bool = False
    ) -> None:
        self.dataset = dataset
        self.collate_fn = collate_fn
        self.in_order = in_order

    def __len__(self) -> int:
        return size_of(self.dataset)

    def __getitem__(self, indices: NDArray[numpy.int64]) -> Tree:
        """The collated rows (None for none)."""
        if len(indices) == 0:
            return None
        whole = taker(self.dataset) if self.collate_fn is None else None
        if whole is not None:
            return whole(torch.from_numpy(indices))
        rows = indices.tolist()
        items = [self.dataset[row] for row in rows] if self.in_order else items_of(self.dataset, rows)
        return (self.collate_fn or dicts_from(default_collate))(items)


def with_dicts(tree: Tree) -> Tree:
    """The tree with a dict for every mapping that torch does not look into (Hugging Face's BatchEncoding)."""
    return pytree.tree_map(lambda leaf: with_dicts(dict(leaf)) if isinstance(leaf, Mapping) else leaf, tree)


def dicts_from(collate_fn: Callable[[list[Any]], Tree]) -> Callable[[list[Any]], Tree]:
    """collate_fn, with dicts for such mappings; picklable if it is, for worker processes."""
    return partial(_collate, collate_fn)


def _collate(collate_fn: Callable[[list[Any]], Tree], items: list[Any]) -> Tree:
    return with_dicts(collate_fn(items))


def items_of(dataset: Dataset[Any], indices: list[int]) -> list[Any]:
    """These records, in an order of the data set's choosing (that of a database, say)."""
    fetch = getattr(dataset, "__getitems__", None)
    return fetch(indices) if fetch else [dataset[index] for index in indices]


def collated(
    dataset: Dataset[Any], rows: NDArray[numpy.int64], collate_fn: Callable[[list[Any]], Tree] | None = None
) -> Tree:
    """The batch of these rows (None for none)."""
    return _Rows(dataset, collate_fn)[rows]


def size_of(dataset: Dataset[Any]) -> int:
    """The number of rows.

    Raises:
        PrivgradError: a data set without a length or an order (an IterableDataset cannot be Poisson sampled), an empty one, or a
            DataLoader.
    """
    if isinstance(dataset, DataLoader):
        raise PrivgradError(
            "a DataLoader was given as the data set; give the data set itself (loader.dataset), and collate_fn and workers "
            "beside it: batches are sampled here, as the plan says"
        )
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise PrivgradError("the data set has no length or no order; Poisson sampling needs a map-style torch Dataset")
    size = len(dataset)
    if size == 0:
        raise PrivgradError("the data set is empty; expected at least one record")
    return size


def first_row(dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None = None) -> Tree:
    """PRIVATE. The first record, collated to a batch of one: for the structure and the shapes of batches.

    Raises:
        PrivgradError: a record that cannot be read or collated. (Its kind only: the words of an error may hold the record.)
    """
    try:
        return _Rows(dataset, collate_fn)[numpy.zeros(1, dtype=numpy.int64)]
    except PrivgradError:
        raise
    except Exception as error:
        raise PrivgradError(
            f"the first record of the data set cannot be read and collated alone ({type(error).__name__}); a batch may be of "
            "one record, so that collate_fn must take one"
        ) from error


def check_apart(dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None) -> None:
    """Refuse a collate_fn that mixes records (MixUp, CutMix): the first row of a batch must not hold the second record.

    Tries it under some seeds; the caller keeps the generators. Nothing is said where shapes differ (`padding` sees those), where
    the function draws random numbers of its own, or where records hold no tensor and no array.

    Guarantee: the records are made up, with the first one's shapes: no value of a tensor, an array or a number enters.

    Raises:
        RefusedError: another second record changes the first row.
    """
    if collate_fn is None or size_of(dataset) == 0:
        return
    mixes = False
    with contextlib.suppress(Exception):  # what cannot be read or collated is refused elsewhere, in words
        (like,) = items_of(dataset, [0])
        items = [pytree.tree_map(made_up, like) for _ in range(3)]
        mixes = any(_mixes(collate_fn, items, seed) for seed in range(_SEEDS))
    if mixes:
        raise RefusedError(
            "collate_fn mixes records: a row of its batch changes with another record, so that one record moves several "
            "rows, and clipping a row does not bound what it changes; leave mixing (MixUp, CutMix) out, or augment each "
            "record by itself (views)"
        )


def made_up(leaf: Any) -> Any:
    """Random numbers in the place of a tensor's, an array's or a single one; anything else as it is."""
    if isinstance(leaf, Tensor):
        drawn = torch.randn(leaf.shape) if leaf.is_floating_point() else torch.randint(2, leaf.shape)
        return drawn.to(leaf.dtype)
    if isinstance(leaf, numpy.ndarray):
        return numpy.asarray(numpy.random.standard_normal(leaf.shape)).astype(leaf.dtype)
    if isinstance(leaf, bool | int | float | numpy.number):
        return type(leaf)(numpy.random.randint(2))
    return leaf


def _mixes(collate_fn: Callable[[list[Any]], Tree], items: list[Any], seed: int) -> bool:
    alone, again, *others = (_first(collate_fn, [items[0], items[other]], seed) for other in (0, 0, 1, 2))
    return not _differ(alone, again) and any(_differ(alone, other) for other in others)


def _first(collate_fn: Callable[[list[Any]], Tree], items: list[Any], seed: int) -> list[Tensor]:
    """The first row of a batch of copies: every tensor of it."""
    seed_all(seed, [])
    return [leaf[0] for leaf in pytree.tree_leaves(collate_fn(copy.deepcopy(items))) if isinstance(leaf, Tensor)]


def _differ(one: list[Tensor], other: list[Tensor]) -> bool:
    return any(a.shape == b.shape and not same(a, b) for a, b in zip(one, other, strict=False))


def _seed_worker(_: int) -> None:
    """A worker has a copy of the data set and of the generators that it holds; torch's own has a secret seed there."""
    information = get_worker_info()
    if information is not None:
        for generator in generators_in(rows=information.dataset).values():
            reseed(generator, int(torch.randint(2**53, ())))


def _as_is(item: Tree) -> Tree:
    return item


def sampled_batches(
    dataset: Dataset[Any],
    draws: Iterator[Drawn],
    *,
    collate_fn: Callable[[list[Any]], Tree] | None = None,
    workers: int = 0,
    pin_memory: bool = False,
    seed: int = 0,
    in_order: bool = False,
) -> Iterator[SampledBatch]:
    """One batch per draw. An empty draw gives a batch with data None: a step like any other. seed: of the workers' randomness.

    in_order: records are asked for one by one, so that a row's place says which one it is: where units have several rows.
    """
    folds: deque[Fold] = deque()

    def indices() -> Iterator[NDArray[numpy.int64]]:
        # Workers get row numbers only, as an array: a tensor would travel as an open file of this process.
        for drawn in draws:
            folds.append(drawn.fold)
            yield drawn.rows.numpy()

    loader = DataLoader(
        _Rows(dataset, collate_fn, in_order=in_order),
        sampler=indices(),
        batch_size=None,
        collate_fn=_as_is,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_seed_worker,
        generator=torch.Generator().manual_seed(
            seed
        ),  # of its own: making a loader must not move the user's (dropout, after a resume)
    )
    for data in loader:  # in the order of the draws, whatever the workers do
        fold = folds.popleft()
        rows = len(fold.index)
        for leaf in pytree.tree_leaves(data):
            if isinstance(leaf, Tensor) and (leaf.dim() == 0 or len(leaf) != rows):
                # Without its first dimension: the size of a sampled batch is private.
                shape = ", ".join(["rows", *map(str, leaf.shape[1:])]) if leaf.dim() else ""
                raise PrivgradError(
                    f"the collated batch has a tensor of shape [{shape}] with another number of rows than records were "
                    "drawn; expected the record as first dimension of every tensor, one row each"
                )
        yield SampledBatch(data, fold)

"""Padding to the longest record of a batch: its width is one record's doing, and must not move the losses of the others."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from privgrad.errors import RefusedError
from privgrad.gradients.contract import LossFn, Tree, trainable
from privgrad.mechanism.statistics import in_eval_mode
from privgrad.nn.state import same, same_randomness, seed_all, undisturbed
from privgrad.nn.subject import awakened
from privgrad.training.batches import items_of, made_up, size_of

_TRIALS = 24
_STILL = 4
"""One in so many trials may leave the loss where it was: by chance it moves too little to tell it from rounding."""


def check_padding(
    model: nn.Module, loss_fn: LossFn, dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None
) -> None:
    """Refuse a model whose loss of a record changes with the width that another, longer record gives the batch.

    A mean over positions, or the last one, takes in the padding; with a mask nothing changes. The caller keeps the generators.
    In eval mode, since dropout draws by the width, and with random numbers in weights that are all zero. Nothing is said where no
    record can be made longer, or where model or collate_fn cannot take a made-up one.

    Guarantee: the records are made up, with the first one's shapes and texts: no value of a tensor, an array or a number enters.

    Raises:
        RefusedError: the loss changed for more than three quarters of the made-up records. (Not for any: a made-up length is 0
            every other time, of which the last position is taken. Nor for all: one in a hundred moves by less than rounding.)
    """
    if collate_fn is None or size_of(dataset) == 0:
        return
    with same_randomness([]):
        pairs = _pairs(dataset, collate_fn)
    if not pairs:
        return
    moved = []
    with undisturbed(dict(model.named_modules())), in_eval_mode(model), torch.no_grad():
        for parameter, value in awakened(trainable(model).values()):
            parameter.copy_(value)
        for alone, beside in pairs:
            with suppress(Exception):  # what the model cannot run at all is refused elsewhere, in words
                moved.append(_differ(_loss(model, loss_fn, alone), _loss(model, loss_fn, beside)))
            if moved.count(False) * _STILL >= _TRIALS:
                return
    if moved and moved.count(False) * _STILL < len(moved):
        raise RefusedError(
            "the loss of a record changes with the longest record of its batch, to which collate_fn pads: one long record moves "
            "the gradients of all others, and clipping a row does not bound that; pad to a fixed length, or keep the padding out "
            "of the loss (a mask, packed sequences, the last position by its own length)"
        )


def check_order(dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree] | None) -> None:
    """Refuse a collate_fn that sorts its records by length, where units may have several rows: whose a row is, its place says.

    The caller keeps the generators. Nothing is said where no record can be made longer, or collate_fn cannot take a made-up one.

    Guarantee: as `check_padding`.

    Raises:
        RefusedError: two records of different length make the same batch in either order.
    """
    if collate_fn is None or size_of(dataset) == 0:
        return
    sorts = False
    with suppress(Exception):  # what cannot be read or collated is refused elsewhere, in words
        (like,) = items_of(dataset, [0])
        sorts = any(_sorts(collate_fn, like, seed) for seed in range(_TRIALS))
    if sorts:
        raise RefusedError(
            "collate_fn changes the order of its records (by their length, say), and a row's place says whose it is: the rows of "
            "one unit would count as another's; keep the order (pack_padded_sequence has enforce_sorted=False)"
        )


def _sorts(collate_fn: Callable[[list[Any]], Tree], like: Any, seed: int) -> bool:
    seed_all(seed, [])
    record, other = (pytree.tree_map(made_up, like) for _ in range(2))
    for longer in _longer(other):
        with suppress(Exception):  # a tensor that has to keep its size: another one may grow
            found = [_leaves(collate_fn, items, seed) for items in ([record, longer], [longer, record])]
            rows = [[leaf[row] for leaf in found[0] if len(leaf) == 2] for row in range(2)]
            if _equal(*found) and not _equal(*rows):
                return True
    return False


def _leaves(collate_fn: Callable[[list[Any]], Tree], items: list[Any], seed: int) -> list[Tensor]:
    seed_all(seed, [])
    leaves = pytree.tree_leaves(collate_fn(copy.deepcopy(items)))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(same, one, other))


def _pairs(dataset: Dataset[Any], collate_fn: Callable[[list[Any]], Tree]) -> list[tuple[Tree, Tree]]:
    """Rows of made-up records: each beside a copy of itself, and beside one that makes it wider."""
    pairs: list[tuple[Tree, Tree]] = []
    with suppress(Exception):  # what cannot be read or collated is refused elsewhere, in words
        (like,) = items_of(dataset, [0])
        for seed in range(_TRIALS):
            seed_all(seed, [])
            record = pytree.tree_map(made_up, like)
            alone = _first_row(collate_fn, [record, record], seed)
            beside = _wider(collate_fn, record, alone, seed)
            if beside is None:
                break
            pairs.append((alone, beside))
    return pairs


def _wider(collate_fn: Callable[[list[Any]], Tree], record: Any, alone: Tree, seed: int) -> Tree | None:
    for longer in _longer(record):
        with suppress(Exception):  # a tensor that has to keep its size: another one may grow
            beside = _first_row(collate_fn, [record, longer], seed)
            if _shapes(beside) != _shapes(alone):
                return beside
    return None


def _longer(record: Any) -> Iterator[Any]:
    """The record with everything in it that has a length twice as long, and then one by one."""
    leaves, structure = pytree.tree_flatten(record, is_leaf=_is_numbers)
    twice = [_twice(leaf) for leaf in leaves]
    yield pytree.tree_unflatten(twice, structure)
    for index, leaf in enumerate(twice):
        yield pytree.tree_unflatten([*leaves[:index], leaf, *leaves[index + 1 :]], structure)


def _is_numbers(node: Any) -> bool:
    return isinstance(node, list) and all(isinstance(number, int | float) for number in node)


def _twice(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.dim():
        return torch.cat([leaf, leaf])
    if isinstance(leaf, numpy.ndarray) and leaf.ndim:
        return numpy.concatenate([leaf, leaf])
    if isinstance(leaf, str):
        return f"{leaf} {leaf}"
    if isinstance(leaf, bytes):
        return leaf + b" " + leaf
    return leaf + leaf if isinstance(leaf, list) else leaf


def _first_row(collate_fn: Callable[[list[Any]], Tree], items: list[Any], seed: int) -> Tree:
    seed_all(seed, [])
    return pytree.tree_map(
        lambda leaf: leaf[:1] if isinstance(leaf, Tensor) else leaf, collate_fn(copy.deepcopy(items))
    )


def _shapes(row: Tree) -> list[torch.Size]:
    return [leaf.shape for leaf in pytree.tree_leaves(row) if isinstance(leaf, Tensor)]


def _loss(model: nn.Module, loss_fn: LossFn, row: Tree) -> Tensor:
    device = next(model.parameters()).device
    row = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, row)
    return loss_fn(model, row).double()


def _differ(one: Tensor, other: Tensor) -> bool:
    """By more than another order of summation makes."""
    rounding = torch.finfo(torch.float32).eps ** 0.5
    return bool(((one - other).abs() > rounding * (1 + one.abs())).any())

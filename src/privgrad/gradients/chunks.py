"""A batch in parts that fit into memory, whole units each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from privgrad.gradients.contract import Fold, Tree


def chunks(batch: Tree, fold: Fold, rows_per_chunk: int) -> Iterator[tuple[Tree, Fold]]:
    """Consecutive parts of at most `rows_per_chunk` rows (more where a single unit has more), whole units each.

    It changes nothing in the mathematics: a unit's rows are never divided. Units without rows at the end are left out.
    """
    if fold.is_identity:
        for first in range(0, fold.units, rows_per_chunk):
            last = min(first + rows_per_chunk, fold.units)
            yield _part(batch, slice(first, last)), Fold.identity(last - first)
        return
    counts = fold.index.bincount(minlength=fold.units).tolist()
    row = unit = 0
    while unit < fold.units:
        first, rows = unit, 0
        while unit < fold.units and (rows == 0 or rows + counts[unit] <= rows_per_chunk):
            rows += counts[unit]
            unit += 1
        if rows == 0:
            return
        part = slice(row, row + rows)
        scale = None if fold.scale is None else fold.scale[part]
        yield _part(batch, part), Fold(fold.index[part] - first, unit - first, scale)
        row += rows


def by_answer(batch: Tree, fold: Fold, answers: Tensor) -> list[tuple[Tree, Fold]]:
    """Parts of units whose rows give the same answer [rows] each; none where the rows of one unit differ."""
    _, known = torch.unique(answers.cpu(), return_inverse=True)
    parts = []
    for answer in range(int(known.max()) + 1):
        rows = (known == answer).nonzero().flatten()
        units, index = torch.unique(fold.index[rows], return_inverse=True)
        if int(torch.isin(fold.index, units).sum()) > len(rows):
            return []
        scale = None if fold.scale is None else fold.scale[rows]
        parts.append((_part(batch, rows), Fold(index, len(units), scale)))
    return parts


def _part(batch: Tree, rows: slice | Tensor) -> Tree:
    return pytree.tree_map(lambda leaf: leaf[rows if isinstance(rows, slice) else rows.to(leaf.device)], batch)

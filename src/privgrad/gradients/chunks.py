"""A batch in parts that fit into memory, whole units each."""

from __future__ import annotations

from collections.abc import Iterator

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


def _part(batch: Tree, rows: slice) -> Tree:
    return pytree.tree_map(lambda leaf: leaf[rows], batch)

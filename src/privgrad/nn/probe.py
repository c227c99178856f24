"""Batches to probe a model with: synthetic ones that hold nothing of the private records, or rows of a public batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import Tree


class Probe(Protocol):
    """Gives pairs of batches to compare."""

    @property
    def words(self) -> str:
        """What it is, for an error."""
        ...

    @property
    def advice(self) -> str:
        """What to do where the loss cannot run on it."""
        ...

    def pair(self, rows: int, generator: torch.Generator) -> tuple[Tree, Tree]:
        """Two batches of `rows` rows on the CPU; where it can be had, each row differs between the two in every tensor."""
        ...

    def forms(self) -> Sequence[Probe]:
        """The forms of this probe to be tried, in this order, until the loss function can run on one."""
        ...


@dataclass(frozen=True)
class _Leaf:
    """One tensor of a batch: the shape of a row, and its type."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class SyntheticProbe:
    """Random rows with the structure, shapes and types of given ones.

    Floats are standard normal, or uniform in [0, 1] where the loss needs that (a loss of probabilities); integers and booleans
    are 0 or 1, valid for every vocabulary and every number of classes from 2, and a row of several holds both (a mask of
    nothing but zeros would hide the row).

    Guarantee: a function of the structure alone. No value of a record enters.
    """

    template: Tree
    floats: Literal["normal", "uniform"] = "normal"

    words: ClassVar[str] = "random records (floats: normal, integers: 0 or 1)"
    advice: ClassVar[str] = (
        "if it needs other values, give a small batch that is not private as probe=; if not, mend the model or the loss"
    )

    @staticmethod
    def like(batch: Tree) -> SyntheticProbe:
        """The probe for batches like this one.

        Raises:
            PrivgradError: a batch that is not a tree of tensors with the row as first dimension.
        """
        _check_rows(batch)
        leaves, structure = pytree.tree_flatten(batch)
        template = [_Leaf(leaf.shape[1:], leaf.dtype) if isinstance(leaf, Tensor) else None for leaf in leaves]
        return SyntheticProbe(pytree.tree_unflatten(template, structure))

    def forms(self) -> Sequence[SyntheticProbe]:
        return self, replace(self, floats="uniform")

    def pair(self, rows: int, generator: torch.Generator) -> tuple[Tree, Tree]:
        leaves, structure = pytree.tree_flatten(self.template)
        pairs = [(None, None) if leaf is None else self._draw(leaf, rows, generator) for leaf in leaves]
        one, other = ([pair[side] for pair in pairs] for side in (0, 1))
        return pytree.tree_unflatten(one, structure), pytree.tree_unflatten(other, structure)

    def _draw(self, leaf: _Leaf, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        shape = (rows, *leaf.shape)
        if leaf.dtype.is_floating_point or leaf.dtype.is_complex:
            draw = torch.randn if self.floats == "normal" or leaf.dtype.is_complex else torch.rand
            wide = torch.complex64 if leaf.dtype.is_complex else torch.float32
            one, other = (draw(shape, generator=generator, dtype=wide).to(leaf.dtype) for _ in range(2))
            return one, other
        coins = torch.randint(2, shape, generator=generator)
        flat = coins.view(rows, leaf.shape.numel())
        if flat.shape[1] >= 2:
            places = torch.rand(flat.shape, generator=generator).topk(2, dim=1).indices
            flat.scatter_(1, places, torch.tensor([[0, 1]]).expand(rows, 2))
        return coins.to(leaf.dtype), (1 - coins).to(leaf.dtype)


@dataclass(frozen=True)
class PublicProbe:
    """Rows of a batch that is not private.

    Raises:
        PrivgradError: a batch that is not a tree of tensors with the row as first dimension, at least two rows.
    """

    batch: Tree

    words: ClassVar[str] = "the public batch that was given as probe="
    advice: ClassVar[str] = "give rows on which the loss is finite, or mend the model or the loss"

    def __post_init__(self) -> None:
        if _check_rows(self.batch) < 2:
            raise PrivgradError("probe has one row; expected a public batch of at least two different rows")

    def forms(self) -> Sequence[PublicProbe]:
        return (self,)

    def pair(self, rows: int, generator: torch.Generator) -> tuple[Tree, Tree]:
        count = _check_rows(self.batch)
        one = torch.randperm(count, generator=generator).repeat(-(-rows // count))[:rows]
        other = (one + torch.randint(1, count, (rows,), generator=generator)) % count
        return self._rows(one), self._rows(other)

    def _rows(self, index: Tensor) -> Tree:
        return pytree.tree_map(
            lambda leaf: leaf.detach().cpu()[index] if isinstance(leaf, Tensor) else leaf, self.batch
        )


def _check_rows(batch: Tree) -> int:
    """The number of rows of a batch."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if leaf is not None]
    strange = next((leaf for leaf in leaves if not isinstance(leaf, Tensor)), None)
    if strange is not None or not leaves:
        raise PrivgradError(
            f"a batch holds {'nothing' if strange is None else f'a {type(strange).__name__}'}; expected tensors in tuples, lists "
            "and dicts, each with the record as first dimension"
        )
    if any(leaf.dim() == 0 or len(leaf) != len(leaves[0]) for leaf in leaves) or len(leaves[0]) == 0:
        raise PrivgradError(
            "the tensors of a batch have different numbers of rows, or none; expected the record as first dimension of every "
            "tensor, one row each"
        )
    return len(leaves[0])

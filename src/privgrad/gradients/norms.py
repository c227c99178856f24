"""Norms of unit gradients, never smaller than what they are the norms of: one that came out too small would break a bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRUSTED = 1e-4
"""A squared Gram norm below this share of its largest possible value has lost digits to cancellation and is computed again."""
_LOST = 4.0
"""So many machine epsilons of what a norm would be if nothing cancelled may be lost to rounding, beside what long sums lose."""
_SLICE = 64
"""So many numbers are added up at once: float32 squares of ten million, in order, lose a hundredth of their sum."""
_ADDED = _SLICE / 4 + 4
"""So many machine epsilons a norm of `_SLICE` numbers may lose, whatever their order: a sum of n squares loses at most n half
epsilons of itself, its root half as much."""


def wide(tensor: Tensor) -> Tensor:
    """float32, where a tensor has less: norms and sums are never kept in less."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def select(tensor: Tensor, dropped: Tensor | None) -> Tensor:
    """A tensor [units, ...] with zeros for the dropped units: 0 * NaN would be NaN."""
    if dropped is None:
        return tensor
    selected: Tensor = tensor.masked_fill(dropped.view(-1, *[1] * (tensor.dim() - 1)), 0)
    return selected


def norms_of(tensor: Tensor) -> Tensor:
    """[units]: the l2 norms of a tensor [units, ...], rounded upwards."""
    flat = tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
    norms: Tensor = _by_slices(flat) * (1 + _ADDED * torch.finfo(tensor.dtype).eps)
    return norms


def factors_of(tensor: Tensor) -> Tensor:
    """[units]: the same for factors of a product, above zero, with what squares too small to be numbers may have hidden.

    A hidden 1e-23 times the other factor's 1e19 would be seen again in the sum.
    """
    return norms_of(tensor) + math.sqrt(hidden(math.prod(tensor.shape[1:]), tensor.dtype))


def hidden(count: int, dtype: torch.dtype) -> float:
    """What a sum of so many squares may lack, and products of such sums too, next to what `upwards` adds."""
    return count * torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def upwards(squares: Tensor, largest: Tensor, *, summed: int = 1, by_gram: bool = False) -> Tensor:
    """Squared norms, with what rounding may have taken from them, and what it may add to the weighted sum, whose order differs.

    largest: the norms if nothing cancelled. summed: of how many products a coordinate of the gradient is the sum, when the
    weighted sum is made; twice as many where another such sum was measured. A sum of n numbers, in any order, loses at most n
    half epsilons of what they are without their signs. by_gram: the squares themselves are sums of products that cancel.
    """
    eps = torch.finfo(squares.dtype).eps
    if by_gram:
        squares = squares + _LOST * eps * largest.square()
    return (squares.sqrt() + (_LOST + summed / 2) * eps * largest).square()


def _by_slices(rows: Tensor) -> Tensor:
    """Norms of [units, n], of slices first and then of their norms, in double precision."""
    count = rows.shape[1]
    whole = count // _SLICE * _SLICE
    if count <= _SLICE:
        norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
        return norms
    slices: Tensor = torch.linalg.vector_norm(torch.unflatten(rows[:, :whole], 1, (-1, _SLICE)), dim=2)
    if whole < count:
        rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
        slices = torch.cat([slices, rest], dim=1)
    norms = torch.linalg.vector_norm(slices.double(), dim=1)
    return norms.to(rows.dtype)

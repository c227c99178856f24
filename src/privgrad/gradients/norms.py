"""Norms of unit gradients, and what rounding may do to them: a norm that came out too small would break a bound."""

from __future__ import annotations

import torch
from torch import Tensor

TRUSTED = 1e-4
"""A squared Gram norm below this share of its largest possible value has lost digits to cancellation and is computed again."""
_LOST = 4.0
"""So many machine epsilons of what a norm would be if nothing cancelled may be lost to rounding (up to two were seen)."""


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
    """[units]: the l2 norms of a tensor [units, ...]."""
    found: Tensor = torch.linalg.vector_norm(tensor.reshape(len(tensor), -1), dim=1)
    return found


def directions(vectors: Tensor, norms: Tensor) -> Tensor:
    """Vectors [units, n] by their norms; zeros stay zeros."""
    return vectors / torch.where(norms == 0, 1.0, norms)[:, None]


def upwards(squares: Tensor, largest: Tensor, *, by_gram: bool = False) -> Tensor:
    """Squared norms, with what rounding may have taken from them, and what it may add to the weighted sum, whose order differs.

    largest: the norms if nothing cancelled. by_gram: the squares themselves are sums of products that cancel.
    """
    lost = _LOST * torch.finfo(squares.dtype).eps
    if by_gram:
        squares = squares + lost * largest.square()
    return (squares.sqrt() + lost * largest).square()

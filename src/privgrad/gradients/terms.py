"""A weight's unit gradients in the form in which an operator's rule has them: norms and weighted sums from each.

A term is one use's share of the gradients of one weight, [units, *shape]. Those of `rows` hold them; these here hold what the
gradients are products of, and multiply it out only where that is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

import torch
from torch import Tensor

from privgrad.gradients.folding import Folding
from privgrad.gradients.norms import TRUSTED, factors_of, hidden, norms_of, select, upwards
from privgrad.gradients.products import added, batched_product, gram, linear, weighted_product
from privgrad.gradients.rows import Rows, Take

_TRAFFIC = 96
"""What writing and reading back a number costs, in floating point operations: measured on CPUs, and no less on GPUs."""
_SLICE = 1024
"""So many columns of a product are added up in single precision."""


class Share(Protocol):
    """A share of a weight's gradients, [units, *shape], in float32 or wider, as it waits for the weights of the units."""

    def dense(self) -> Tensor:
        """The gradients themselves."""
        ...

    def squares(self) -> Tensor:
        """[units]: their squared l2 norms. Not finite for a unit whose gradient is not."""
        ...

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        """[*shape]: the sum of weights [units] times gradients; units in the mask `dropped` are selected out, not multiplied."""
        ...


class Term(Share, Protocol):
    """A share as an operator's rule has it; before `folded` it is [rows, *shape]."""

    def cut(self, rows: Tensor) -> Term:
        """Some rows (first index of the parameter) of the gradients only."""
        ...

    def folded(self, folding: Folding) -> Term:
        """From rows to units."""
        ...

    def kept(self, take: Take) -> Share:
        """The form in which to wait for the weights: multiplied out, where that is cheaper, into a buffer from `take`."""
        ...

    def masked(self, mask: Tensor, take: Take) -> Share:
        """The same, with zeros where the mask [*shape] has zeros; elsewhere it has ones."""
        ...


def tensors(share: Share) -> Iterator[Tensor]:
    """A share's tensors, with those of the terms that it is the sum of."""
    for value in vars(share).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list):
            yield from (tensor for part in value for tensor in tensors(part))


@dataclass
class Outer:
    """Sums of outer products: left [units, T, p], right [units, T, d], gradient [p, d] = sum over T of left_t right_t^T.

    ragged: left and right are still [rows, ...], and this is how they make units of different sizes.
    """

    left: Tensor
    right: Tensor
    ragged: Folding | None = None

    def dense(self) -> Tensor:
        units = self.joined()
        return batched_product(units.left.transpose(1, 2), units.right)

    def joined(self) -> Outer:
        """The same, with one row for every unit."""
        if self.ragged is None:
            return self
        return Outer(self.ragged.joined(self.left), self.ragged.joined(self.right))

    def squares(self) -> Tensor:
        units = self.joined()
        if units.left.shape[1] == 1:
            # Lengths first: their squares may leave the range of floats where the product does not.
            return (factors_of(units.left) * factors_of(units.right)).square()
        return _trusted(_inner(units, units), [units])

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        return weighted_product(*self.weighted(weights, dropped))

    def weighted(self, weights: Tensor, dropped: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """left [n, p], factors [n] and right [n, d], of which the weighted sum is left^T diag(factors) right."""
        if self.ragged is not None:
            weights = weights[self.ragged.index]
            dropped = None if dropped is None else dropped[self.ragged.index]
        left, right = select(self.left, dropped), select(self.right, dropped)
        factors = weights.to(left).view(-1, 1).expand(left.shape[:2]).flatten()
        return left.flatten(0, 1), factors, right.flatten(0, 1)

    def cut(self, rows: Tensor) -> Outer:
        return replace(self, left=self.left.index_select(2, rows.to(self.left.device)))

    def folded(self, folding: Folding) -> Term:
        if folding.each == 1:
            return self
        if not folding.joins:
            return Rows(folding.sum(self.dense()))
        return (
            replace(self, ragged=folding)
            if folding.each is None
            else Outer(folding.joined(self.left), folding.joined(self.right))
        )

    def kept(self, take: Take) -> Share:
        """Two T x T Gram matrices, or the gradients written once and read twice, whichever costs less."""
        positions, rows, columns = self.left.shape[1], self.left.shape[2], self.right.shape[2]
        positions *= 1 if self.ragged is None else self.ragged.most
        if positions > 1 and 2 * positions**2 * (rows + columns) > _TRAFFIC * rows * columns:
            return self._multiplied_out(take)
        return self

    def masked(self, mask: Tensor, take: Take) -> Share:
        units = self.joined()
        if units.left.shape[1] == 1:
            return MaskedProduct(units.left.squeeze(1), units.right.squeeze(1), mask)
        rows = units._multiplied_out(take)
        rows.gradient.mul_(mask)
        return rows

    def _multiplied_out(self, take: Take) -> Rows:
        units = self.joined()
        buffer = take(len(units.left), torch.Size((units.left.shape[2], units.right.shape[2])), units.left)
        return Rows(batched_product(units.left.transpose(1, 2), units.right, buffer))


@dataclass
class MaskedProduct:
    """One outer product a unit, of left [units, p] and right [units, d], with zeros where mask [p, d] has them."""

    left: Tensor
    right: Tensor
    mask: Tensor

    def dense(self) -> Tensor:
        return (self.left[:, :, None] * self.right[:, None, :]).mul_(self.mask)

    def squares(self) -> Tensor:
        """Sum over i, j of left_i^2 mask_ij right_j^2: a product with the mask, and nothing cancels.

        Of vectors of length 1 at most, since squares may leave the range of floats; what is then too small to be squared is less
        than what is added.
        """
        left, right = factors_of(self.left), factors_of(self.right)
        columns = (self.right / right[:, None]).square_()
        first, *others = zip(torch.split(columns, _SLICE, 1), torch.split(self.mask, _SLICE, 1), strict=True)
        kept = linear(*first)
        for slices in others:
            kept = kept.double().add_(linear(*slices))
        rows = kept.sqrt_().to(self.left).mul_(self.left).div_(left[:, None])
        return upwards((norms_of(rows) * (left * right)).square(), left * right)

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        left, right = select(self.left, dropped), select(self.right, dropped)
        return weighted_product(left, weights.to(left), right).mul_(self.mask)


@dataclass
class Lookup:
    """Rows of a table: index [units, T], right [units, T, d], gradient [count, d] = sum over T of onehot(index_t) right_t^T."""

    index: Tensor
    right: Tensor
    count: int

    def dense(self) -> Tensor:
        units, _, width = self.right.shape
        table = added(self._places(), self.right, units * self.count)
        return table.to(self.right.dtype).view(units, self.count, width)

    def squares(self, mask: Tensor | None = None) -> Tensor:
        places, inverse = torch.unique(self._places(), return_inverse=True)
        touched = added(inverse, self.right, len(places))
        if mask is not None:
            touched.mul_(mask[places % self.count])
        squares = norms_of(touched).square()
        squares = squares.new_zeros(len(self.index)).index_add_(0, places // self.count, squares)
        return upwards(squares.to(self.right.dtype), _largest(self)[0])

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        right = select(self.right, dropped) * weights.to(self.right).view(-1, 1, 1)
        places, inverse = torch.unique(self.index, return_inverse=True)
        table = right.new_zeros(self.count, right.shape[2])
        table[places] = added(inverse, right, len(places)).to(table)
        return table

    def cut(self, rows: Tensor) -> Lookup:
        places = torch.full((self.count,), -1, device=self.index.device)
        places[rows.to(self.index.device)] = torch.arange(len(rows), device=self.index.device)
        found = places[self.index]
        return Lookup(found.clamp(min=0), self.right.masked_fill((found < 0)[..., None], 0), len(rows))

    def folded(self, folding: Folding) -> Term:
        if folding.each == 1:
            return self
        if not folding.joins:
            return Rows(folding.sum(self.dense()))
        return Lookup(folding.joined(self.index), folding.joined(self.right), self.count)

    def kept(self, take: Take) -> Lookup:
        return self

    def masked(self, mask: Tensor, take: Take) -> MaskedLookup:
        return MaskedLookup(self.index, self.right, self.count, mask)

    def _places(self) -> Tensor:
        units = torch.arange(len(self.index), device=self.index.device)
        return (units[:, None] * self.count + self.index).flatten()


@dataclass
class MaskedLookup:
    """A `Lookup` with zeros where mask [count, d] has them."""

    index: Tensor
    right: Tensor
    count: int
    mask: Tensor

    def dense(self) -> Tensor:
        return self._whole.dense().mul_(self.mask)

    def squares(self) -> Tensor:
        return self._whole.squares(self.mask)

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        return self._whole.weighted_sum(weights, dropped).mul_(self.mask)

    @property
    def _whole(self) -> Lookup:
        return Lookup(self.index, self.right, self.count)


@dataclass
class Sum:
    """A tied table's uses, as products (`Outer`) and look-ups: a unit's gradient is their sum, so its norm has cross terms."""

    terms: list[Outer | Lookup]

    def dense(self) -> Tensor:
        return reduce(torch.add, (term.dense() for term in self.terms))

    def squares(self) -> Tensor:
        total = sum(term.squares() for term in self.terms)
        for number, one in enumerate(self.terms):
            for other in self.terms[:number]:
                total = total + 2 * _inner(one, other)
        assert isinstance(total, Tensor)
        return _trusted(total, self.terms)

    def weighted_sum(self, weights: Tensor, dropped: Tensor | None) -> Tensor:
        return reduce(torch.add, (term.weighted_sum(weights, dropped) for term in self.terms))

    def cut(self, rows: Tensor) -> Term:
        return combined([term.cut(rows) for term in self.terms])

    def folded(self, folding: Folding) -> Term:
        return combined([term.folded(folding) for term in self.terms])

    def kept(self, take: Take) -> Sum:
        return self

    def masked(self, mask: Tensor, take: Take) -> Rows:
        return Rows(self.dense().mul_(mask))


def combined(terms: Sequence[Term]) -> Term:
    """One term for all uses of a weight: norms are norms of the sum over uses."""
    if len(terms) == 1:
        return terms[0]
    products = [term for term in terms if isinstance(term, Outer)]
    lookups = [term for term in terms if isinstance(term, Lookup)]
    if len(products) + len(lookups) < len(terms):
        return Rows(reduce(torch.add, (term.dense() for term in terms)))
    joined: list[Outer | Lookup] = []
    if products:
        left = torch.cat([term.left for term in products], dim=1)
        right = torch.cat([term.right for term in products], dim=1)
        joined.append(Outer(left, right, products[0].ragged))
    if lookups:
        index = torch.cat([term.index for term in lookups], dim=1)
        joined.append(Lookup(index, torch.cat([term.right for term in lookups], dim=1), lookups[0].count))
    if len(joined) == 1:
        return joined[0]
    return Sum([term.joined() if isinstance(term, Outer) else term for term in joined])


def _inner(one: Outer | Lookup, other: Outer | Lookup) -> Tensor:
    """[units], in double precision: the inner products of two terms' gradients, from Gram matrices over their positions."""
    if isinstance(one, Lookup):
        if isinstance(other, Outer):
            return _inner(other, one)
        left = (one.index[:, :, None] == other.index[:, None, :]).double()
    elif isinstance(other, Lookup):
        left = one.left.gather(2, other.index[:, None, :].expand(-1, one.left.shape[1], -1)).double()
    else:
        left = gram(one.left, other.left)
    inner: Tensor = torch.linalg.vecdot(left.flatten(1), gram(one.right, other.right).flatten(1))
    return inner


def _largest(term: Outer | Lookup) -> tuple[Tensor, Tensor]:
    """[units]: the norm that a term's gradient would have if nothing cancelled; the same with what squares may have hidden."""
    right: Tensor = torch.linalg.vector_norm(term.right, dim=2)
    if isinstance(term, Lookup):
        return right.sum(1), right.sum(1)
    left: Tensor = torch.linalg.vector_norm(term.left, dim=2)
    more = [math.sqrt(hidden(factor.shape[2], factor.dtype)) for factor in (term.left, term.right)]
    return (left * right).sum(1), ((left + more[0]) * (right + more[1])).sum(1)


def _trusted(squares: Tensor, terms: Sequence[Outer | Lookup]) -> Tensor:
    """Squared Gram norms, rounded upwards; computed again from the gradients for units where cancellation ate their digits.

    A norm that comes out too small would let a unit contribute more than its bound.
    """
    lengths = [_largest(term) for term in terms]
    largest = reduce(torch.add, (seen for seen, _ in lengths))
    squares = squares.to(largest.dtype)
    # A table's sums are in double precision.
    summed = max((term.left.shape[1] for term in terms if isinstance(term, Outer)), default=1)
    rounded = upwards(squares, reduce(torch.add, (most for _, most in lengths)), summed=summed, by_gram=True)
    for unit in (squares < TRUSTED * largest.square()).nonzero().flatten().tolist():
        part = slice(unit, unit + 1)
        gradient = reduce(
            torch.add,
            (
                Outer(term.left[part], term.right[part]).dense()
                if isinstance(term, Outer)
                else Lookup(term.index[part], term.right[part], term.count).dense()
                for term in terms
            ),
        )
        rounded[unit] = upwards(norms_of(gradient)[0].square(), largest[unit], summed=2 * summed)
    return rounded

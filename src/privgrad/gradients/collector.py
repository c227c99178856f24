"""Takes in terms while the backward pass makes them; gives norms to the clipping rule and weighted sums to the sink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from privgrad.gradients.batched import NotCoveredError
from privgrad.gradients.contract import Identity, Need, Request, add_weighted, masked
from privgrad.gradients.folding import Folding
from privgrad.gradients.memory import Workspace
from privgrad.gradients.norms import wide
from privgrad.gradients.rows import Rows, multiplied_out
from privgrad.gradients.terms import Outer, Share, Term, combined, tensors

_SMALL = 2**19
"""Gradients that take so many bytes at most, for all units, are handled together with the others of their block."""

TOGETHER = 16 * 2**20
"""Complete blocks wait for one another until they hold so many bytes: the rule costs as much for one as for ten."""


@dataclass(eq=False)
class Weight:
    """A trainable parameter, or a tensor that the model computed from trainable parameters alone (a derived weight).

    expected: uses that were caught in the forward pass; terms: one for each that the backward pass has reached, with what
    `_versions` said of it then.
    parents: the parameters that a derived weight was computed from. version: how often it had been changed in place by then.
    """

    tensor: Tensor
    name: str | None
    parents: Sequence[Weight] = ()
    version: int = 0
    expected: int = 0
    terms: list[tuple[Term, Sequence[int]]] = field(default_factory=list)

    @property
    def detached(self) -> Tensor:
        """The values, of which autograd does not know where they come from."""
        return self.tensor.detach()

    def append(self, term: Term) -> None:
        """One use's term has come."""
        self.terms.append((term, _versions(term)))


class Collector:
    """One chunk's unit gradients, from the first caught use to the sink.

    most: bytes of multiplied-out gradients that were kept at any one time.
    anchor: every caught use depends on it: a gradient with respect to it runs through all of them and touches no parameter.

    Guarantee: every (unit, block) is asked for exactly once; a unit and block of weight 0 is selected out of the sums; a
    parameter's norm is that of the sum over all its uses, whatever the order in which they arrive; sums are of the numbers
    whose norms the rule saw: terms are not copied, and one that was changed in place meanwhile is refused.
    """

    def __init__(
        self,
        request: Request,
        parameters: Mapping[str, nn.Parameter],
        folding: Folding,
        dtype: torch.dtype,
        workspace: Workspace,
    ) -> None:
        self.parameters = {name: Weight(parameter, name) for name, parameter in parameters.items()}
        self.folding = folding
        self.backward = False
        self.most = 0
        self._kept = 0
        self.anchor = torch.zeros((), requires_grad=True)
        self._request = request
        self._workspace = workspace
        self._derived: list[Weight] = []
        device = next(iter(parameters.values())).device
        # In double precision: the squares of a thousand small weights, one by one, would be lost beside those of a large one.
        self._squares = torch.zeros(folding.units, len(request.blocks), device=device, dtype=torch.float64)
        self._dtype = dtype
        self._column = {slot: column for column, slots in enumerate(request.blocks) for slot in slots}
        self._totals: dict[int, dict[str, Share]] = {column: {} for column in range(len(request.blocks))}
        left_out = masked(request.encoding, request.encoding.slots())
        self._open = {c: sum(s not in left_out for s in slots) for c, slots in enumerate(request.blocks)}
        self._ready: list[int] = []
        self._waiting = 0
        self._seen: dict[str, Sequence[int]] = {}
        self._rows = _places(request, parameters, Need.ROWS)
        self._coordinates = _places(request, parameters, Need.PLACES)
        self._native = _native(request, parameters)

    def expect(self, weight: Weight) -> None:
        """A use was caught: the weight is complete only when its term has come."""
        weight.expected += 1
        if weight.expected == 1 and weight.name is None:
            self._derived.append(weight)
            for parent in weight.parents:
                self.expect(parent)

    def start(self) -> None:
        """The forward pass is over, and all uses are known. A parameter without any has the gradient zero."""
        self.backward = True
        for name in self._native:
            if self.parameters[name].expected == 0:
                self._open[self._column[name]] -= 1

    def deliver(self, weight: Weight, term: Term) -> None:
        """One use's term, of rows, with every row's factor in it."""
        weight.append(self._cut(weight, term).folded(self.folding))
        if weight.name in self._native and len(weight.terms) == weight.expected:
            self._complete(weight)

    def finish(self) -> None:
        """The backward pass is over: what it did not reach has the gradient zero."""
        for weight in self._derived:
            self._pull_back(weight)
        for name in self._native:
            if self.parameters[name].terms:
                self._complete(self.parameters[name])
        self._encode()
        # In the order in which they became complete: each is then let go of as soon as no other needs its inputs.
        self._settle([*self._ready, *(column for column in self._open if column not in self._ready)])

    def _cut(self, weight: Weight, term: Term) -> Term:
        """What the encoding wants of a parameter's term."""
        rows = None if weight.name is None else self._rows.get(weight.name)
        return term if rows is None else term.cut(rows)

    def _complete(self, weight: Weight) -> None:
        assert weight.name is not None
        whole, places = self._whole(weight), self._coordinates.get(weight.name)
        take = self._workspace.take
        total = whole.kept(take) if places is None else whole.masked(_mask(places, weight.tensor), take)
        column = self._column[weight.name]
        self._take(weight.name, total)
        self._open[column] -= 1
        if self._open[column] == 0 and self._request.rule.separable:
            self._ready.append(column)
            self._waiting += sum(tensor.nbytes for term in self._totals[column].values() for tensor in tensors(term))
            if self._waiting >= TOGETHER:
                self._settle(self._ready)
                self._ready, self._waiting = [], 0

    def _take(self, slot: str, total: Share) -> None:
        column = self._column[slot]
        self._totals[column][slot] = total
        self._seen[slot] = _versions(total)
        held = multiplied_out(total)
        if held is not None:
            self._kept += held.nbytes
            self.most = max(self.most, self._kept)
            if isinstance(total, Rows) and held.nbytes <= _SMALL:
                return  # its norm is taken together with the block's other small ones
        self._squares[:, column] += total.squares()

    def _pull_back(self, weight: Weight) -> None:
        """Unit gradients of a derived weight to unit gradients of its parameters: a linear map, one vjp per unit."""
        if not weight.terms:
            return
        gradient = self._whole(weight).dense().to(weight.tensor.dtype)
        inputs = [parent.tensor for parent in weight.parents]
        parts = torch.autograd.grad(
            weight.tensor, inputs, gradient, is_grads_batched=True, retain_graph=True, allow_unused=True
        )
        for parent, part in zip(weight.parents, parts, strict=True):
            if part is not None:
                parent.append(self._cut(parent, Rows(wide(part))))

    def _encode(self) -> None:
        """Parameters that the encoding wants coordinate by coordinate."""
        wanted = {name: weight for name, weight in self.parameters.items() if name not in self._native}
        if not wanted:
            return
        gradients = {
            name: self._whole(weight).dense().to(self._dtype)
            if weight.terms
            else self._squares.new_zeros(self.folding.units, *weight.tensor.shape, dtype=self._dtype)
            for name, weight in wanted.items()
        }
        vectors = self._request.encoding.encode(gradients)
        if self._request.joined is not None:
            add_weighted(self._request, vectors)
            self._open.clear()
            return
        for slot, vector in vectors.items():
            self._take(slot, Rows(vector))

    def _settle(self, columns: Sequence[int]) -> None:
        """Ask for these blocks' weights, add their sums, and let go of their terms."""
        for column in columns:
            for slot, total in self._totals[column].items():
                self._unchanged(total, self._seen.pop(slot))
        for column in columns:
            del self._open[column]
            held = (multiplied_out(total) for total in self._totals[column].values())
            self._kept -= sum(gradients.nbytes for gradients in held if gradients is not None)
        if not columns:
            return
        joined = {column: self._join(column) for column in columns}
        weights = self._request.rule(self._squares[:, columns].to(self._dtype).sqrt(), columns)
        zero = weights == 0
        some = bool(zero.any())
        for place, column in enumerate(columns):
            weight, dropped = weights[:, place], zero[:, place] if some else None
            cap = self._request.cap(column)
            small = joined.pop(column)
            if small is not None:
                shapes, rows = small
                together = rows.weighted_sum(weight, dropped, cap)
                parts = torch.split(together, [shape.numel() for shape in shapes.values()])
                for (slot, shape), part in zip(shapes.items(), parts, strict=True):
                    self._add(slot, part.view(shape))
            totals = self._totals.pop(column)
            for slot in list(totals):
                total = totals.pop(slot)
                if cap is not None:
                    self._add(slot, self._multiplied_out(total).weighted_sum(weight, dropped, cap))
                elif isinstance(total, Outer | Rows) and slot not in self._coordinates:
                    self._request.sink.add_product(slot, *total.weighted(weight, dropped))
                else:
                    self._add(slot, total.weighted_sum(weight, dropped))
                self._free(total)

    def _add(self, slot: str, value: Tensor) -> None:
        """A parameter's sum, or what the encoding wants of its coordinates."""
        places = self._coordinates.get(slot)
        value = value if places is None else value.flatten()[places.to(value.device)]
        self._request.sink.add(slot, value)

    def _whole(self, weight: Weight) -> Term:
        """One term for all of a weight's uses."""
        for term, versions in weight.terms:
            self._unchanged(term, versions)
        whole, weight.terms = combined([term for term, _ in weight.terms]), []
        return whole

    def _unchanged(self, share: Share, versions: Sequence[int]) -> None:
        """Refuse numbers that a backward pass of the model's own wrote over after they had come."""
        if _versions(share) != versions:
            late = len(self._open) < len(self._request.blocks)
            raise NotCoveredError("its backward pass changes a gradient in place", late=late)

    def _multiplied_out(self, total: Share) -> Rows:
        if isinstance(total, Rows):
            return total
        rows = Rows(total.dense())
        self.most = max(self.most, self._kept + rows.gradient.nbytes)
        return rows

    def _free(self, total: Share) -> None:
        held = multiplied_out(total)
        if held is not None:
            self._workspace.give_back(held)

    def _join(self, column: int) -> tuple[dict[str, torch.Size], Rows] | None:
        """A block's small gradients side by side, as one: many small operations would cost more than their arithmetic."""
        totals = self._totals[column]
        small = {
            slot: total.gradient
            for slot, total in totals.items()
            if isinstance(total, Rows) and total.gradient.nbytes <= _SMALL
        }
        if len(small) < 2:
            for slot in small:
                self._squares[:, column] += totals[slot].squares()
            return None
        rows = Rows(torch.cat([gradient.reshape(len(gradient), -1) for gradient in small.values()], dim=1))
        for slot in small:
            self._free(totals.pop(slot))
        self._squares[:, column] += rows.squares()
        return {slot: gradient.shape[1:] for slot, gradient in small.items()}, rows


def _versions(share: Share) -> Sequence[int]:
    """How often each of a share's tensors has been changed in place."""
    return [tensor._version for tensor in tensors(share)]


def _places(request: Request, parameters: Mapping[str, nn.Parameter], need: Need) -> dict[str, Tensor]:
    """The places of the parameters with one need."""
    wanted = (name for name in parameters if request.encoding.need(name) is need)
    return {name: places for name in wanted if (places := request.encoding.places(name)) is not None}


def _mask(places: Tensor, weight: Tensor) -> Tensor:
    """Ones at the coordinates of a weight that are kept, zeros elsewhere, of the type of its gradients."""
    zeros = wide(torch.zeros_like(weight.detach(), memory_format=torch.contiguous_format))
    zeros.view(-1)[places.to(weight.device)] = 1
    return zeros


def _native(request: Request, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The parameters that are slots of their own: the encoding leaves them as they are, or takes rows of them."""
    if isinstance(request.encoding, Identity):
        return set(parameters)
    slots = request.encoding.slots()
    return {
        name
        for name, parameter in parameters.items()
        if request.encoding.need(name) in (Need.ROWS, Need.PLACES)
        or (request.encoding.need(name) is Need.NORMS and slots.get(name) == parameter.shape)
    }

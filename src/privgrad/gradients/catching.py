"""Trainable parameters, caught where the model uses them.

The forward pass runs under `torch.func.vmap` over the rows, so that each row's forward sees that row alone, and inside a
`TorchFunctionMode` that looks for trainable parameters among the arguments of every torch function:

- an operator with a rule runs on all rows at once, with the parameter detached, and its output's gradient is caught;
- a computation from parameters alone (weight standardization, a transposed view) makes a derived weight;
- any other operator is given one copy of the parameter per row, and vmap does the rest.

What reaches a parameter on another way is noticed in autograd's graph afterwards (`uncovered`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from privgrad.gradients.batched import (
    Hidden,
    NotCoveredError,
    Swallowed,
    any_batched,
    is_batched,
    level,
    on_rows,
    unbatched,
)
from privgrad.gradients.collector import Collector, Weight
from privgrad.gradients.norms import wide
from privgrad.gradients.rows import Rows
from privgrad.gradients.terms import Term

Rule = Callable[..., Any]
"""rule(scope, *args, **kwargs) with an operator's own arguments: its output, or NotImplemented for copies per row."""

_HOOKS = frozenset((Tensor.register_hook, Tensor.retain_grad))
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]

Terms = Callable[..., Iterable[tuple[Weight, Term]]]
"""terms(output gradient, *saved): each weight's term, of rows."""


class Scope:
    """What a rule may use."""

    def __init__(self, collector: Collector, mode: TorchFunctionMode, row: Tensor) -> None:
        self._collector = collector
        self._weights = {id(weight.tensor): weight for weight in collector.parameters.values()}
        self._copies: dict[tuple[int, bool], Tensor] = {}
        self._anchor = collector.anchor
        self.mode = mode
        self.row = row
        self._level = level()

    def close(self) -> None:
        """The forward pass is over. Copies know their backward functions, and those this object: a cycle, and a leak."""
        self._copies.clear()
        self._weights.clear()
        del self.mode, self.row

    def weight(self, value: object) -> Weight | None:
        """The weight that a tensor is; None where nothing trainable is in it."""
        return self._weights.get(id(value))

    def value(self, tensor: Tensor) -> Tensor:
        """What to compute with: a weight's values alone, since its gradient is caught; anything else as it is."""
        weight = self.weight(tensor)
        return tensor if weight is None else weight.detached

    def weights_in(self, arguments: Iterable[Any]) -> list[Weight]:
        """The weights among arguments, lists of them included."""
        found = []
        for argument in arguments:
            weight = self._weights.get(id(argument))
            if weight is not None:
                found.append(weight)
            elif type(argument) in (list, tuple):
                found += self.weights_in(argument)
        return found

    def derive(self, output: Any, sources: Sequence[Weight]) -> None:
        """Remember what was computed from weights alone."""
        if isinstance(output, list | tuple):
            for part in output:
                self.derive(part, sources)
        elif isinstance(output, Tensor) and output.requires_grad:
            known = self._weights.get(id(output))
            changed = known is not None and known.name is None and output._version != known.version
            if known is not None and changed and known.expected:
                raise NotCoveredError("it changes in place a weight that it computed and has used before")
            if known is None or changed:
                parents = {id(p): p for source in sources for p in (source.parents or [source])}
                self._weights[id(output)] = Weight(output, None, list(parents.values()), version=output._version)

    def on_rows(self, function: Callable[..., Any], *tensors: Tensor) -> Any:
        """function(rows, *tensors) on all rows at once: every tensor [rows, *its shape for one row]. So is the output."""
        return on_rows(self._level, function, *tensors)

    def catch(self, output: Tensor, weights: Iterable[Weight | None], terms: Terms, *saved: Tensor) -> Tensor:
        """Let `terms` see the gradient of an operator's fresh output (in on_rows), with what it needs of the forward pass."""
        known = [weight for weight in weights if weight is not None]
        if not known:
            return output
        for weight in known:
            self._collector.expect(weight)

        def arrived(gradient: Tensor, *kept: Tensor) -> None:
            if not self._collector.backward:
                raise NotCoveredError("the model takes a gradient in its forward pass")
            for weight, term in terms(gradient, *kept):
                self._collector.deliver(weight, term)

        kept = (tensor.detach() for tensor in saved)
        caught: Tensor = _Catch.apply(self._anchor, output, arrived, *kept)  # type: ignore[no-untyped-call]
        return caught

    def scaled(self, gradient: Tensor, rows: int) -> Tensor:
        """A gradient [rows * T, ...] as [rows, T, ...], in float32 or wider, with each row's factor."""
        return self.factored(gradient.reshape(rows, -1, *gradient.shape[1:]))

    def factored(self, gradient: Tensor) -> Tensor:
        """A gradient [rows, ...] in float32 or wider, with each row's factor."""
        return self._collector.folding.scaled(wide(gradient))

    def copies(self, weight: Weight, rows: int, flat: bool = False) -> Tensor:
        """[rows, *shape] (in on_rows): a copy for every row, whose gradients are the row gradients. flat: [rows * numbers]."""
        known = self._copies.get((id(weight), flat))
        if known is None:
            self._collector.expect(weight)

            def arrived(gradient: Tensor) -> None:
                if not self._collector.backward:
                    raise NotCoveredError("the model takes a gradient in its forward pass")
                term = Rows(self.factored(gradient.reshape(rows, *weight.tensor.shape)))
                self._collector.deliver(weight, term)

            copied = weight.detached.expand(rows, *weight.tensor.shape)
            copied = copied.reshape(-1) if flat else copied
            known = _Copies.apply(self._anchor, copied, arrived)  # type: ignore[no-untyped-call]
            self._copies[id(weight), flat] = known
        return known


class Catching(Swallowed):
    """Looks at every torch function that the model calls."""

    def __init__(
        self,
        collector: Collector,
        rules: Mapping[Any, Rule],
        always: Mapping[Any, Rule],
        row: Tensor,
        hidden: Hidden | None,
    ) -> None:
        super().__init__(hidden)
        self.scope = Scope(collector, self, row)
        self._rules = rules
        self._always = always

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One torch function, with the weights in it caught."""
        if func in _HOOKS:
            raise NotCoveredError("its forward pass registers a hook on a tensor")
        if func == _GRAD_FN and is_batched(args[0]):  # under vmap there is none yet: a hook on it would be passed by
            raise NotCoveredError("its forward pass looks at a tensor's grad_fn")
        if func == _REQUIRES_GRAD and is_batched(args[0]):
            # As in an ordinary forward pass: the gradients of rows come from below vmap, which would say no.
            return unbatched(args[0]).requires_grad
        weights = [*self.scope.weights_in(args), *self.scope.weights_in(kwargs.values())]
        if (not weights and func not in self._always) or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        if not any_batched(args) and not any_batched(kwargs.values()):
            output = func(*args, **kwargs)
            if not any_batched([output]):
                self.scope.derive(output, weights)
                return output
        rules = [self._rules.get(func)] if weights else []
        for rule in (*rules, self._always.get(func)):
            output = NotImplemented if rule is None else rule(self.scope, *args, **kwargs)
            if output is not NotImplemented:
                return output
            args, kwargs = self._with_copies(args), self._with_copies(kwargs)
        return func(*args, **kwargs)

    def _with_copies(self, value: Any) -> Any:
        """Arguments with every weight replaced by its copies, one per row."""
        weight = self.scope.weight(value)
        if weight is not None:
            return self.scope.on_rows(lambda rows, _: self.scope.copies(weight, rows), self.scope.row)
        if isinstance(value, dict):
            return {key: self._with_copies(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._with_copies(item) for item in value)
        return value


def uncovered(losses: Tensor, parameters: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """A parameter that autograd's graph still leads to, and the operator through which; None: every use was caught.

    Guarantee: a gradient that an ordinary backward pass would give to a parameter either comes through a caught use or is named.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    seen: set[Any] = set()
    waiting = [] if losses.grad_fn is None else [losses.grad_fn]
    while waiting:
        node = waiting.pop()
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            seen.add(following)
            if type(following).__name__ != "AccumulateGrad":
                waiting.append(following)
                continue
            name = names.get(id(following.variable))  # type: ignore[attr-defined]
            if name is not None:
                return name, node.name().removesuffix("0")
    return None


class _Catch(torch.autograd.Function):
    """The identity, in place; its backward pass shows the gradient to `arrived`."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, output: Tensor, arrived: Callable[..., None], *saved: Tensor) -> Tensor:
        ctx.arrived = arrived
        ctx.save_for_backward(*saved)  # autograd then notices where the model changes an input in place
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.arrived(gradient, *ctx.saved_tensors)
        ctx.arrived = None  # it knows the inputs, and the graph lives longer than they need to
        return (None, gradient, None, *(None for _ in ctx.saved_tensors))


class _Copies(torch.autograd.Function):
    """The identity on copies of a weight; its backward pass shows their gradients to `arrived`, and goes no further."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, copied: Tensor, arrived: Callable[[Tensor], None]) -> Tensor:
        ctx.arrived = arrived
        return copied.view_as(copied)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.arrived(gradient)
        ctx.arrived = None
        return None, None, None

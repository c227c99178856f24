"""One file per kind of operator: how its weights' unit gradients come from its inputs and its output's gradient.

A rule is a function rule(scope, *args, **kwargs) with the operator's own arguments, called inside `torch.func.vmap`. It runs
the operator on all rows at once (`scope.on_rows`), lets the output's gradient be caught (`scope.catch`), and returns the
output; or it returns NotImplemented, and the operator gets one copy of each weight per row.

For an operator of your own, `per_row` makes a rule of a function that gives the row gradients. The operator must be one that
torch lets be overridden: its first lines are has_torch_function and handle_torch_function (docs/engine.md).

    def scaled_gradient(output_gradient, inputs, scale):
        return [(output_gradient * inputs).flatten(1).sum(1)]      # one for each weight among the arguments: [rows, *shape]

    engine = OnePassEngine(rules={scaled: per_row(scaled, scaled_gradient)})
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.batched import is_batched
from privgrad.gradients.catching import Rule, Scope
from privgrad.gradients.collector import Weight
from privgrad.gradients.rows import Rows
from privgrad.gradients.rules import attention, convolution, embedding, linear, normalization, recurrent
from privgrad.gradients.terms import Term

RULES: Mapping[Any, Rule] = {
    **linear.RULES,
    **convolution.RULES,
    **embedding.RULES,
    **normalization.RULES,
    **attention.RULES,
    **recurrent.RULES,
}
"""Operators that take weights."""

ALWAYS: Mapping[Any, Rule] = attention.WITHOUT_WEIGHTS
"""Operators without weights that vmap alone runs slowly."""


def per_row(operator: Callable[..., Tensor], gradients: Callable[..., Sequence[Tensor]]) -> Rule:
    """A rule from gradients(output gradient, *args, **kwargs), with the operator's own arguments.

    Every tensor comes as [rows, *its shape for one row] (weights among them without rows). The answer is the row gradients
    [rows, *shape] of each weight among the arguments, in their order.
    """

    def rule(scope: Scope, *args: Any, **kwargs: Any) -> Any:
        given, form = pytree.tree_flatten((args, kwargs))
        weights = [weight for value in given if (weight := scope.weight(value)) is not None]
        given = [scope.value(value) if isinstance(value, Tensor) else value for value in given]
        places = [place for place, value in enumerate(given) if is_batched(value)]
        positional, named = pytree.tree_unflatten(given, form)

        def on_rows(rows: int, output: Tensor, *inputs: Tensor) -> Tensor:
            def terms(gradient: Tensor, *saved: Tensor) -> Iterator[tuple[Weight, Term]]:
                known = dict(zip(places, saved, strict=True))
                positional, named = pytree.tree_unflatten([known.get(n, v) for n, v in enumerate(given)], form)
                answer = gradients(gradient, *positional, **named)
                for weight, gradient in zip(weights, answer, strict=True):
                    expected = (rows, *weight.tensor.shape)
                    if gradient.shape != expected:
                        raise PrivgradError(
                            f"the rule for {operator.__name__} answers a weight with gradients of shape "
                            f"{tuple(gradient.shape)}; expected {expected}, one for each row"
                        )
                    yield weight, Rows(scope.factored(gradient))

            return scope.catch(output.clone(), weights, terms, *inputs)

        return scope.on_rows(on_rows, operator(*positional, **named), *(given[place] for place in places))

    return rule

"""Tables that are looked up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients.catching import Rule, Scope, is_batched
from privgrad.gradients.collector import Weight
from privgrad.gradients.terms import Lookup, Term


def embedding(
    scope: Scope,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """torch.nn.functional.embedding. Renormalised tables are another operator, and left to copies."""
    owner = scope.weight(weight)
    if not is_batched(input) or owner is None or max_norm is not None or scale_grad_by_freq:
        return NotImplemented

    def on_rows(rows: int, index: Tensor) -> Tensor:
        output = F.embedding(index, owner.detached)
        count = owner.tensor.shape[0]
        padding = None if padding_idx is None else padding_idx % count

        def terms(gradient: Tensor, saved: Tensor) -> Iterator[tuple[Weight, Term]]:
            right = scope.scaled(gradient.flatten(0, -2), rows)
            places = saved.view(rows, -1)
            if padding is not None:
                right = right.masked_fill((places == padding)[:, :, None], 0)
            yield owner, Lookup(places, right, count)

        return scope.catch(output, [owner], terms, index.contiguous())

    return scope.on_rows(on_rows, input)


RULES: Mapping[Any, Rule] = {F.embedding: embedding}

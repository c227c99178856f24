"""y = x W^T + b and x W: outer products over the positions of a row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from privgrad.gradients import products
from privgrad.gradients.batched import is_batched
from privgrad.gradients.catching import Rule, Scope
from privgrad.gradients.collector import Weight
from privgrad.gradients.norms import wide
from privgrad.gradients.rows import Rows
from privgrad.gradients.terms import Outer, Term


def linear(scope: Scope, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """torch.nn.functional.linear, with any leading dimensions."""
    if not is_batched(input) or is_batched(weight) or is_batched(bias):
        return NotImplemented
    return scope.on_rows(lambda rows, inputs: on_rows(scope, rows, inputs, weight, bias), input)


def on_rows(scope: Scope, rows: int, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for [rows, ..., d], outside of vmap."""
    owner = scope.weight(weight)
    bias_owner = None if bias is None else scope.weight(bias)
    flat = inputs.reshape(-1, inputs.shape[-1])
    output = products.linear(flat, scope.value(weight), None if bias is None else scope.value(bias))

    def terms(gradient: Tensor, *saved: Tensor) -> Iterator[tuple[Weight, Term]]:
        left = scope.scaled(gradient, rows)
        if owner is not None:
            yield owner, Outer(left, wide(saved[0]).view(rows, -1, flat.shape[1]))
        if bias_owner is not None:
            yield bias_owner, Rows(left.squeeze(1) if left.shape[1] == 1 else left.sum(1))

    saved = (flat.to(output.dtype),) if owner is not None else ()
    return scope.catch(output, [owner, bias_owner], terms, *saved).view(*inputs.shape[:-1], output.shape[1])


def matmul(scope: Scope, input: Tensor, other: Tensor) -> Any:
    """x W with a matrix W."""
    if not is_batched(input) or is_batched(other) or other.dim() != 2 or scope.weight(input) is not None:
        return NotImplemented

    def product(rows: int, inputs: Tensor) -> Tensor:
        owner = scope.weight(other)
        flat = inputs.reshape(-1, inputs.shape[-1])
        output = products.linear(flat, scope.value(other).T)

        def terms(gradient: Tensor, saved: Tensor) -> Iterator[tuple[Weight, Term]]:
            assert owner is not None
            yield owner, Outer(wide(saved).view(rows, -1, flat.shape[1]), scope.scaled(gradient, rows))

        caught = scope.catch(output, [owner], terms, flat.to(output.dtype))
        return caught.view(*inputs.shape[:-1], output.shape[1])

    return scope.on_rows(product, input)


def bilinear(scope: Scope, input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    """torch.nn.functional.bilinear, for which vmap has no rule, as a product for which it has one."""
    with scope.mode:
        output = torch.einsum("...i,kij,...j->...k", input1, weight, input2)
        return output if bias is None else output + bias


RULES: Mapping[Any, Rule] = {
    F.linear: linear,
    F.bilinear: bilinear,
    torch.matmul: matmul,
    torch.mm: matmul,
    Tensor.matmul: matmul,
    Tensor.mm: matmul,
    Tensor.__matmul__: matmul,
}

"""Which module couples: hooks compare, call by call, what went in and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.gradients.contract import Tree
from privgrad.nn.subject import ROWS, Draw, Subject, differ, largest_of


@dataclass(frozen=True)
class Call:
    """One call of a module: the tensors that went in, before it changed any in place, and those that came out."""

    name: str
    inputs: list[Tensor]
    outputs: list[Tensor]


OnReturn = Callable[[Call, Any], Any]
"""Gets each call when it returns, inner modules first, with its output; gives the output to go on with."""


@contextmanager
def _watched(modules: Mapping[str, nn.Module], on_return: OnReturn, *, live: bool) -> Iterator[None]:
    """live: tensors with their graph, instead of copies of their values."""
    open_calls: list[list[Tensor]] = []

    def taken(tree: Any) -> list[Tensor]:
        tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        return tensors if live else [tensor.detach().clone() for tensor in tensors]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        open_calls.append(taken((args, kwargs)))

    def leave(name: str) -> Callable[..., Any]:
        return lambda module, args, kwargs, output: on_return(Call(name, open_calls.pop(), taken(output)), output)

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class View:
    """One row of a batch, as one run sees it."""

    batch: Tree
    rows: int
    row: int

    def part(self, tensor: Tensor) -> Tensor:
        """The row's part of a tensor that has rows first (or rows times something), flat; any other tensor whole."""
        return tensor.reshape(self.rows, -1)[self.row] if self.has_rows(tensor) else tensor.flatten()

    def has_rows(self, tensor: Tensor) -> bool:
        """Whether rows may be first."""
        return tensor.dim() > 0 and tensor.numel() > 0 and len(tensor) % self.rows == 0


@dataclass(frozen=True)
class Blame:
    """modules: names, in order of execution. loss: the row's loss is still wrong once all of them are mended.

    certain: the model's own output for the row could be compared, so that what is left must be the loss function's.
    """

    modules: list[str]
    loss: bool
    certain: bool


def culprits_forward(subject: Subject, draw: Draw, good: View, bad: View, tolerance: float) -> Blame:
    """The modules whose output for the row differs between two runs while their inputs for it do not, in order of execution.

    A culprit's output is mended (the row gets the good run's values) before the run goes on, so that culprits behind it are found
    in the same run.
    """
    calls: list[Call] = []

    def remember(call: Call, output: Any) -> Any:
        calls.append(call)
        return output

    def watch(modules: Mapping[str, nn.Module], on_return: OnReturn) -> Callable[[], Any]:
        return lambda: _watched(modules, on_return, live=False)

    reference = subject.run(good.batch, draw, hooks=watch(subject.hooked, remember))
    remaining = iter(calls)
    guilty: list[str] = []

    def unlike(one: list[Tensor], other: list[Tensor]) -> bool:
        pairs = [(good.part(a), bad.part(b)) for a, b in zip(one, other, strict=False)]
        return len(one) != len(other) or any(differ(a, b, tolerance) for a, b in pairs)

    def compare(call: Call, output: Any) -> Any:
        expected = next(remaining, None)
        if expected is None or expected.name != call.name:
            return output  # another path through the model: nothing to compare
        if unlike(expected.inputs, call.inputs) or not unlike(expected.outputs, call.outputs):
            return output
        guilty.append(call.name)
        right = iter(expected.outputs)
        return pytree.tree_map(lambda leaf: _mended(leaf, next(right)) if isinstance(leaf, Tensor) else leaf, output)

    def _mended(tensor: Tensor, expected: Tensor) -> Tensor:
        value = good.part(expected)
        if bad.part(tensor).shape != value.shape:
            return tensor
        if bad.part(tensor).numel() == tensor.numel():
            return value.view(tensor.shape)
        mended = tensor.reshape(bad.rows, -1).clone()
        mended[bad.row] = value
        return mended.view(tensor.shape)

    suspect = subject.run(bad.batch, draw, hooks=watch(subject.hooked, compare))
    scale = largest_of([reference.losses, suspect.losses])
    wrong = differ(reference.losses[good.row], suspect.losses[bad.row], tolerance, scale)
    certain = any(call.name == "" and any(good.has_rows(tensor) for tensor in call.outputs) for call in calls)
    return Blame(list(dict.fromkeys(guilty)), wrong, certain)


@dataclass(frozen=True)
class _Backward:
    """One call's own backward pass from one row of its output.

    inputs: the row's part of what went in. leaks: it reaches other rows of the inputs. weights: the gradient by its weights.
    """

    name: str
    inputs: list[Tensor]
    leaks: bool
    weights: list[Tensor]


def culprits_backward(subject: Subject, draw: Draw, batch: Tree, changed: Tree, row: int) -> list[str]:
    """The modules by whose own backward pass one row's output reaches other rows, or whose weights' gradient knows of them."""
    both = [_backward(subject, draw, View(one, ROWS, row)) for one in (batch, changed)]
    guilty: list[str] = []
    for one, other in zip(*both, strict=False):
        inside = any(found.startswith(f"{one.name}." if one.name else "") for found in guilty)
        if not inside and one.name not in guilty and (one.leaks or other.leaks or _weights_differ(one, other, subject)):
            guilty.append(one.name)
    return guilty


def _weights_differ(one: _Backward, other: _Backward, subject: Subject) -> bool:
    """From equal inputs. (An expert may have got other rows.)"""

    def unlike(ones: list[Tensor], others: list[Tensor]) -> bool:
        scale = largest_of([*ones, *others])
        return any(differ(a, b, subject.same_shape, scale) for a, b in zip(ones, others, strict=True))

    comparable = (
        one.name == other.name and len(one.inputs) == len(other.inputs) and not unlike(one.inputs, other.inputs)
    )
    return comparable and unlike(one.weights, other.weights)


def _backward(subject: Subject, draw: Draw, view: View) -> list[_Backward]:
    calls: list[Call] = []

    def remember(call: Call, output: Any) -> Any:
        calls.append(call)
        return output

    run = subject.run(view.batch, draw, hooks=lambda: _watched(subject.hooked, remember, live=True))
    found = []
    for call in calls:
        outputs = [view.part(tensor) for tensor in call.outputs if tensor.requires_grad]
        if not outputs:
            continue
        total = torch.stack([_weighted_sum(part).to(subject.device) for part in outputs]).sum()
        inputs = [tensor for tensor in call.inputs if tensor.requires_grad]
        weights = [p for p in subject.modules[call.name].parameters() if p.requires_grad]
        if not inputs and not weights:
            continue
        with run.draws.drawing(subject.hooked):
            gradients = torch.autograd.grad(
                total, [*inputs, *weights], retain_graph=True, allow_unused=True, materialize_grads=True
            )
        leaks = any(_leaks(gradient, view, subject.precision) for gradient in gradients[: len(inputs)])
        parts = [view.part(tensor).detach().clone() for tensor in call.inputs]
        found.append(_Backward(call.name, parts, leaks, list(gradients[len(inputs) :])))
    return found


def _weighted_sum(values: Tensor) -> Tensor:
    """With unequal weights: the plain sum of a normalised output has no gradient."""
    return torch.linspace(0.5, 1.5, len(values), device=values.device).to(values) @ values


def _leaks(gradient: Tensor, view: View, tolerance: float) -> bool:
    return view.has_rows(gradient) and reaches_others(gradient.reshape(view.rows, -1), view.row, tolerance)


def reaches_others(gradient: Tensor, row: int, tolerance: float) -> bool:
    """Whether a row's gradient by an input [rows, ...] is anything but zero on other rows."""
    others = [index for index in range(len(gradient)) if index != row]
    return largest_of([gradient[others]]) > tolerance * largest_of([gradient])

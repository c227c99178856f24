"""A model and its loss as one module, what its forward pass may not leave behind, and what its backward pass may not do."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import LossFn, Tree, one_per_row

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
_LARGE = 10_000
"""Entries of a container that is not looked into: a vocabulary, say."""


class WithLoss(nn.Module):
    """Losses [rows] from a batch, checked; one module, so that tensors are swapped under model and loss alike."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Tree) -> Tensor:
        return one_per_row(self.loss_fn(self.model, batch), len(pytree.tree_leaves(batch)[0]))


def hooked(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """A module or parameter with a backward hook, which fast engines would pass by; None where there is none."""
    for name, parameter in parameters.items():
        if parameter._backward_hooks:
            return name
    for name, part in module.named_modules():
        if part._backward_hooks or part._backward_pre_hooks:
            return str(name).removeprefix("model.")
    return None


@contextmanager
def nothing_in_grad(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Refuse a backward pass that has side effects: what a hidden operator leaves in `.grad` is un-noised."""
    before = {name: parameter.grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
        found = [name for name, parameter in parameters.items() if parameter.grad is not None]
    finally:
        for name, parameter in parameters.items():
            parameter.grad = before[name]
    if found:
        raise PrivgradError(
            f"the model's backward pass puts a gradient into .grad of {', '.join(found)} by itself, un-clipped; "
            "take the operator that calls backward() out of the model"
        )


@contextmanager
def nothing_kept(module: nn.Module) -> Iterator[None]:
    """What a forward pass leaves behind is forgotten: every pass of a step begins where the first one did.

    Buffers (the model computes on copies), plain attributes with the containers in them, and the random states of numpy and
    Python. How many passes a step takes follows from how many records were drawn; what one leaves may be made of them.
    """
    owners = [owner for owner in module.modules() if not isinstance(owner, torch.jit.ScriptModule)]
    held = [(owner, name, tensor) for owner in owners for name, tensor in owner._buffers.items()]
    attributes = [(owner, _attributes(owner)) for owner in owners]
    contents: dict[int, tuple[Any, list[Any]]] = {}
    _look_into([value for _, values in attributes for value in values.values()], contents)
    random_states = numpy.random.get_state(), random.getstate()
    copies: dict[int, Tensor] = {}
    try:
        for owner, name, tensor in held:
            if tensor is not None:
                owner._buffers[name] = copies.setdefault(id(tensor), tensor.clone())
        yield
    finally:
        for owner in owners:
            owner._buffers.clear()
        for owner, name, tensor in held:
            owner._buffers[name] = tensor
        for owner, values in attributes:
            for key in _attributes(owner).keys() - values.keys():
                del vars(owner)[key]
            vars(owner).update(values)
        for container, items in contents.values():
            now = _items(container)
            if len(now) != len(items) or any(one is not other for one, other in zip(now, items, strict=True)):
                container.clear()
                if isinstance(container, dict):
                    container.update(zip(items[::2], items[1::2], strict=True))
                else:
                    (container.update if isinstance(container, set) else container.extend)(items)
        numpy.random.set_state(random_states[0])
        random.setstate(random_states[1])


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING}


def _look_into(values: Iterable[Any], found: dict[int, tuple[Any, list[Any]]]) -> None:
    """The containers among values, and in them, with what is in each."""
    for value in values:
        if isinstance(value, tuple):
            _look_into(value, found)
        elif isinstance(value, dict | list | set | deque) and id(value) not in found and len(value) <= _LARGE:
            found[id(value)] = value, _items(value)
            _look_into(found[id(value)][1], found)


def _items(container: Any) -> list[Any]:
    """What is in a container; of a dictionary, keys and values by turns."""
    return [part for pair in container.items() for part in pair] if isinstance(container, dict) else list(container)

"""A model and its loss as one module, what its forward pass may not leave behind, and what its backward pass may not do."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import LossFn, Tree, one_per_row
from privgrad.gradients.holdings import Holdings


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
    holdings = Holdings(owners)
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
        holdings.restore()
        numpy.random.set_state(random_states[0])
        random.setstate(random_states[1])

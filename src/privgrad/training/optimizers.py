"""What a private step asks of the optimizer."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from privgrad.errors import PrivgradError, RefusedError
from privgrad.gradients.contract import trainable


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimizer that needs a closure, that holds other parameters than the model's, or not all of those it trains."""
    if isinstance(optimizer, type):
        raise PrivgradError(f"the optimizer is a class; build it: {optimizer.__name__}(model.parameters(), lr=...)")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise RefusedError(
            "LBFGS calls the loss several times a step (a closure), each a release of its own; use SGD or Adam"
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise RefusedError("SparseAdam needs sparse gradients, and a noised gradient is dense; use SGD or Adam")
    if not trainable(model):
        raise PrivgradError("the model has no trainable parameter; unfreeze at least one (requires_grad = True)")
    known = {id(parameter) for parameter in model.parameters()}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = sum(id(parameter) not in known for parameter in held)
    if foreign:
        raise PrivgradError(
            f"the optimizer holds {foreign} parameter(s) that are not the model's; build it from model.parameters()"
        )
    missing = [name for name, parameter in trainable(model).items() if all(parameter is not other for other in held)]
    if missing:
        raise PrivgradError(
            f"the optimizer does not hold {', '.join(missing)}; give it all trainable parameters, or freeze those "
            "(requires_grad = False)"
        )


def check_plain(optimizer: Optimizer) -> None:
    """Mixing moves the weights itself, by the learning rate of plain SGD."""
    first = optimizer.param_groups[0]
    plain = ("momentum", "weight_decay", "dampening", "nesterov", "maximize")
    if type(optimizer) is not torch.optim.SGD or any(
        group.get(name) for group in optimizer.param_groups for name in plain
    ):
        raise RefusedError(
            "mixing needs plain SGD without momentum and weight decay: a hidden buffer breaks its composition, and a released "
            "one undoes the mixing; use torch.optim.SGD(..., lr), and mixing's own decay and momentum"
        )
    if any(group["lr"] != first["lr"] for group in optimizer.param_groups):
        raise RefusedError(
            "mixing needs one learning rate for all parameters: the width of its noise is a multiple of it"
        )

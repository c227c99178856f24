"""The one form of a loss: loss_fn(model, batch) -> losses [rows]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import LossFn, Tree


def check_loss(loss_fn: object) -> None:
    """Refuse what is no loss of a model and a batch, where it can be seen: a criterion of outputs and targets."""
    if (
        isinstance(loss_fn, nn.modules.loss._Loss | type)
        or getattr(loss_fn, "__module__", None) == "torch.nn.functional"
    ):
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise PrivgradError(
            f"loss_fn is {name}, a criterion; it is called with (model, batch): give supervised({name}), or your own"
        )


def supervised(criterion: Callable[..., Tensor] | nn.Module) -> LossFn:
    """A loss function for (input, target) batches: supervised(F.cross_entropy).

    criterion: a function of torch.nn.functional, called with reduction="none"; or a loss module built with it. Losses of more
    than one dimension (pixels, tokens) are averaged over all but the first.

    Raises:
        PrivgradError: a loss module that averages over the batch itself: that couples records; or its class.
    """
    if isinstance(criterion, type):
        raise PrivgradError(f"{criterion.__name__} is a class; give supervised({criterion.__name__}(reduction='none'))")
    options: dict[str, Any] = {"reduction": "none"}
    if isinstance(criterion, nn.Module):
        reduction = getattr(criterion, "reduction", "none")
        if reduction != "none":
            raise PrivgradError(
                f"{type(criterion).__name__} has reduction={reduction!r}, which couples the records of a batch; "
                "build it with reduction='none'"
            )
        options = {}

    def loss_fn(model: nn.Module, batch: Tree) -> Tensor:
        inputs, targets = batch
        losses = criterion(model(inputs), targets, **options)
        if not isinstance(losses, Tensor) or losses.dim() == 0:
            raise PrivgradError("the criterion gave a single number; expected one loss per row (reduction='none')")
        return losses if losses.dim() == 1 else losses.flatten(1).mean(1)

    return loss_fn

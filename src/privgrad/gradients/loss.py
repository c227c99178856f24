"""A model and its loss as one module."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.errors import PrivgradError
from privgrad.gradients.contract import LossFn, Tree


class WithLoss(nn.Module):
    """Losses [rows] from a batch, checked; one module, so that `functional_call` swaps tensors under model and loss alike."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, batch: Tree) -> Tensor:
        losses = self.loss_fn(self.model, batch)
        rows = len(pytree.tree_leaves(batch)[0])
        if not isinstance(losses, Tensor) or losses.shape != (rows,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise PrivgradError(
                f"loss_fn returned {got} for {rows} row(s); expected one loss per row, shape ({rows},): "
                "use reduction='none' and average over everything but the first dimension"
            )
        return losses

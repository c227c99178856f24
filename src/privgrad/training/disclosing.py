"""What a run shows of its training records without noise, where the plan names it (`mechanism.disclosure`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from privgrad.gradients.contract import LossFn, Tree

_BATCH = 1024


def training_metrics(
    names: Sequence[str],
    model: nn.Module,
    loss_fn: LossFn,
    dataset: Dataset[Any],
    collate_fn: Callable[[list[Any]], Tree] | None,
) -> dict[str, float]:
    """NOT PRIVATE. training_loss and training_accuracy over all records, in eval mode; only those that are named."""
    wanted = [name for name in ("training_loss", "training_accuracy") if name in names]
    if not wanted:
        return {}
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    model.eval()
    totals, rows = dict.fromkeys(wanted, 0.0), 0
    try:
        with torch.no_grad():
            for batch in DataLoader(dataset, batch_size=_BATCH, collate_fn=collate_fn):
                batch = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)
                rows += len(pytree.tree_leaves(batch)[0])
                if "training_loss" in totals:
                    totals["training_loss"] += float(loss_fn(model, batch).sum())
                if "training_accuracy" in totals:
                    inputs, targets = batch
                    totals["training_accuracy"] += int((model(inputs).argmax(1) == targets).sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    return {name: total / rows for name, total in totals.items()}

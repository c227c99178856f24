"""Accuracy on a declared split: data that is public, or held out and declared not to be protected."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from privgrad.errors import PrivgradError, RefusedError, nearest
from privgrad.gradients.contract import Tree
from privgrad.training.batches import taker
from privgrad.training.public import is_made_of

DECLARATIONS = ("public", "held-out")


@dataclass(frozen=True)
class DeclaredSplit:
    """A data set for evaluation, with the declaration that stands in the certificate.

    declared: "public", or "held-out": its records are not protected by the guarantee, and the certificate says so.
    """

    dataset: Dataset[Any]
    declared: str = "held-out"
    name: str = "test"

    def __post_init__(self) -> None:
        check_declared(self.declared)


def check_declared(declared: object) -> None:
    """Refuse what is no declaration of a split."""
    if not isinstance(declared, str) or declared not in DECLARATIONS:
        raise PrivgradError(f"data.test is {declared!r}; {nearest(str(declared), DECLARATIONS)}")


def check_split(split: object, private: Dataset[Any]) -> None:
    """Refuse, before anything is charged, a split on which accuracy could not be measured, or that is the private data.

    Raises:
        PrivgradError: no split, or records without a class.
        RefusedError: the split is made of private records (looked for where both are held in memory).
    """
    if not isinstance(split, DeclaredSplit):
        raise PrivgradError(f"test is a {type(split).__name__}; expected DeclaredSplit(dataset, declared='held-out')")
    if is_made_of(private, split.dataset):
        raise RefusedError(
            f"the split {split.name!r} is made of private records, whose accuracy would leave un-noised; give other records, or "
            "leave the split out (accuracy on the private ones has a name of its own: disclose = ['training_accuracy'])"
        )
    batch = next(_in_order(split.dataset, 1), None)
    if not isinstance(batch, list | tuple) or len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch):
        raise PrivgradError(
            f"the split {split.name!r} has records that are not (input, class) pairs of tensors; accuracy needs such pairs: "
            "leave the split out (test=None), and evaluate the model yourself"
        )
    targets = batch[1]
    if targets.dim() != 1 or targets.is_floating_point():
        raise PrivgradError(
            f"the split {split.name!r} has targets [rows{''.join(f', {n}' for n in targets.shape[1:])}], {targets.dtype}; "
            "accuracy is of one class (a whole number) for each record: leave it out (test=None), and evaluate yourself"
        )


def accuracy(model: nn.Module, split: DeclaredSplit, batch_size: int = 1024) -> float:
    """The share of (input, class) records of the split that the model classifies rightly, in eval mode."""
    device = next(model.parameters()).device
    training = {module: module.training for module in model.modules()}
    model.eval()
    right = total = 0
    try:
        with torch.no_grad():
            for batch in _in_order(split.dataset, batch_size):
                inputs, targets = pytree.tree_map(lambda leaf: leaf.to(device), batch)
                logits: Tensor = model(inputs)
                if logits.dim() != 2 or logits.shape[0] != len(targets):
                    raise PrivgradError(
                        f"the model answers in the shape [rows{''.join(f', {n}' for n in logits.shape[1:])}]; accuracy is of one "
                        "class for each record: expected logits [rows, classes] (or leave the split out)"
                    )
                right += int((logits.argmax(1) == targets).sum())
                total += len(targets)
    finally:
        for module, mode in training.items():
            module.training = mode
    if total == 0:
        raise PrivgradError(f"the split {split.name!r} is empty; expected at least one record to evaluate on")
    return right / total


def _in_order(dataset: Dataset[Any], batch_size: int) -> Iterator[Tree]:
    """All records, collated."""
    take = taker(dataset)
    if take is None:
        yield from DataLoader(dataset, batch_size=batch_size)
        return
    size = len(dataset)  # type: ignore[arg-type]
    for start in range(0, size, batch_size):
        yield take(torch.arange(start, min(size, start + batch_size)))

"""A data set with its declared splits, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.data import Dataset, TensorDataset

from privgrad.errors import PrivgradError, nearest


@dataclass(frozen=True)
class Source:
    """Private training records and a test split that is NOT protected, for classification.

    input_shape: of one record. scaling: what was done to the inputs, in words; constants are fixed, never computed from
    private records.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    size: int
    input_shape: tuple[int, ...]
    classes: int
    scaling: str


def digits() -> Source:
    """scikit-learn's handwritten digits: 1,797 images of 8 x 8 pixels (0..16), 1,437 to train and 360 to test.

    The split is a fixed permutation. Each image is scaled by itself alone: less its own mean, over its own standard deviation,
    times 1.4. (What all images share would use up gradient norm, and so clipping, without telling them apart.)
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.from_numpy(raw.images).to(torch.float32).flatten(1)
    spread = images.std(1, keepdim=True).clamp(min=1.0)
    inputs = (1.4 * (images - images.mean(1, keepdim=True)) / spread).view(-1, 8, 8)
    labels = torch.from_numpy(raw.target).to(torch.int64)
    order = torch.from_numpy(numpy.random.RandomState(0).permutation(len(labels)))
    inputs, labels = inputs[order].unsqueeze(1), labels[order]
    size = 1437
    return Source(
        name="digits",
        train=TensorDataset(inputs[:size], labels[:size]),
        test=TensorDataset(inputs[size:], labels[size:]),
        size=size,
        input_shape=(1, 8, 8),
        classes=10,
        scaling="each image less its own mean, over its own standard deviation",
    )


SOURCES: dict[str, Callable[[], Source]] = {"digits": digits}
"""Embedded data sets by their name in a configuration file."""


def load(name: str) -> Source:
    """The data set of a name."""
    if name not in SOURCES:
        raise PrivgradError(f"data.source is {name!r}; {nearest(name, SOURCES)}")
    return SOURCES[name]()

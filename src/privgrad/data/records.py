"""Records in memory, of which any list of rows is taken at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from privgrad.data.augmentation import AUGMENTATIONS
from privgrad.data.settings import Scalar
from privgrad.errors import PrivgradError


class Records(Dataset[tuple[Tensor, Tensor]]):
    """(input, label) pairs. Pixels stay uint8 in memory and are scaled when they are taken.

    inputs: float32 or float16 [n, *shape], taken as they are; or uint8 [n, channels, height, width] or [n, features], taken as
    pixels / 255, less `mean`, over `std`: stated constants, for all channels or for each. labels: int64 [n]. augment: names of
    random changes (`data.augmentation`) of images, made anew each time that a row is taken.
    """

    def __init__(
        self, inputs: Tensor, labels: Tensor, mean: Scalar = 0.5, std: Scalar = 0.5, augment: Sequence[str] = ()
    ) -> None:
        if len(inputs) != len(labels):
            raise PrivgradError(f"there are {len(inputs)} inputs and {len(labels)} labels; expected as many")
        if augment and inputs.dim() != 4:
            raise PrivgradError(
                f"data.images.augment changes images [channels, height, width]; the records have {list(inputs.shape[1:])}"
            )
        self.inputs, self.labels = inputs, labels
        self._augment = [AUGMENTATIONS[name] for name in augment]
        self._offset = self._divisor = torch.ones(())
        if inputs.dtype == torch.uint8:
            # In the units of pixels, so that with the defaults 0 is exactly -1 and 255 exactly 1.
            self._offset = _per_channel("mean", mean, inputs)
            self._divisor = _per_channel("std", std, inputs)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, labels = self.take(torch.tensor([range(len(self))[index]]))
        return inputs[0], labels[0]

    def take(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The collated batch of these rows [rows] (int64): float32 inputs [rows, *shape] and int64 labels [rows]."""
        inputs = self.inputs.index_select(0, indices)
        for change in self._augment:
            inputs = change(inputs)
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(torch.float32).sub_(self._offset).div_(self._divisor)
        return inputs.to(torch.float32), self.labels.index_select(0, indices)


def _per_channel(name: str, value: Scalar, inputs: Tensor) -> Tensor:
    """255 times the constant, in the shape of one record's channels."""
    if not isinstance(value, tuple):
        return torch.tensor(255 * value, dtype=torch.float32)
    if inputs.dim() != 4 or len(value) != inputs.shape[1]:
        channels = inputs.shape[1] if inputs.dim() == 4 else "no"
        raise PrivgradError(
            f"data.images.{name} has {len(value)} numbers, and the images have {channels} channels; expected as many"
        )
    return (255 * torch.tensor(value, dtype=torch.float64)).to(torch.float32).view(-1, 1, 1)

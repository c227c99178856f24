"""Random changes of images that leave their class as it is. They cost no privacy: each record is changed by itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SHARE_OF_SHIFT = 8


def flip(images: Tensor) -> Tensor:
    """Each image [n, channels, height, width] mirrored left to right with probability 1/2."""
    turned = torch.rand(len(images)) < 0.5
    return torch.where(turned.view(-1, 1, 1, 1), images.flip(-1), images)


def shift(images: Tensor) -> Tensor:
    """Each image moved by up to an eighth of its height and of its width (4 pixels of 32); what comes in is mirrored."""
    count, _, height, width = images.shape
    rows, columns = _places(count, height), _places(count, width)
    moved = images[torch.arange(count).view(-1, 1, 1), :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def _places(count: int, side: int) -> Tensor:
    """[count, side]: where each pixel along one side comes from."""
    reach = side // _SHARE_OF_SHIFT
    places = torch.arange(side) + torch.randint(-reach, reach + 1, (count, 1))
    return (side - 1) - ((side - 1) - places.abs()).abs()


AUGMENTATIONS: dict[str, Callable[[Tensor], Tensor]] = {"flip": flip, "shift": shift}
"""By their names in data.images.augment."""

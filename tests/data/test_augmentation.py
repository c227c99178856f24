"""Augmented images are the same images: mirrored, or moved by a little."""

from __future__ import annotations

import pytest
import torch

import privgrad as pg
from privgrad.data.augmentation import AUGMENTATIONS, flip, shift
from privgrad.data.records import Records

IMAGES = torch.arange(64 * 3 * 16 * 24, dtype=torch.int64).remainder(251).to(torch.uint8).view(64, 3, 16, 24)


def test_flip_mirrors_about_half() -> None:
    torch.manual_seed(0)
    flipped = flip(IMAGES)
    turned = [bool((new == old.flip(-1)).all()) for new, old in zip(flipped, IMAGES, strict=True)]
    same = [bool((new == old).all()) for new, old in zip(flipped, IMAGES, strict=True)]
    assert all(a != b for a, b in zip(turned, same, strict=True))
    assert 16 < sum(turned) < 48


def test_shift_moves_by_up_to_an_eighth() -> None:
    torch.manual_seed(0)
    moves = set()
    padded = torch.nn.functional.pad(IMAGES.float(), (3, 3, 2, 2), mode="reflect").to(torch.uint8)
    for new, whole in zip(shift(IMAGES), padded, strict=True):
        found = [
            (down - 2, right - 3)
            for down in range(5)
            for right in range(7)
            if torch.equal(new, whole[:, down : down + 16, right : right + 24])
        ]
        assert len(found) == 1
        moves.update(found)
    assert {down for down, _ in moves} == {-2, -1, 0, 1, 2}
    assert {right for _, right in moves} == {-3, -2, -1, 0, 1, 2, 3}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_augmentation_changes_each_image_by_itself(name: str, dtype: torch.dtype) -> None:
    images = IMAGES.to(dtype)
    torch.manual_seed(1)
    before = AUGMENTATIONS[name](images)
    others = images.clone()
    others[1:] = 7
    torch.manual_seed(1)
    after = AUGMENTATIONS[name](others)
    assert torch.equal(before[0], after[0])
    assert before.dtype == dtype
    assert AUGMENTATIONS[name](images[:0]).shape == (0, 3, 16, 24)


def test_records_are_augmented_anew_each_time() -> None:
    torch.manual_seed(0)
    records = Records(IMAGES, torch.zeros(64, dtype=torch.int64), augment=("flip", "shift"))
    rows = torch.zeros(32, dtype=torch.int64)
    views = records.take(rows)[0]
    assert len({view.numpy().tobytes() for view in views}) > 8


def test_only_images_are_augmented() -> None:
    with pytest.raises(pg.PrivgradError, match=r"data\.images\.augment changes images"):
        Records(torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64), augment=("flip",))

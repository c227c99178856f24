"""Scattering features in place of pixels: computed once, image by image, and kept on the disk like decoded images."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy
import torch
from numpy.lib.format import open_memmap
from torch import Tensor
from torch.nn import functional

from privgrad.data.progress import Progress
from privgrad.data.records import Records
from privgrad.data.settings import FeatureSettings
from privgrad.errors import PrivgradError
from privgrad.nn.scattering import Scattering

_FORMAT = 2
"""Of what is computed: features of another format are made again."""
_CHUNK = 64
_YCBCR = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
"""Of ITU-R BT.601, as in JPEG, without the offsets."""


def with_features(records: Records, settings: FeatureSettings, directory: Path | None, where: str) -> Records:
    """The same records with the scattering features of their images as inputs: float16 [n, channels, height, width].

    Each image is transformed by itself: pixels / 255, another color space where one is asked for, scattering, and (groups > 0)
    each group of channels less its own mean over its own standard deviation; `mirror`: the mean with those of the mirror image.
    directory: where the features are kept (as private as the images), or None.

    Raises:
        PrivgradError: records that are no images, or images that do not fit the transform.
    """
    pixels = records.inputs
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise PrivgradError(
            f"{where} holds no images, and data.features are features of images; leave [data.features] out"
        )
    transform = Scattering(int(pixels.shape[2]), int(pixels.shape[3]), settings.scale)
    if settings.color != "as-is" and pixels.shape[1] != 3:
        raise PrivgradError(
            f"data.features.color is {settings.color!r}, and the images of {where} are gray; leave it out"
        )
    channels = int(pixels.shape[1]) * transform.channels
    if settings.groups and channels % settings.groups:
        raise PrivgradError(
            f"data.features.groups is {settings.groups}, which does not divide the {channels} channels of the features of "
            f"{where}; expected a divisor, or 0 for none"
        )
    if directory is None:
        return Records(_computed(pixels, transform, settings, None, where), records.labels)
    name = hashlib.sha256(json.dumps([_FORMAT, asdict(settings), list(pixels.shape)]).encode())
    name.update(pixels.contiguous().numpy().data)
    path = directory / f"{name.hexdigest()[:32]}.features.npy"
    kept = _kept(path, len(pixels), channels)
    return Records(_computed(pixels, transform, settings, path, where) if kept is None else kept, records.labels)


def image_shape(features: Sequence[int], settings: FeatureSettings) -> tuple[int, int, int]:
    """(channels, height, width) of images whose features have the shape `features`."""
    channels, height, width = features
    large = (height * 2**settings.scale, width * 2**settings.scale)
    return channels // Scattering(*large, settings.scale).channels, *large


def _kept(path: Path, count: int, channels: int) -> Tensor | None:
    """The features in a file (its pages are read when they are needed), or None where they are not whole."""
    try:
        found = numpy.load(path, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if found.dtype != numpy.float16 or found.ndim != 4 or found.shape[:2] != (count, channels):
        return None
    if found.offset + found.nbytes != path.stat().st_size:  # a missing end would read as zeros
        return None
    return torch.from_numpy(found)


def _computed(
    pixels: Tensor, transform: Scattering, settings: FeatureSettings, path: Path | None, where: str
) -> Tensor:
    sample = _features(pixels[:1], transform, settings)
    shape = (len(pixels), *sample.shape[1:])
    if path is None:
        values = torch.empty(shape, dtype=torch.float16)
        _fill(values, pixels, transform, settings, where)
        return values
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600))
        stored = open_memmap(temporary, mode="w+", dtype=numpy.float16, shape=shape)
        _fill(torch.from_numpy(stored), pixels, transform, settings, where)
        stored.flush()
        temporary.replace(path)
    except OSError as error:
        raise PrivgradError(
            f"the features cannot be kept in {path.parent}: {error.strerror or error}; give data.cache = 'none', or a directory"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    print(f"privgrad: the features of {where} are kept in {path.parent} (only you can read them)", file=sys.stderr)
    kept = _kept(path, *shape[:2])
    if kept is None:
        raise PrivgradError(f"{path} was changed while it was written; try again")
    return kept


def _fill(out: Tensor, pixels: Tensor, transform: Scattering, settings: FeatureSettings, where: str) -> None:
    with Progress(f"features of {where}", len(pixels)) as progress:
        for start in range(0, len(pixels), _CHUNK):
            chunk = slice(start, start + _CHUNK)
            out[chunk] = _features(pixels[chunk], transform, settings).to(torch.float16)
            progress.update(min(start + _CHUNK, len(pixels)))


def _features(pixels: Tensor, transform: Scattering, settings: FeatureSettings) -> Tensor:
    with torch.no_grad():
        images = pixels.to(torch.float32) / 255
        if settings.color == "ycbcr":
            images = torch.einsum("ij,njhw->nihw", _YCBCR, images)
        found = [transform(images), transform(images.flip(-1))] if settings.mirror else [transform(images)]
        if settings.groups:
            found = [functional.group_norm(features, settings.groups) for features in found]
        return torch.stack(found).mean(0)

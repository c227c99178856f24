"""Image files to uint8 pixels, each decoded once."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from privgrad.data.cache import Cache
from privgrad.data.edges import check_memory, reading
from privgrad.data.progress import Progress
from privgrad.data.settings import ImageSettings, Scalar
from privgrad.errors import PrivgradError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "PPM")
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm")
"""Only formats that Pillow decodes by itself: it hands some others to other programs."""
_GRAY, _COLOR = ("1", "L"), ("RGB",)
_CONVERTIBLE = (*_GRAY, *_COLOR, "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr")
"""8-bit modes. (Pillow's conversion of 16-bit pixels cuts off everything above 255.)"""
_PNG = b"\x89PNG\r\n\x1a\n"

Pixels = NDArray[numpy.uint8]


@dataclass(frozen=True)
class Blob:
    """One image file in memory. where: its place, asked for when something is wrong."""

    data: bytes
    where: Callable[[], str]


def read_pixels(
    blobs: Callable[[], Iterable[Blob]],
    count: int,
    settings: ImageSettings,
    source: Path,
    files: Iterable[Path],
    cache: Cache,
) -> Tensor:
    """All images of a split, uint8 [n, channels, height, width]: from the cache, or decoded.

    blobs: the images in order. source: what they are called. files: what they are read from, whose changes the cache must see.
    """
    key = {"source": str(source), "column": settings.column, "size": settings.size, "mode": settings.mode}
    entry = cache.entry(key, files)
    found = entry.load(count)
    if found is None:
        found = _decode_all(blobs(), count, settings, source)
        entry.keep(found)
    return torch.from_numpy(found)


def scaling(settings: ImageSettings) -> str:
    """What is done to the pixels, in words for the certificate."""
    before = {"as-is": "", "gray": "converted to gray, ", "color": "converted to RGB, "}[settings.mode]
    if settings.size is not None:
        before += f"resized to {settings.size[0]} x {settings.size[1]}, "
    return f"{before}pixels / 255, less {_words(settings.mean)}, over {_words(settings.std)} (stated constants)"


def decode(data: bytes, settings: ImageSettings) -> Pixels:
    """One image as uint8 [channels, height, width].

    Raises:
        PrivgradError: what is damaged, or would have to be guessed: other modes, animations, more than 8 bits.
    """
    with reading("the image"):
        if data.startswith(_PNG):
            _check_png(data)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                image = _converted(_upright(opened), settings.mode)
                if settings.size is not None and image.size != settings.size[::-1]:
                    image = image.resize(settings.size[::-1], Image.Resampling.BILINEAR)
                array = numpy.asarray(image, dtype=numpy.uint8)
        except UnidentifiedImageError as error:
            raise PrivgradError(f"the image is none of {', '.join(FORMATS)}, or is damaged") from error
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise PrivgradError(
                f"the image has more than {Image.MAX_IMAGE_PIXELS:,} pixels, Pillow's limit; make it smaller"
            ) from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode_all(blobs: Iterable[Blob], count: int, settings: ImageSettings, source: Path) -> Pixels:
    out: Pixels | None = None
    done = 0
    if settings.size is not None:
        check_memory(str(source), count * settings.size[0] * settings.size[1])
    with Progress(f"decoding {source.parent.name}/{source.name}", count) as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for blob in blobs:
            try:
                image = decode(blob.data, settings)
            except PrivgradError as error:
                raise PrivgradError(f"{blob.where()}: {error}") from error
            if out is None:
                first = blob.where
                check_memory(str(source), count * image.size)
                out = numpy.empty((count, *image.shape), dtype=numpy.uint8)
            if image.shape != out.shape[1:]:
                raise _mixed(image.shape, out.shape[1:], blob.where(), first())
            if done < count:
                out[done] = image
            done += 1
            progress.update(done)
    if out is None or done != count:
        raise PrivgradError(
            f"{source} holds {done} images and {count} labels; it is damaged, or changed while it was read"
        )
    return out


def _upright(opened: Image.Image) -> Image.Image:
    """The pixels, turned as the camera's EXIF note says."""
    frames = getattr(opened, "n_frames", 1)
    if frames != 1 and opened.format != "MPO":  # a photograph with its preview behind it
        raise PrivgradError(f"the image holds {frames} frames; expected one")
    opened.load()
    return ImageOps.exif_transpose(opened) if "exif" in opened.info else opened


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode not in _CONVERTIBLE:
        raise PrivgradError(f"the image has pixels of mode {image.mode}; expected 8-bit gray or color")
    if mode == "as-is" and image.mode not in (*_GRAY, *_COLOR):
        raise PrivgradError(
            f"the image has pixels of mode {image.mode} (a palette, transparency or print colors); "
            "give data.images.mode = 'gray' or 'color' to convert all"
        )
    wanted = {"gray": "L", "color": "RGB", "as-is": "L" if image.mode in _GRAY else "RGB"}[mode]
    return image if image.mode == wanted else image.convert(wanted)


def _check_png(data: bytes) -> None:
    """Compare the checksums of a PNG file's chunks, and see that it ends. (Pillow skips those of the pixels.)"""
    place = len(_PNG)
    while True:
        if len(data) < place + 12:
            raise PrivgradError("the image is cut off")
        (length,) = struct.unpack_from(">I", data, place)
        end = place + 8 + length
        if len(data) < end + 4:
            raise PrivgradError("the image is cut off")
        if zlib.crc32(memoryview(data)[place + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise PrivgradError("the image is damaged: a checksum does not fit")
        if data[place + 4 : place + 8] == b"IEND":
            return
        place = end + 4


def _mixed(shape: tuple[int, ...], expected: tuple[int, ...], where: str, first: str) -> PrivgradError:
    if shape[0] != expected[0]:
        names = {1: "gray", 3: "color"}
        return PrivgradError(
            f"{where}: the image is {names[shape[0]]}, and that of {first} is {names[expected[0]]}; "
            "give data.images.mode = 'gray' or 'color' to convert all"
        )
    return PrivgradError(
        f"{where}: the image has {shape[1]} x {shape[2]} pixels, and that of {first} has {expected[1]} x {expected[2]} "
        "(height x width); give data.images.size = [height, width] to resize all"
    )


def _words(number: Scalar) -> str:
    return ", ".join(f"{n:g}" for n in number) if isinstance(number, tuple) else f"{number:g}"

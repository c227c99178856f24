"""Images by Pillow, in parquet files and in folders: the same pixels come back, and what is damaged is refused by name."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from privgrad.data import images as images_module
from privgrad.data.cache import Cache
from privgrad.data.images import Blob, read_pixels
from privgrad.data.settings import ImageSettings
from privgrad.data.source import Source, load, training_size
from privgrad.errors import PrivgradError
from tests.data.files import image_bytes, people, pictures, settings, write_folder, write_images

NAMES = ["cat", "dog", "eel"]


def hugging_face(root: Path, train: numpy.ndarray, kind: str = "PNG", column: str = "image", **options: Any) -> Path:
    """Two parquet files of images; labels 0, 1, 2, 0, 1, 2, ..."""
    for name, array in (("train", train), ("test", pictures(3, train.shape[1:], seed=9))):
        blobs: list[bytes | None] = [image_bytes(image, kind) for image in array]
        labels = [number % 3 for number in range(len(array))]
        write_images(root / f"{name}.parquet", blobs, labels, column=column, names=NAMES, **options)
    return root


def pixels(source: Source) -> torch.Tensor:
    return source.train.inputs  # type: ignore[attr-defined]


def refusal(root: Path, **data: Any) -> str:
    with pytest.raises(PrivgradError) as error:
        load(settings(root, **data))
    assert "\n" not in str(error.value)
    return str(error.value)


# What is read.


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)])
def test_parquet_in_the_hugging_face_layout(tmp_path: Path, shape: tuple[int, ...], column: str) -> None:
    array = pictures(1100, shape)  # more than one batch of the reader
    source = load(settings(hugging_face(tmp_path, array, column=column)))
    expected = array[:, None] if len(shape) == 2 else array.transpose(0, 3, 1, 2)
    assert pixels(source).dtype == torch.uint8
    assert numpy.array_equal(pixels(source).numpy(), expected)
    inputs, labels = source.train.take(torch.tensor([7, 0, 7]))  # type: ignore[attr-defined]
    numpy.testing.assert_allclose(inputs.numpy(), expected[[7, 0, 7]] / 127.5 - 1, atol=1e-6)
    assert labels.tolist() == [1, 0, 1]
    assert (source.size, source.classes, source.input_shape) == (1100, 3, expected.shape[1:])
    assert source.scaling == "pixels / 255, less 0.5, over 0.5 (stated constants)"
    assert training_size(settings(tmp_path)) == 1100


def test_shards_of_one_split_are_read_in_order(tmp_path: Path) -> None:
    array = pictures(9)
    hugging_face(tmp_path, array)
    (tmp_path / "train.parquet").unlink()
    for shard in (2, 0, 1):
        write_images(
            tmp_path / f"train-{shard:05d}-of-00003.parquet",
            [image_bytes(image) for image in array[3 * shard : 3 * shard + 3]],
            [0, 1, 2],
            names=NAMES,
        )
    source = load(settings(tmp_path))
    assert numpy.array_equal(pixels(source).numpy()[:, 0], array)
    path = tmp_path / "train-00001-of-00003.parquet"
    write_images(path, [image_bytes(image) for image in array[:3]], [0, 7, 2], names=NAMES)
    assert "train-00001-of-00003.parquet, row 2: label 7 is out of range" in refusal(tmp_path)
    write_images(path, [image_bytes(array[0]), b"?", image_bytes(array[1])], [0, 1, 2], names=NAMES)
    assert "train-00001-of-00003.parquet, row 2 (001.png): the image is none of PNG" in refusal(tmp_path)
    write_images(path, [image_bytes(array[0])], [0], names=["a", "b"])
    assert "the shards name different classes" in refusal(tmp_path)
    people().to_parquet(path)
    assert f"{path} has other columns than" in refusal(tmp_path)
    path.unlink()
    assert "holds 2 of 3 shards of the train split" in refusal(tmp_path)


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    array, labels = pictures(7), [1, 0, 1, 1, 0, 0, 1]
    write_folder(tmp_path / "train", array, labels)
    write_folder(tmp_path / "test", pictures(2, seed=3), [0, 1])
    (tmp_path / "train" / ".DS_Store").write_bytes(b"\0")
    (tmp_path / "train" / "cat" / "._001.png").write_bytes(b"\0")
    (tmp_path / "LICENSE").write_text("free")
    source = load(settings(tmp_path))
    order = numpy.argsort(labels, kind="stable")
    assert numpy.array_equal(pixels(source).numpy()[:, 0], array[order])
    assert source.train.labels.tolist() == sorted(labels)  # type: ignore[attr-defined]
    assert (source.classes, source.size, len(source.test)) == (2, 7, 2)  # type: ignore[arg-type]


def test_one_file_in_two_places_is_refused(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_folder(tmp_path / name, pictures(4), [0, 1, 0, 1])
    first, *_ = sorted((tmp_path / "train" / "cat").iterdir())
    (first.parent / "again.png").symlink_to(first)
    with pytest.raises(PrivgradError, match="are one file, and would count as two records"):
        load(settings(tmp_path))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "WEBP", "PPM"])
def test_lossless_formats_give_the_same_pixels(tmp_path: Path, kind: str) -> None:
    array = pictures(6)
    root = write_folder(tmp_path / "train", array, [0, 1] * 3)
    for number, path in enumerate(sorted(root.rglob("*.png"), key=lambda path: path.name)):
        options = {"lossless": True} if kind == "WEBP" else {}
        path.with_suffix(f".{kind.lower()}").write_bytes(image_bytes(array[number], kind, **options))
        if kind != "PNG":
            path.unlink()
    shutil.copytree(root, tmp_path / "test")
    # GIF has a palette, and WebP is always in color: the gray values are the same.
    source = load(settings(tmp_path, images={"mode": "gray"}))
    assert numpy.array_equal(pixels(source).numpy()[:, 0], array[[0, 2, 4, 1, 3, 5]])


def test_a_folder_without_a_test_split_is_split_or_gets_another(tmp_path: Path) -> None:
    write_folder(tmp_path / "all", pictures(40), [number % 2 for number in range(40)])
    write_folder(tmp_path / "other", pictures(4), [0, 1, 0, 1])
    message = refusal(tmp_path / "all")
    assert "has no test split beside it; give data.test_source = 'PATH' or data.test_share = 0.2" in message
    shared = load(settings(tmp_path / "all", test_share=0.25))
    assert shared.size + len(shared.test) == 40  # type: ignore[arg-type]
    assert load(settings(tmp_path / "all", test_source=str(tmp_path / "other"))).size == 40


def test_a_class_called_train_is_a_class(tmp_path: Path) -> None:
    write_folder(tmp_path, pictures(8), [0, 1] * 4, names=("bus", "train"))
    assert load(settings(tmp_path, test_share=0.4)).classes == 2


def test_sizes_and_modes_are_converted_when_asked(tmp_path: Path) -> None:
    gray, color = pictures(1, (8, 8))[0], pictures(1, (4, 6, 3))[0]
    blobs: list[bytes | None] = [image_bytes(gray), image_bytes(color)]
    for name in ("train", "test"):
        write_images(tmp_path / f"{name}.parquet", blobs, [0, 1], names=NAMES)
    message = refusal(tmp_path)
    assert "row 2 (001.png): the image is color, and that of" in message
    assert "row 1 (000.png) is gray; give data.images.mode" in message
    message = refusal(tmp_path, images={"mode": "gray"})
    assert "row 2 (001.png): the image has 4 x 6 pixels, and that of" in message
    assert "row 1 (000.png) has 8 x 8 (height x width); give data.images.size" in message
    for mode, channels, converted in (("gray", 1, "L"), ("color", 3, "RGB")):
        source = load(settings(tmp_path, images={"mode": mode, "size": [4, 6]}))
        assert source.input_shape == (channels, 4, 6)
        expected = numpy.asarray(Image.fromarray(color).convert(converted)).reshape(4, 6, channels).transpose(2, 0, 1)
        assert numpy.array_equal(pixels(source)[1].numpy(), expected), "an image of that size is not resampled"
        assert source.scaling.startswith(f"converted to {mode if mode == 'gray' else 'RGB'}, resized to 4 x 6, pixels")


def test_mean_and_std_are_stated_constants_for_all_channels_or_for_each(tmp_path: Path) -> None:
    array = pictures(6, (4, 4, 3))
    hugging_face(tmp_path, array)
    mean, std = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]
    source = load(settings(tmp_path, images={"mean": mean, "std": std}))
    inputs, _ = source.train.take(torch.arange(6))  # type: ignore[attr-defined]
    expected = ((array / 255 - mean) / std).transpose(0, 3, 1, 2)
    numpy.testing.assert_allclose(inputs.numpy(), expected, atol=1e-5)
    assert "less 0.1, 0.2, 0.3, over 0.5, 1, 2" in source.scaling
    assert "has 2 numbers, and the images have 3 channels" in refusal(tmp_path, images={"mean": [0.1, 0.2]})


def test_the_default_constants_reach_both_ends_exactly(tmp_path: Path) -> None:
    array = numpy.zeros((3, 2, 2), numpy.uint8)
    array[:, 0] = 255
    inputs, _ = load(settings(hugging_face(tmp_path, array))).train.take(torch.arange(3))  # type: ignore[attr-defined]
    assert set(inputs.unique().tolist()) == {-1.0, 1.0}


def test_a_photograph_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    upright = numpy.zeros((16, 8, 3), numpy.uint8)
    upright[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to see it upright"
    sideways = numpy.rot90(upright).copy()
    for name in ("train", "test"):
        write_images(
            tmp_path / f"{name}.parquet",
            [image_bytes(sideways, "JPEG", exif=exif, quality=95)] * 2,
            [0, 1],
            names=NAMES,
        )
    found = pixels(load(settings(tmp_path)))[0].float().mean(0)
    assert found.shape == (16, 8)
    assert float(found[:7].mean()) > 200 > 50 > float(found[9:].mean())


# Classes and labels.


def test_class_names_come_from_the_metadata_or_the_configuration_never_from_labels(tmp_path: Path) -> None:
    blobs: list[bytes | None] = [image_bytes(image) for image in pictures(4)]
    for name in ("train", "test"):
        write_images(tmp_path / f"{name}.parquet", blobs, [0, 1, 1, 0])
    assert "has no class names; state them, or how many there are, as data.images.classes = 10" in refusal(tmp_path)
    assert load(settings(tmp_path, images={"classes": 5})).classes == 5
    assert load(settings(tmp_path, images={"classes": ["a", "b", "c"]})).classes == 3
    assert "label 1 is out of range" not in refusal(tmp_path, images={"classes": 1})
    write_images(tmp_path / "train.parquet", blobs, [0, 1, 1, 0], names=NAMES)
    assert load(settings(tmp_path)).classes == 3, "the test split takes the names of the training split"
    assert "expected 4" in refusal(tmp_path, images={"classes": 4})
    assert "expected ('dog', 'cat', 'eel')" in refusal(tmp_path, images={"classes": ["dog", "cat", "eel"]})


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 3], "row 3: label 3 is out of range; expected 0 to 2 (3 classes)"),
        ([0, -1, 1], "row 2: label -1 is out of range"),
        ([2**62, 0, 0], "row 1: label 4611686018427387904 is out of range"),
        (pyarrow.array([0, None, 1]), "row 2: label 'label' is missing"),
        (pyarrow.array([0.0, 1.0, 2.0]), "is a column of double; expected whole numbers"),
        (pyarrow.array(["0", "1", "2"]), "is a column of string; expected whole numbers"),
        (pyarrow.array([[0], [1], [2]]), "expected whole numbers"),
        (pyarrow.array([True, False, True]), "is a column of bool; expected whole numbers"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_bad_labels_are_refused_with_their_row(tmp_path: Path, labels: Any, said: str, split: str) -> None:
    hugging_face(tmp_path, pictures(3))
    path = write_images(
        tmp_path / f"{split}.parquet", [image_bytes(image) for image in pictures(3)], labels, names=NAMES
    )
    message = refusal(tmp_path)
    assert said in message
    assert str(path) in message


def test_unsigned_labels_are_whole_numbers_too(tmp_path: Path) -> None:
    hugging_face(tmp_path, pictures(3))
    labels = pyarrow.array([0, 1, 2], pyarrow.uint8())
    write_images(tmp_path / "train.parquet", [image_bytes(image) for image in pictures(3)], labels, names=NAMES)
    assert load(settings(tmp_path)).train.labels.tolist() == [0, 1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "metadata",
    ["", "{", "[]", "null", '{"info": 3}', '{"info": {"features": []}}', "[" * 100_000],
)
def test_metadata_that_cannot_be_read_is_refused(tmp_path: Path, metadata: str) -> None:
    hugging_face(tmp_path, pictures(3))
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet").replace_schema_metadata({"huggingface": metadata})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert "'huggingface' metadata that cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("names", [[], ["a"], ["a", "a"], "ab", {"0": "a"}, [1, 2]])
def test_metadata_without_two_different_names_is_refused(tmp_path: Path, names: Any) -> None:
    hugging_face(tmp_path, pictures(3))
    text = json.dumps({"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}})
    table = pyarrow.parquet.read_table(tmp_path / "train.parquet").replace_schema_metadata({"huggingface": text})
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    assert "no list of at least two different class names" in refusal(tmp_path)


def test_the_folders_of_both_splits_have_the_same_classes(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", pictures(4), [0, 1, 0, 1])
    write_folder(tmp_path / "test", pictures(4), [0, 1, 0, 1], names=("cat", "eel"))
    assert "has the classes ['cat', 'eel']; expected ('cat', 'dog')" in refusal(tmp_path)
    source = load(settings(tmp_path, images={"classes": ["eel", "dog", "cat"]}))
    assert source.train.labels.tolist() == [1, 1, 2, 2]  # type: ignore[attr-defined]
    assert source.test.labels.tolist() == [0, 0, 2, 2]  # type: ignore[attr-defined]
    assert source.classes == 3


# What is refused.


def png_of_size(width: int, height: int) -> bytes:
    """A small PNG file that claims to be huge, every checksum right."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    stream = io.BytesIO()
    frames = [Image.fromarray(image) for image in pictures(2)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return stream.getvalue()


GOOD = image_bytes(pictures(1)[0])


@pytest.mark.parametrize(
    ("blob", "said"),
    [
        (b"", "the image has no bytes"),
        (None, "the image has no bytes"),
        (b"not an image", "the image is none of PNG, JPEG, BMP, GIF, WEBP, PPM, or is damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 6\n", "the image is none of"),
        (GOOD[:-1], "the image is cut off"),
        (GOOD[:40], "the image is cut off"),
        (GOOD[:8], "the image is cut off"),
        (GOOD[:-30] + bytes([GOOD[-30] ^ 1]) + GOOD[-29:], "a checksum does not fit"),
        (image_bytes(pictures(1)[0], "JPEG")[:-40], "cannot be read: image file is truncated"),
        (image_bytes(pictures(1)[0], "BMP")[:-10], "cannot be read"),
        (image_bytes(pictures(1)[0].astype(numpy.uint16) * 256), "mode I;16; expected 8-bit gray or color"),
        (
            image_bytes(pictures(1, (6, 5, 4))[0]),
            "mode RGBA (a palette, transparency or print colors); give data.images.mode",
        ),
        (image_bytes(pictures(1)[0], "GIF"), None),
        (animation(), "the image holds 2 frames; expected one"),
        (png_of_size(30_000, 30_000), "more than 89,478,485 pixels, Pillow's limit"),
        (png_of_size(10_000, 10_000), "more than 89,478,485 pixels, Pillow's limit"),
        (png_of_size(2**31 - 1, 2**31 - 1), "more than 89,478,485 pixels, Pillow's limit"),
        (png_of_size(0, 5), "the image"),
        (png_of_size(500, 500), "cannot be read: image file is truncated"),
    ],
)
def test_an_image_that_does_not_decode_is_refused_by_name(tmp_path: Path, blob: bytes | None, said: str | None) -> None:
    hugging_face(tmp_path, pictures(3))
    write_images(tmp_path / "train.parquet", [GOOD, blob, GOOD], [0, 1, 2], names=NAMES)
    if said is None:
        assert load(settings(tmp_path, images={"mode": "gray"})).size == 3
        return
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'train.parquet'}, row 2 (001.png): the image")
    assert said in message


def test_a_bad_file_in_a_folder_is_refused_by_its_path(tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_folder(tmp_path / name, pictures(4), [0, 1, 0, 1])
    path = tmp_path / "train" / "dog" / "001.png"
    path.write_bytes(GOOD[:-9])
    assert refusal(tmp_path) == f"{path}: the image is cut off"
    path.rename(path.with_suffix(".heic"))
    assert f"{path.with_suffix('.heic')} is no image file" in refusal(tmp_path)
    path.with_suffix(".heic").unlink()
    os.mkfifo(path)
    assert f"{path} is no image file" in refusal(tmp_path), "a pipe would be waited for"
    path.unlink()
    (tmp_path / "train" / "stray.png").write_bytes(GOOD)
    assert "is in no class folder; expected train/CLASS/stray.png" in refusal(tmp_path)


def test_a_column_without_images_is_refused(tmp_path: Path) -> None:
    people().to_parquet(tmp_path / "train.parquet")
    people().to_parquet(tmp_path / "test.parquet")
    assert "no column 'image' or 'img'; name the column of images as data.images.column" in refusal(tmp_path)
    assert "column 'age' is a column of int64; expected images" in refusal(tmp_path, images={"column": "age"})
    assert "data.images.column is 'picture'" in refusal(tmp_path, images={"column": "picture"})
    frame = people().rename(columns={"age": "image", "note": "img"})
    frame.to_parquet(tmp_path / "train.parquet")
    assert "both 'image' and 'img'" in refusal(tmp_path)
    hugging_face(tmp_path, pictures(3))
    assert "data.images.label is 'lable', and" in refusal(tmp_path, images={"label": "lable"})


def test_what_would_not_fit_in_memory_is_refused_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hugging_face(tmp_path, pictures(3))
    monkeypatch.setattr(
        images_module, "check_memory", lambda what, needed: (_ for _ in ()).throw(PrivgradError(f"{needed}"))
    )
    assert refusal(tmp_path) == str(3 * 6 * 5)


def test_what_would_not_fit_into_this_machine_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(tmp_path, pictures(3))
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}[name])
    assert "GiB of memory, and this machine has 0.0; give fewer records or smaller images" in refusal(
        tmp_path, images={"size": [60, 60]}
    )
    assert load(settings(tmp_path)).size == 3


def test_splits_of_different_shapes_are_refused(tmp_path: Path) -> None:
    hugging_face(tmp_path, pictures(3))
    write_images(tmp_path / "test.parquet", [image_bytes(pictures(1, (7, 7))[0])], [0], names=NAMES)
    message = refusal(tmp_path)
    assert "has records of shape [1, 6, 5] (torch.uint8), and" in message
    assert "of shape [1, 7, 7] (torch.uint8); expected the same in both splits" in message


def test_keys_beside_images(tmp_path: Path) -> None:
    blobs: list[bytes | None] = [image_bytes(image) for image in pictures(5)]
    for name, writers in (("train", ["bo", "al", "bo", "cy", "al"]), ("test", ["di"] * 5)):
        extra = {"writer": pyarrow.array(writers)}
        write_images(tmp_path / f"{name}.parquet", blobs, [0, 1, 2, 0, 1], names=NAMES, extra=extra)
    source = load(settings(tmp_path), key="writer")
    assert source.keys is not None
    assert source.keys.tolist() == [1, 0, 1, 2, 0]
    assert source.users == 3
    with pytest.raises(PrivgradError, match=r"key is 'author', and .*; it has 'image', 'label', 'writer'"):
        load(settings(tmp_path), key="author")
    write_folder(tmp_path / "folders", pictures(4), [0, 1, 0, 1])
    with pytest.raises(PrivgradError, match="is a folder of images, which has no columns"):
        load(settings(tmp_path / "folders", test_share=0.5), key="writer")


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_images_as_labels_or_none_at_all(tmp_path: Path, count: int) -> None:
    blobs = [Blob(GOOD, lambda: "here")] * 3
    with pytest.raises(PrivgradError, match=f"holds 3 images and {count} labels; it is damaged"):
        read_pixels(lambda: blobs, count, ImageSettings(), tmp_path / "file", [], Cache("none"))


def test_fewer_rows_than_the_file_claims_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen in fuzzing, where a flipped bit in the footer changed a count."""
    hugging_face(tmp_path, pictures(3))
    read = pyarrow.parquet.ParquetFile.read
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read", lambda *given, **more: read(*given, **more).slice(1))
    assert "claims 3 rows and holds 2; the file is damaged" in refusal(tmp_path)

"""MNIST and CIFAR-10 as they are found in $PRIVGRAD_DATA."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from privgrad.data.settings import DataSettings
from privgrad.data.source import load, training_size
from tests.data.files import settings

DATA = Path(os.environ.get("PRIVGRAD_DATA") or "data")
ROWS = 300


def prefix(name: str, root: Path) -> Path:
    """The first rows of both splits, with their schema."""
    for split in ("train", "test"):
        path = DATA / name / f"{split}.parquet"
        if not path.exists():
            pytest.skip(f"{path} is not there; set PRIVGRAD_DATA")
        table = next(pyarrow.parquet.ParquetFile(path).iter_batches(ROWS))
        pyarrow.parquet.write_table(pyarrow.Table.from_batches([table]), root / f"{split}.parquet")
    return root


@pytest.mark.parametrize(
    ("name", "column", "shape"),
    [("mnist", "image", (1, 28, 28)), ("fashion_mnist", "image", (1, 28, 28)), ("cifar10", "img", (3, 32, 32))],
)
def test_real_images_are_read_as_pillow_reads_them(
    tmp_path: Path, name: str, column: str, shape: tuple[int, ...]
) -> None:
    root = prefix(name, tmp_path)
    source = load(settings(root))
    assert (source.size, source.input_shape, source.classes) == (ROWS, shape, 10)
    inputs, labels = source.train.take(torch.arange(ROWS))  # type: ignore[attr-defined]
    table = pyarrow.parquet.read_table(root / "train.parquet")
    assert labels.tolist() == table["label"].to_pylist()
    for row in (0, 1, ROWS - 1):
        image = numpy.asarray(Image.open(io.BytesIO(table[column][row]["bytes"].as_py())), dtype=float)
        expected = image[None] if image.ndim == 2 else image.transpose(2, 0, 1)
        numpy.testing.assert_allclose(inputs[row].numpy(), expected / 127.5 - 1, atol=1e-6)
    assert len(set(labels.tolist())) == 10


@pytest.mark.parametrize(("name", "size"), [("mnist", 60_000), ("fashion_mnist", 60_000), ("cifar10", 50_000)])
def test_the_whole_sets_are_found_by_name_and_counted_without_decoding(name: str, size: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{DATA / name} is not there; set PRIVGRAD_DATA")
    assert training_size(DataSettings(source=name, cache="none")) == size

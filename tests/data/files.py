"""Real files of every kind, each written by a program that is not ours."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy
import pandas
import pyarrow
import pyarrow.parquet
from PIL import Image

from privgrad.data.settings import DataSettings, read_settings

TABLE: dict[str, Any] = {
    "target": "diagnosis",
    "classes": ["benign", "malignant"],
    "columns": {
        "age": {"kind": "numeric", "low": 0, "high": 120},
        "sex": {"kind": "categorical", "values": ["f", "m"]},
        "height": [100, 220],
    },
}
"""[data.table] for `people`."""


def settings(source: Path | str, **data: Any) -> DataSettings:
    """The settings of [data], with a file or directory and no cache unless one is given."""
    return read_settings({"source": str(source), "cache": "none", **data})


def people(count: int = 12, seed: int = 0, customers: str = "c") -> pandas.DataFrame:
    """Records of three numbers, a category, a free text with everything that CSV must quote, and a customer."""
    random = numpy.random.default_rng(seed)
    return pandas.DataFrame(
        {
            "customer": [f"{customers}{number:02d}" for number in random.integers(0, max(2, count // 3), count)],
            "age": random.integers(0, 100, count),
            "sex": random.choice(["f", "m"], count),
            "height": numpy.round(random.uniform(150, 200, count), 1),
            "note": [f'said "{number}", and\nleft' for number in range(count)],
            "diagnosis": random.choice(["benign", "malignant"], count),
        }
    )


def encoded(frame: pandas.DataFrame) -> numpy.ndarray:
    """The features that TABLE makes of people, computed anew."""
    age = frame["age"].to_numpy(float) / 60 - 1
    height = (frame["height"].to_numpy(float) - 160) / 60
    columns = [age, frame["sex"] == "f", frame["sex"] == "m", height]
    return numpy.stack(columns, axis=1).clip(-1, 1).astype(numpy.float32)


def pictures(count: int = 12, shape: tuple[int, ...] = (6, 5), seed: int = 0) -> numpy.ndarray:
    """uint8 images [count, *shape]."""
    return numpy.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=numpy.uint8)


def image_bytes(array: numpy.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    """An image file's bytes, by Pillow."""
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def write_images(
    path: Path,
    images: list[bytes | None],
    labels: Any,
    *,
    column: str = "image",
    names: list[str] | None = None,
    extra: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """A parquet file as Hugging Face's `datasets` writes it; names: of the classes, in the schema's metadata."""
    cells = [{"bytes": data, "path": f"{number:03d}.png"} for number, data in enumerate(images)]
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    values = labels if isinstance(labels, pyarrow.Array) else pyarrow.array(labels, pyarrow.int64())
    table = pyarrow.table({column: pyarrow.array(cells, image_type), "label": values, **(extra or {})})
    if names is not None:
        features = {column: {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, **options)
    return path


def write_folder(root: Path, images: numpy.ndarray, labels: Any, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """A folder of class folders of PNG files."""
    for name in names:
        (root / name).mkdir(parents=True, exist_ok=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / names[label] / f"{number:03d}.png").write_bytes(image_bytes(image))
    return root

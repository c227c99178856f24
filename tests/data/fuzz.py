"""Damaged and strange data files, and what the readers make of them: `python -m tests.data.fuzz FIRST COUNT`.

Case N is the same on every machine. Each is refused in one line, or accepted with records that an oracle agrees with: the
undamaged ones where the format has checksums, those of Python's own csv module for CSV, and anything well-formed otherwise.
"""

from __future__ import annotations

import csv
import json
import random
import resource
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import torch

from privgrad.data.settings import DataSettings
from privgrad.data.source import load
from privgrad.errors import PrivgradError
from tests.data import files

MEMORY = 24 * 2**30
COUNT = 16
TEST = files.people(8, seed=1, customers="t")


@dataclass
class Case:
    """A data set on the disk. good: the bytes of `path` before the damage, whose records the accepted ones must be."""

    settings: DataSettings
    path: Path
    key: str | None = None
    good: bytes | None = None
    expected: Callable[[], tuple[numpy.ndarray, list[int]]] | None = None


def damaged(data: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, lost, added or moved."""
    out = bytearray(data)
    for _ in range(dice.choice([1, 1, 1, 2, 8])):
        if not out:
            break
        place = dice.randrange(len(out))
        span = dice.choice([1, 2, 8, 64])
        match dice.randrange(9):
            case 0 | 1 | 2:
                out[place] ^= 1 << dice.randrange(8)
            case 3:
                out[place : place + span] = dice.randbytes(span)
            case 4:
                del out[place:]
            case 5:
                del out[place : place + span]
            case 6:
                out[place:place] = dice.choice([dice.randbytes(span), bytes(span), b"\xff" * span, out[:span]])
            case 7:
                out[place : place + span] = bytes(span)
            case 8:
                out[-dice.randrange(1, 64) :] = b""
    return bytes(out)


def rewritten(text: str, dice: random.Random) -> bytes:
    """A CSV text with one of the faults that programs and people make."""
    lines = text.split("\n")
    cells = [
        *(
            "",
            " ",
            "NA",
            "nan",
            "inf",
            "-inf",
            "1e999",
            "-1e999",
            "9" * 400,
            "1" * 70_000,
            "0x10",
            "1_000",
            "१२",
            "true",
            "None",
        ),
        *(
            "1,5",
            '"',
            '""',
            '"1',
            "\x00",
            "\ufeff",
            "\u202e",
            "'",
            "=1+1",
            "1e-400",
            "+5",
            "5.",
            ".5",
            ".",
            "-",
            "e5",
            "[1]",
            "{}",
        ),
    ]
    match dice.randrange(16):
        case 0:
            return ("\ufeff" + text).encode()
        case 1:
            return text.encode(dice.choice(["utf-16", "utf-16-le", "utf-16-be", "utf-32"]))
        case 2:
            return text.replace("benign", "bénign").encode(dice.choice(["latin-1", "cp1252", "utf-8", "utf-7"]))
        case 3:
            lines[0] = lines[0].replace(*dice.sample(files.people().columns.to_list(), 2))
        case 4:
            return text.replace(",", dice.choice([";", "\t", "|", ", ", ",,"])).encode()
        case 5:
            return text.replace("\n", dice.choice(["\r\n", "\r", "\n\n", "\n\r"])).encode()
        case 6:
            lines[dice.randrange(len(lines))] += dice.choice([",", ",1", '"', "\x00", '",'])
        case 7:
            lines.pop(dice.randrange(len(lines)))
        case 8:
            lines[0] = lines[0].upper() if dice.random() < 0.5 else " " + lines[0]
        case 9:
            return dice.choice(["", "\n", ",", '"', "\ufeff", "age", lines[0], lines[0] + "\n", "\x00" * 99]).encode()
        case _:
            place = dice.randrange(len(lines))
            row = lines[place].split(",")
            row[dice.randrange(len(row))] = dice.choice(cells)
            lines[place] = ",".join(row)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def csv_case(root: Path, dice: random.Random) -> Case:
    people = files.people(COUNT)
    text = people.to_csv(index=False)
    path = root / "train.csv"
    path.write_bytes(rewritten(text, dice) if dice.random() < 0.6 else damaged(text.encode(), dice))
    TEST.to_csv(root / "test.csv", index=False)
    table = {**files.TABLE, "missing": dice.choice(["refuse", "refuse", "zero"])}
    return Case(
        files.settings(root, table=table), path, key="customer", expected=lambda: csv_oracle(path, table["missing"])
    )


def csv_oracle(path: Path, missing: str) -> tuple[numpy.ndarray, list[int]]:
    """Features and labels by Python's csv module and plain loops."""
    csv.field_size_limit(10**7)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        header, *rows = (row for row in csv.reader(stream) if row)
    features, labels = [], []
    for row in rows:
        assert len(row) == len(header)
        cell = {name: value.strip(" \t") for name, value in zip(header, row, strict=True)}
        labels.append(files.TABLE["classes"].index(cell["diagnosis"]))
        features.append(
            [number(cell["age"], 0, 120), cell["sex"] == "f", cell["sex"] == "m", number(cell["height"], 100, 220)]
        )
        if missing == "refuse":
            assert None not in features[-1]
            assert cell["sex"] in ("f", "m")
    return numpy.array(
        [[0 if value is None else value for value in row] for row in features], dtype=numpy.float32
    ), labels


def number(text: str, low: float, high: float) -> float | None:
    if not text.isascii() or "_" in text:
        return None
    try:
        value = float(text)
    except ValueError:
        return None
    if not abs(value) < float("inf"):
        return None
    return 2 * (min(max(value, low), high) - low) / (high - low) - 1


def strange_column(count: int, dice: random.Random) -> pyarrow.Array:
    """A column of a type that a table may well have, and that is not the expected one."""
    values: list[Callable[[], pyarrow.Array]] = [
        lambda: pyarrow.nulls(count),
        lambda: pyarrow.array([None] * count, pyarrow.int64()),
        lambda: pyarrow.array([[1, 2]] * count),
        lambda: pyarrow.array([{"a": 1}] * count),
        lambda: pyarrow.array([b"\xff"] * count),
        lambda: pyarrow.array([2**63] * count, pyarrow.uint64()),
        lambda: pyarrow.array([-1] * count),
        lambda: pyarrow.array([1e308, float("nan"), float("inf")] * count).slice(0, count),
        lambda: pyarrow.array([True, False] * count).slice(0, count),
        lambda: pyarrow.array(["1", "2"] * count).slice(0, count).dictionary_encode(),
        lambda: pyarrow.array([0] * count, pyarrow.timestamp("ns")),
        lambda: pyarrow.array([0] * count, pyarrow.date32()),
        lambda: pyarrow.array([0] * count, pyarrow.duration("s")),
        lambda: pyarrow.array([1] * count, pyarrow.decimal128(38, 10)),
        lambda: pyarrow.array([1] * count, pyarrow.decimal256(76, 70)),
        lambda: pyarrow.array([1.5] * count, pyarrow.float16()),
        lambda: pyarrow.array(["x" * 40_000] * count, pyarrow.large_string()),
        lambda: pyarrow.array([[("k", 1)]] * count, pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        lambda: pyarrow.array([{"bytes": None, "path": "x"}] * count),
        lambda: pyarrow.array([None if number % 3 else {"bytes": b"x", "path": None} for number in range(count)]),
        lambda: pyarrow.array(["benign", None] * count).slice(0, count),
    ]
    return dice.choice(values)()


def parquet_table_case(root: Path, dice: random.Random) -> Case:
    table = pyarrow.Table.from_pandas(files.people(COUNT))
    path = root / "train.parquet"
    good = None
    strange = dice.random() < 0.4
    if strange:
        place = dice.randrange(table.num_columns)
        table = table.set_column(place, table.column_names[place], strange_column(COUNT, dice))
    compression = dice.choice(["zstd", "snappy", "none", "gzip"])
    pyarrow.parquet.write_table(
        table, path, write_page_checksum=True, compression=compression, use_dictionary=dice.random() < 0.5
    )
    if not strange:
        good = path.read_bytes()
        path.write_bytes(damaged(good, dice))
    TEST.to_parquet(root / "test.parquet")
    return Case(files.settings(root, table=files.TABLE), path, key="customer", good=good)


def parquet_image_case(root: Path, dice: random.Random) -> Case:
    kind = dice.choice(["PNG", "PNG", "JPEG"])
    images: list[bytes | None] = [files.image_bytes(image, kind) for image in files.pictures(COUNT)]
    labels: Any = [number % 3 for number in range(COUNT)]
    names = ["a", "b", "c"]
    files.write_images(root / "test.parquet", images[:2], [0, 1], names=names)
    path = root / "train.parquet"
    files.write_images(path, images, labels, names=names, write_page_checksum=True)
    good: bytes | None = path.read_bytes()
    match dice.randrange(4):
        case 0:  # a damaged image in a good file
            place = dice.randrange(COUNT)
            images[place] = dice.choice([damaged(images[place] or b"", dice), None, b"", b"GIF89a" + bytes(9)])
            files.write_images(path, images, labels, names=names)
            good = good if kind == "PNG" else None  # JPEG has no checksum
        case 1:
            files.write_images(path, images, strange_column(COUNT, dice), names=names)
            good = None
        case _:
            path.write_bytes(damaged(good or b"", dice))
    return Case(files.settings(root), path, good=good)


def npz_case(root: Path, dice: random.Random) -> Case:
    path = root / "data.npz"
    pixels = dice.random() < 0.5
    inputs = files.pictures(COUNT) if pixels else numpy.random.default_rng(0).normal(size=(COUNT, 4))
    arrays: dict[str, Any] = {"x": inputs, "y": numpy.arange(COUNT) % 3, "user": numpy.arange(COUNT) // 2}
    strange = dice.random() < 0.3
    if strange:
        arrays[dice.choice(list(arrays))] = dice.choice(
            [
                numpy.array([{}] * COUNT, dtype=object),
                numpy.full((COUNT, 4), numpy.nan),
                numpy.zeros((0, 4)),
                numpy.zeros(COUNT, dtype=[("a", int)]),
                numpy.zeros((COUNT, 2), dtype=complex),
                numpy.array(["1"] * COUNT),
                numpy.array(3.0),
                numpy.full((COUNT, 2), 1e300),
                numpy.zeros(COUNT, "M8[s]"),
                numpy.full(COUNT, 2**63, dtype=numpy.uint64),
                numpy.full(COUNT, -1),
                numpy.zeros((COUNT, 2, 3, 3, 3), numpy.uint8),
            ]
        )
    (numpy.savez if dice.random() < 0.5 else numpy.savez_compressed)(path, **arrays)
    good = None if strange else path.read_bytes()
    if good is not None:
        path.write_bytes(damaged(good, dice))
    return Case(files.settings(path, npz={"classes": 3}, test_share=0.3), path, key="user", good=good)


def folder_case(root: Path, dice: random.Random) -> Case:
    images, labels = files.pictures(6), [0, 1] * 3
    files.write_folder(root / "train", images, labels)
    files.write_folder(root / "test", images, labels)
    path = dice.choice(sorted((root / "train").rglob("*.png")))
    good = path.read_bytes()
    path.write_bytes(damaged(good, dice))
    return Case(files.settings(root), path, good=good)


MAKERS = (csv_case, csv_case, parquet_table_case, parquet_image_case, npz_case, folder_case)


def verdict(case: Case) -> str:
    """ "accepted" or "refused: ...". Anything else is raised."""
    try:
        source = load(case.settings, key=case.key)
    except PrivgradError as error:
        message = str(error)
        assert "\n" not in message, message
        assert len(message) < 1000, message
        return f"refused: {message}"
    inputs, labels = source.train.take(torch.arange(source.size))  # type: ignore[attr-defined]
    assert source.size == len(inputs) == len(labels) > 0
    assert bool(inputs.isfinite().all())
    assert 0 <= int(labels.min()) <= int(labels.max()) < source.classes
    if case.key is not None:
        assert source.keys is not None
        assert sorted(set(source.keys.tolist())) == list(range(source.users or 0))
    if case.good is not None:
        case.path.write_bytes(case.good)
        whole = load(case.settings, key=case.key)
        good_inputs, good_labels = whole.train.take(torch.arange(whole.size))  # type: ignore[attr-defined]
        assert torch.equal(labels, good_labels), "damaged labels were accepted"
        assert torch.equal(inputs, good_inputs), "damaged inputs were accepted"
    if case.expected is not None:
        oracle_inputs, oracle_labels = case.expected()
        assert labels.tolist() == oracle_labels
        numpy.testing.assert_allclose(inputs.numpy(), oracle_inputs, atol=1e-6)
    return "accepted"


def make(number: int, root: Path) -> Case:
    """Case `number`, with its files in `root`."""
    return MAKERS[number % len(MAKERS)](root, random.Random(number))


def main() -> None:
    """FIRST COUNT [FILE]. One line of JSON before each case and one after: a parent sees which case a crash was in."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    first, count = map(int, sys.argv[1:3])
    tally: Counter[str] = Counter()
    failures = []
    torch.set_num_threads(1)
    for case_number in range(first, first + count):
        print(json.dumps({"start": case_number}), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = verdict(make(case_number, Path(folder))).replace(folder, "DIR")
            except BaseException as error:
                said = "FAILED: " + "".join(traceback.format_exception(error))
        kind = MAKERS[case_number % len(MAKERS)].__name__
        print(json.dumps({"case": case_number, "kind": kind, "said": said}), flush=True)
        tally[f"{kind.removesuffix('_case')}: {said.split(':')[0]}"] += 1
        failures += [f"case {case_number}: {said}"] if said.startswith("FAILED") else []
    if len(sys.argv) > 3:
        command = f"python -m tests.data.fuzz {first} {count} FILE"
        result = {"command": command, "cases": count, "failures": failures, "outcomes": dict(sorted(tally.items()))}
        Path(sys.argv[3]).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Decoded images are kept for their owner only, used the second time, and made again when anything is not as it was."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from privgrad.data import images
from privgrad.data.source import Source, load, training_size
from privgrad.errors import PrivgradError
from tests.data.files import image_bytes, people, pictures, settings, write_folder, write_images

NAMES = ["a", "b"]


def write(root: Path, seed: int = 0, count: int = 6) -> Path:
    for name, number in (("train", count), ("test", 2)):
        blobs: list[bytes | None] = [image_bytes(image) for image in pictures(number, seed=seed)]
        write_images(root / f"{name}.parquet", blobs, [row % 2 for row in range(number)], names=NAMES)
    return root


def pixels(source: Source) -> torch.Tensor:
    return source.train.inputs  # type: ignore[attr-defined]


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for every image that is decoded."""
    seen: list[int] = []
    decode = images.decode

    def counted(*arguments: Any) -> Any:
        seen.append(1)
        return decode(*arguments)

    monkeypatch.setattr(images, "decode", counted)
    return seen


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def test_images_are_decoded_once(
    tmp_path: Path, kept: Path, decoded: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data")
    first = load(settings(root, cache=str(kept)))
    assert len(decoded) == 8
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"privgrad: a decoded copy of the private images is kept in {kept} (only you can read it); "
        "data.cache = 'none' keeps none\n"
    )
    second = load(settings(root, cache=str(kept)))
    assert len(decoded) == 8
    assert capsys.readouterr().err == "", "said once"
    assert torch.equal(pixels(first), pixels(second))
    assert torch.equal(first.train.labels, second.train.labels)  # type: ignore[attr-defined]


def test_only_the_owner_can_read_the_copy(tmp_path: Path, kept: Path) -> None:
    before = os.umask(0)
    try:
        load(settings(write(tmp_path / "data"), cache=str(kept / "deeper")))
    finally:
        os.umask(before)
    assert stat.S_IMODE((kept / "deeper").stat().st_mode) == 0o700
    files = list((kept / "deeper").iterdir())
    assert len(files) == 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_directory_that_others_can_read_is_refused(tmp_path: Path, kept: Path) -> None:
    root = write(tmp_path / "data")
    kept.mkdir(mode=0o755)
    with pytest.raises(PrivgradError, match=f"is open to other users, .* run chmod 700 {kept}, or choose another"):
        load(settings(root, cache=str(kept)))
    assert not list(kept.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(PrivgradError, match="is no directory"):
        load(settings(root, cache=str(tmp_path / "file")))


@pytest.mark.parametrize("variable", ["PRIVGRAD_CACHE", "HOME"])
def test_auto_is_the_variable_or_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, decoded: list[int]
) -> None:
    monkeypatch.delenv("PRIVGRAD_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    root = write(tmp_path / "data")
    for _ in range(2):
        load(settings(root, cache="auto"))
    assert len(decoded) == 8
    where = tmp_path / "there" if variable == "PRIVGRAD_CACHE" else tmp_path / "there" / ".cache" / "privgrad"
    assert len(list(where.glob("*.pixels"))) == 2
    assert stat.S_IMODE(where.stat().st_mode) == 0o700


def test_none_keeps_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]) -> None:
    monkeypatch.setenv("PRIVGRAD_CACHE", str(tmp_path / "kept"))
    root = write(tmp_path / "data")
    for _ in range(2):
        load(settings(root, cache="none"))
    assert len(decoded) == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: flip(path, -1),
        lambda path: flip(path, 5),
        lambda path: flip(path, len(path.read_bytes().split(b"\n", 1)[0]) + 3),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\n"),
        lambda path: path.write_bytes(b"null\n"),
        lambda path: path.write_bytes(b"[" * 5000),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"shape":[', b'"shape":[-')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"crc":', b'"src":')),
        lambda path: path.write_bytes(path.read_bytes().replace(b'"shape":[6,1,6,5]', b'"shape":[6,1,5,6]')),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_corrupt_copy_is_made_again(
    tmp_path: Path, kept: Path, decoded: list[int], harm: Callable[[Path], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    root = write(tmp_path / "data")
    good = load(settings(root, cache=str(kept)))
    for path in kept.iterdir():
        harm(path)
    again = load(settings(root, cache=str(kept)))
    assert torch.equal(pixels(again), pixels(good))
    assert len(decoded) > 8


def test_a_changed_file_is_decoded_again_and_its_old_copy_is_gone(
    tmp_path: Path, kept: Path, decoded: list[int]
) -> None:
    root = write(tmp_path / "data")
    load(settings(root, cache=str(kept)))
    write(root, seed=5)
    changed = load(settings(root, cache=str(kept)))
    assert len(decoded) == 16
    assert numpy.array_equal(pixels(changed)[:, 0].numpy(), pictures(6, seed=5))
    assert len(list(kept.iterdir())) == 2
    # The same size, but another time: looked at anew.
    found = (root / "train.parquet").stat()
    os.utime(root / "train.parquet", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    load(settings(root, cache=str(kept)))
    assert len(decoded) == 22
    # Other content of the same size, with the old time: as archives and copies leave it.
    content = (root / "train.parquet").read_bytes()
    (root / "train.parquet").write_bytes(content)
    os.utime(root / "train.parquet", ns=(found.st_atime_ns, found.st_mtime_ns + 1))
    load(settings(root, cache=str(kept)))
    assert len(decoded) == 28


def test_one_changed_file_in_a_folder_is_seen(tmp_path: Path, kept: Path, decoded: list[int]) -> None:
    for name in ("train", "test"):
        write_folder(tmp_path / "data" / name, pictures(4), [0, 1, 0, 1])
    for _ in range(2):
        load(settings(tmp_path / "data", cache=str(kept)))
    assert len(decoded) == 8
    path = tmp_path / "data" / "train" / "cat" / "002.png"
    path.write_bytes(image_bytes(pictures(1, seed=8)[0]))
    source = load(settings(tmp_path / "data", cache=str(kept)))
    assert len(decoded) == 12
    assert numpy.array_equal(pixels(source)[1, 0].numpy(), pictures(1, seed=8)[0])
    path.rename(path.with_name("000a.png"))
    load(settings(tmp_path / "data", cache=str(kept)))
    assert len(decoded) == 16


def test_other_settings_have_a_copy_of_their_own(tmp_path: Path, kept: Path, decoded: list[int]) -> None:
    root = write(tmp_path / "data")
    load(settings(root, cache=str(kept)))
    assert load(settings(root, cache=str(kept), images={"size": [3, 3]})).input_shape == (1, 3, 3)
    assert load(settings(root, cache=str(kept), images={"mode": "color"})).input_shape == (3, 6, 5)
    assert load(settings(root, cache=str(kept))).input_shape == (1, 6, 5)
    assert len(decoded) == 24
    # Constants of the scaling are no matter of decoding.
    load(settings(root, cache=str(kept), images={"mean": 0.1}))
    assert len(decoded) == 24


def test_refused_data_leaves_nothing(tmp_path: Path, kept: Path) -> None:
    root = write(tmp_path / "data")
    write_images(root / "test.parquet", [b"?"], [0], names=NAMES)
    with pytest.raises(PrivgradError):
        load(settings(root, cache=str(kept)))
    write_images(root / "test.parquet", [image_bytes(pictures(1, (9, 9))[0])], [0], names=NAMES)
    with pytest.raises(PrivgradError, match="expected the same in both splits"):
        load(settings(root, cache=str(kept)))
    assert not kept.exists()


def test_a_table_looks_at_no_cache(tmp_path: Path, kept: Path) -> None:
    from tests.data.files import TABLE

    kept.mkdir(mode=0o777)
    for name in ("train", "test"):
        people().to_csv(tmp_path / f"{name}.csv", index=False)
    assert load(settings(tmp_path, table=TABLE, cache=str(kept))).size == 12


def test_counting_decodes_nothing(tmp_path: Path, kept: Path, decoded: list[int]) -> None:
    assert training_size(settings(write(tmp_path / "data"), cache=str(kept))) == 6
    assert decoded == []
    assert not kept.exists()


def test_a_cache_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert load(settings(write(tmp_path / "data"), cache=str(kept))).size == 6
    assert (
        capsys.readouterr().err == f"privgrad: no decoded copy of the images is kept: {kept}: No space left on device\n"
    )
    assert list(kept.iterdir()) == [], "no half of a file is left"


def test_a_directory_that_cannot_be_looked_at_does_not_stop_it_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert load(settings(write(tmp_path / "data"), cache=str(tmp_path / "file" / "kept"))).size == 6
    assert (
        capsys.readouterr().err
        == f"privgrad: no decoded copy of the images is kept: {tmp_path}/file/kept: Not a directory\n"
    )


def test_what_a_crash_left_half_written_is_removed_a_day_later(tmp_path: Path, kept: Path) -> None:
    root = write(tmp_path / "data")
    load(settings(root, cache=str(kept)))
    (old, new, foreign) = (
        kept / f".{path.stem}.{n}.tmp" for n, path in enumerate([*sorted(kept.iterdir()), kept / "x"])
    )
    for path in (old, new, foreign):
        path.write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    for path in (old, foreign):
        os.utime(path, (yesterday, yesterday))
    write(root, seed=3)
    load(settings(root, cache=str(kept)))
    assert [path.exists() for path in (old, new, foreign)] == [False, True, True]


def test_progress_is_shown_when_decoding_takes_long_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from privgrad.data import progress

    root = write(tmp_path / "data", count=8)
    load(settings(root))
    assert capsys.readouterr().err == ""
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    load(settings(root))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "decoding data/train.parquet: 1/8"
    assert 3 <= len(lines) <= 6
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    load(settings(root))
    assert "decoding data/train.parquet" in capsys.readouterr().err

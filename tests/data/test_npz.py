"""Arrays that numpy saved: floats as they are, pixels scaled, nothing unpickled, nothing damaged accepted."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from privgrad.data.source import Source, load
from privgrad.errors import PrivgradError
from tests.data.files import pictures, settings

N = 12
Y = numpy.arange(N) % 3
NPZ = {"classes": 3}


def features(count: int = N) -> numpy.ndarray:
    return numpy.random.default_rng(0).normal(size=(count, 4))


def saved(path: Path, **arrays: Any) -> Path:
    numpy.savez(path, **{"x": features(), "y": Y, **arrays})
    return path


def refusal(path: Path, **data: Any) -> str:
    with pytest.raises(PrivgradError) as error:
        load(settings(path, **{"npz": NPZ, "test_share": 0.3, **data}))
    assert "\n" not in str(error.value)
    return str(error.value)


def all_of(source: Source) -> tuple[torch.Tensor, torch.Tensor]:
    return source.train.take(torch.arange(source.size))  # type: ignore[attr-defined]


@pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8"])
def test_both_splits_in_one_file(tmp_path: Path, save: Any, dtype: str) -> None:
    x = features().astype(dtype)
    save(tmp_path / "d.npz", x_train=x, y_train=Y.astype(numpy.uint8), x_test=x[:5], y_test=Y[:5])
    source = load(settings(tmp_path / "d.npz", npz=NPZ))
    inputs, labels = all_of(source)
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.from_numpy(x.astype(numpy.float32)))
    assert labels.tolist() == Y.tolist()
    assert (source.size, len(source.test), source.classes, source.scaling) == (N, 5, 3, "as given")  # type: ignore[arg-type]
    assert source.name == "d"


def test_files_beside_each_other_and_arrays_by_other_names(tmp_path: Path) -> None:
    for name in ("train", "test"):
        numpy.savez(tmp_path / f"{name}.npz", data=features(), digit=Y)
    source = load(settings(tmp_path, npz={**NPZ, "inputs": "data", "labels": "digit"}))
    assert source.size == N
    assert "data.npz.labels asks for the array 'y', and" in refusal(tmp_path, test_share=None)
    assert "it has 'data', 'digit'" in refusal(tmp_path, test_share=None)


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((8, 7), (1, 8, 7)),
        ((8, 7, 3), (3, 8, 7)),
        ((3, 8, 7), (3, 8, 7)),
        ((8, 7, 1), (1, 8, 7)),
        ((1, 8, 7), (1, 8, 7)),
    ],
)
def test_uint8_arrays_are_pixels(tmp_path: Path, shape: tuple[int, ...], found: tuple[int, ...]) -> None:
    array = pictures(N, shape)
    for name in ("train", "test"):
        saved(tmp_path / f"{name}.npz", x=array)
    source = load(settings(tmp_path, npz=NPZ, images={"mean": 0.0, "std": 1.0}))
    assert source.input_shape == found
    last = len(shape) == 3 and shape[2] in (1, 3)
    expected = array.transpose(0, 3, 1, 2) if last else array.reshape(N, *found)
    numpy.testing.assert_allclose(all_of(source)[0].numpy(), expected / 255, atol=1e-6)
    assert source.scaling == "pixels / 255, less 0, over 1 (stated constants)"


def test_rows_of_pixels_stay_rows(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz", x=pictures(N, (20,)))
    assert load(settings(path, npz=NPZ, test_share=0.3)).input_shape == (20,)
    assert "has 2 numbers, and the images have no channels" in refusal(path, images={"mean": [0.1, 0.2]})


def test_keys_are_an_array_beside(tmp_path: Path) -> None:
    users = numpy.array([7, 7, 3, 3, 9, 9, 7, 3, 9, 1, 1, 1])
    arrays = {"x_train": features(), "y_train": Y, "x_test": features(), "y_test": Y, "user_test": users + 100}
    numpy.savez(tmp_path / "d.npz", user_train=users, **arrays)
    source = load(settings(tmp_path / "d.npz", npz=NPZ), key="user")
    assert source.keys is not None
    assert source.keys.tolist() == [2, 2, 1, 1, 3, 3, 2, 1, 3, 0, 0, 0]
    assert source.users == 4
    with pytest.raises(PrivgradError, match=r"key asks for the array 'owner_train', and .* it has 'user_train'"):
        load(settings(tmp_path / "d.npz", npz=NPZ), key="owner")


def test_one_user_is_one_whatever_spaces_are_around(tmp_path: Path) -> None:
    whole = numpy.array(["u", " u", "u ", "v"] * 3)
    arrays = {"x_train": features(), "y_train": Y, "x_test": features() + 1, "y_test": Y}
    numpy.savez(tmp_path / "both.npz", user_train=whole, user_test=numpy.array(["w"] * 12), **arrays)
    assert load(settings(tmp_path / "both.npz", npz=NPZ), key="user").users == 2


@pytest.mark.parametrize(
    ("pixels", "data", "key"),
    [
        (True, {"images": {"size": [32, 32]}}, "data.images.size"),
        (True, {"images": {"mode": "color"}}, "data.images.mode"),
        (True, {"images": {"label": "nonsense"}}, "data.images.label"),
        (True, {"images": {"classes": 77}}, "data.images.classes"),
        (False, {"images": {"mean": 0.1}}, "data.images.mean"),
        (False, {"images": {"std": 77.0}}, "data.images.std"),
    ],
)
def test_settings_that_would_not_be_heeded_are_refused(tmp_path: Path, pixels: bool, data: Any, key: str) -> None:
    """The certificate would claim what was never done."""
    path = saved(tmp_path / "d.npz", **({"x": pictures(N)} if pixels else {}))
    assert f"{key} is given, and {path} is read without it; leave it out" in refusal(path, **data)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (numpy.arange(N - 1), "expected one key per record, [12]"),
        (numpy.zeros((N, 2)), "expected one key per record, [12]"),
        (numpy.array([1.0] * 4 + [numpy.nan] * 8), "row 5: the key is missing"),
        (numpy.array(["a"] * 4 + [""] * 8), "row 5: the key is missing"),
        (numpy.array(["a"] * 4 + [" "] * 8), "row 5: the key is missing"),
        (numpy.array([b"a"] * 4 + [b""] * 8), "row 5: the key is missing"),
        (numpy.array(["2001-01-01"] * 4 + ["NaT"] * 8, "M8[D]"), "row 5: the key is missing"),
        (numpy.array([{}] * N, dtype=object), "Object arrays cannot be loaded"),
    ],
)
def test_bad_keys_are_refused(tmp_path: Path, keys: numpy.ndarray, said: str) -> None:
    path = saved(tmp_path / "d.npz", user=keys)
    with pytest.raises(PrivgradError) as error:
        load(settings(path, npz=NPZ, test_share=0.3), key="user")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (
            {"x": numpy.full((N, 2), numpy.nan)},
            "array 'x', row 1 is not finite; expected float32 numbers without nan and inf",
        ),
        ({"x": numpy.array([[1.0]] * 7 + [[numpy.inf]] + [[1.0]] * 4)}, "array 'x', row 8 is not finite"),
        ({"x": numpy.array([[1.0]] * 9 + [[1e200]] + [[1.0]] * 2)}, "array 'x', row 10 is not finite"),
        (
            {"x": numpy.zeros((N, 2), numpy.int64)},
            "array 'x' is int64 of shape [12, 2]; expected floats (features) or uint8",
        ),
        ({"x": numpy.zeros((N, 2), bool)}, "array 'x' is bool of shape [12, 2]; expected floats"),
        ({"x": numpy.zeros((N, 2), complex)}, "array 'x' is complex128 of shape [12, 2]; expected floats"),
        ({"x": numpy.array([["a"]] * N)}, "array 'x' is <U1 of shape [12, 1]; expected floats"),
        ({"x": numpy.zeros(N, [("a", float)])}, "expected [records, features]"),
        ({"x": numpy.zeros(N)}, "array 'x' is float64 of shape [12]; expected [records, features] or images"),
        ({"x": numpy.array(1.0)}, "array 'x' is float64 of shape []; expected [records, features] or images"),
        ({"x": numpy.zeros((N, 0))}, "array 'x' is float64 of shape [12, 0]; expected [records, features]"),
        ({"x": features(7)}, "as many records as 'y' has (12)"),
        ({"x": pictures(N, (5, 6, 7))}, "with 1 or 3 channels"),
        ({"x": pictures(N, (3, 6, 3))}, "with 1 or 3 channels"),
        ({"x": pictures(N, (3, 3, 6, 3))}, "with 1 or 3 channels"),
        ({"x": numpy.array([[None]] * N, dtype=object)}, "Object arrays cannot be loaded when allow_pickle=False"),
        ({"y": numpy.array([0] * N, dtype=object)}, "Object arrays cannot be loaded when allow_pickle=False"),
        (
            {"y": Y.astype(float)},
            "array 'y' is float64 of shape [12]; expected labels, whole numbers of shape [records]",
        ),
        ({"y": Y.astype(bool)}, "array 'y' is bool of shape [12]; expected labels"),
        ({"y": Y[:, None]}, "array 'y' is int64 of shape [12, 1]; expected labels"),
        ({"y": Y + 1}, "array 'y', row 3: label 3 is out of range; expected 0 to 2 (3 classes)"),
        ({"y": numpy.full(N, 2**63, numpy.uint64)}, "array 'y', row 1: label 9223372036854775808 is out of range"),
        ({"x": features(0), "y": Y[:0]}, "holds no records; expected at least one"),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(tmp_path: Path, arrays: dict[str, Any], said: str) -> None:
    assert said in refusal(saved(tmp_path / "d.npz", **arrays))


def test_the_number_of_classes_is_stated(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz")
    assert "has no class names; state them, or how many there are, as data.npz.classes = 10" in refusal(path, npz={})
    assert load(settings(path, npz={"classes": ["a", "b", "c", "d"]}, test_share=0.3)).classes == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"not a zip file", "cannot be read: File is not a zip file"),
        (b"\x80\x04N.", "cannot be read: File is not a zip file"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    assert said in refusal(tmp_path / "d.npz")


def test_a_single_array_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "d.npz").open("wb") as stream:
        numpy.save(stream, features())
    assert "File is not a zip file" in refusal(tmp_path / "d.npz")


def archive(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, data in members.items():
            out.writestr(f"{name}.npy", data)
    return path


def npy(array: numpy.ndarray, header: bytes | None = None) -> bytes:
    stream = io.BytesIO()
    numpy.save(stream, array)
    data = stream.getvalue()
    return data if header is None else data.replace(b"(12, 4)", header)


def test_an_array_that_is_not_what_its_header_says_is_refused(tmp_path: Path) -> None:
    good = {"x": npy(features()), "y": npy(Y)}
    assert load(settings(archive(tmp_path / "good.npz", **good), npz=NPZ, test_share=0.3)).classes == 3
    less = archive(tmp_path / "less.npz", x=npy(features(), b"(12, 3)"), y=good["y"])
    assert "array 'x' is damaged: it holds more than its shape says" in refusal(less)
    more = archive(tmp_path / "more.npz", x=npy(features(), b"(12, 9)"), y=good["y"])
    assert "array 'x' cannot be read" in refusal(more)
    huge = archive(tmp_path / "huge.npz", x=npy(features(), b"(12, 9" + b"9" * 20 + b")"), y=good["y"])
    assert "array 'x' cannot be read" in refusal(huge)
    for text in (b"(-2, 4)", b"(12,4e)", b"__imp__", b"(12, x)"):
        strange = archive(tmp_path / "strange.npz", x=npy(features(), text), y=good["y"])
        assert "array 'x' cannot be read" in refusal(strange)


def test_an_archive_that_would_not_fit_in_memory_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path = archive(tmp_path / "bomb.npz", x=bytes(10**7), y=npy(Y))
    assert path.stat().st_size < 10**5
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}[name])
    assert "array 'x' needs 0.0 GiB of memory, and this machine has 0.0" in refusal(path)


def test_two_arrays_of_one_name_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.npz")
    with zipfile.ZipFile(path, "a") as out, pytest.warns(UserWarning, match="Duplicate name"):
        out.writestr("y.npy", npy(Y))
    assert "holds two arrays called 'y'" in refusal(path)


def test_an_encrypted_archive_is_refused(tmp_path: Path) -> None:
    data = bytearray(saved(tmp_path / "d.npz").read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := data.find(mark, place + 1)) >= 0:
            data[place + offset] |= 1
    (tmp_path / "d.npz").write_bytes(data)
    assert "is encrypted, password required" in refusal(tmp_path / "d.npz")

"""Trees in safetensors files: what goes in comes out, and a file is whole or is refused."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from privgrad.errors import PrivgradError
from privgrad.training.checkpoint import load_tree, save_tree, save_weights


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def equal(one: Any, other: Any) -> bool:
    """Equal in structure, type and bits."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype and one.shape == other.shape
        return same and torch.equal(bits(one), bits(other))
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other) or (one != one and other != other)


def round_trip(path: Path, tree: Any) -> Any:
    save_tree(path / "tree", tree)
    return load_tree(path / "tree")


@pytest.mark.parametrize(
    "tree",
    [
        {},
        [],
        (),
        None,
        True,
        0,
        -1.5e-300,
        10**30,
        "",
        'text with "quotes", a line\nand an accent: é',
        {"nested": {0: {1: {"deep": [1, (2, [3.0, None])]}}}},
        {0: "int", "0": "text"},
        {1: True, 2: 1, 3: 1.0},
        {None: 1, False: 2, 1.5: 3},
        (0.9, 0.999),
        [(), [], {}],
        {"tensor": 1, "dict": 2, "list": 3, "value": 4, "tuple": False},
        math.inf,
        -math.inf,
        math.nan,
    ],
    ids=repr,
)
def test_plain_trees_come_back_with_their_types(tmp_path: Path, tree: Any) -> None:
    assert equal(round_trip(tmp_path, tree), tree)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int8,
        torch.uint8,
    ],
)
def test_tensors_come_back_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (100 * torch.randn(3, 5)).to(dtype)
    assert equal(round_trip(tmp_path, {"a": tensor, "b": [tensor[0]]}), {"a": tensor, "b": [tensor[0]]})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3.0),
        torch.zeros(0, 4),
        torch.tensor([True, False]),
        torch.arange(12).view(3, 4).T,
        torch.arange(12)[::2],
        torch.tensor([math.nan, math.inf, -0.0]),
        torch.zeros(2).expand(3, 2),
    ],
    ids=["scalar", "empty", "bool", "transposed", "strided", "not finite", "expanded"],
)
def test_tensors_of_any_form_come_back(tmp_path: Path, tensor: torch.Tensor) -> None:
    assert equal(round_trip(tmp_path, tensor), tensor)


def test_one_tensor_at_two_places_comes_back_at_both(tmp_path: Path) -> None:
    shared = torch.randn(3)
    loaded = round_trip(tmp_path, {"one": shared, "other": shared, "part": shared[:2]})
    assert equal(loaded, {"one": shared, "other": shared, "part": shared[:2]})


def test_a_loaded_tensor_is_no_view_of_the_saved_one(tmp_path: Path) -> None:
    tensor = torch.zeros(2)
    loaded = round_trip(tmp_path, tensor)
    tensor.add_(1)
    assert torch.equal(loaded, torch.zeros(2))


def test_parameters_come_back_as_plain_tensors_without_a_graph(tmp_path: Path) -> None:
    loaded = round_trip(tmp_path, nn.Linear(2, 2).weight)
    assert type(loaded) is torch.Tensor
    assert not loaded.requires_grad


def test_states_of_models_and_optimizers_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).bfloat16()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True)
    model(torch.randn(5, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    state = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict()}
    loaded = round_trip(tmp_path, state)
    assert equal(loaded, state)
    optimizer.load_state_dict(loaded["optimizer"])


def test_ordered_dictionaries_come_back_as_dictionaries_in_their_order(tmp_path: Path) -> None:
    assert list(round_trip(tmp_path, OrderedDict([("b", 1), ("a", 2)]))) == ["b", "a"]


class Thing:
    pass


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        (Thing(), "Thing"),
        ({"deep": [1, (2, Thing())]}, "Thing"),
        ({1, 2}, "set"),
        (b"bytes", "bytes"),
        (1j, "complex"),
        (torch.float32, "dtype"),
        (print, "builtin_function_or_method"),
        (Thing, "type"),
    ],
)
def test_objects_are_refused_by_their_type_and_nothing_is_written(tmp_path: Path, tree: Any, named: str) -> None:
    with pytest.raises(PrivgradError, match=f"cannot hold a {named};"):
        save_tree(tmp_path / "tree", tree)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "tree",
    [
        {(1, 2): "a tuple becomes a list, which is no key: refused only when it is loaded, as damaged"},
        {torch.float32: "no JSON: TypeError"},
        {b"bytes": "no JSON: TypeError"},
        torch.zeros(2, dtype=torch.complex128),
        torch.eye(2).to_sparse(),
    ],
    ids=["tuple key", "dtype key", "bytes key", "complex128", "sparse"],
)
def test_what_cannot_be_stored_is_refused_when_it_is_saved(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(PrivgradError):
        save_tree(tmp_path / "tree", tree)


# Damage.


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "tree"
    save_tree(path, {"weights": torch.randn(20), "numbers": {0: (1, 2.0, None, True)}})
    return path


def test_a_file_is_read_once_from_its_beginning_to_its_end(stored: Path, tmp_path: Path) -> None:
    """`verify` looks at trainings that are under way: what is opened twice may be two files. A pipe can be read only once."""
    pipe, content = tmp_path / "pipe", stored.read_bytes()
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,), daemon=True)
    writer.start()
    assert equal(load_tree(pipe), load_tree(stored))
    writer.join()


def test_a_missing_file_is_nothing_to_resume_from(tmp_path: Path) -> None:
    with pytest.raises(PrivgradError, match="does not exist; there is nothing to resume from"):
        load_tree(tmp_path / "tree")


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 40, -1])
def test_a_file_that_was_cut_off_is_refused(stored: Path, size: int) -> None:
    stored.write_bytes(stored.read_bytes()[:size])
    with pytest.raises(PrivgradError, match="damaged"):
        load_tree(stored)


@pytest.mark.parametrize("content", [b"no safetensors", b"\x00" * 64, b"\xff" * 64, b'{"json": 1}'])
def test_another_kind_of_file_is_refused(stored: Path, content: bytes) -> None:
    stored.write_bytes(content)
    with pytest.raises(PrivgradError, match="not a privgrad checkpoint"):
        load_tree(stored)


def test_an_ordinary_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "model", {"weight": torch.zeros(2)})
    with pytest.raises(PrivgradError, match="not a privgrad checkpoint"):
        load_tree(tmp_path / "model")


def test_a_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    torch.save(Trap(), tmp_path / "tree")
    with pytest.raises(PrivgradError, match="not a privgrad checkpoint"):
        load_tree(tmp_path / "tree")
    assert not (tmp_path / "sprung").exists()


def test_a_damaged_header_gives_a_tree_or_a_readable_error(stored: Path) -> None:
    """One bit after the other, through the whole header: never another exception."""
    raw = stored.read_bytes()
    refused = 0
    for position in range(8 + struct.unpack("<Q", raw[:8])[0]):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << (position % 8)
        stored.write_bytes(damaged)
        try:
            load_tree(stored)
        except PrivgradError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize(
    "tree",
    [
        {"tensor": "7"},
        {"tensor": [0]},
        {"list": [1], "tuple": False},
        {"list": []},
        {"dict": [[1]]},
        {"dict": [[[], {"value": 1}]]},
        {"nothing": 1},
        "text",
        5,
        None,
    ],
    ids=repr,
)
def test_a_tree_that_makes_no_sense_is_refused(tmp_path: Path, tree: Any) -> None:
    from safetensors.torch import save

    (tmp_path / "tree").write_bytes(save({"0": torch.zeros(1)}, metadata={"tree": json.dumps(tree)}))
    with pytest.raises(PrivgradError, match="damaged"):
        load_tree(tmp_path / "tree")


# Whole or not at all.


def test_a_failing_rename_leaves_the_old_file_and_no_other(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored.read_bytes()

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for owner, name in ((os, "replace"), (os, "rename"), (Path, "replace"), (Path, "rename")):
        monkeypatch.setattr(owner, name, fail)
    with pytest.raises(PrivgradError, match="cannot be written: No space left on device"):
        save_tree(stored, {"new": torch.zeros(100)})
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


def test_a_failing_flush_leaves_the_old_file_and_no_other(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stored.read_bytes()

    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(PrivgradError, match="cannot be written: Input/output error"):
        save_tree(stored, {"new": torch.zeros(100)})
    assert stored.read_bytes() == before
    assert list(stored.parent.iterdir()) == [stored]


def test_the_new_content_is_on_the_disk_before_it_takes_the_name(stored: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at the rename finds a complete file under the other name."""
    before = stored.read_bytes()
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (flushed.append(descriptor), fsync(descriptor))[1])

    class Killed(BaseException):
        pass

    def killed(source: Path, target: Path) -> None:
        assert flushed
        assert stored.read_bytes() == before
        assert equal(load_tree(source), {"new": torch.zeros(3)})
        raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        save_tree(stored, {"new": torch.zeros(3)})
    assert stored.read_bytes() == before


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(PrivgradError, match=r"nowhere/tree cannot be written: No such file or directory"):
        save_tree(tmp_path / "nowhere" / "tree", {})


# Weights.


def test_weights_are_an_ordinary_safetensors_file_with_the_models_keys(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    save_weights(tmp_path / "model", dict(model.state_dict()))
    assert equal(dict(sorted(load_file(tmp_path / "model").items())), dict(sorted(model.state_dict().items())))


def test_tied_weights_are_saved_under_both_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(tmp_path / "model", dict(model.state_dict()))
    loaded = load_file(tmp_path / "model")
    assert loaded.keys() == model.state_dict().keys()
    assert torch.equal(loaded["0.weight"], loaded["1.weight"])

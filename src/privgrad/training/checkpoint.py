"""Checkpoints: one safetensors file, replaced atomically. No pickle anywhere.

Any tree of dicts, lists, tensors and plain values (a state_dict, an optimizer's state, stage states) is stored: tensors under
numbered names, the shape of the tree as JSON in the header.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from privgrad.errors import PrivgradError
from privgrad.files import write_atomically


def save_tree(path: Path, tree: Any) -> None:
    """Write `tree` to `path`, whole or not at all.

    Raises:
        PrivgradError: a value that is neither a tensor nor plain, or a path that cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_flatten(tree, tensors))
    # One entry: safetensors writes several in any order, and equal trees shall give equal files.
    header = json.dumps({"sha256": _digest(structure, tensors), "tree": structure})
    try:
        content = save(tensors, metadata={"tree": header})
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise PrivgradError(f"a checkpoint cannot hold one of these tensors: {error}") from error
    write_atomically(path, content)


def load_tree(path: Path) -> Any:
    """The tree of a file written by `save_tree`.

    Raises:
        PrivgradError: a file in which anything was changed, or that is not there.
    """
    try:
        # Read once: a training that is under way may put a newer file in its place meanwhile, and safe_open() opens a path twice.
        content = path.read_bytes()
        tensors, header = load(content), json.loads(_metadata(content)["tree"])
        if header["sha256"] != _digest(header["tree"], tensors):
            raise ValueError("its checksum does not fit its content")
        return _unflatten(json.loads(header["tree"]), tensors)
    except FileNotFoundError:
        raise PrivgradError(f"{path} does not exist; there is nothing to resume from") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise PrivgradError(
            f"{path} is not a privgrad checkpoint, or is damaged: {error}; put a copy back, or remove it to start from new "
            "weights (what was charged stays charged)"
        ) from error


def save_weights(path: Path, state: dict[str, Tensor]) -> None:
    """Write a model's state_dict as an ordinary safetensors file with the model's own keys."""
    write_atomically(path, save({name: _own(value) for name, value in state.items()}))


def load_weights(path: Path, model: nn.Module) -> None:
    """Put the weights of a file written by `save_weights` into `model`.

    Raises:
        PrivgradError: a damaged file, or one of another model.
    """
    try:
        model.load_state_dict(load(path.read_bytes()))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise PrivgradError(f"{path} does not fit this model, or is damaged: {reason}") from error


def _metadata(content: bytes) -> dict[str, str]:
    """What a safetensors file says of itself: its first 8 bytes are the length of a JSON header (little-endian)."""
    length = int.from_bytes(content[:8], "little")
    found: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return found


def _digest(structure: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 (hex) of a tree: a bit that a disk flips must not go on training."""
    found = hashlib.sha256(structure.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _own(tensor: Tensor) -> Tensor:
    if tensor.layout != torch.strided:
        raise PrivgradError(f"a checkpoint cannot hold a tensor of layout {tensor.layout}; make it dense")
    # safetensors refuses shared memory (tied weights): each name gets a copy of its own.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _flatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = _own(node)
        return {"tensor": name}
    if isinstance(node, dict):
        strange = next((key for key in node if not isinstance(key, bool | int | float | str | None)), None)
        if strange is not None:
            raise PrivgradError(f"a checkpoint cannot hold the key {strange!r}; expected text or numbers")
        return {"dict": [[key, _flatten(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [_flatten(value, tensors) for value in node], "tuple": isinstance(node, tuple)}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise PrivgradError(
        f"a checkpoint cannot hold a {type(node).__name__}; expected tensors, numbers, text, lists or dicts"
    )


def _unflatten(node: Any, tensors: dict[str, Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "dict" in node:
        return {key: _unflatten(value, tensors) for key, value in node["dict"]}
    if "list" in node:
        items = [_unflatten(value, tensors) for value in node["list"]]
        return tuple(items) if node["tuple"] else items
    return node["value"]

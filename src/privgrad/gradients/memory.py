"""How many rows a micro-batch may hold: measured on one row, against a budget."""

from __future__ import annotations

import os
from functools import cache

import torch
from torch import Tensor, nn

from privgrad.gradients.contract import Tree

_LARGEST_ON_CPU = 256 * 2**20
"""On a CPU larger chunks only add page faults: a quarter of a gigabyte was as fast as anything above it."""
_SHARE_OF_FREE = 0.25
_LEARNED = 32 * 2**20 - 2**16
"""Just below what glibc calls DEFAULT_MMAP_THRESHOLD_MAX."""
_CACHE = 184 * 2**20
"""What the one-pass engine takes on a CPU: small enough to reuse its pages, large enough for the kernels."""


def budget(device: torch.device) -> int:
    """Bytes that one micro-batch may use: a quarter of what is free, and on a CPU no more than is useful."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _SHARE_OF_FREE)
    free = _LARGEST_ON_CPU / _SHARE_OF_FREE
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(free * _SHARE_OF_FREE, _LARGEST_ON_CPU))


def rows_within(memory: int | None, module: nn.Module, row: Tree, parameters: int) -> int:
    """Rows per micro-batch within `memory` bytes (None: `budget`), from the memory of one row.

    One row needs its gradient (`parameters` numbers, twice: the gradient and its weighted copy) and, for the backward
    pass, what the forward pass saved and about as much again. Only sizes are looked at, and they are the same for every row.
    """
    saved = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal saved
        saved += tensor.numel() * tensor.element_size()
        return tensor

    device = next(module.parameters()).device
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    # A throw-away random state: looking at sizes must not move the user's generator.
    random_devices = [device] if device.type == "cuda" else []
    counting = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with torch.random.fork_rng(devices=random_devices), counting:
        torch.func.functional_call(module, buffers, (row,))
    per_row = 8 * parameters + 2 * saved
    available = budget(device) if memory is None else memory
    return max(1, available // max(1, per_row))


def rows_of(saved: int, kept: int, memory: int | None, device: torch.device) -> int:
    """Rows per chunk within `memory` bytes (None: `budget`), where one row saves and keeps so many bytes.

    The backward pass makes about half as much again as the forward pass saved.
    """
    available = _CACHE if memory is None and device.type == "cpu" else memory or budget(device)
    return max(1, available // max(1, saved + saved // 2 + kept))


class Saved:
    """Counts the bytes that a forward pass saves for backward, each storage once and the model's own not at all."""

    def __init__(self, model: nn.Module) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(size for place, size in self._storages.items() if place not in self._known)

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context in which to run a forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._count, lambda tensor: tensor)

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor


@cache
def keep_pages() -> None:
    """Let the allocator keep what one step frees for the next: on a CPU its page faults cost up to a third of a step.

    glibc hands freed memory back to the system beyond twice the largest block that it has seen come and go; so it is shown one,
    once, of the most that it learns from. Nothing is written there. Other allocators take no notice.
    """
    torch.empty(_LEARNED, dtype=torch.uint8)


def even(rows: int, largest: int) -> int:
    """The size of equal parts of at most `largest` rows: a small last part would cost as much as a full one."""
    parts = -(-rows // largest)
    return -(-rows // parts)


class Workspace:
    """Buffers for gradients that were multiplied out, kept from chunk to chunk and from step to step.

    Fresh memory costs a page fault for every 4 KiB, which on a CPU can be more than the arithmetic that fills it.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[object, ...], list[Tensor]] = {}
        self._taken: dict[int, tuple[tuple[object, ...], Tensor]] = {}

    def take(self, rows: int, shape: torch.Size, like: Tensor) -> Tensor:
        """[rows, *shape], of any content, of the type and on the device of `like`."""
        key = (shape, like.dtype, like.device)
        free = self._free.setdefault(key, [])
        buffer = free.pop() if free else None
        if buffer is None or len(buffer) < rows:
            buffer = like.new_empty(rows, *shape)
        self._taken[buffer.data_ptr()] = (key, buffer)
        return buffer[:rows]

    def give_back(self, tensor: Tensor) -> None:
        """A tensor from `take` is no longer needed; any other is ignored."""
        key, buffer = self._taken.pop(tensor.data_ptr(), (None, None))
        if key is not None and buffer is not None:
            self._free[key].append(buffer)

    def clear(self) -> None:
        """Everything is free again: what was taken when a chunk failed."""
        for key, buffer in self._taken.values():
            self._free[key].append(buffer)
        self._taken.clear()

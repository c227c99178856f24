"""How many rows a micro-batch may hold: measured on one row, against a budget."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

from privgrad.gradients.contract import Tree

_LARGEST_ON_CPU = 256 * 2**20
"""On a CPU larger chunks only add page faults: a quarter of a gigabyte was as fast as anything above it."""
_SHARE_OF_FREE = 0.25


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

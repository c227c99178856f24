"""Several processes that train together: each would sample, noise and account for itself."""

from __future__ import annotations

import warnings

from torch import distributed, nn

from privgrad.errors import RefusedError

_WRAPPERS = ("torch.nn.parallel.", "torch.distributed.")
"""Where torch has them: DataParallel, DistributedDataParallel, FullyShardedDataParallel. (To import the last takes a second.)"""


def check_processes(model: nn.Module) -> None:
    """Refuse a model that is wrapped for data parallelism; warn where this process is one of several.

    Raises:
        RefusedError: a wrapper that copies the model, or adds up gradients of its own, past clipping and noise.
    """
    wrapper = next((m for m in model.modules() if type(m).__module__.startswith(_WRAPPERS)), None)
    if wrapper is not None:
        raise RefusedError(
            f"the model is in a {type(wrapper).__name__}, whose processes or copies would each draw a sample and noise of their "
            "own: together they would release n steps, charged as one; give the model itself (model.module), and train in one "
            "process"
        )
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            f"this is one of {distributed.get_world_size()} processes: what each of them trains privately costs an epsilon of "
            "its own, which add up; train in one of them",
            stacklevel=3,
        )

"""Tensors inside `torch.func.vmap`, and the way out of it: the one place that touches functorch's own functions.

`torch.autograd.Function` has a public way out (its vmap rule); it costs a third of a millisecond a call, this one a hundredth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter as current
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class NotCoveredError(Exception):
    """Another engine must take this model; the message says why.

    late: a part of the batch has reached the sink by then. alone: it must be one that takes each row by itself.
    """

    def __init__(self, reason: str, *, late: bool = False, alone: bool = False) -> None:
        super().__init__(reason)
        self.late, self.alone = late, alone


class Hidden(TorchDispatchMode):
    """Outside vmap: sees the operators that no torch function leads to (those of scripted functions), and what they raise.

    met: whether there was one. operator: the first one that raised.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.met = False
        self.operator: str | None = None
        self.under_way = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        hidden = self.under_way == 0
        self.met |= hidden
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if hidden and self.operator is None:
                self.operator = str(func)
            raise


class Swallowed(TorchFunctionMode):
    """Sees exceptions that a model keeps to itself.

    Under vmap an operator raises for all rows what it would raise for one of them, and a model that catches it takes all of them
    another way. operator: the first one that raised on rows; None: none did. hidden: sees what no torch function leads to.
    """

    def __init__(self, hidden: Hidden | None = None) -> None:
        super().__init__()
        self._operator: str | None = None
        self._hidden = hidden

    @property
    def operator(self) -> str | None:
        """The first operator that raised an exception on rows."""
        return self._operator or (None if self._hidden is None else self._hidden.operator)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        hidden = self._hidden
        if hidden is not None:
            hidden.under_way += 1
        try:
            return self.call(func, args, kwargs)
        except Exception as error:
            if self._operator is None and (
                isinstance(error, NotCoveredError)
                or any_batched(args, deep=True)
                or any_batched(kwargs.values(), deep=True)
            ):
                self._operator = getattr(func, "__name__", type(func).__name__)
            raise
        finally:
            if hidden is not None:
                hidden.under_way -= 1

    def call(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """One torch function."""
        return func(*args, **kwargs)


_inside = 0
_lock = Lock()


@contextmanager
def as_if_compiled() -> Iterator[None]:
    """`torch.compiler.is_compiling()` is true meanwhile: a model goes the way that its authors made for graphs.

    vmap has one graph for all rows, as torch.export has one for all inputs: a model may not ask what a value is. Attention
    asks whether a mask hides anything at all, to save work; on its way for graphs it uses the mask as it is. torch.export sets
    this variable, too; where torch has no such variable, the model asks as before, and vmap refuses. It belongs to the whole
    process: of several threads, the first one sets it and the last one takes it back.
    """
    global _inside
    with _lock:
        _inside += 1
        torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.compiler._is_compiling_flag = _inside > 0


def is_batched(value: object) -> bool:
    """Whether a tensor has rows (inside vmap)."""
    return isinstance(value, Tensor) and functorch.is_batchedtensor(value)


def unbatched(value: Tensor) -> Tensor:
    """What a tensor with rows is, one transform further out; where its rows are, is not said."""
    plain: Tensor = functorch.get_unwrapped(value)
    return plain


def any_batched(values: Iterable[Any], *, deep: bool = False) -> bool:
    """Whether there is a tensor with rows among values, lists of them included. deep: or one of another transform around it."""
    for value in values:
        if isinstance(value, Tensor):
            if functorch.is_batchedtensor(value) or (deep and functorch.is_functorch_wrapped_tensor(value)):
                return True
        elif isinstance(value, list | tuple) and any_batched(value, deep=deep):
            return True
    return False


def level() -> int:
    """Which of the nested transforms of torch.func is under way."""
    return current().level()


def on_rows(expected: int, function: Callable[..., Any], *tensors: Tensor) -> Any:
    """function(rows, *tensors) outside of the vmap of level `expected`: every tensor, and every output, has rows first."""
    interpreter = current()
    if interpreter.level() != expected:
        raise NotCoveredError("the model uses transforms of torch.func itself")
    rows = interpreter.batch_size()  # type: ignore[attr-defined]
    plain = [_rows_first(tensor, rows) for tensor in tensors]
    with interpreter.lower():
        output = function(rows, *plain)
    if isinstance(output, tuple):
        return tuple(functorch._add_batch_dim(part, 0, expected) for part in output)
    return functorch._add_batch_dim(output, 0, expected)


def _rows_first(tensor: Tensor, rows: int) -> Tensor:
    if not functorch.is_batchedtensor(tensor):
        return tensor.expand(rows, *tensor.shape)
    place = functorch.maybe_get_bdim(tensor)
    plain: Tensor = functorch.get_unwrapped(tensor)
    if functorch.is_functorch_wrapped_tensor(plain):
        raise NotCoveredError("the model uses transforms of torch.func itself")
    return plain if place == 0 else plain.movedim(place, 0)

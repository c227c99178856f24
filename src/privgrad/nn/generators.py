"""Random generators in somebody's own code: from a known seed, one record more would shift the draws of all that follow."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from privgrad.errors import RefusedError
from privgrad.gradients.holdings import CONTAINERS, LARGE

Generator = torch.Generator | numpy.random.Generator | numpy.random.RandomState | random.Random
GENERATORS = (torch.Generator, numpy.random.Generator, numpy.random.RandomState, random.Random)
_LEAVES = (str, bytes, int, float, complex, type(None), Tensor, numpy.ndarray, types.ModuleType, type, *GENERATORS)
_MOST = 100_000
"""Objects that are looked at: a data set may hold any number."""
_LIBRARIES = frozenset(
    ("torch", "numpy", "builtins", "collections", "typing", "abc", "functools", "random", "privgrad")
)


def generators_in(**roots: Any) -> dict[str, Generator]:
    """The generators that some objects lead to, by where they are: attributes, containers, what functions refer to."""
    found: dict[int, tuple[str, Generator]] = {}
    for path, value in _reachable(roots):
        if isinstance(value, GENERATORS):
            found.setdefault(id(value), (path, value))
    return dict(found.values())


def state_of(generator: Generator) -> Any:
    """What `put_back` takes."""
    if isinstance(generator, torch.Generator | numpy.random.RandomState):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def put_back(generator: Generator, state: Any) -> None:
    """Draws go on from a state of `state_of`."""
    if isinstance(generator, torch.Generator | numpy.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state


def reseed(generator: Generator, seed: int) -> None:
    """Draws follow from `seed`, below 2**53, and from nothing else."""
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, numpy.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(seed).state
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    else:
        generator.seed([seed % 2**32, seed // 2**32])


def check_foreign(model: nn.Module, loss_fn: Callable[..., Any]) -> None:
    """Refuse a model or loss with a generator of numpy's or Python's own: one draw of it serves all rows of a chunk.

    Raises:
        RefusedError: with where it is.
    """
    for path, generator in generators_in(model=model, loss_fn=loss_fn).items():
        if not isinstance(generator, torch.Generator):
            kind = f"{type(generator).__module__}.{type(generator).__qualname__}"
            raise RefusedError(
                f"{path} is a {kind}, whose draws would go by how many records came before; draw with torch's functions in the "
                "model and in the loss (a torch.Generator held there is seeded secretly in each step)"
            )


def _reachable(roots: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    queue = deque(roots.items())
    while queue and len(seen) < _MOST:
        path, value = queue.popleft()
        yield path, value
        if not isinstance(value, _LEAVES) and id(value) not in seen:
            seen.add(id(value))
            queue.extend((path + step, part) for step, part in _parts(value))


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, CONTAINERS):
        if len(value) <= LARGE:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            yield from ((f"[{key!r}]", item) for key, item in items)
    elif isinstance(value, functools.partial):
        yield from (("", value.func), ("", value.args), ("", value.keywords))
    elif isinstance(value, types.MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _of_function(value)
    else:
        yield from ((f".{name}", part) for name, part in getattr(value, "__dict__", {}).items())
        for kind in type(value).__mro__:
            if kind.__module__.split(".")[0] not in _LIBRARIES:
                followed = (types.FunctionType, *GENERATORS)
                yield from ((f".{name}", part) for name, part in vars(kind).items() if isinstance(part, followed))


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function holds; of the globals that it names, generators alone (the others lead into whole libraries)."""
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            yield f"({name})", cell.cell_contents
        except ValueError:  # not filled yet
            continue
    yield from (("(default)", value) for value in function.__defaults__ or ())
    yield from ((f"({name})", value) for name, value in (function.__kwdefaults__ or {}).items())
    for name in function.__code__.co_names:
        if isinstance(function.__globals__.get(name), GENERATORS):
            yield f"({name})", function.__globals__[name]

"""What modules hold besides parameters and buffers: attributes, and what is in the containers there."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from operator import is_
from typing import Any

from torch import nn

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}
CONTAINERS = (dict, list, tuple, set, deque)
LARGE = 10_000
"""Entries of a container in which no further containers are looked for: a vocabulary, say."""


def attributes_of(module: nn.Module) -> dict[str, Any]:
    """What was set on a module, other than parameters, buffers and modules."""
    return {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING}


def walk(values: Iterable[Any]) -> Iterator[Any]:
    """The values and what the containers among them hold, each container once; of dictionaries, the values."""
    seen: set[int] = set()
    queue = deque(values)
    while queue:
        value = queue.popleft()
        yield value
        if isinstance(value, CONTAINERS) and id(value) not in seen and len(value) <= LARGE:
            seen.add(id(value))
            queue.extend(value.values() if isinstance(value, dict) else value)


class Holdings:
    """The attributes of modules and the contents of containers among them, to be put back.

    also: further values to be looked into. `values`: everything that was found.
    """

    def __init__(self, modules: Iterable[nn.Module], also: Iterable[Any] = ()) -> None:
        self._attributes = [(module, attributes_of(module)) for module in modules]
        held = [value for _, attributes in self._attributes for value in attributes.values()]
        self.values = list(walk([*held, *also]))
        self._contents = [
            (value, _contents(value))
            for value in self.values
            if isinstance(value, CONTAINERS) and not isinstance(value, tuple)
        ]

    def restore(self) -> None:
        """Put back what was there, and nothing else; containers stay the objects that they were."""
        for module, attributes in self._attributes:
            for key in attributes_of(module).keys() - attributes.keys():
                del vars(module)[key]
            vars(module).update(attributes)
        for container, contents in self._contents:
            now = _contents(container)
            if all(
                len(one) == len(other) and all(map(is_, one, other)) for one, other in zip(now, contents, strict=True)
            ):
                continue
            container.clear()
            if isinstance(container, dict):
                container.update(zip(*contents, strict=True))
            else:
                (container.update if isinstance(container, set) else container.extend)(contents[0])


def _contents(container: Any) -> tuple[list[Any], ...]:
    """What is in a container, in its order; of a dictionary, keys and values."""
    return (list(container), list(container.values())) if isinstance(container, dict) else (list(container),)

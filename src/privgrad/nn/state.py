"""What a model holds, so that a probe leaves everything as it was, and so that what it remembers of its records is seen."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training", "_parameters", "_buffers"}
_CONTAINERS = (dict, list, tuple, set, deque)
_LARGE = 10_000
"""Entries of a container that is not looked into: a vocabulary, say."""


class Slot(NamedTuple):
    """One place in a module that holds a value. registered: a parameter or buffer that is saved and published with the model."""

    module: str
    attribute: str
    registered: bool


def named(model: nn.Module, loss_fn: Callable[..., Any]) -> dict[str, nn.Module]:
    """Every module that a loss goes through, by name; "" is the model, "loss_fn..." are those that the loss function holds."""
    found = {module: name for name, module in model.named_modules()}
    for number, root in enumerate(_held(loss_fn)):
        prefix = "loss_fn" if number == 0 else f"loss_fn{number + 1}"
        for name, module in root.named_modules():
            found.setdefault(module, f"{prefix}.{name}" if name else prefix)
    return {name: module for module, name in found.items()}


def _held(loss_fn: Any) -> list[nn.Module]:
    """The modules in a loss function's closure, object or arguments."""
    followed = (nn.Module, types.FunctionType, types.MethodType, functools.partial)
    modules: list[nn.Module] = []
    seen: set[int] = set()
    queue: deque[Any] = deque([loss_fn])
    while queue:
        item = queue.popleft()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            modules.append(item)
        elif isinstance(item, functools.partial):
            queue += [item.func, *item.args, *item.keywords.values()]
        elif isinstance(item, types.MethodType):
            queue += [item.__self__, item.__func__]
        elif isinstance(item, types.FunctionType):
            queue += [value for cell in item.__closure__ or () if isinstance(value := _content(cell), followed)]
        else:
            queue += [value for value in getattr(item, "__dict__", {}).values() if isinstance(value, followed)]
    return modules


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def generators_of(modules: Mapping[str, nn.Module], loss_fn: Callable[..., Any]) -> list[torch.Generator]:
    """torch's random generators that modules hold, in containers too, or the loss function."""
    held = [value for module in modules.values() for value in _own(module).values()]
    closure = getattr(loss_fn, "__closure__", None) or ()
    queue = [*held, *(_content(cell) for cell in closure), *getattr(loss_fn, "__dict__", {}).values()]
    found: dict[int, torch.Generator] = {}
    seen: set[int] = set()
    while queue:
        value = queue.pop()
        if isinstance(value, torch.Generator):
            found[id(value)] = value
        elif isinstance(value, _CONTAINERS) and id(value) not in seen and len(value) <= _LARGE:
            seen.add(id(value))
            queue += value.values() if isinstance(value, dict) else value
    return list(found.values())


class Snapshot:
    """The parameters, buffers, attributes and generators of modules, to be put back and to be compared with."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        self._attributes = {module: _own(module) for module in modules.values()}
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        seen: set[int] = set()
        for module, attributes in self._attributes.items():
            # (A scripted module makes its dictionary of parameters anew each time: here they are held.)
            for value in (*attributes.values(), *module.parameters(recurse=False), *module.buffers(recurse=False)):
                self._keep(value, seen)
        self._before = {
            slot: self._tensors[id(leaf)][1] if isinstance(leaf, Tensor) else leaf for slot, leaf in self._leaves()
        }

    def _keep(self, value: Any, seen: set[int]) -> None:
        if isinstance(value, _CONTAINERS):
            if id(value) in seen:
                return
            seen.add(id(value))
            if not isinstance(value, tuple):
                self._containers.append((value, list(value.items()) if isinstance(value, dict) else list(value)))
            if len(value) <= _LARGE:
                for item in value.values() if isinstance(value, dict) else value:
                    self._keep(item, seen)
        elif isinstance(value, Tensor):
            if id(value) not in self._tensors:
                self._tensors[id(value)] = (value, value.detach().clone())
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        for module, attributes in self._attributes.items():
            current = vars(module)
            for key in _own(module).keys() - attributes.keys():
                del current[key]
            current.update(attributes)
        for container, items in self._containers:
            container.clear()
            if isinstance(container, list | deque):
                container.extend(items)
            else:
                container.update(items)
        for tensor, copy in self._tensors.values():
            if not same(tensor, copy):
                tensor.data = copy.clone()
        for generator, state in self._generators:
            generator.set_state(state)

    def changes(self) -> dict[Slot, Any]:
        """The tensors, numbers and texts that are no longer what they were, copied."""
        return {
            slot: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf
            for slot, leaf in self._leaves()
            if slot not in self._before or not same(leaf, self._before[slot])
        }

    def _leaves(self) -> Iterator[tuple[Slot, Any]]:
        for name, module in self._modules.items():
            for key, value in _own(module).items():
                if key in ("_parameters", "_buffers"):
                    passing = module._non_persistent_buffers_set
                    yield from (
                        (Slot(name, leaf, leaf not in passing), v) for leaf, v in value.items() if v is not None
                    )
                else:
                    yield from ((Slot(name, path, False), leaf) for path, leaf in _walk(key, value, set()))


def _own(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if key not in _BOOKKEEPING}


def _walk(path: str, value: Any, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor | bool | int | float | complex | str):
        yield path, value
    elif (
        isinstance(value, _CONTAINERS)
        and not isinstance(value, set)
        and id(value) not in above
        and len(value) <= _LARGE
    ):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _walk(f"{path}[{key}]", item, above | {id(value)})


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, bit by bit; for tensors of any shape, NaN being equal to NaN."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype or one.layout != other.layout:
            return False
        if one.layout != torch.strided:
            return False
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    return type(one) is type(other) and bool(one == other or one != one)


@contextmanager
def undisturbed(modules: Mapping[str, nn.Module]) -> Iterator[Snapshot]:
    """A snapshot of the modules; at the end they, their gradients and all random states are as they were."""
    gradients = {parameter: parameter.grad for module in modules.values() for parameter in module.parameters()}
    snapshot = Snapshot(modules)
    for parameter in gradients:
        parameter.grad = None
    with same_randomness(devices_of(modules)):
        try:
            yield snapshot
        finally:
            snapshot.restore()
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def devices_of(modules: Mapping[str, nn.Module]) -> list[torch.device]:
    """Every device that holds a parameter or a buffer."""
    tensors = [tensor for module in modules.values() for tensor in (*module.parameters(), *module.buffers())]
    return sorted({tensor.device for tensor in tensors}, key=str)


@contextmanager
def same_randomness(devices: list[torch.device], generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Torch's, numpy's and Python's random states are afterwards what they were before, and those of `generators`."""
    own = [generator.get_state() for generator in generators]
    cuda = [device for device in devices if device.type == "cuda"]
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
    others = numpy.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, own, strict=True):
            generator.set_state(state)
        torch.set_rng_state(states[0])
        for device, state in zip(cuda, states[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        numpy.random.set_state(others[0])
        random.setstate(others[1])


def seed_all(seed: int, devices: list[torch.device]) -> None:
    """Seed torch (on the CPU and on `devices`), numpy and Python. (torch.manual_seed would also reach devices not yet in use.)"""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)


def foreign_draws() -> tuple[Any, ...]:
    """A value that moves when numpy or Python draw a random number."""
    state: Any = numpy.random.get_state(legacy=True)
    return random.getstate(), bytes(state[1]), state[2]

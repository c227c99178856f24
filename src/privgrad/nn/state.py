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

from privgrad.gradients.holdings import CONTAINERS, LARGE, Holdings, attributes_of
from privgrad.nn.generators import Generator, put_back, state_of


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


class Snapshot:
    """The parameters, buffers, attributes and generators of modules, to be put back and to be compared with."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._modules = modules
        # (A scripted module makes its dictionary of parameters anew each time: here they are held.)
        registered = [
            value
            for module in modules.values()
            for value in (
                module._parameters,
                module._buffers,
                *module.parameters(recurse=False),
                *module.buffers(recurse=False),
            )
        ]
        self._holdings = Holdings(modules.values(), registered)
        tensors = {id(value): value for value in self._holdings.values if isinstance(value, Tensor)}
        self._tensors = {key: (tensor, tensor.detach().clone()) for key, tensor in tensors.items()}
        self._generators = [
            (value, value.get_state()) for value in self._holdings.values if isinstance(value, torch.Generator)
        ]
        self._before = {
            slot: self._tensors[id(leaf)][1] if isinstance(leaf, Tensor) else leaf for slot, leaf in self._leaves()
        }

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        self._holdings.restore()
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
            passing = module._non_persistent_buffers_set
            for registered in (module._parameters, module._buffers):
                yield from (
                    (Slot(name, leaf, leaf not in passing), v) for leaf, v in registered.items() if v is not None
                )
            for key, value in attributes_of(module).items():
                yield from ((Slot(name, path, False), leaf) for path, leaf in _walk(key, value, set()))


def _walk(path: str, value: Any, above: set[int]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor | bool | int | float | complex | str):
        yield path, value
    elif (
        isinstance(value, CONTAINERS) and not isinstance(value, set) and id(value) not in above and len(value) <= LARGE
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
def same_randomness(devices: list[torch.device], generators: Sequence[Generator] = ()) -> Iterator[None]:
    """Torch's, numpy's and Python's random states are afterwards what they were before, and those of `generators`."""
    own = [state_of(generator) for generator in generators]
    cuda = [device for device in devices if device.type == "cuda"]
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in cuda]
    others = numpy.random.get_state(), random.getstate()
    try:
        yield
    finally:
        for generator, state in zip(generators, own, strict=True):
            put_back(generator, state)
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

"""Random draws of a probe: the same numbers for every row, so that a row's draw depends neither on its place nor on the batch."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_FILL = {"normal_", "uniform_", "bernoulli_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"}
_LIKE = {"rand_like", "randn_like", "randint_like"}
_BY_ROW = {
    *("bernoulli", "native_dropout", "poisson", "binomial", "_standard_gamma", "_sample_dirichlet", "normal"),
    *("rrelu_with_noise", "rrelu_with_noise_"),
}
_COINS = {"bernoulli_", "bernoulli", "native_dropout"}


class EqualDraws(TorchDispatchMode):
    """Inside, every random operation of torch draws for one row, and all rows get that draw.

    With ordinary draws a dropout mask depends on the shape of the batch, and on how many other records were routed to the same
    expert: then no row's loss alone could be compared with its loss in a batch. A draw is the same along the first dimension and
    along every dimension of size `rows`. Each operation is seeded by one number from torch's generator, and each call of a module
    has a stream of its own: which other modules drew, and how much, depends on how the others were routed.

    devices: of the model. keep_all: coins of positive probability fall on one (dropout keeps everything), so that nothing hides
    behind a zero.
    """

    supports_higher_order_operators = True

    def __init__(self, rows: int, devices: Sequence[torch.device], *, seed: int, keep_all: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.equal = True
        """False once an operation was met that cannot be made equal (fused attention with dropout)."""
        self.types: set[torch.dtype] = set()
        """The types in which anything was computed (a loss may run in autocast, and return float32)."""
        self.seeds: set[int] = set()
        """Of the operations: others for another `seed`, unless the model seeds torch's generator itself."""
        self._rows = rows
        self._devices = [device for device in devices if device.type == "cuda"]
        self._seed = seed
        self._keep_all = keep_all
        self._borrowed: list[tuple[torch.Generator, Tensor]] = []
        self._calls: Counter[str] = Counter()
        self._streams: list[Tensor] = []

    @contextmanager
    def drawing(self, modules: Mapping[str, nn.Module]) -> Iterator[None]:
        """The mode itself, with a stream for each call of a module. Generators that the model brought along are put back."""
        self._calls.clear()
        handles = []
        try:
            for name, module in modules.items():
                handles.append(module.register_forward_pre_hook(self._enter(name)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            # The first state last: torch makes a new object for the same generator each time.
            for generator, state in reversed(self._borrowed):
                generator.set_state(state)
            self._borrowed.clear()

    def _enter(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._streams.append(torch.default_generator.get_state())
            stream = f"{self._seed}:{name}:{self._calls[name]}"
            self._calls[name] += 1
            torch.default_generator.manual_seed(zlib.crc32(stream.encode()))

        return enter

    def _leave(self, *_: Any) -> None:
        torch.default_generator.set_state(self._streams.pop())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options: dict[str, Any] = kwargs or {}
        if not _is_random(func, args, options):
            result = func(*args, **options)
            if isinstance(result, Tensor):
                self.types.add(result.dtype)
            return result
        name = func.overloadpacket.__name__
        seed = int(torch.randint(2**31, (), device="cpu"))
        self.seeds.add(seed)
        if self._keep_all and name in _COINS:
            return _heads(name, *args, **options)

        def draw(*values: Any) -> Any:
            self._seed_all(seed, options.get("generator"))
            return func(*values, **options)

        with self._unmoved():
            return self._equal(name, draw, args)

    def _equal(self, name: str, draw: Callable[..., Any], args: Sequence[Any]) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if not tensors:
            # (A permutation of the rows stays one: that it mixes them is for the detector to see.)
            return self._made(draw, args)
        first = tensors[0]
        if len(tensors) == 1 and name in _FILL:
            return first.copy_(draw(first[self._one(first.shape)].clone(), *args[1:]).expand_as(first))
        if name in _LIKE:
            return draw(first[self._one(first.shape)], *args[1:]).expand_as(first).clone()
        rows = len(first) if first.dim() else 0
        by_row = name in _BY_ROW or name in _FILL or (name == "multinomial" and first.dim() == 2)
        if rows == 0 or not by_row or any(tensor.dim() == 0 or len(tensor) != rows for tensor in tensors):
            self.equal = self.equal and first.numel() == 0
            return draw(*args)
        drawn_rows = [
            draw(*[value[row : row + 1] if isinstance(value, Tensor) else value for value in args])
            for row in range(rows)
        ]
        # (In-place operations changed the slices of `first`.)
        return first if name.endswith("_") else pytree.tree_map(lambda *parts: torch.cat(parts), *drawn_rows)

    def _made(self, draw: Callable[..., Any], args: Sequence[Any]) -> Any:
        """A new tensor, drawn in the shape of one row."""
        sizes = [list(value) for value in args if isinstance(value, list | tuple)]
        if not sizes:
            return draw(*args)
        one = [len(range(*part.indices(size))) for part, size in zip(self._one(sizes[0]), sizes[0], strict=True)]
        drawn = draw(*[one if isinstance(value, list | tuple) else value for value in args])
        return drawn.expand(sizes[0]).clone()

    def _one(self, shape: Sequence[int]) -> tuple[slice, ...]:
        """Narrows to one along each dimension that may hold rows."""
        return tuple(slice(0, 1 if dim == 0 or size == self._rows else size) for dim, size in enumerate(shape))

    def _seed_all(self, seed: int, generator: torch.Generator | None) -> None:
        if generator is not None:
            self._borrowed.append((generator, generator.get_state()))
            generator.manual_seed(seed)
            return
        for own in self._generators():
            own.manual_seed(seed)

    @contextmanager
    def _unmoved(self) -> Iterator[None]:
        states = [(generator, generator.get_state()) for generator in self._generators()]
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)

    def _generators(self) -> list[torch.Generator]:
        return [
            torch.default_generator,
            *(torch.cuda.default_generators[device.index or 0] for device in self._devices),
        ]


def _is_random(func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether an operation draws. Fused attention and recurrent networks do only with dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
        return False
    for place, argument in enumerate(func._schema.arguments):
        if argument.name in ("dropout", "dropout_p"):
            chance = args[place] if place < len(args) else options.get(argument.name, argument.default_value)
            return bool(chance)
    return True


def _heads(name: str, first: Tensor, *args: Any, **options: Any) -> Any:
    """The operation's result where every coin of positive probability falls on one."""
    chance: Any = args[0] if args else options.get("p", 0.5 if name == "bernoulli_" else None)
    if name == "native_dropout":
        scale = 0.0 if chance == 1 else 1 / (1 - chance)
        return first * scale, torch.full_like(first, chance < 1, dtype=torch.bool)
    if chance is None:
        return (first > 0).to(first.dtype)
    ones = (torch.as_tensor(chance, device=first.device) > 0).to(first.dtype)
    return first.copy_(ones.expand_as(first)) if name == "bernoulli_" else ones.expand_as(first).clone()

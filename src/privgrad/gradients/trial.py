"""Trials: what an engine finds out about a model before it decides how to run it, for nobody and with nothing kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from privgrad.gradients.contract import Engine, Fold, Identity, Need, Request, most_needed, trainable
from privgrad.gradients.loss import WithLoss


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Modules in evaluation mode, each as it was before afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def unmoved_generators(device: torch.device) -> Iterator[None]:
    """A throw-away random state: looking at sizes must not move the user's generator."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def made_up_rows(request: Request) -> Iterator[Request]:
    """The request with a first row of nobody's data: normal floats, and whole numbers (labels, tokens, masks) of 0, or of 1."""
    for whole in (0, 1):  # 0 first: it is in the range of every table, which a GPU does not forgive
        generator = torch.Generator().manual_seed(0)

        def made_up(leaf: Tensor, whole: int = whole, generator: torch.Generator = generator) -> Tensor:
            if not (leaf.is_floating_point() or leaf.is_complex()):
                return torch.full_like(leaf[:1], whole)
            return torch.randn(leaf[:1].shape, generator=generator, dtype=torch.float32).to(leaf)

        yield replace(request, batch=pytree.tree_map(made_up, request.batch))


def norms_by_parameter(engine: Engine, module: WithLoss, request: Request) -> Tensor:
    """[parameters]: the norms that an engine finds for the first row, by parameter."""
    rule = Nobody(separable=False)
    alone = replace(by_parameter(request, trainable(module.model)), rule=rule)
    engine.accumulate(module.model, module.loss_fn, alone)
    return torch.cat(rule.seen)


def by_parameter(request: Request, parameters: Mapping[str, nn.Parameter]) -> Request:
    """A unit of the first row alone, each parameter a block, for nobody."""
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    blocks = [(name,) for name in shapes]
    return replace(trial_of(request), encoding=Identity(shapes), blocks=blocks, caps=(), joined=None)


def trial_of(request: Request, rows: int = 1) -> Request:
    """A unit of the first row alone, so many times, for nobody: no weight, no sum."""
    batch = pytree.tree_map(lambda leaf: leaf[:1].expand(rows, *leaf.shape[1:]).clone(), request.batch)
    fold = Fold(torch.zeros(rows, dtype=torch.int64), 1)
    return replace(request, batch=batch, fold=fold, rule=Nobody(request.rule.separable), sink=_Nowhere())


def unmasked(request: Request, parameters: Mapping[str, nn.Parameter]) -> Request:
    """The request if all rows of all parameters took part: other ones do in other steps, and chunks are sized once."""
    if most_needed(request.encoding, parameters) > Need.ROWS:
        return request
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    return replace(request, encoding=Identity(shapes), joined=None)


class Nobody:
    """A rule under which no unit contributes. seen: the norms it was asked about."""

    def __init__(self, separable: bool) -> None:
        self.separable = separable
        self.seen: list[Tensor] = []

    def __call__(self, norms: Tensor, blocks: Sequence[int]) -> Tensor:
        self.seen.append(norms)
        return torch.zeros_like(norms)


class _Nowhere:
    """A sink that keeps nothing."""

    def add(self, slot: str, value: Tensor) -> None:
        pass

    def add_product(self, slot: str, left: Tensor, weights: Tensor, right: Tensor) -> None:
        pass

"""Put layers that treat every record by itself in the place of those that do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privgrad.errors import PrivgradError, nearest
from privgrad.nn.public_norm import FrozenBatchNorm, PrivateBatchNorm, PublicBatchNorm

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_MOST_GROUPS = 32
_FEWEST_CHANNELS = 4


@dataclass(frozen=True)
class Conversion:
    """One layer that was replaced. name: dotted, "" for the model itself; before, after: what stood and what stands there."""

    name: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.name or 'the model itself'}: {self.before} became {self.after}"


@dataclass(frozen=True)
class Report:
    """What `convert` did. model: the converted model: the given one, unless that was itself a layer to replace.

    changed: what was replaced. left: names and classes of layers that normalise over the batch in a way of their own.
    """

    model: nn.Module
    changed: tuple[Conversion, ...]
    left: tuple[str, ...]

    @property
    def words(self) -> str:
        """One line for every layer that was replaced or left."""
        lines = [str(conversion) for conversion in self.changed] or [
            "nothing was replaced: there is no BatchNorm layer"
        ]
        lines += [f"{name} was left: it is a kind of BatchNorm with a forward of its own" for name in self.left]
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.words


def convert(model: nn.Module, to: str = "group") -> Report:
    """Replace every BatchNorm layer of `model`, in place. Affine weights move over as they are: an optimizer keeps them.

    to: what each becomes.
        "group": BatchNorm2d, BatchNorm3d and SyncBatchNorm become GroupNorm (arXiv:1803.08494) with as many groups, up to 32, as
            leave at least four channels in each. BatchNorm1d becomes GroupNorm of a single group, which is LayerNorm over the
            features: on inputs [rows, features] a group of four would keep only two of four degrees of freedom. Features of
            different units must be brought to one scale before it, by constants that are public.
        "layer": GroupNorm of a single group. "instance": GroupNorm of one channel a group; not for BatchNorm1d, which it would
            erase. "none": nothing.
        "public_batch": `PublicBatchNorm`, with the statistics of a public batch (plan.statistics).
        "private_statistics": `PrivateBatchNorm`, with noised statistics of the private records (plan.statistics of kind private).
        "frozen": `FrozenBatchNorm`, with the statistics that the layer has (from public data: they are not protected).
        "test_batch": BatchNorm without running statistics. It couples records, in training (for plans that clip groups) and at
            inference, where it takes the batch's own.

    Statistics are dropped except where it says otherwise, and outputs change: convert before training. A layer that is used in
    several places is replaced by one layer in all of them. Subclasses are left, and the report says so: what else their
    forward does is unknown.

    Guarantee: the new layers normalise each record by itself, except those of "test_batch".

    Raises:
        PrivgradError: an unknown `to`; a lazy layer that does not know its channels yet; "instance" for BatchNorm1d, "frozen" for
            a layer without statistics.
    """
    if to not in _TARGETS:
        raise PrivgradError(f"convert to={to!r} is unknown; {nearest(str(to), _TARGETS)}")
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    for name, module in layers:
        if isinstance(module, _LAZY):
            raise PrivgradError(
                f"{name or 'the model itself'} ({type(module).__name__}) does not know its channels yet; run the model once on a "
                "public batch first"
            )
    replaced: dict[nn.Module, nn.Module] = {
        module: _TARGETS[to](module) for _, module in layers if type(module) in _BATCH_NORMS
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    changed = tuple(
        Conversion(name, f"{type(module).__name__}({module.num_features})", _described(replaced[module], module))
        for name, module in layers
        if module in replaced
    )
    left = tuple(f"{name} ({type(module).__name__})" for name, module in layers if module not in replaced)
    return Report(replaced.get(model, model), changed, left)


NORMALIZATIONS = ("none", "batch", "group", "layer", "instance", "public_batch", "private_statistics", "test_batch")
"""What reference models take as `normalization`: what `convert` makes of BatchNorm, or "batch", BatchNorm itself."""


def normalized(name: str, batch_norm: type[_BatchNorm], channels: int) -> nn.Module:
    """A normalization layer by its name. batch_norm: the class of BatchNorm for these inputs."""
    if name not in NORMALIZATIONS:
        raise PrivgradError(f"normalization is {name!r}; {nearest(str(name), NORMALIZATIONS)}")
    layer = batch_norm(channels)
    return layer if name == "batch" else convert(layer, name).model


def _group_norm(layer: _BatchNorm) -> nn.GroupNorm:
    return _groups_of(layer, 1 if isinstance(layer, nn.BatchNorm1d) else _groups(layer.num_features))


def _layer_norm(layer: _BatchNorm) -> nn.GroupNorm:
    return _groups_of(layer, 1)


def _instance_norm(layer: _BatchNorm) -> nn.GroupNorm:
    if isinstance(layer, nn.BatchNorm1d):
        raise PrivgradError("convert to='instance' would erase BatchNorm1d's features; use to='layer'")
    return _groups_of(layer, layer.num_features)


def _groups_of(layer: _BatchNorm, groups: int) -> nn.GroupNorm:
    norm = nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=layer.affine)
    if layer.affine:
        norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)


def _nothing(layer: _BatchNorm) -> nn.Identity:
    return nn.Identity()


def _frozen(layer: _BatchNorm) -> FrozenBatchNorm:
    if layer.running_mean is None:
        raise PrivgradError("convert to='frozen' keeps a layer's statistics, and one has none; use to='public_batch'")
    return FrozenBatchNorm.of(layer)


def _test_batch(layer: _BatchNorm) -> nn.Module:
    norm = type(layer)(layer.num_features, layer.eps, affine=layer.affine, track_running_stats=False)
    norm.weight, norm.bias = layer.weight, layer.bias
    return norm.train(layer.training)


def _groups(channels: int) -> int:
    """The largest divisor, up to 32, that leaves at least four channels a group; 1 where there is none."""
    return max(
        (
            groups
            for groups in range(1, _MOST_GROUPS + 1)
            if channels % groups == 0 and channels // groups >= _FEWEST_CHANNELS
        ),
        default=1,
    )


def _described(norm: nn.Module, before: _BatchNorm) -> str:
    if not isinstance(norm, nn.GroupNorm):
        without = " without running statistics" if isinstance(norm, _BatchNorm) else ""
        return type(norm).__name__ + without
    size = norm.num_channels // norm.num_groups
    words = f"GroupNorm of {norm.num_groups} group(s) of {size} channel(s)"
    if isinstance(before, nn.BatchNorm1d) and size < _FEWEST_CHANNELS:
        words += f"; on inputs [rows, {size}] it erases most of them: freeze BatchNorm there instead, or take it out"
    return words


_TARGETS: dict[str, Callable[[_BatchNorm], nn.Module]] = {
    "none": _nothing,
    "group": _group_norm,
    "layer": _layer_norm,
    "instance": _instance_norm,
    "public_batch": PublicBatchNorm.of,
    "private_statistics": PrivateBatchNorm.of,
    "frozen": _frozen,
    "test_batch": _test_batch,
}

"""What the coupling detector finds, in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from privgrad.errors import RefusedError

OUTPUT = "one record's output depends on the other records of its batch"
LOSS = "one record's loss depends on the other records of its batch"
GRADIENT = "one record's gradient depends on the other records of its batch, although its loss does not"
ALONE = "one record's loss or gradient is another one alone than in a batch (by the batch's size, or the record's place in it)"

_MODULE_WAY = "use layers that treat every record by itself (GroupNorm or LayerNorm; attention with batch_first=True)"
_BATCHNORM_WAY = (
    "use GroupNorm or LayerNorm (privgrad.nn.convert(model, to='group') puts them in the place of BatchNorm; to='public_batch' "
    "or 'private_statistics' keeps its arithmetic, with statistics from the plan), or freeze the layer with .eval() and given "
    "statistics"
)
_LOSS_WAY = (
    "give one loss per record, from that record alone (reduction='none'; no normaliser over the batch, no division by "
    "its size)"
)
_STATE_WAY = (
    "keep nothing of the records (track_running_stats=False), or freeze the layer with .eval() and given statistics"
)
_NAMED = 6


@dataclass(frozen=True)
class Finding:
    """One place where records of a batch meet. where: a module's dotted name and class, or the loss function."""

    where: str
    what: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}; {self.way_out}"


def in_module(modules: Mapping[str, nn.Module], name: str, what: str) -> Finding:
    """A module couples."""
    way = _LOSS_WAY if name.startswith("loss_fn") else _MODULE_WAY
    return Finding(_place(modules, name), what, _BATCHNORM_WAY if isinstance(modules[name], _BatchNorm) else way)


def in_loss(what: str) -> Finding:
    """The modules are clean, and the loss is not."""
    return Finding("the loss function", what, _LOSS_WAY)


def in_either(what: str) -> Finding:
    """No single place was found."""
    return Finding("the loss function, or the model outside its layers", what, f"{_MODULE_WAY}; {_LOSS_WAY}")


def kept(modules: Mapping[str, nn.Module], name: str, attributes: list[str]) -> Finding:
    """A module takes up values of the records."""
    way = _BATCHNORM_WAY if isinstance(modules[name], _BatchNorm) else _STATE_WAY
    return Finding(_place(modules, name), f"{', '.join(attributes)} would take up the records, un-noised", way)


def counted(modules: Mapping[str, nn.Module], name: str, attributes: list[str]) -> Finding:
    """A module goes on from what its last forward pass left, as a counter does."""
    what = f"{', '.join(attributes)} would go on from one forward pass to the next, whose number follows from private records"
    return Finding(_place(modules, name), what, "set it from outside, between two steps, and leave it alone in forward")


def refuse_coupling(findings: Iterable[Finding]) -> None:
    """Raise one line about the findings, if there are any.

    Raises:
        RefusedError: where, what, and the ways out.
    """
    by_what: dict[str, list[str]] = {}
    ways: dict[str, None] = {}
    for finding in findings:
        by_what.setdefault(finding.what, []).append(finding.where)
        ways[finding.way_out] = None
    if by_what:
        places = "; ".join(f"{_listed(where)}: {what}" for what, where in by_what.items())
        raise RefusedError(
            f"{places}. Clipping a record's gradient does not bound what it changes then: {'; '.join(ways)}; or clip "
            "groups of records instead of records (Batch Clipping, plan.groups)"
        )


def refuse_memory(findings: Iterable[Finding]) -> None:
    """Raise one line about what a group, or a record that is measured, would leave to the next, if there is anything.

    Raises:
        RefusedError: where and what.
    """
    found = [f"{finding.where}: {finding.what}" for finding in findings]
    if found:
        raise RefusedError(
            f"{'; '.join(found)}. One record or group must not see another, and only buffers of ordinary modules in the model "
            "are put back after each: keep nothing of the records, or keep it in a registered buffer of a module that is not "
            "scripted"
        )


def _place(modules: Mapping[str, nn.Module], name: str) -> str:
    kind = type(modules[name]).__name__
    if name == "":
        return f"the model's own forward ({kind})" if any(modules[name].children()) else f"the model itself ({kind})"
    return f"the loss function ({kind})" if name == "loss_fn" else f"{name} ({kind})"


def _listed(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")

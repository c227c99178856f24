"""The certificate: what was promised for one trained model, as JSON and as Markdown for people.

It follows the reporting list of Ponomareva et al. 2023 (How to DP-fy ML, arXiv:2303.00654, section 5.3). Every figure comes from
the ledger; `verify` recomputes them.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from privgrad.files import digest
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Accountant, Sampler
from privgrad.privacy.ledger import Record

FORMAT = 1

_ACCOUNTANTS = {
    Accountant.PLD: "privacy loss distributions (PLD), rounded pessimistically",
    Accountant.RDP: "Renyi differential privacy (RDP)",
}

_SAMPLERS = {
    Sampler.POISSON: "Poisson sampling is assumed, and Poisson sampling is what was run",
    Sampler.TRUNCATED_POISSON: "truncated Poisson sampling is assumed, and truncated Poisson sampling is what was run",
    Sampler.FIXED_SIZE: "sampling of a fixed size without replacement is assumed, and it is what was run",
    Sampler.SHUFFLED: "no amplification by sampling is assumed: one full Gaussian step is charged for each epoch that was begun, "
    "provided that the records stood in the same order whenever the run was resumed",
    Sampler.FULL_BATCH: "full batches are assumed, and full batches are what was run",
}

_NOT_COVERED = (
    "Choices made by looking at other trainings on the same data: hyper-parameters, early stopping, the best of several runs. "
    "Each further training on this data adds its own epsilon.",
    "Floating-point arithmetic: the proof is about real numbers, the computer rounds.",
    "The evaluation split: its records are declared not to be protected.",
    "The computer that trained the model: whoever could read its memory or its disk saw the data itself.",
    "What is true of people in general: a model may well teach something about a person whose data was not used at all.",
)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on data that is not protected."""

    split: str
    declared: str
    """"public" or "held-out": in either case not protected by the guarantee."""
    metrics: Mapping[str, float]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class PlanFacts:
    """What a certificate needs to know of a plan: its JSON, what its stages do in words, and a few of its numbers.

    unit: one unit of privacy, in a word. seeded: the noise comes from a seed that must stay secret.
    disclosed: what leaves the training without noise because the user asked for it, in words. own: the classes of mechanisms that
    are not this library's.
    """

    plan: Mapping[str, Any]
    words: Mapping[str, str]
    unit: str
    noise_multiplier: float
    seeded: bool
    steps: int
    disclosed: tuple[str, ...] = ()
    own: tuple[str, ...] = ()


def make_certificate(
    record: Record,
    facts: PlanFacts,
    *,
    steps_applied: int,
    data: str,
    model_digest: str,
    evaluation: Evaluation | None,
    created: str,
) -> dict[str, Any]:
    """The certificate of a finished run, with its own digest.

    record: the ledger. created: when, as text. epsilon is None where there is no guarantee (noise 0): JSON knows no infinity.
    """
    unit = facts.unit
    epsilon = record.spent()
    terms = record.terms
    content: dict[str, Any] = {
        "format": FORMAT,
        "created": created,
        "guarantee": math.isfinite(epsilon),
        "epsilon": epsilon if math.isfinite(epsilon) else None,
        "delta": terms.delta,
        "unit": unit,
        "adjacency": {"name": terms.adjacency.value, "words": terms.adjacency.words.format(unit=unit)},
        "attack_success": record.attack_success(),
        "setting": "central: the trainer is trusted and sees the data; what leaves the training is protected",
        "covers": "one training run, with every intermediate state of the weights and the final model",
        "mechanism": dict(facts.words),
        "noise": {"multiplier": facts.noise_multiplier, "secret_seed": facts.seeded},
        "accounting": {
            "accountant": terms.accountant.value,
            "words": _ACCOUNTANTS[terms.accountant],
            "assumptions": _SAMPLERS[terms.sampler],
            "library": f"dp-accounting {_version('dp-accounting')}",
        },
        "steps": {"planned": facts.steps, "charged": record.count, "applied": steps_applied},
        "data": data,
        "evaluation": None
        if evaluation is None
        else {
            "split": evaluation.split,
            "declared": evaluation.declared,
            "metrics": {name: value if math.isfinite(value) else None for name, value in evaluation.metrics.items()},
        },
        "disclosed": list(facts.disclosed),
        **({"own_mechanisms": list(facts.own)} if facts.own else {}),
        "not_covered": list(_NOT_COVERED),
        "ledger": {"steps": record.count, "head": record.head},
        "plan": dict(facts.plan),
        "plan_digest": terms.plan,
        "model_sha256": model_digest,
        "software": {
            "privgrad": _version("privgrad"),
            "torch": _version("torch"),
            "python": platform.python_version(),
        },
    }
    return {**content, "digest": digest(content)}


def round_up(number: float, digits: int) -> str:
    """A number as people read it, rounded upwards from its shortest decimal form (a float times 100 may round downwards)."""
    if math.isinf(number):
        return "infinity"
    return str(Decimal(repr(float(number))).quantize(Decimal(1).scaleb(-digits), rounding=ROUND_CEILING))


def rounded_epsilon(certificate: Mapping[str, Any]) -> str:
    """epsilon as people read it: rounded upwards to two digits."""
    epsilon = certificate["epsilon"]
    return "none" if epsilon is None else round_up(epsilon, 2)


def plain_delta(certificate: Mapping[str, Any]) -> str:
    """delta as people read it: 0.00001; with an exponent where the zeros would not end."""
    delta = float(certificate["delta"])
    return f"{Decimal(repr(delta)):f}" if delta >= 1e-12 else repr(delta)


def success_of_100(certificate: Mapping[str, Any]) -> int:
    """How often in 100 fair in-or-out guesses an ideal attacker can be right at most, rounded upwards."""
    return min(100, math.ceil(100 * float(certificate["attack_success"]) - 1e-9))


def shown(metric: float | None) -> str:
    """A metric as people read it."""
    return "not a number" if metric is None else f"{metric:.4f}"


def statement(certificate: Mapping[str, Any]) -> str:
    """The claim in one sentence."""
    if not certificate["guarantee"]:
        return "NO GUARANTEE: this model was trained without enough noise to protect anyone."
    limits = ""
    if certificate["noise"]["secret_seed"]:
        limits = " This holds only while the seed of the noise stays secret and serves no other training."
    if certificate["disclosed"]:
        limits += f" It does not cover what was shown without noise on request: {'; '.join(certificate['disclosed'])}."
    if certificate.get("own_mechanisms"):
        limits += (
            " Its proof is not this library's alone: it rests on mechanisms of the user's own "
            f"({', '.join(certificate['own_mechanisms'])})."
        )
    return (
        f"This model was trained with differential privacy: epsilon = {rounded_epsilon(certificate)}, "
        f"delta = {plain_delta(certificate)}, for each {certificate['unit']} of the training data.{limits}"
    )


def meaning(certificate: Mapping[str, Any]) -> str:
    """What the claim means for one person, for readers who are no engineers."""
    unit = certificate["unit"]
    coin = f"whether one particular {unit} was used in training"
    if certificate["adjacency"]["name"] == Adjacency.REPLACE_ONE:
        coin = f"which of two particular {unit}s was used in training"
    if not certificate["guarantee"] or success_of_100(certificate) == 100:
        return "Nothing can be said about what an attacker may learn from the model about one person."
    return (
        f"Suppose that a coin decided {coin}, and that an attacker knows all other records, this method and every version of "
        "the model. Guessing how the coin fell, blindly, is right 50 times in 100. With the model it is right at most "
        f"{success_of_100(certificate)} times in 100. That is the limit for an ideal attacker, whatever is learned in the future."
    )


def to_markdown(certificate: Mapping[str, Any]) -> str:
    """The certificate as Markdown. Names that the user gave (files, keys, blocks) stay words: no headings, links or tags."""
    c = _as_words(certificate)
    lines = [
        "# Privacy certificate",
        "",
        f"**{statement(c)}**",
        "",
        meaning(c),
        "",
        "## What is protected",
        "",
        f"- One unit of privacy: one {c['unit']}.",
        f"- Hard to tell apart: {c['adjacency']['words']} (`{c['adjacency']['name']}`).",
        f"- Setting: {c['setting']}.",
        f"- Covers: {c['covers']}.",
        f"- Data: {c['data']}.",
        "",
        "## How",
        "",
        *[f"- {name.capitalize()}: {text}." for name, text in c["mechanism"].items()],
        f"- Steps: {c['steps']['planned']} planned, {c['steps']['charged']} charged to the ledger, "
        f"{c['steps']['applied']} applied to the model.",
        f"- Accounting: {c['accounting']['words']}, {c['accounting']['library']}; {c['accounting']['assumptions']}.",
        "",
        "## What is not covered",
        "",
        *[f"- {text}" for text in c["not_covered"]],
        *[f"- Shown without noise, because the user asked for it by name: {text}." for text in c["disclosed"]],
        "",
    ]
    if c["evaluation"] is not None:
        lines += [
            "## What was measured",
            "",
            f"On the split `{c['evaluation']['split']}`, declared {c['evaluation']['declared']} (not protected):",
            "",
            *[f"- {name.replace('_', ' ')}: {shown(value)}" for name, value in c["evaluation"]["metrics"].items()],
            "",
        ]
    lines += [
        "## To check it",
        "",
        "`privgrad verify RUN` recomputes epsilon from the ledger and compares plan, ledger, model and pages with this "
        "certificate (not `config.toml` and `metrics.jsonl`, on which the claim does not rest).",
        "",
        "| | |",
        "|---|---|",
        f"| epsilon (exact) | {c['epsilon']} |",
        f"| ledger | {c['ledger']['steps']} steps, head `{c['ledger']['head']}` |",
        f"| plan | `{c['plan_digest']}` |",
        f"| model.safetensors | `{c['model_sha256']}` |",
        f"| this certificate | `{c['digest']}` |",
        f"| made | {c['created']} with privgrad {c['software']['privgrad']}, torch {c['software']['torch']}, "
        f"Python {c['software']['python']} |",
        "",
    ]
    return "\n".join(lines)


def _as_words(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _as_words(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_words(item) for item in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(value.split())).replace("](", "]\\(")

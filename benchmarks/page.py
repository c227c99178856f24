"""Writes docs/speed.md and docs/speed.svg from the committed results: `python -m benchmarks.page`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.picture import draw

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
PAGE, PICTURE = ROOT / "docs" / "speed.md", ROOT / "docs" / "speed.svg"

MODELS = {
    "dp-cnn": "DP-CNN",
    "resnet-20-gn": "ResNet-20",
    "wrn-16-4-gn": "WRN-16-4",
    "mlp": "MLP",
    "transformer": "transformer",
}
ENGINES = {
    "plain-tuned": "plain, with privgrad's pages and products",
    "plain-microbatched": "plain, in small parts",
    "privgrad-flat": "**privgrad, flat**",
    "privgrad-layerwise": "**privgrad, layerwise**",
    "privgrad-group": "**privgrad, groups of 32**",
    "privgrad-unnoised": "privgrad, flat, without its noise (not private)",
    "vmap": "privgrad, vmap engine",
    "opacus-hooks": "Opacus 1.6, hooks",
    "opacus-ghost": "Opacus 1.6, ghost",
}
PEERS = ("opacus-hooks", "opacus-ghost")
TO_REACH = {
    "privgrad-flat": {"dp-cnn": 1.10, "resnet-20-gn": 1.25, "wrn-16-4-gn": 1.15, "mlp": 1.15, "transformer": 1.15},
    "privgrad-layerwise": {"dp-cnn": 1.10, "resnet-20-gn": 1.20, "wrn-16-4-gn": 1.10, "mlp": 1.12, "transformer": 1.10},
    "privgrad-group": dict.fromkeys(MODELS, 1.10),
}
"""Time ratios that the project set itself."""
MEMORY_TO_REACH = {model: 1.10 if model == "mlp" else 1.00 for model in MODELS}
"""The same for the memory of flat and layerwise clipping."""
PARTS = ("forward", "input gradients", "weight gradients and norms", "weighted sums", "noise", "rest")

Rows = Sequence[Mapping[str, Any]]


def load(name: str) -> dict[str, Any]:
    """One committed result file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def by_cell(rows: Rows) -> dict[tuple[str, str], Mapping[str, Any]]:
    """{(model, engine): its row}, of those that ran."""
    return {(row["model"], row["engine"]): row for row in rows if "skipped" not in row}


def _with_memory(rows: Rows, memory: Rows) -> Rows:
    """Step times with the memory ratios of more than one process, where there are any."""
    found = by_cell(memory)
    return [
        {**row, "memory_ratio": found[cell]["resident"] / found[row["model"], "plain"]["resident"]}
        if (cell := (row["model"], row["engine"])) in found
        else row
        for row in rows
    ]


def page() -> str:
    """docs/speed.md."""
    steps, profile, noise, memory, scaling, sparse, accounting = map(
        load, ("step_time", "profile", "noise", "memory", "scaling", "sparsification", "accounting")
    )
    rows = _with_memory(steps["rows"], memory["rows"])
    return f"""# What a private step costs

Written by `python -m benchmarks.page` from [benchmarks/results](../benchmarks/results). Each number is a ratio to the same step
without privacy (`plain`) in one interleaved run on one core of an idle machine: {steps["about"]}.

![Step time of each engine](speed.svg)

`{steps["command"]}`.
Batch in brackets; step time / peak memory, which for plain training and for flat and layerwise clipping is the median of
several processes (table below): it differs by up to a tenth from one to the next.

{_step_table(rows)}

{_against_peers(rows)}

**Pages and products.** Two things that privgrad does would make any training faster. It shows glibc a large block once, so that
what one step frees stays for the next (`privgrad.gradients.memory.keep_pages`). And it multiplies the matrices of large linear
layers by oneDNN, where the BLAS of this torch, MKL, leaves half of the registers unused: on AVX-512 processors that Intel did not
make, as this one (`privgrad.gradients.products`). The first row is the plain step with both. Against that row the flat step takes
{_against_tuned(steps["rows"])}.
Where Linux has huge pages, `THP_MEM_ALLOC_ENABLE=1` makes large batches cheaper as well (torch reads it at its start; the
command line sets it).

## Where the time goes

`{profile["command"]}`: milliseconds; both steps in turns in one process, pages kept.

{_profile_table(profile["rows"])}

What is left above the plain step, and why. Linear layers are multiplied faster than in plain training here, which hides what
privacy costs them. Gradients of single examples are as many operations as their sum, but in smaller products, and they are
written once and read twice (norms, sums). Convolutions go by the same library in both: one with few channels pays most
(ResNet-20), since its gradients come from a grouped kernel and are laid out anew; one with many weights (WRN-16-4) has its norms
from Gram matrices and its sum from a second kernel. The MLP pays for its noise: a cryptographic normal costs
{_nanoseconds(noise["rows"])} nanoseconds (torch's own {_nanoseconds(noise["rows"], "fast")}), 1.9 million of them for 512
examples.
Share of a step, by `{noise["command"]}`: {_noise_shares(noise["rows"])}.
Not measured again yet: noise was drawn in single precision when all times on this page were taken, and is drawn, added and
rounded in double precision since ([why](guarantees/dp_sgd.md)), which takes longer.

## Where the memory goes

`{memory["command"]}`: MiB beyond what stood there before the first step. Tensors: the most that
tensors hold at once, with what an engine keeps from step to step; resident: the figure of the table above; code: pages of the
libraries' machine code that the steps were the first to read, which all processes share; rest: resident less code.

{_memory_table(memory["rows"])}

{_memory_words(memory["rows"])}

## Random sparsification

`{sparse["command"]}`:
90 % masked, `compression = random_sparsification`; ratios to plain training, as above.

{_sparse_table(sparse["rows"])}

`elements`: single coordinates, as in the paper; all gradients are computed. `rows`: of each weight; the weight gradient of a few
rows still reads all inputs. `layers`: whole layers, others at each step;
below the lowest that takes part no gradient is computed. `bare`: hardly a row is left, but all input gradients are.
{_sparse_words(sparse["rows"])}

## Scaling

`{scaling["command"]}`: one tower of convolutions, of which one number at a time changes; time ratios.

{_scaling_table(scaling["rows"])}

{_scaling_words(scaling["rows"])}

## Accounting

`{accounting["command"]}`: epsilon and the seconds for it; then the seconds for the noise multiplier of
epsilon {accounting["target"]:g}; delta {accounting["delta"]:g}. privgrad calls dp-accounting, on a grid that follows the answer,
and rounds upwards.

{_accounting_table(accounting["rows"])}
"""


def _table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _step_table(rows: Rows) -> str:
    cells = by_cell(rows)
    header = ["time / memory", *(f"{name} [{cells[model, 'plain']['batch']}]" for model, name in MODELS.items())]
    lines = [
        [
            words,
            *(
                f"{row['time_ratio']:.2f} / {row['memory_ratio']:.2f}" if (row := cells.get((model, engine))) else ""
                for model in MODELS
            ),
        ]
        for engine, words in ENGINES.items()
    ]
    for engine, words in (("privgrad-flat", "to reach, flat"), ("privgrad-layerwise", "to reach, layerwise")):
        lines.append([words, *(f"{TO_REACH[engine][model]:.2f} / {MEMORY_TO_REACH[model]:.2f}" for model in MODELS)])
    lines.append(["to reach, groups", *(f"{TO_REACH['privgrad-group'][model]:.2f}" for model in MODELS)])
    return _table(header, lines)


def _against_peers(rows: Rows) -> str:
    cells = by_cell(rows)
    ahead = {
        model: min(cells[model, peer]["seconds"] for peer in PEERS) / cells[model, "privgrad-flat"]["seconds"]
        for model in MODELS
    }
    faster = ", ".join(f"{MODELS[model]} {ratio:.2f}" for model, ratio in ahead.items())
    memory = dict.fromkeys(("privgrad-flat", "privgrad-layerwise"), MEMORY_TO_REACH)
    missed = [
        f"{what} of {MODELS[model]} {engine.removeprefix('privgrad-')} ({ratio:.2f}, to reach {bar:.2f})"
        for what, targets in (("time", TO_REACH), ("memory", memory))
        for engine, bars in targets.items()
        for model, bar in bars.items()
        if (ratio := cells[model, engine][f"{what}_ratio"]) > bar
    ]
    return (
        f"Opacus's better engine takes so many times as long as privgrad's flat step: {faster}. "
        f"Lines that are not reached: {', '.join(missed) if missed else 'none'}."
    )


def _against_tuned(rows: Rows) -> str:
    cells = by_cell(rows)
    ratios = [
        (name, cells[model, "privgrad-flat"]["seconds"] / cells[model, "plain-tuned"]["seconds"])
        for model, name in MODELS.items()
    ]
    return ", ".join(f"{ratio:.2f} ({name})" for name, ratio in ratios)


def _parts(row: Mapping[str, Any]) -> list[float]:
    private = row["private"]
    known = {
        **{part: private.get(part, 0.0) for part in PARTS},
        "input gradients": private["backward"] - private["weight gradients and norms"],
    }
    known["rest"] = private["step"] - sum(known[part] for part in PARTS[:-1])
    return [known[part] for part in PARTS]


def _profile_table(rows: Rows) -> str:
    lines = [
        [
            MODELS[row["model"]],
            f"{row['plain']['step']:.0f} ({row['plain']['forward']:.0f} + {row['plain']['backward']:.0f})",
            f"{row['private']['step']:.0f}",
            *(f"{value:.0f}" for value in _parts(row)),
        ]
        for row in rows
    ]
    return _table(["", "plain (forward + backward)", "private", *PARTS], lines)


def _nanoseconds(rows: Rows, kind: str = "secure") -> str:
    values = [row[f"{kind}_nanoseconds_per_number"] for row in rows]
    return f"{min(values):.1f} to {max(values):.1f}"


def _noise_shares(rows: Rows) -> str:
    return ", ".join(f"{row['secure_share_of_step']:.1%} ({MODELS[row['model']]})" for row in rows)


def _memory_table(rows: Rows) -> str:
    parts = ("tensors", "resident", "code", "rest")
    words = {"plain": "plain", **ENGINES}
    lines = [[MODELS[row["model"]], words[row["engine"]], *(f"{row[part]:.1f}" for part in parts)] for row in rows]
    return _table(["", "", *parts], lines)


def _memory_words(rows: Rows) -> str:
    plain, private = (by_cell(rows)["mlp", engine] for engine in ("plain", "privgrad-flat"))
    alone = (plain["rest"] + private["code"]) / plain["resident"]
    return (
        f"Beyond code the MLP's private step takes {private['rest']:.0f} MiB where the plain one takes {plain['rest']:.0f}. "
        f"What sets them apart is the code of other\nkernels, {private['code']:.0f} MiB for {plain['code']:.0f}, beside a "
        f"plain step that is small: with that code and nothing else the ratio would be\n{alone:.2f}."
    )


def _sparse_table(rows: Rows) -> str:
    masks = {
        "privgrad-flat": "no mask",
        "privgrad-sparse-elements": "elements",
        "privgrad-sparse": "rows",
        "privgrad-sparse-layers": "layers",
        "privgrad-bare": "bare",
    }
    cells = by_cell(rows)
    lines = []
    for engine, mask in masks.items():
        ratios = [(cells[model, engine]["time_ratio"], cells[model, engine]["memory_ratio"]) for model in MODELS]
        lines.append([mask, *(f"{time:.2f} / {memory:.2f}" for time, memory in ratios)])
    return _table(["time / memory", *MODELS.values()], lines)


def _sparse_words(rows: Rows) -> str:
    times = {engine: row["time_ratio"] for (model, engine), row in by_cell(rows).items() if model == "wrn-16-4-gn"}
    whole = times["privgrad-flat"]
    cost = whole - times["privgrad-bare"]
    by_rows, by_layers = times["privgrad-sparse"], times["privgrad-sparse-layers"]
    return (
        f"On WRN-16-4 `rows` removes {(whole - by_rows) / cost:.1%} of what weight gradients, norms and noise cost\n"
        f"(no mask less `bare`) and makes the step {whole / by_rows:.2f} times as fast; `layers` removes\n"
        f"{(whole - by_layers) / cost:.1%}, since input gradients go, too, and makes it {whole / by_layers:.2f} times as fast."
    )


def _scaling_table(rows: Rows) -> str:
    engines = [engine for engine in dict.fromkeys(row["engine"] for row in rows) if engine != "plain"]
    cells = by_cell(rows)
    names = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for name in names:
        ratios = {engine: cells[name, engine]["time_ratio"] for engine in engines}
        against_tuned = ratios["privgrad-flat"] / ratios["plain-tuned"]
        lines.append([name, *(f"{ratio:.2f}" for ratio in ratios.values()), f"{against_tuned:.2f}"])
    return _table(["", *engines, "flat against plain-tuned"], lines)


def _scaling_words(rows: Rows) -> str:
    cells = by_cell(rows)
    names = list(dict.fromkeys(row["model"] for row in rows))
    ways = {way: [name for name in names if name.startswith(way)] for way in ("batch", "depth", "width")}

    def course(base: str) -> str:
        def ratio(name: str) -> float:
            return float(cells[name, "privgrad-flat"]["seconds"] / cells[name, base]["seconds"])

        return ", ".join(f"{way} {ratio(some[0]):.2f} to {ratio(some[-1]):.2f}" for way, some in ways.items())

    return (
        f"From the smallest to the largest, flat against the plain step: {course('plain')}; "
        f"against the plain\nstep with the same pages: {course('plain-tuned')}."
    )


def _accounting_table(rows: Rows) -> str:
    questions = list(dict.fromkeys((row["rate"], row["steps"], row["noise_multiplier_given"]) for row in rows))
    found = {(row["engine"], row["rate"], row["steps"]): row for row in rows}
    lines = [
        [
            engine,
            *(
                f"{row['epsilon']:.3f} in {row['epsilon_seconds']:.2f} s; {row['noise_multiplier_seconds']:.1f} s"
                for rate, steps, _ in questions
                if (row := found[engine, rate, steps])
            ),
        ]
        for engine in dict.fromkeys(row["engine"] for row in rows)
    ]
    return _table(["", *(f"q = {rate:g}, T = {steps:,}, z = {given:g}" for rate, steps, given in questions)], lines)


def main() -> None:
    """Write both files."""
    PAGE.write_text(page())
    draw(by_cell(load("step_time")["rows"]), MODELS, PICTURE)


if __name__ == "__main__":
    main()

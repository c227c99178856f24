"""Damaged runs: ledgers, plans and certificates changed where it hurts, with the hashes made right again."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from privgrad.privacy.certificate import to_markdown
from privgrad.report.certificate_page import to_html
from tests.fuzz.configurations import VALUES

TOLD_BY_THE_RUN_ALONE = {"created", "data", "evaluation", "software", "model_sha256"}
"""What a certificate says and neither ledger nor plan knows; a forger who makes its digest right is not found out."""


@dataclass
class Damage:
    """One change. noticed: `verify` must exit with 1 or 2."""

    words: str
    noticed: bool


def canonical(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def sha(data: Any) -> str:
    return hashlib.sha256(canonical(data).encode()).hexdigest()


def damage(directory: Path, original: Path, chance: random.Random) -> Damage:
    """A copy of the run at `original`, finished or not, with one change in it."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(original, directory)
    names = ["ledger.jsonl", "plan.json"]
    if (directory / "certificate.json").exists():
        names += ["certificate.json", "certificate.md", "certificate.html", "model.safetensors"]
    kinds = {"bytes": 2, "ledger": 4, "plan": 4, "certificate": 4, "files": 1, "training": 2}
    kind = chance.choices(list(kinds), list(kinds.values()))[0]
    if kind == "certificate" and "certificate.json" not in names:
        kind = "ledger"
    if kind == "bytes":
        return _bytes(directory, chance.choice([*names, "checkpoint/latest.safetensors"]), chance)
    if kind == "training":
        name = "metrics.jsonl" if chance.random() < 0.3 and (directory / "metrics.jsonl").exists() else "config.toml"
        return _bytes(directory, name, chance, noticed=False)
    if kind == "files":
        return _files(directory, names, chance)
    return {"ledger": _ledger, "plan": _plan, "certificate": _certificate}[kind](directory, chance)


def _bytes(directory: Path, name: str, chance: random.Random, *, noticed: bool = True) -> Damage:
    path = directory / name
    raw = path.read_bytes()
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 3, 50))):
        at = chance.randint(0, len(changed))
        match chance.randrange(4):
            case 0:
                changed[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                changed[at:at] = chance.choice((b"\n", b"\0", b"[" * 3000, b"{", b'"', b"9" * 5000, b"\xff"))
            case 2:
                del changed[at : at + chance.randint(1, 40)]
            case _:
                del changed[at:]
    path.write_bytes(changed)
    return Damage(f"{name}: other bytes", noticed and bytes(changed) != raw and path.exists())


def _files(directory: Path, names: list[str], chance: random.Random) -> Damage:
    name = chance.choice(names)
    path = directory / name
    match chance.randrange(4):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            other = chance.choice([other for other in names if other != name])
            shutil.copyfile(directory / other, path)
        case _:
            path.write_bytes(b"")
    return Damage(f"{name}: another file", True)


def _change(node: Any, chance: random.Random, words: list[str]) -> Any:
    """One value, key or element somewhere in a tree becomes another."""
    if isinstance(node, dict) and node and chance.random() < 0.85:
        key = chance.choice(list(node))
        words.append(str(key))
        match chance.randrange(8):
            case 0:
                return {other: value for other, value in node.items() if other != key}
            case 1:
                return {**node, chance.choice(("x", "", "kind", "steps")): _value(chance)}
            case _:
                return {**node, key: _change(node[key], chance, words)}
    if isinstance(node, list) and node and chance.random() < 0.7:
        at = chance.randrange(len(node))
        return [_change(item, chance, words) if place == at else item for place, item in enumerate(node)]
    return _value(chance)


def _value(chance: random.Random) -> Any:
    plain = [value for value in VALUES if isinstance(value, bool | int | float | str | list | dict)]
    return chance.choice([None, *plain])


def _ledger(directory: Path, chance: random.Random) -> Damage:
    path = directory / "ledger.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    contents = [{key: value for key, value in entry.items() if key not in ("previous", "hash")} for entry in entries]
    words: list[str] = []
    place = chance.randrange(len(contents))
    match chance.randrange(6):
        case 0:
            del contents[place]
        case 1:
            contents.insert(place, contents[place])
        case 2:
            contents = contents[:place]
        case _:
            contents[place] = _change(contents[place], chance, words)
    raw, previous = "", ""
    for content in contents:
        entry = {**content, "previous": previous} if isinstance(content, dict) else content
        if isinstance(content, dict):
            previous = sha(entry)
            entry["hash"] = previous
        raw += canonical(entry) + "\n"
    before = path.read_text()
    path.write_text(raw)
    return Damage(f"ledger.jsonl: {'.'.join(words) or 'other lines'} in line {place + 1}", raw != before)


def _plan(directory: Path, chance: random.Random) -> Damage:
    """With the ledger's first line made to fit, so that the plan itself is looked at."""
    path, ledger = directory / "plan.json", directory / "ledger.jsonl"
    words: list[str] = []
    before = json.loads(path.read_text())
    plan = _change(before, chance, words)
    path.write_text(json.dumps(plan, indent=2) + "\n")
    if chance.random() < 0.7:
        raw, previous = "", ""
        for line in ledger.read_text().splitlines():
            entry = {key: value for key, value in json.loads(line).items() if key != "hash"} | {"previous": previous}
            if "plan" in entry:
                entry["plan"] = sha(plan)
            previous = sha(entry)
            raw += canonical({**entry, "hash": previous}) + "\n"
        ledger.write_text(raw)
    return Damage(f"plan.json: {'.'.join(words)}", canonical(plan) != canonical(before))


def _certificate(directory: Path, chance: random.Random) -> Damage:
    """With its digest and its other forms made to fit, so that its content is looked at."""
    path = directory / "certificate.json"
    words: list[str] = []
    before = json.loads(path.read_text())
    certificate = _change({key: value for key, value in before.items() if key != "digest"}, chance, words)
    forged = isinstance(certificate, dict) and chance.random() < 0.8
    if forged:
        certificate["digest"] = sha(certificate)
    path.write_text(json.dumps(certificate, indent=2) + "\n")
    for name, render in (("certificate.md", to_markdown), ("certificate.html", to_html)):
        try:
            (directory / name).write_text(render(certificate))
        except Exception:  # no certificate at all; then the old page stays
            forged = forged and certificate == before
    same = canonical(certificate) == canonical(before)
    beyond = forged and isinstance(certificate, dict) and _only_told_by_the_run(certificate, before)
    return Damage(f"certificate.json: {'.'.join(words)}", not same and not beyond)


def _only_told_by_the_run(certificate: dict[str, Any], before: dict[str, Any]) -> bool:
    differing = {key for key in certificate.keys() | before.keys() if certificate.get(key) != before.get(key)}
    if "steps" in differing and isinstance(certificate.get("steps"), dict):  # how many were applied
        differing -= {"steps"} if {**certificate["steps"], "applied": 0} == {**before["steps"], "applied": 0} else set()
    if "accounting" in differing and isinstance(certificate.get("accounting"), dict):  # the library's version
        differing -= (
            {"accounting"}
            if {**certificate["accounting"], "library": 0} == {**before["accounting"], "library": 0}
            else set()
        )
    return differing <= TOLD_BY_THE_RUN_ALONE | {"digest"}

"""The ledger: nothing in it can be changed unseen, and a step that may have run is never forgotten."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from dp_accounting import GaussianDpEvent, LaplaceDpEvent, NonPrivateDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent

import privgrad
from privgrad.errors import PrivgradError, VerificationError
from privgrad.privacy.accounting import Precision
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import _SERIALISED, Accountant, Sampler, event_from_json, event_to_json
from privgrad.privacy.ledger import Ledger, Receipt, Terms, has_begun, read_ledger

TERMS = Terms("ab" * 32, Sampler.POISSON, Adjacency.ZERO_OUT, Accountant.PLD, 1e-5)
STEP = PoissonSampledDpEvent(0.25, GaussianDpEvent(1.5))
OTHER = GaussianDpEvent(2.0)


def written(path: Path, *events) -> bytes:
    """A ledger file with these events, and its bytes."""
    ledger = Ledger(TERMS, path)
    for event in events:
        ledger.charge(event)
    ledger.close()
    return path.read_bytes()


def chained(*contents: dict[str, Any]) -> bytes:
    """A ledger made by hand whose chain is right, whatever its lines say. Written from the format, not from the code."""
    raw, previous = b"", ""
    for content in contents:
        entry = {**content, "previous": previous}
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        previous = hashlib.sha256(text.encode()).hexdigest()
        entry["hash"] = previous
        raw += json.dumps(entry, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
    return raw


# Round trip


def test_charge_read_and_resume_tell_the_same_story(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    receipts = [ledger.charge(event) for event in (STEP, OTHER, STEP)]
    assert [receipt.step for receipt in receipts] == [1, 2, 3]
    assert [receipt.event for receipt in receipts] == [STEP, OTHER, STEP]
    head = ledger.head
    ledger.close()

    record = read_ledger(path)
    assert record.terms == TERMS
    assert dict(record.events) == {STEP: 2, OTHER: 1}
    assert (record.count, record.head, record.torn) == (3, head, 0)
    assert len(record.heads) == 4
    assert record.heads[-1] == head

    resumed = Ledger.resume(TERMS, path)
    assert (resumed.count, resumed.head) == (3, head)
    assert dict(resumed.record.events) == dict(record.events)
    assert resumed.charge(OTHER).step == 4
    assert resumed.charge(STEP).step == 5
    resumed.close()
    after = read_ledger(path)
    assert dict(after.events) == {STEP: 3, OTHER: 2}
    assert after.heads[:4] == record.heads


def test_a_charge_is_on_the_disk_before_its_receipt_is_given(tmp_path, monkeypatch):
    """What another reader sees after each charge, and that the flush to the disk came before the return."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (real(descriptor), synced.append(path.stat().st_size)))
    for step in (1, 2, 3):
        ledger.charge(STEP)
        assert read_ledger(path).count == step
        assert synced[-1] == path.stat().st_size
        assert len(synced) == step
    ledger.close()


def test_the_file_has_the_format_that_is_written_down(tmp_path):
    """Canonical JSON lines, each with the SHA-256 of itself and of the line before: other tools can check it."""
    first = {
        "format": 1,
        "plan": "ab" * 32,
        "sampler": "poisson",
        "adjacency": "zero_out",
        "accountant": "pld",
        "delta": 1e-5,
    }
    gaussian = {"kind": "gaussian", "noise_multiplier": 1.5}
    step = {"step": 1, "event": {"kind": "poisson_sampled", "sampling_probability": 0.25, "event": gaussian}}
    assert written(tmp_path / "ledger.jsonl", STEP) == chained(first, step)


@pytest.mark.parametrize("event", [STEP, OTHER, NonPrivateDpEvent()])
def test_events_survive_the_ledger(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize("event", [LaplaceDpEvent(1.0), SelfComposedDpEvent(STEP, 3)])
def test_an_event_without_a_ledger_form_is_refused_and_not_counted(tmp_path, event):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    with pytest.raises(PrivgradError, match="no ledger form"):
        ledger.charge(event)
    assert ledger.charge(STEP).step == 1
    ledger.close()
    assert read_ledger(path).count == 1


def test_spent_is_that_of_the_charged_steps_and_infinite_after_one_without_noise():
    ledger = Ledger(TERMS)
    assert ledger.record.spent() == 0.0
    ledger.charge(OTHER)
    one = ledger.record.spent(Precision.COARSE)
    ledger.charge(OTHER)
    assert 0 < one < ledger.record.spent(Precision.COARSE) < math.inf
    bare = Ledger(TERMS)
    bare.charge(NonPrivateDpEvent())
    bare.charge(NonPrivateDpEvent())
    assert bare.record.spent() == math.inf
    assert bare.record.attack_success() == 1.0


def test_spent_of_a_ledger_with_two_kinds_of_steps():
    ledger = Ledger(TERMS)
    ledger.charge(STEP)
    one = ledger.record.spent(Precision.COARSE)
    ledger.charge(OTHER)
    assert one < ledger.record.spent(Precision.COARSE) < math.inf


# The chain


def test_an_end_that_no_crash_leaves_is_damage(tmp_path):
    """One line may be cut off. A copy whose last pages are zeros has lost steps that were charged and used."""
    path = tmp_path / "ledger.jsonl"
    raw = written(path, *[STEP] * 20)
    line = raw.splitlines(keepends=True)[-1]
    path.write_bytes(raw[: -len(line)] + bytes(len(line)))
    assert read_ledger(path).count == 19
    path.write_bytes(raw[:-2000] + bytes(2000))
    for act in (lambda: read_ledger(path), lambda: Ledger.resume(TERMS, path)):
        with pytest.raises(VerificationError, match="bytes that are no entry, more than a crash leaves of a line"):
            act()


def test_changing_any_single_bit_is_found(tmp_path):
    """All bits of a ledger of four lines. Only the last newline can be lost, and then it shows as a torn line."""
    path = tmp_path / "ledger.jsonl"
    raw = written(path, STEP, OTHER, NonPrivateDpEvent())
    whole = read_ledger(path)
    with path.open("r+b", buffering=0) as stream:
        for place, byte in enumerate(raw):
            for bit in range(8):
                os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit]), place)
                try:
                    record = read_ledger(path)
                except VerificationError:
                    continue
                assert place == len(raw) - 1, f"bit {bit} of byte {place} changes nothing"
                assert record.torn > 0
                assert record.count == whole.count - 1
                assert record.head == whole.heads[-2]
            os.pwrite(stream.fileno(), bytes([byte]), place)
    assert path.read_bytes() == raw


def test_swapped_deleted_and_duplicated_lines_are_found(tmp_path):
    """Every pair swapped, every line but the last taken out, every line written twice in every place."""
    path = tmp_path / "ledger.jsonl"
    lines = written(path, STEP, STEP, STEP, STEP).splitlines(keepends=True)
    places = range(len(lines))
    forged = [lines[:i] + lines[i + 1 :] for i in places[:-1]]
    for i in places:
        forged += [[*lines[:j], lines[i], *lines[j:]] for j in range(len(lines) + 1)]
        for j in places[i + 1 :]:
            swapped = lines.copy()
            swapped[i], swapped[j] = swapped[j], swapped[i]
            forged.append(swapped)
    for attempt in forged:
        path.write_bytes(b"".join(attempt))
        with pytest.raises(VerificationError):
            read_ledger(path)


def test_a_line_of_another_ledger_is_found(tmp_path):
    mine = written(tmp_path / "mine", STEP, STEP).splitlines(keepends=True)
    theirs = written(tmp_path / "theirs", OTHER, STEP).splitlines(keepends=True)
    (tmp_path / "mixed").write_bytes(mine[0] + mine[1] + theirs[2])
    with pytest.raises(VerificationError, match="line 3"):
        read_ledger(tmp_path / "mixed")


def test_other_spellings_of_the_same_line_are_found(tmp_path):
    """A line must be what its hash covers to the byte: no spaces, no other order, no second key of the same name."""
    path = tmp_path / "ledger.jsonl"
    raw = written(path, STEP)
    for old, new in [
        (b'"delta":1e-05', b'"delta":0.00001'),
        (b'"delta":1e-05', b'"delta": 1e-05'),
        (b'"delta":1e-05', b'"delta":0.5,"delta":1e-05'),
        (b'"poisson"', b'"\\u0070oisson"'),
        (b"\n", b"\r\n"),
        (b"\n", b" \n"),
        (b"\n", b"\n\n"),
        (b"{", b"\xef\xbb\xbf{"),
    ]:
        changed = raw.replace(old, new, 1)
        assert changed != raw
        path.write_bytes(changed)
        with pytest.raises(VerificationError):
            read_ledger(path)


def test_a_missing_tail_shows_in_count_and_head(tmp_path):
    """The chain cannot show it; whoever holds count and head does. `heads` says which prefix it is."""
    path = tmp_path / "ledger.jsonl"
    lines = written(path, STEP, OTHER, STEP).splitlines(keepends=True)
    whole = read_ledger(path)
    for kept in range(3):
        path.write_bytes(b"".join(lines[: kept + 1]))
        record = read_ledger(path)
        assert record.count == kept
        assert record.head != whole.head
        assert record.head == whole.heads[kept]
        assert record.torn == 0
    assert len(set(whole.heads)) == 4


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"{}", b"\n", b"{}\n", b"[]\n", b"null\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"]
)
def test_what_is_no_ledger_is_refused_in_words(tmp_path, raw):
    (tmp_path / "ledger.jsonl").write_bytes(raw)
    with pytest.raises(VerificationError):
        read_ledger(tmp_path / "ledger.jsonl")


def test_a_missing_ledger_is_refused_in_words(tmp_path):
    for read in (read_ledger, lambda path: Ledger.resume(TERMS, path)):
        with pytest.raises(PrivgradError, match="nowhere"):
            read(tmp_path / "nowhere")
    with pytest.raises(PrivgradError, match="cannot be written"):
        Ledger(TERMS, tmp_path / "no" / "directory")


# What a right chain cannot make right

GOOD_EVENT = event_to_json(STEP)
GOOD_GAUSSIAN = event_to_json(OTHER)


def test_the_hand_made_ledger_is_good_before_it_is_spoilt(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chained(TERMS.to_json(), {"step": 1, "event": GOOD_EVENT}, {"step": 2, "event": GOOD_GAUSSIAN}))
    assert dict(read_ledger(path).events) == {STEP: 1, OTHER: 1}


GOOD_TRUNCATED = {
    "kind": "truncated_poisson_gaussian",
    "dataset_size": 10,
    "sampling_probability": 0.5,
    "truncated_batch_size": 4,
    "noise_multiplier": 1.0,
}
GOOD_FIXED = {
    "kind": "sampled_without_replacement",
    "source_dataset_size": 10,
    "sample_size": 4,
    "event": GOOD_GAUSSIAN,
}


def test_the_good_ones_are_read():
    assert all(event_to_json(event_from_json(event)) == event for event in (GOOD_TRUNCATED, GOOD_FIXED, GOOD_EVENT))


GOOD_MIXED = {"kind": "mixed_gaussian", "noise_multiplier": 1.0, "width": 3.0, "p": 4.0}
BAD_EVENTS = [
    None,
    "gaussian",
    1.0,
    [],
    {},
    {"kind": None, "noise_multiplier": 1.0},
    {"kind": ["gaussian"], "noise_multiplier": 1.0},
    {"kind": "gauss", "noise_multiplier": 1.0},
    {"kind": "no_op", "noise_multiplier": 1.0},
    {"kind": "laplace", "noise_multiplier": 1.0},
    {"kind": "self_composed", "event": GOOD_GAUSSIAN, "count": 0},
    {"kind": "composed", "events": []},
    {"kind": "gaussian"},
    {"kind": "gaussian", "noise_multiplier": 1.0, "sensitivity": 0.1},
    {"kind": "non_private", "noise_multiplier": 1.0},
    {"kind": "poisson_sampled", "sampling_probability": 0.1},
    {"kind": "poisson_sampled", "event": GOOD_GAUSSIAN},
    {**GOOD_EVENT, "dataset_size": 100},
    {**GOOD_EVENT, "event": {"kind": "gaussian"}},
    {**GOOD_EVENT, "event": None},
    *[{**GOOD_GAUSSIAN, "noise_multiplier": bad} for bad in (0, 0.0, -1.0, True, None, "1.0", [1.0])],
    *[{**GOOD_EVENT, "event": {"kind": "gaussian", "noise_multiplier": bad}} for bad in (0, -2.0, "2.0")],
    *[{**GOOD_EVENT, "sampling_probability": bad} for bad in (0, 0.0, -0.1, 1.0000001, 2, True, "0.1", None)],
    *[
        {**GOOD_TRUNCATED, key: bad}
        for key in ("dataset_size", "truncated_batch_size")
        for bad in (0, -1, 4.0, True, "4", None)
    ],
    *[{**GOOD_TRUNCATED, "sampling_probability": bad} for bad in (0, 1.5)],
    {key: value for key, value in GOOD_TRUNCATED.items() if key != "noise_multiplier"},
    *[
        {**GOOD_FIXED, key: bad}
        for key in ("source_dataset_size", "sample_size")
        for bad in (0, -1, 4.0, True, "4", None)
    ],
    {**GOOD_FIXED, "sample_size": 11},
    {**GOOD_FIXED, "event": GOOD_EVENT},
    *[{**GOOD_MIXED, key: bad} for key in ("noise_multiplier", "width", "p") for bad in (0, -1.0, True, "4", None)],
    {**GOOD_MIXED, "p": 0.5},
    {**GOOD_EVENT, "event": {**GOOD_MIXED, "p": 0.999}},
]


@pytest.mark.parametrize("event", BAD_EVENTS, ids=repr)
def test_events_that_mean_nothing_are_refused_also_on_a_right_chain(tmp_path, event):
    with pytest.raises(VerificationError):
        event_from_json(event)
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chained(TERMS.to_json(), {"step": 1, "event": GOOD_EVENT}, {"step": 2, "event": event}))
    with pytest.raises(VerificationError):
        read_ledger(path)
    with pytest.raises(VerificationError):
        Ledger.resume(TERMS, path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_know_are_refused_on_a_right_chain(tmp_path, bad):
    """Python's own parser reads NaN and Infinity."""
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chained(TERMS.to_json(), {"step": 1, "event": {"kind": "gaussian", "noise_multiplier": bad}}))
    with pytest.raises(VerificationError):
        read_ledger(path)


def wrapped(event: dict[str, Any], times: int) -> dict[str, Any]:
    for _ in range(times):
        event = {"kind": "poisson_sampled", "sampling_probability": 0.5, "event": event}
    return event


@pytest.mark.parametrize(
    "event",
    [
        pytest.param({"kind": "gaussian", "noise_multiplier": math.inf}, id="infinite noise is free"),
        pytest.param({"kind": "gaussian", "noise_multiplier": 10**400}, id="an integer beyond floats"),
        pytest.param(wrapped({"kind": "non_private"}, 1), id="a sampled event that no accountant takes"),
        pytest.param(wrapped(GOOD_GAUSSIAN, 2), id="sampled twice, which no accountant takes"),
        pytest.param(wrapped(GOOD_GAUSSIAN, 3_000), id="nested beyond the stack"),
    ],
)
def test_events_that_cannot_be_accounted_for_are_refused(event):
    with pytest.raises(VerificationError):
        event_from_json(event)


@pytest.mark.parametrize(
    "spoilt",
    [
        {"step": 1},
        {"event": GOOD_EVENT},
        {"step": 0, "event": GOOD_EVENT},
        {"step": 2, "event": GOOD_EVENT},
        {"step": -1, "event": GOOD_EVENT},
        {"step": "1", "event": GOOD_EVENT},
        {"step": None, "event": GOOD_EVENT},
        pytest.param(
            {"step": 1, "event": GOOD_EVENT, "count": 100},
        ),
        pytest.param(
            {"step": True, "event": GOOD_EVENT},
        ),
    ],
    ids=repr,
)
def test_steps_out_of_order_are_refused_on_a_right_chain(tmp_path, spoilt):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chained(TERMS.to_json(), spoilt))
    with pytest.raises(VerificationError):
        read_ledger(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("format", None),
        ("sampler", "shuffle"),
        ("sampler", []),
        ("adjacency", "add_or_remove"),
        ("accountant", "prv"),
        pytest.param("delta", 0.0),
        pytest.param("delta", 1.5),
        pytest.param("delta", "1e-5"),
    ],
    ids=repr,
)
def test_first_lines_without_terms_are_refused_on_a_right_chain(tmp_path, key, value):
    path = tmp_path / "ledger.jsonl"
    for terms in ({**TERMS.to_json(), key: value}, {k: v for k, v in TERMS.to_json().items() if k != key}):
        path.write_bytes(chained(terms, {"step": 1, "event": GOOD_EVENT}))
        with pytest.raises(VerificationError):
            read_ledger(path)


@pytest.mark.parametrize(
    "change",
    [
        {"note": "surplus"},
        {"plan": 5},
        {"format": True},
        {"step": 0, "event": GOOD_EVENT, "format": 2},
    ],
    ids=repr,
)
def test_first_lines_with_more_or_other_things_in_them_are_refused(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(chained({**TERMS.to_json(), **change}, {"step": 1, "event": GOOD_EVENT}))
    with pytest.raises(VerificationError):
        read_ledger(path)


def test_nesting_of_any_depth_is_refused_in_words(tmp_path):
    """Up to what json itself can write from here: the stack must not run out anywhere between."""
    path, nested, depths = tmp_path / "ledger.jsonl", 1.0, 0
    for depth in range(2_000):
        nested = [nested]
        if depth % 29:
            continue
        try:
            raw = chained(TERMS.to_json(), {"step": 1, "event": {"kind": "gaussian", "noise_multiplier": nested}})
        except RecursionError:
            break
        path.write_bytes(raw)
        with pytest.raises(VerificationError):
            read_ledger(path)
        depths += 1
    assert depths > 10


def test_every_kind_of_event_has_its_bad_examples():
    """A new kind of event needs its lines in BAD_EVENTS."""
    assert set(_SERIALISED) == {
        "gaussian",
        "mixed_gaussian",
        "poisson_sampled",
        "truncated_poisson_gaussian",
        "sampled_without_replacement",
        "non_private",
        "no_op",
    }


def test_steps_without_a_cost_are_a_shuffled_epochs_later_ones(tmp_path):
    path = tmp_path / "ledger.jsonl"
    shuffled = dataclasses.replace(TERMS, sampler=Sampler.SHUFFLED).to_json()
    free, paid = {"kind": "no_op"}, GOOD_GAUSSIAN
    path.write_bytes(chained(shuffled, {"step": 1, "event": paid}, {"step": 2, "event": free}))
    assert read_ledger(path).count == 2
    for terms, events in ((shuffled, [free, paid]), (TERMS.to_json(), [paid, free])):
        path.write_bytes(chained(terms, *({"step": step, "event": event} for step, event in enumerate(events, 1))))
        with pytest.raises(VerificationError, match="charges nothing"):
            read_ledger(path)


# Stops, crashes and full disks


def test_a_torn_last_line_is_cut_off_and_the_ledger_goes_on(tmp_path):
    """Wherever the write stopped: the two whole steps count, the torn one does not, and its number is used next."""
    path = tmp_path / "ledger.jsonl"
    raw = written(path, STEP, OTHER, STEP)
    two = len(b"".join(raw.splitlines(keepends=True)[:3]))
    for length in (two + 1, two + 50, len(raw) - 2, len(raw) - 1):
        path.write_bytes(raw[:length])
        assert read_ledger(path).torn == length - two
        ledger = Ledger.resume(TERMS, path)
        assert path.read_bytes() == raw[:two]
        assert ledger.count == 2
        assert ledger.charge(STEP).step == 3
        ledger.close()
        assert path.read_bytes() == raw


@pytest.mark.parametrize(
    "change",
    [
        {"plan": "cd" * 32},
        {"sampler": Sampler.FULL_BATCH},
        {"adjacency": Adjacency.ADD_REMOVE},
        {"accountant": Accountant.RDP},
        {"delta": 1e-6},
    ],
    ids=str,
)
def test_resume_under_other_terms_is_refused_and_changes_nothing(tmp_path, change):
    path = tmp_path / "ledger.jsonl"
    raw = written(path, STEP) + b'{"torn'
    path.write_bytes(raw)
    with pytest.raises(PrivgradError, match="plan"):
        Ledger.resume(dataclasses.replace(TERMS, **change), path)
    assert path.read_bytes() == raw


def test_resume_of_a_broken_chain_is_refused_and_changes_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    raw = written(path, STEP, STEP).replace(b"1.5", b"9.5", 1)
    path.write_bytes(raw)
    with pytest.raises(VerificationError):
        Ledger.resume(TERMS, path)
    assert path.read_bytes() == raw


def test_a_refused_resume_gives_the_lock_back(tmp_path):
    """Also where somebody still holds the error, as a notebook does."""
    path = tmp_path / "ledger.jsonl"
    written(path, STEP)
    with pytest.raises(PrivgradError) as held:
        Ledger.resume(dataclasses.replace(TERMS, delta=1e-6), path)
    assert "plan" in str(held.value)
    assert Ledger.resume(TERMS, path).count == 1


def test_an_existing_file_is_never_started_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    raw = written(path, STEP)
    with pytest.raises(PrivgradError, match="exists"):
        Ledger(TERMS, path)
    assert path.read_bytes() == raw


@pytest.mark.parametrize("length", [0, 1, 100, None])
def test_a_ledger_without_a_whole_first_line_has_not_begun_and_can_be_started(tmp_path, length):
    """A crash in the write of the first line: nothing was charged, so nothing can be forgotten."""
    path = tmp_path / "ledger.jsonl"
    raw = written(path)
    path.write_bytes(raw[:-1][:length])
    assert not has_begun(path)
    ledger = Ledger(TERMS, path)
    assert ledger.charge(STEP).step == 1
    ledger.close()
    assert has_begun(path)
    assert path.read_bytes()[: len(raw)] == raw
    assert read_ledger(path).count == 1


def test_what_is_too_long_for_a_torn_first_line_is_not_overwritten(tmp_path):
    """A ledger whose line ends were lost holds charges, though it has no line."""
    path = tmp_path / "ledger.jsonl"
    raw = written(path, *[STEP] * 20).replace(b"\n", b" ")
    path.write_bytes(raw)
    with pytest.raises(PrivgradError, match="exists"):
        Ledger(TERMS, path)
    assert path.read_bytes() == raw


def test_a_hole_of_zeros_in_the_last_line_is_a_torn_line_and_elsewhere_damage(tmp_path):
    """What a power cut can leave of a line that was not flushed yet: its end is on the disk and its start is not."""
    path = tmp_path / "ledger.jsonl"
    lines = written(path, STEP, STEP).splitlines(keepends=True)
    hole = bytes(40) + lines[2][40:]
    path.write_bytes(lines[0] + lines[1] + hole)
    assert (read_ledger(path).count, read_ledger(path).torn) == (1, len(hole))
    ledger = Ledger.resume(TERMS, path)
    ledger.charge(STEP)
    ledger.close()
    assert path.read_bytes() == b"".join(lines)
    path.write_bytes(lines[0] + bytes(40) + lines[1][40:] + lines[2])
    with pytest.raises(VerificationError):
        read_ledger(path)
    path.write_bytes(bytes(10) + lines[0][10:])
    assert not has_begun(path)


def test_what_must_be_there_before_the_first_line_is_written_under_the_lock(tmp_path):
    path = tmp_path / "ledger.jsonl"
    seen = []

    def prepare() -> None:
        with pytest.raises(PrivgradError, match="in use"):
            Ledger(TERMS, path)
        seen.append(path.read_bytes())

    Ledger(TERMS, path, prepare).close()
    assert seen == [b""]


def test_a_start_that_cannot_be_prepared_leaves_no_run_and_no_lock(tmp_path):
    path = tmp_path / "ledger.jsonl"

    def failing() -> None:
        raise PrivgradError("no plan")

    with pytest.raises(PrivgradError, match="no plan"):
        Ledger(TERMS, path, failing)
    assert not has_begun(path)
    Ledger(TERMS, path).close()


def test_an_abandoned_ledger_is_free_again_unless_something_was_charged(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(TERMS, path).abandon()
    assert not has_begun(path)
    ledger = Ledger(TERMS, path)
    ledger.charge(STEP)
    ledger.abandon()
    assert read_ledger(path).count == 1
    Ledger.resume(TERMS, path).abandon()
    assert read_ledger(path).count == 1


def test_a_forgotten_ledger_gives_its_lock_back(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(TERMS, path)
    assert Ledger.resume(TERMS, path).count == 0


def test_a_child_of_the_process_neither_holds_the_lock_nor_charges(tmp_path):
    """Data-loading workers are forks: one that outlives its killed parent must not keep the run from being resumed."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    ledger.charge(STEP)
    ready, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go_on)
        code = 0
        with suppress(PrivgradError):
            ledger.charge(STEP)
            code = 1
        os.read(ready, 1)  # lives on, until the parent has looked
        os._exit(code)
    try:
        with pytest.raises(PrivgradError, match="in use"):
            Ledger.resume(TERMS, path)
        assert ledger.charge(STEP).step == 2
        ledger.close()
        resumed = Ledger.resume(TERMS, path)
        assert resumed.count == 2
        resumed.close()
    finally:
        os.close(go_on)
        _, status = os.waitpid(child, 0)
        os.close(ready)
    assert os.waitstatus_to_exitcode(status) == 0
    assert read_ledger(path).count == 2


def test_closing_frees_the_lock_though_a_child_still_has_the_file_open(tmp_path):
    """A fork that the system has not yet let run holds the descriptor; a child with the descriptor stands for it here."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    descriptor = ledger._file._descriptor
    child = subprocess.Popen(["sleep", "60"], pass_fds=[descriptor])
    try:
        with pytest.raises(PrivgradError, match="in use"):
            Ledger.resume(TERMS, path)
        ledger.close()
        Ledger.resume(TERMS, path).close()
    finally:
        child.kill()
        child.wait()


def test_a_ledger_is_open_once_in_a_process(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first = Ledger(TERMS, path)
    first.charge(STEP)
    with pytest.raises(PrivgradError, match="in use"):
        Ledger.resume(TERMS, path)
    assert first.charge(STEP).step == 2
    first.close()
    second = Ledger.resume(TERMS, path)
    with pytest.raises(PrivgradError, match="in use"):
        Ledger.resume(TERMS, path)
    assert second.charge(STEP).step == 3
    second.close()
    assert read_ledger(path).count == 3


HOLDER = """
import sys
from pathlib import Path
from dp_accounting import GaussianDpEvent
from privgrad.privacy.adjacency import Adjacency
from privgrad.privacy.events import Accountant, Sampler
from privgrad.privacy.ledger import Ledger, Terms
terms = Terms("ab" * 32, Sampler.POISSON, Adjacency.ZERO_OUT, Accountant.PLD, 1e-5)
ledger = Ledger.resume(terms, Path(sys.argv[1]))
print(ledger.charge(GaussianDpEvent(2.0)).step, flush=True)
sys.stdin.read()
"""


def test_a_ledger_is_open_in_one_process_and_survives_its_death(tmp_path):
    """While another process holds it, it is refused; after kill -9 every step that it charged counts."""
    path = tmp_path / "ledger.jsonl"
    written(path, STEP)
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "2\n"
            with pytest.raises(PrivgradError, match="in use"):
                Ledger.resume(TERMS, path)
            assert read_ledger(path).count == 2
        finally:
            holder.send_signal(signal.SIGKILL)
    ledger = Ledger.resume(TERMS, path)
    assert ledger.count == 2
    assert ledger.charge(STEP).step == 3
    ledger.close()


def failing_sync(descriptor: int) -> None:
    raise OSError(5, "Input/output error")


@contextmanager
def disk_full_after(path: Path, more: int) -> Iterator[None]:
    """No file of this process can grow beyond the size of `path` and `more` bytes: a write is cut off in its middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_after_a_failing_flush_nothing_is_charged_until_resume(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    ledger.charge(STEP)
    head = ledger.head
    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", failing_sync)
        with pytest.raises(PrivgradError, match="not taken"):
            ledger.charge(STEP)
    assert (ledger.count, ledger.head) == (1, head)
    assert dict(ledger.record.events) == {STEP: 1}
    for event in (STEP, OTHER):
        with pytest.raises(PrivgradError, match="resume"):
            ledger.charge(event)
    assert ledger.count == 1
    ledger.close()
    resumed = Ledger.resume(TERMS, path)
    # The line may have reached the disk or not. If it has, it counts: never fewer steps than may have run.
    assert resumed.count == read_ledger(path).count >= 1
    assert resumed.charge(OTHER).step == resumed.count
    resumed.close()
    assert read_ledger(path).events[OTHER] == 1


@pytest.mark.parametrize("more", [0, 1, 60])
def test_after_a_write_that_fails_in_its_middle_nothing_is_charged_until_resume(tmp_path, more):
    """A real short write, as on a full disk."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    ledger.charge(STEP)
    refusals: list[str] = []
    with disk_full_after(path, more):
        for _ in range(3):
            try:
                ledger.charge(STEP)
            except PrivgradError as error:
                refusals.append(str(error))
        seen = read_ledger(path)
    assert len(refusals) == 3
    assert "not taken" in refusals[0]
    assert (seen.count, seen.torn) == (1, more)
    assert ledger.count == 1
    with pytest.raises(PrivgradError, match="resume"):
        ledger.charge(STEP)
    ledger.close()
    resumed = Ledger.resume(TERMS, path)
    assert resumed.charge(OTHER).step == resumed.count == 2
    resumed.close()
    assert read_ledger(path).events[OTHER] == 1


def test_a_ledger_whose_first_line_cannot_be_written_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing_sync)
    with pytest.raises(PrivgradError, match="cannot be written"):
        Ledger(TERMS, tmp_path / "ledger.jsonl")


def test_after_an_interrupt_in_the_flush_the_chain_stays_whole(tmp_path, monkeypatch):
    """Ctrl-C in a notebook lands in fsync more often than not. Going on may be refused; a fork of the chain may not be."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(STEP)
    with suppress(PrivgradError):
        ledger.charge(STEP)
    ledger.close()
    assert read_ledger(path).count >= 1


def test_after_an_interrupt_just_behind_the_flush_the_chain_stays_whole(tmp_path, monkeypatch):
    """A signal may be handled between any two calls: here, between the flush and the count."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    append = ledger._append

    def interrupted(line: bytes) -> None:
        append(line)
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(ledger, "_append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ledger.charge(STEP)
    with suppress(PrivgradError):
        ledger.charge(STEP)
    ledger.close()
    assert read_ledger(path).count >= 1


def test_a_torn_line_that_cannot_be_cut_off_is_refused_in_words(tmp_path, monkeypatch):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(written(path, STEP) + b"{")
    monkeypatch.setattr(os, "fsync", failing_sync)
    with pytest.raises(PrivgradError):
        Ledger.resume(TERMS, path)


def test_a_ledger_on_a_full_disk_can_be_closed(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    with disk_full_after(path, 10):
        with pytest.raises(PrivgradError, match="not taken"):
            ledger.charge(STEP)
        ledger.close()


def test_an_event_with_infinite_noise_is_refused_in_words():
    with pytest.raises(PrivgradError):
        Ledger(TERMS).charge(GaussianDpEvent(math.inf))


# Memory and receipts


def test_a_ledger_in_memory_is_the_same_chain(tmp_path):
    """And writes nothing."""
    memory, path = Ledger(TERMS), tmp_path / "ledger.jsonl"
    disk = Ledger(TERMS, path)
    assert memory.head == disk.head
    for step, event in enumerate((STEP, OTHER, STEP), start=1):
        assert memory.charge(event) == disk.charge(event) == Receipt(step, event)
        assert memory.head == disk.head
    assert memory.count == 3
    assert memory.record == disk.record
    memory.close()
    disk.close()
    assert list(tmp_path.iterdir()) == [path]


def test_a_closed_ledger_charges_nothing(tmp_path):
    ledger = Ledger(TERMS, tmp_path / "ledger.jsonl")
    ledger.close()
    with pytest.raises(PrivgradError):
        ledger.charge(STEP)
    assert read_ledger(tmp_path / "ledger.jsonl").count == 0


def test_a_record_does_not_change_when_the_ledger_goes_on():
    ledger = Ledger(TERMS)
    ledger.charge(STEP)
    before = ledger.record
    before.events[OTHER] += 7
    ledger.charge(STEP)
    assert before.count == 1
    assert dict(ledger.record.events) == {STEP: 2}


def test_step_numbers_rise_and_are_never_used_twice(tmp_path):
    """Over stops and a torn line: seeded noise is indexed by them."""
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger(TERMS, path)
    numbers = [ledger.charge(STEP).step for _ in range(3)]
    for _ in range(3):
        ledger.close()
        with path.open("ab") as stream:
            stream.write(b'{"event":')
        ledger = Ledger.resume(TERMS, path)
        numbers += [ledger.charge(OTHER).step, ledger.charge(STEP).step]
    ledger.close()
    assert numbers == list(range(1, 10))


def test_nothing_but_charge_makes_a_receipt():
    """Over the whole source: `Receipt(...)` is called in Ledger.charge alone, and a receipt is never copied or unpickled."""
    found = []
    for path in sorted(Path(privgrad.__path__[0]).rglob("*.py")):
        tree = ast.parse(path.read_text())
        owners = {
            id(node): f"{path.name}:{scope.name}"
            for scope in ast.walk(tree)
            if isinstance(scope, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(scope)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", None)) == "Receipt":
                found.append(owners.get(id(node), f"{path.name}:module"))
    assert found == ["ledger.py:charge"]


def test_a_receipt_cannot_be_changed():
    receipt = Ledger(TERMS).charge(STEP)
    with pytest.raises(dataclasses.FrozenInstanceError):
        receipt.step = 2

"""The guarantees name the code they rest on; the names must exist, and so must the tests that attack them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from benchmarks import page as speed

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "guarantees").glob("*.md"))


def test_the_page_on_speed_is_of_the_results() -> None:
    assert speed.PAGE.read_text() == speed.page()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_in_a_guarantee_exists(page: Path) -> None:
    text = page.read_text()
    names = re.findall(r"`(privgrad(?:\.\w+)+):(\w+(?:\.\w+)*)`", text)
    assert names, "a guarantee names its code as `privgrad.module:Name`"
    for module, path in names:
        found = importlib.import_module(module)
        for attribute in path.split("."):
            found = getattr(found, attribute)
    for file in re.findall(r"tests/\w+/\w+\.py", text):
        assert (ROOT / file).exists(), file

"""A file imports from its own floor and from those below, never upwards; privacy/ imports no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import privgrad

SOURCE = Path(privgrad.__file__).parent
FLOORS = ["privacy", "gradients", "mechanism", "nn", "data", "report", "training", "audit", "cli"]
COMMON = {"errors", "files", "own"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_imports_from_above(floor: str) -> None:
    allowed = COMMON | set(FLOORS[: FLOORS.index(floor) + 1])
    files = sorted((SOURCE / floor).rglob("*.py"))
    assert files
    for path in files:
        for module in imports(path):
            top, _, rest = module.partition(".")
            if top == "privgrad":
                assert rest.split(".")[0] in allowed, f"{path} imports {module}"
            if floor == "privacy":
                assert top != "torch", f"{path} imports {module}"


def test_files_are_short_enough_to_read() -> None:
    assert not [path for path in SOURCE.rglob("*.py") if len(path.read_text().splitlines()) > 400]


def test_nothing_unpickles() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text()
        assert "pickle" not in imports(path)
        assert "torch.load" not in text
        assert "torch.save" not in text

"""Every mutant still applies: an edit whose text is gone would be an error of the runner, found late."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.mutants.catalogue import MUTANTS, Mutant
from tests.mutants.runner import ROOT, remembered


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutants_text_occurs_once_and_its_tests_exist(mutant: Mutant) -> None:
    text = (ROOT / "src" / "privgrad" / mutant.file).read_text()
    assert text.count(mutant.before) == 1
    compile(text.replace(mutant.before, mutant.after), mutant.file, "exec")
    assert mutant.before != mutant.after
    assert mutant.tests
    assert all((ROOT / test.split("::")[0]).exists() for test in mutant.tests)


def test_names_are_unique() -> None:
    assert set(Counter(mutant.name for mutant in MUTANTS).values()) == {1}


def test_what_is_remembered_is_of_mutants_and_of_files_that_exist() -> None:
    names = {mutant.name for mutant in MUTANTS}
    assert set(remembered()) <= names
    assert all((ROOT / killer.split("::")[0]).exists() for killer in remembered().values())

"""Pictures as text."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from privgrad.report.comparison import Cell, rows_of, to_svg
from privgrad.report.picture import new_figure, svg


def test_the_same_picture_is_the_same_text() -> None:
    def drawn() -> str:
        figure = new_figure(3, 2)
        axes = figure.subplots()
        axes.bar([1, 2], [3.0, 4.0])
        axes.set_title("a title")
        return svg(figure)

    assert drawn() == drawn()


@pytest.mark.parametrize("name", ["lr_$5_vs_$10", "ctl\x01", "$", "a_b^c \\frac"])
def test_a_plan_may_have_any_name(name: str) -> None:
    """No formula, and nothing that XML cannot hold."""
    cells = [Cell(name, 0, 3.0, 1e-5, 10, 0.5, 1.0), Cell("other", 0, 3.0, 1e-5, 10, 0.6, 1.0)]
    ElementTree.fromstring(to_svg(rows_of(cells), cells, name))

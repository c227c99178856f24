"""Pictures as text."""

from __future__ import annotations

from privgrad.report.picture import new_figure, svg


def test_the_same_picture_is_the_same_text() -> None:
    def drawn() -> str:
        figure = new_figure(3, 2)
        axes = figure.subplots()
        axes.bar([1, 2], [3.0, 4.0])
        axes.set_title("a title")
        return svg(figure)

    assert drawn() == drawn()

"""The certificate's page: it says what the certificate says, whatever stands in it, and loads nothing from anywhere."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import privgrad as pg
from privgrad.privacy.certificate import to_markdown
from privgrad.report.certificate_page import to_html
from privgrad.training.trainer import Trainer

Certificate = dict[str, Any]
EVIL = """<script src="https://evil.example/x.js"></script><b onclick='f()'>&amp;"""


def certified(directory: Path, *, multiplier: float = 20.0, seed: int | None = None) -> Certificate:
    """The certificate of a real run. Full batches are accounted for at once."""
    data, test = (TensorDataset(torch.randn(8, 3), torch.arange(8) % 2) for _ in range(2))
    plan = pg.Plan(
        sampling=pg.PoissonSampling(rate=1.0, divisor=8.0),
        steps=2,
        noise=pg.GaussianNoise(multiplier=multiplier, insecure_seed=seed),
    )
    model = nn.Linear(3, 2)
    Trainer(
        *(model, torch.optim.SGD(model.parameters(), lr=0.1), data, plan, pg.supervised(F.cross_entropy)),
        **{"directory": directory, "test": pg.DeclaredSplit(test, name="split"), "quiet": True, "evaluations": 1},
    ).fit()
    return json.loads((directory / "certificate.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Certificate]:
    directory = tmp_path_factory.mktemp("runs")
    return {
        "plain": certified(directory / "plain"),
        "seeded": certified(directory / "seeded", seed=3),
        "no guarantee": certified(directory / "none", multiplier=0.0),
    }


@pytest.fixture
def plain(made: dict[str, Certificate]) -> Certificate:
    return copy.deepcopy(made["plain"])


def test_names_stay_words_in_markdown(plain: Certificate) -> None:
    plain["data"] = "x\n\n# Privacy certificate: epsilon 0\n\n[free](https://evil.example) <b onclick=f()>tr; 3 < 4"
    text = to_markdown(plain)
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Privacy certificate"]
    assert "](" not in text.replace("]\\(", "")
    assert "<b" not in text
    assert "3 < 4" in text


@pytest.fixture(params=["plain", "seeded", "no guarantee"])
def each(request: pytest.FixtureRequest, made: dict[str, Certificate]) -> Certificate:
    return copy.deepcopy(made[request.param])


class Reader(HTMLParser):
    """The page as a browser takes it apart: elements with their attributes, and the words."""

    VOID = frozenset({"meta", "link", "circle"})

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data

    @property
    def text(self) -> str:
        return " ".join(self.words.split())


def texts(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every text in a certificate."""
    if isinstance(node, str):
        yield path
    elif isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from texts(value, (*path, key))


def put(node: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value


# Well-formed, alone, and the same every time.


def test_every_element_is_closed(each: Certificate) -> None:
    reader = Reader(to_html(each))
    assert reader.open == []
    assert [tag for tag, _ in reader.elements][:2] == ["html", "head"]


def test_nothing_is_loaded_and_nothing_runs(each: Certificate) -> None:
    page = to_html(each)
    for forbidden in ("http://", "https://", "src=", "<script", "@import", "url(", "javascript:", "<iframe", "<object"):
        assert forbidden not in page.lower(), forbidden
    reader = Reader(page)
    for tag, attributes in reader.elements:
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("href", "data:,") == "data:,"
    policies = [
        found["content"] for _, found in reader.elements if found.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1
    assert policies[0] is not None
    assert policies[0].startswith("default-src 'none';")


def test_equal_certificates_give_equal_pages(each: Certificate) -> None:
    assert to_html(each) == to_html(json.loads(json.dumps(each)))


def test_the_page_is_ascii(plain: Certificate) -> None:
    plain["data"] = "Zürich – 記録 \U0001f600"
    page = to_html(plain)
    assert page.isascii()
    assert plain["data"] in Reader(page).text


def test_the_page_of_a_run_is_the_page_of_its_certificate(made: dict[str, Certificate], tmp_path: Path) -> None:
    certificate = certified(tmp_path)
    assert (tmp_path / "certificate.html").read_text(encoding="utf-8") == to_html(certificate)


def test_a_page_is_not_changed_by_being_made(each: Certificate) -> None:
    before = copy.deepcopy(each)
    to_html(each)
    assert each == before


# Escaping.


def test_no_text_of_a_certificate_becomes_markup(each: Certificate) -> None:
    plain_page = [tag for tag, _ in Reader(to_html(each)).elements]
    paths = [path for path in texts(each) if path != ("adjacency", "name")]
    assert len(paths) > 20
    for path in paths:
        changed = copy.deepcopy(each)
        put(changed, path, EVIL)
        page = to_html(changed)
        assert "<script" not in page, path
        assert "<b " not in page, path
        assert [tag for tag, _ in Reader(page).elements] == plain_page, path


@pytest.mark.parametrize("path", [("data",), ("evaluation", "split"), ("mechanism", "noise"), ("unit",)])
def test_what_stands_in_a_certificate_can_be_read_on_the_page(plain: Certificate, path: tuple[str, ...]) -> None:
    put(plain, path, EVIL)
    assert EVIL in Reader(to_html(plain)).text


def test_names_of_stages_and_metrics_are_escaped(plain: Certificate) -> None:
    plain["mechanism"][EVIL] = "words"
    plain["disclosed"] = [EVIL]
    page = to_html(plain)
    assert "<script" not in page
    assert "<b " not in page


def test_a_dollar_sign_is_a_dollar_sign(plain: Certificate) -> None:
    """The page is filled in by a template, in which $ has a meaning."""
    plain["data"] = "$body costs $$5 and ${title}"
    assert "$body costs $$5 and ${title}" in Reader(to_html(plain)).text


# What it says.


def test_the_page_gives_epsilon_rounded_upwards_and_delta(plain: Certificate) -> None:
    plain["epsilon"] = 2.9900001
    text = Reader(to_html(plain)).text
    assert "epsilon = 3.00" in text
    assert "2.99 " not in text
    assert "1 in 100,000" in text


def test_the_page_tells_who_is_protected_and_what_is_not_covered(plain: Certificate) -> None:
    text = Reader(to_html(plain)).text
    for words in (plain["unit"], plain["adjacency"]["name"], plain["data"], *plain["not_covered"]):
        assert words in text
    for words in plain["mechanism"].values():
        assert words[1:] in text


def test_the_page_gives_every_hash(plain: Certificate) -> None:
    text = Reader(to_html(plain)).text
    for value in (plain["digest"], plain["plan_digest"], plain["model_sha256"], plain["ledger"]["head"]):
        assert value in text
    assert repr(plain["epsilon"]) in text


def test_steps_that_a_crash_lost_are_told(plain: Certificate) -> None:
    assert "interruption" not in Reader(to_html(plain)).text
    plain["steps"] = {"planned": 2000, "charged": 2000, "applied": 1999}
    one = Reader(to_html(plain)).text
    assert "2,000 planned, 2,000 charged to the ledger, 1,999 applied to the model." in one
    assert "1 charged step is not in the model" in one
    plain["steps"]["applied"] = 1990
    assert "10 charged steps are not in the model" in Reader(to_html(plain)).text


def test_what_was_disclosed_is_told(plain: Certificate) -> None:
    assert "Disclosed outside the guarantee" not in Reader(to_html(plain)).text
    plain["disclosed"] = ["the training loss of every step"]
    text = Reader(to_html(plain)).text
    assert "Disclosed outside the guarantee" in text
    assert "the training loss of every step" in text


def test_a_certificate_without_an_evaluation_measures_nothing(plain: Certificate) -> None:
    assert "What was measured" in Reader(to_html(plain)).text
    plain["evaluation"] = None
    assert "What was measured" not in Reader(to_html(plain)).text


@pytest.mark.parametrize(("success", "extra"), [(0.5, 0), (0.501, 1), (0.731, 24), (0.9999, 50), (1.0, 50)])
def test_the_picture_shows_100_dots_and_rounds_in_the_attackers_favour(
    plain: Certificate, success: float, extra: int
) -> None:
    plain["attack_success"] = success
    page = to_html(plain)
    picture = re.search(r'<svg viewBox="0 0 200 200".*?</svg>', page, re.DOTALL)
    assert picture is not None
    drawn = {
        kind: found.count("<circle") for kind, found in re.findall(r'<g class="(\w+)">(.*?)</g>', picture[0], re.DOTALL)
    }
    expected = {"coin": 50, "extra": extra, "rest": 50 - extra}
    assert drawn == {kind: count for kind, count in expected.items() if count}
    places = re.findall(r'cx="(\d+)" cy="(\d+)"', picture[0])
    assert len(set(places)) == len(places) == 100


# Variants.


def test_a_seeded_run_is_warned_of_before_anything_else(made: dict[str, Certificate]) -> None:
    seeded, plain = (Reader(to_html(made[name])).text for name in ("seeded", "plain"))
    assert "Warning: the noise comes from a seed." in seeded
    assert "only while the seed of the noise stays secret" in seeded
    assert seeded.index("Warning") < seeded.index("The two figures")
    assert "Warning" not in plain


def test_without_a_guarantee_the_page_is_a_warning_without_figures(made: dict[str, Certificate]) -> None:
    certificate = made["no guarantee"]
    assert certificate["guarantee"] is False
    reader = Reader(to_html(certificate))
    assert "NO GUARANTEE" in reader.text
    assert ("header", {"class": "alarm"}) in reader.elements
    assert "What is protected Nothing." in reader.text
    for promise in ("The two figures", "What it means", "delta = ", "epsilon = ", "differential privacy"):
        assert promise not in reader.text, promise
    assert "<title>No privacy guarantee</title>" in to_html(certificate)


def test_a_page_with_a_guarantee_raises_no_alarm(plain: Certificate) -> None:
    page = to_html(plain)
    assert "NO GUARANTEE" not in page
    assert 'class="alarm"' not in page
    assert "<title>Privacy certificate</title>" in page


@pytest.mark.parametrize("key", ["guarantee", "unit", "steps", "noise", "digest"])
def test_a_certificate_that_lacks_a_key_makes_no_page(plain: Certificate, key: str) -> None:
    del plain[key]
    with pytest.raises(KeyError):
        to_html(plain)


@pytest.mark.parametrize("change", [lambda c: c, lambda c: {**c, "created": "2000-01-01 00:00 UTC"}])
def test_the_page_knows_no_clock(plain: Certificate, change: Callable[[Certificate], Certificate]) -> None:
    """The only date on the page is the certificate's."""
    certificate = change(plain)
    assert set(re.findall(r"\d{4}-\d\d-\d\d", Reader(to_html(certificate)).text)) == {certificate["created"][:10]}

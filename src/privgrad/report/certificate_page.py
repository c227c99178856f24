"""The certificate as one HTML page, for a reader who is no engineer: no script, nothing loaded from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping
from string import Template
from typing import Any

from privgrad.privacy.certificate import meaning, plain_delta, rounded_epsilon, shown, statement, success_of_100

_BLIND = 50
"""How often in 100 guesses a blind coin is right."""

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1c2024; --soft: #565d66; --rule: #d6d9dc;
  --dot: #88919c; --extra: #123f7a; --alarm: #9b1c1c; --tint: #fbefee;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --paper: #15181b; --ink: #e4e6e8; --soft: #a7aeb6; --rule: #3a4047;
    --dot: #69727c; --extra: #9cc4ff; --alarm: #ff9d94; --tint: #2a1b1b; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; text-size-adjust: 100%;
}
main { max-width: 50rem; margin: 0 auto; padding: 3.5rem clamp(1.25rem, 5vw, 2rem) 4rem; }
h1 { margin: 0 0 .75rem; font-size: clamp(1.75rem, 7vw, 2.125rem); line-height: 1.25; letter-spacing: -.015em; }
h2 { margin: 0 0 1rem; font-size: 1.25rem; }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem; }
section { margin-top: 2.25rem; padding-top: 1.75rem; border-top: 1px solid var(--rule); }
p, ul, dl { max-width: 70ch; margin: 0 0 1rem; }
dd, figure, .lead { margin: 0; }
section > :last-child { margin-bottom: 0; }
.facts dt, .figures dd, caption, th { color: var(--soft); }
ul { padding-left: 1.25rem; }
li + li { margin-top: .4rem; }
code { font: .875em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
.lead { font-size: 1.1875rem; line-height: 1.5; }
.warning { margin: 1.5rem 0 0; padding: .1rem 0 .1rem 1rem; border-left: 4px solid var(--alarm); }
.alarm { padding: 1.75rem 1.5rem; border: 3px solid var(--alarm); background: var(--tint); }
.alarm h1, .warning strong { color: var(--alarm); }
.alarm p + p { margin: 1rem 0 0; }
.figures { display: grid; gap: 1.75rem 2.5rem; max-width: none; }
.figures dt { font-weight: 600; }
.figures dd { max-width: 36ch; font-size: 1rem; line-height: 1.5; }
.figures .value { color: var(--ink); font-size: 3rem; font-weight: 300; line-height: 1.2; }
.meaning { display: grid; gap: 1.5rem 3rem; }
figure { max-width: 20rem; }
figure > svg { display: block; width: 100%; max-width: 14rem; height: auto; }
.coin { fill: var(--dot); }
.extra { fill: var(--extra); }
.rest { fill: none; stroke: var(--dot); stroke-width: 1.5; }
figcaption { margin-top: 1rem; font-size: .9375rem; line-height: 1.4; }
figcaption ul { margin: .4rem 0 0; padding: 0; list-style: none; }
figcaption li { display: grid; grid-template-columns: 1rem 1fr; gap: .5rem; }
figcaption svg { width: 1rem; height: 1.3125rem; }
.facts div + div { margin-top: .875rem; }
table { width: 100%; margin-top: 1rem; border-collapse: collapse; font-size: .9375rem; line-height: 1.45; }
caption { padding-bottom: .5rem; text-align: left; }
th, td { padding: .5rem 0; border-top: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { width: 7rem; padding-right: .75rem; font-weight: 400; overflow-wrap: break-word; }
.whole { white-space: nowrap; }
@media (min-width: 36rem) {
  .figures { grid-template-columns: 1fr 1fr; }
  .facts div { display: grid; grid-template-columns: 11rem 1fr; gap: 1rem; }
  th { width: 12rem; }
}
@media (min-width: 44rem) { .meaning { grid-template-columns: 1fr 15rem; } }
@media print {
  :root { --paper: #fff; font-size: 10pt; }
  main { max-width: none; padding: 0; }
  section { margin-top: 1.25rem; padding-top: 1rem; }
  h2, h3, section > p { break-after: avoid; }
  figure, tr, li, .facts div, .figures, .alarm { break-inside: avoid; }
}
"""

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
""")


def to_html(certificate: Mapping[str, Any]) -> str:
    """The certificate as one self-contained page. Equal certificates give equal text, all of it ASCII.

    Without a guarantee the page is a warning: it shows no figure that could be taken for a promise.
    """
    parts = _certificate(certificate) if certificate["guarantee"] else _refusal(certificate)
    title = "Privacy certificate" if certificate["guarantee"] else "No privacy guarantee"
    page = _PAGE.substitute(title=title, style=_STYLE, body="\n".join(part for part in parts if part))
    # `verify` compares the file as text: ASCII reads the same under every locale.
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _certificate(c: Mapping[str, Any]) -> list[str]:
    return [
        _header("Privacy certificate", _text(statement(c), whole=f"delta = {plain_delta(c)}"), _seed_warning(c)),
        _section("The two figures", _figures(c)),
        _section("What it means", f'<div class="meaning">\n<p>{_text(meaning(c))}</p>\n{_picture(c)}\n</div>'),
        _section("What is protected", _facts(_protected(c))),
        _section("How", _facts(_how(c))),
        _section("What is not covered", _bullets(c["not_covered"]) + _disclosed(c)),
        _measured(c),
        _check(c),
    ]


def _refusal(c: Mapping[str, Any]) -> list[str]:
    advice = (
        f"Treat the model like the training data itself: it may give away any {c['unit']} in it. "
        "No figures are shown, because no limit was kept."
    )
    claim = f"<strong>{_text(statement(c))}</strong>"
    return [
        _header("No privacy guarantee", claim, f"<p>{_text(advice)}</p>\n", kind=' class="alarm"'),
        _section("What is protected", "<p>Nothing.</p>\n" + _facts([("Data", _text(c["data"]))])),
        _section("What was run", _facts([*_mechanism(c), _steps(c)])),
        _section("What was disclosed", _bullets(c["disclosed"])) if c["disclosed"] else "",
        _measured(c),
        _check(c),
    ]


def _header(heading: str, lead: str, rest: str, kind: str = "") -> str:
    return f'<header{kind}>\n<h1>{heading}</h1>\n<p class="lead">{lead}</p>\n{rest}</header>'


def _text(value: object, whole: str = "") -> str:
    """The value escaped, with the part `whole` kept on one line (browsers break 1e-05 at the hyphen)."""
    part = html.escape(whole)
    text = html.escape(str(value))
    return text.replace(part, f'<span class="whole">{part}</span>') if whole else text


def _code(value: object) -> str:
    return f"<code>{_text(value)}</code>"


def _sentence(words: str, whole: str = "") -> str:
    return _text(f"{words[:1].upper()}{words[1:]}.", whole)


def _section(heading: str, content: str) -> str:
    return f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"


def _bullets(texts: Iterable[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{_text(text)}</li>\n" for text in texts) + "</ul>"


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    """A list of names and what is said of them; the latter is HTML already."""
    rows = "".join(f"<div><dt>{_text(name)}</dt><dd>{content}</dd></div>\n" for name, content in facts)
    return f'<dl class="facts">\n{rows}</dl>'


def _seed_warning(c: Mapping[str, Any]) -> str:
    if not c["noise"]["secret_seed"]:
        return ""
    return (
        '<p class="warning"><strong>Warning: the noise comes from a seed.</strong> Whoever learns or guesses the seed '
        "can compute the noise and take it away; then nothing is protected. The seed stands in "
        "<code>config.toml</code>: keep that file secret.</p>\n"
    )


def _figures(c: Mapping[str, Any]) -> str:
    limit = f"The limit on how much one {c['unit']} can change what comes out of the training"
    epsilon = f"{limit}. 0 would be not at all. Smaller is stronger."
    share = f"1 in {math.floor(1 / c['delta'] + 1e-6):,}"
    delta = f"A small remainder that the limit of epsilon leaves open, here {share}. Smaller is stronger."
    figures = (("epsilon", rounded_epsilon(c), epsilon), ("delta", plain_delta(c), delta))
    rows = "".join(
        f'<div><dt>{name}</dt><dd class="value">{_text(value)}</dd><dd>{_text(words)}</dd></div>\n'
        for name, value, words in figures
    )
    return f'<dl class="figures">\n{rows}</dl>'


def _picture(c: Mapping[str, Any]) -> str:
    """100 guesses as dots: right by a blind coin, right with the model at most, wrong."""
    right = max(_BLIND, success_of_100(c))
    groups = (
        ("coin", 0, _BLIND, f"{_BLIND} right by a blind coin"),
        ("extra", _BLIND, right, f"{right - _BLIND} more right with the model, at most"),
        ("rest", right, 100, f"{100 - right} wrong, at least"),
    )
    shown = [group for group in groups if group[1] < group[2]]
    drawn = "".join(f'<g class="{kind}">{_dots(first, last)}</g>\n' for kind, first, last, _ in shown)
    legend = "".join(
        f'<li><svg viewBox="0 0 20 26" aria-hidden="true"><circle class="{kind}" cx="10" cy="13" r="7"/></svg>'
        f"<span>{words}</span></li>\n"
        for kind, _, _, words in shown
    )
    return (
        '<figure>\n<svg viewBox="0 0 200 200" role="img" aria-labelledby="picture-title picture-words">\n'
        '<title id="picture-title">100 guesses of an ideal attacker</title>\n'
        f'<desc id="picture-words">Of 100 dots: {"; ".join(words for *_, words in shown)}.</desc>\n'
        f"{drawn}</svg>\n<figcaption>\nEach dot is one of 100 guesses:\n<ul>\n{legend}</ul>\n</figcaption>\n</figure>"
    )


def _dots(first: int, last: int) -> str:
    places = [(10 + 20 * (place % 10), 10 + 20 * (place // 10)) for place in range(first, last)]
    return "".join(f'<circle cx="{x}" cy="{y}" r="7"/>' for x, y in places)


def _protected(c: Mapping[str, Any]) -> list[tuple[str, str]]:
    adjacency = c["adjacency"]
    return [
        ("One unit of privacy", _sentence(f"one {c['unit']}")),
        ("Hard to tell apart", f"{_sentence(adjacency['words'])} {_code(adjacency['name'])}"),
        ("Setting", _sentence(c["setting"])),
        ("Covers", _sentence(c["covers"])),
        ("Data", _text(c["data"])),
    ]


def _how(c: Mapping[str, Any]) -> list[tuple[str, str]]:
    used = c["accounting"]
    accounting = f"{used['words']}, {used['library']}; {used['assumptions']}"
    return [*_mechanism(c), _steps(c), ("Accounting", _sentence(accounting, whole=used["library"]))]


def _mechanism(c: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.capitalize(), _sentence(words)) for name, words in c["mechanism"].items()]


def _steps(c: Mapping[str, Any]) -> tuple[str, str]:
    steps = c["steps"]
    words = (
        f"{steps['planned']:,} planned, {steps['charged']:,} charged to the ledger, "
        f"{steps['applied']:,} applied to the model."
    )
    lost = steps["charged"] - steps["applied"]
    if lost > 0:
        counted = "1 charged step is" if lost == 1 else f"{lost:,} charged steps are"
        words += f" {counted} not in the model: an interruption lost the work. The cost is counted all the same."
    return "Steps", _text(words)


def _disclosed(c: Mapping[str, Any]) -> str:
    texts = c["disclosed"]
    return f"\n<h3>Disclosed outside the guarantee</h3>\n{_bullets(texts)}" if texts else ""


def _measured(c: Mapping[str, Any]) -> str:
    found = c["evaluation"]
    if found is None:
        return ""
    intro = f"<p>On the split {_code(found['split'])}, declared {_text(found['declared'])} (not protected):</p>\n"
    return _section(
        "What was measured",
        intro + _facts((name.replace("_", " ").capitalize(), shown(value)) for name, value in found["metrics"].items()),
    )


def _check(c: Mapping[str, Any]) -> str:
    ledger, software = c["ledger"], c["software"]
    made = (
        f"{c['created']} with privgrad {software['privgrad']}, torch {software['torch']}, Python {software['python']}"
    )
    rows = (
        ("epsilon (exact)", _code("none" if c["epsilon"] is None else c["epsilon"])),
        ("ledger", f"{_text(ledger['steps'])} steps, head {_code(ledger['head'])}"),
        ("plan", _code(c["plan_digest"])),
        ("model.safetensors", _code(c["model_sha256"])),
        ("this certificate", _code(c["digest"])),
        ("made", _text(made)),
    )
    body = "".join(f'<tr><th scope="row">{name}</th><td>{content}</td></tr>\n' for name, content in rows)
    return _section(
        "To check it",
        "<p><code>privgrad verify RUN</code> recomputes epsilon from the ledger and compares plan, ledger, model and pages "
        "with this certificate (not <code>config.toml</code> and <code>metrics.jsonl</code>, on which the claim does not rest)."
        f"</p>\n<table>\n<caption>Hashes are SHA-256.</caption>\n<tbody>\n{body}</tbody>\n</table>",
    )

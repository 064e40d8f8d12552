"""The look of our reports: page shell, style sheet, and the few elements that their sections are made of.

Everything that comes in as `str` is text and is escaped; what is already HTML has the type `Html`. The page allows no
script and no request: its content security policy says so to the browser.
"""

import html
import re
from collections.abc import Iterable, Sequence

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --card: #f6f8fa; --ink: #24292f; --faint: #5b6470; --line: #d8dce1;
  --model: #0072b2; --unigram: #a6a6a6; --gzip: #d08c00; --xz: #00805f; --removed: #c4520a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1d2126; --ink: #e4e7ea; --faint: #a3acb6;
  --line: #353b43; --model: #56b4e9; --unigram: #8a9097; --gzip: #f0b13c; --xz: #35d0a5; --removed: #f0803c; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 40px 24px 72px; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 1.35rem; margin: 56px 0 8px; padding-top: 20px; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 28px 0 6px; }
p { margin: 8px 0 12px; max-width: 46rem; }
.faint { color: var(--faint); }
nav { margin: 18px 0 0; display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.92rem; }
a { color: var(--model); text-decoration: none; }
a:hover { text-decoration: underline; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin: 20px 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.card b { display: block; font-size: 1.3rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { color: var(--faint); font-size: 0.85rem; }
.headline { display: grid; grid-template-columns: minmax(230px, 1fr) 2fr; gap: 28px; align-items: center;
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 24px 28px; margin: 24px 0 12px; }
.headline .figure { font-size: 3.4rem; font-weight: 700; line-height: 1; color: var(--model);
  font-variant-numeric: tabular-nums; }
.headline p { margin: 8px 0 0; }
.bars { display: grid; grid-template-columns: auto 1fr; gap: 8px 14px; align-items: center; font-size: 0.95rem; }
.bar { display: flex; align-items: center; gap: 8px; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: 18px; border-radius: 3px; }
@media (max-width: 700px) { .headline { grid-template-columns: 1fr; } }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.92rem; }
th, td { text-align: left; padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th:last-child, td:last-child { padding-right: 0; }
tr.total td { font-weight: 700; }
figure { margin: 16px 0; overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 560px; height: auto; font-family: inherit; }
.pair svg { min-width: 280px; }
figcaption { color: var(--faint); font-size: 0.9rem; margin-top: 4px; max-width: 46rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 8px 28px; }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 0.86rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; margin: 8px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; max-height: 26rem; overflow-y: auto; }
.text { unicode-bidi: isolate; }
.prompt { font-weight: 700; color: var(--model); }
.token { background: color-mix(in srgb, var(--model) 14%, transparent); border-radius: 3px; white-space: pre-wrap; }
.token:nth-child(even) { background: color-mix(in srgb, var(--gzip) 22%, transparent); }
details { margin: 8px 0; border: 1px solid var(--line); border-radius: 8px; padding: 8px 14px; }
h3 .faint { font-weight: 400; }
summary { cursor: pointer; font-weight: 600; overflow-wrap: anywhere; }
summary span { color: var(--faint); font-weight: 400; }
.origin { color: var(--faint); font-size: 0.86rem; margin: 14px 0 0; overflow-wrap: anywhere; max-width: none; }
@media print { h2 { break-after: avoid; } figure, .card, pre { break-inside: avoid; } }
"""

# Control characters have no place in HTML, and invisible ones that turn the direction of writing could disguise text.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


class Html(str):
    """HTML that is complete and safe to put into a page."""


class Number(str):
    """A number as text, for a table cell that is not to be formatted again."""


def text(value: object) -> Html:
    """Escaped text; control and direction characters show as U+FFFD. `Html` stays what it is."""
    if isinstance(value, Html):
        return value
    plain = str(value).replace("\r\n", "\n").replace("\r", "\n")
    return Html(html.escape(_UNSAFE.sub("\ufffd", plain)))


def cut(value: str, characters: int) -> str:
    """The beginning of a text, with what was left out said at its end."""
    if len(value) <= characters:
        return value
    return f"{value[:characters].rstrip()} … ({len(value) - characters:,} more characters)"


def join(parts: Iterable[Html]) -> Html:
    """One after another."""
    return Html("\n".join(parts))


def tag(name: str, *content: object, css: str = "") -> Html:
    """`<name class=css>` around its content, which is escaped unless it is Html."""
    attribute = f' class="{css}"' if css else ""
    return Html(f"<{name}{attribute}>{''.join(text(part) for part in content)}</{name}>")


def paragraph(*content: object, css: str = "") -> Html:
    """A paragraph."""
    return tag("p", *content, css=css)


def preformatted(*content: object) -> Html:
    """Text with its spaces and line ends, in a box that wraps and scrolls."""
    return tag("pre", *content, css="text")


def figure(svg: str, caption: str = "") -> Html:
    """An inline SVG and what to see in it.

    Args:
      svg: of our own making, as smoljax.evaluation.plots.svg gives it.
      caption: plain text.
    """
    return tag("figure", Html(svg), tag("figcaption", caption) if caption else Html(""))


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, total: bool = False) -> Html:
    """A table. Numbers are aligned to the right, integers get thousands separators, floats three decimals.

    Args:
      columns: headings.
      rows: one sequence of cells a row.
      total: the first row is the total and is set in bold.
    """
    rows = [list(row) for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[place], int | float | Number) for row in rows)
        for place in range(len(columns))
    ]

    def line(cells: Sequence[object], kind: str) -> Html:
        return Html(
            "".join(tag(kind, _cell(c), css="number" if n else "") for c, n in zip(cells, numeric))
        )

    body = [
        tag("tr", line(row, "td"), css="total" if total and number == 0 else "")
        for number, row in enumerate(rows)
    ]
    head = tag("thead", tag("tr", line(columns, "th")))
    return tag("div", tag("table", head, tag("tbody", join(body))), css="scroll")


def cards(facts: Iterable[tuple[str, str]]) -> Html:
    """A row of figures, each above what it counts: (figure, what)."""
    return tag(
        "div",
        *(tag("div", tag("b", value), tag("span", name), css="card") for value, name in facts),
        css="cards",
    )


def bars(rows: Sequence[tuple[str, float, str]]) -> Html:
    """Horizontal bars to scale.

    Args:
      rows: (name, value, CSS variable of the colour).
    """
    longest = max(value for _, value, _ in rows)
    parts = []
    for name, value, variable in rows:
        share = 84 * value / longest
        bar = Html(f'<i style="width: {share:.1f}%; background: var({variable})"></i>')
        parts += [tag("div", name), tag("div", bar, f"{value:.2f}", css="bar")]
    return tag("div", *parts, css="bars")


def folded(summary: str, note: str, *content: object) -> Html:
    """A line that opens on a click."""
    return tag("details", tag("summary", summary, " ", tag("span", note)), *content)


def section(anchor: str, title: str, *content: object) -> Html:
    """A titled part of the page that the navigation can name."""
    heading = Html(f'<h2 id="{html.escape(anchor)}">{text(title)}</h2>')
    return tag("section", heading, join(text(part) for part in content))


def page(title: str, body: Html, *, style: str = "") -> str:
    """The whole document; `style` is CSS of its own, behind what all pages share."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _cell(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"

"""What the page says of one stage: its rules, each with its histogram and the documents next to it, and removals."""

from collections.abc import Mapping, Sequence

from smoljax import report_page as html
from smoljax.curation.report import amounts, charts
from smoljax.report_page import Html, tag

# Characters of a document that show before it is opened, and the groups of clusters by their size.
_LINE = 110
_SIZES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (10, 99), (100, 999), (1_000, 10**9))


def has_section(stage: Mapping) -> bool:
    """Whether there is more to say of a stage than its line in the table."""
    names = ("rules", "drawn", "edits", "languages", "clusters")
    return any(stage.get(name) for name in names)


def _removes(removed: int, reached: int) -> str:
    if not removed:
        return f"removes none of {reached:,} documents"
    return f"removes {removed:,} of {reached:,} documents, {amounts.percent(removed, reached)}"


def section(anchor: str, stage: Mapping) -> Html:
    """All of it, under the anchor; rule number N is at the anchor with rN behind it."""
    note = _removes(stage["removed"], stage["in"]["documents"])
    heading = Html(
        f'<h3 id="{anchor}">{html.text(stage["name"])} <span class="faint">{html.text(note)}</span></h3>'
    )
    parts = [heading]
    if stage["edits"]:
        edits = ", ".join(f"{kind} {count:,}" for kind, count in stage["edits"].items())
        parts.append(html.paragraph(f"Edited: {edits}."))
    if stage.get("languages"):
        parts.append(_languages(stage))
    if stage["rules"]:
        parts.append(_rule_table(anchor, stage))
        parts += [_rule(f"{anchor}r{i}", rule, stage) for i, rule in enumerate(stage["rules"])]
    shown = {rule["reason"] for rule in stage["rules"]}
    parts += [
        _drawn(reason, stage, documents)
        for reason, documents in stage["drawn"].items()
        if reason not in shown
    ]
    if stage.get("cluster_sizes"):
        parts.append(_clusters(stage))
    return tag("div", *parts)


def _languages(stage: Mapping) -> Html:
    rows = [
        [row["language"] or "none", row["documents"], row["kept"], row["median_score"]]
        for row in stage["languages"]
    ]
    columns = ["language, in the sample", "documents", "kept", "median score"]
    return tag("div", html.table(columns, rows), css="narrow")


def _rule_table(anchor: str, stage: Mapping) -> Html:
    rows = []
    for number, rule in enumerate(stage["rules"]):
        link = Html(f'<a href="#{anchor}r{number}">{html.text(_name(rule))}</a>')
        removed, share = f"{rule['corpus']['removed']:,}", rule["corpus"]
        if rule["languages"]:  # The corpus is counted over all languages.
            removed, share = "–", {"removed": 0, "reached": 0}
        rows.append(
            [
                link,
                f"{rule['removes']} {amounts.number(rule['bound'])}",
                html.Number(removed),
                html.Number(amounts.percent(share["removed"], share["reached"])),
                html.Number(amounts.share(rule["beyond"])),
                html.Number(amounts.share(rule["alone"])),
                html.Number(amounts.number(rule["quantiles"]["0.5"])),
            ]
        )
    columns = ["rule", "removes", "removed", "of all", "beyond", "alone", "median"]
    return html.table(columns, rows)


def _name(rule: Mapping) -> str:
    languages = ", ".join(code or "no language" for code in rule["languages"])
    return f"{rule['rule']} ({languages})" if languages else rule["rule"]


def _rule(anchor: str, rule: Mapping, stage: Mapping) -> Html:
    removed, note = rule["corpus"]["removed"], _removes(**rule["corpus"])
    drawn = stage["drawn"].get(rule["reason"], [])
    if rule["languages"]:
        removed = rule["decides"]["documents"]
        note = f"{_removes(removed, rule['measured'])} of the sample"
        drawn = [d for d in drawn if (d["language"] or "") in rule["languages"]]
    title = tag(
        "summary",
        f"{_name(rule)}: {rule['removes']} {amounts.number(rule['bound'])} ",
        tag("span", note),
    )
    chart = charts.histogram(rule["histogram"], bound=rule["bound"], low=rule["removes"] == "below")
    content = [
        Html(f'<div class="rule" id="{anchor}">'),
        tag("div", html.figure(chart), _quantiles(rule)),
        _what_if(rule),
        Html("</div>"),
        tag(
            "div",
            _side("Kept, nearest to the threshold", rule["nearest"]["kept"], rule["bound"]),
            _side("Removed, nearest to the threshold", rule["nearest"]["removed"], rule["bound"]),
            css="sides",
        ),
    ]
    if drawn:
        content.append(_drawn(rule["reason"], stage, drawn))
    opened = " open" if removed else ""
    return Html(f"<details{opened}>{title}{html.join(content)}</details>")


def _quantiles(rule: Mapping) -> Html:
    columns = [f"{100 * float(q):g} %" for q in rule["quantiles"]]
    values = [html.Number(amounts.number(value)) for value in rule["quantiles"].values()]
    return html.table(["quantile", *columns], [["value", *values]])


def _what_if(rule: Mapping) -> Html:
    """What the rule does to the sample, and what other thresholds would do."""
    facts = [
        [name, html.Number(amounts.share(rule[name])), html.Number(amounts.interval(rule[name]))]
        for name in ("beyond", "alone")
    ]
    others = [
        [f"{100 * row['share']:g} %", html.Number(amounts.number(row["bound"]))]
        for row in rule["bounds"]
    ]
    return tag(
        "div",
        html.table([f"{rule['measured']:,} sampled", "share", "95 %"], facts),
        html.table(["would be beyond", "if at"], others),
    )


def _side(title: str, documents: Sequence[Mapping], bound: float) -> Html:
    found = [_document(document | {"bound": bound}) for document in documents]
    return tag(
        "div",
        tag("h4", title),
        *(found or [html.paragraph("none in the sample", css="faint")]),
    )


def _drawn(reason: str, stage: Mapping, documents: Sequence[Mapping]) -> Html:
    return html.folded(
        reason,
        f"{len(documents)} of {stage['removed_by_reason'][reason]:,} removed documents, drawn by hash",
        *(_document(document) for document in documents),
    )


def _clusters(stage: Mapping) -> Html:
    sizes: dict[str, int] = {}
    for size, count in stage["cluster_sizes"].items():
        first, last = next(ends for ends in _SIZES if int(size) <= ends[1])
        name = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        sizes[name] = sizes.get(name, 0) + count
    return html.join(
        [
            tag("h4", "Clusters of duplicates, by how many documents each stands for"),
            tag("div", html.table(["documents", "clusters"], list(sizes.items())), css="narrow"),
            html.folded(
                "The largest clusters",
                "the document that was kept of each",
                *(_document(document) for document in stage["clusters"]),
            ),
        ]
    )


def _document(document: Mapping) -> Html:
    """A line that opens to the text."""
    first = " ".join(document["excerpt"].split())
    value = document.get("value")
    words = []
    if value is not None:
        words = [tag("b", amounts.number(value, beside=document["bound"]))]
    others = document.get("also_removed_by", [])
    note = f"also {', '.join(others)}" if others else ""
    facts = [document["source"], document["path"], document["url"], document["language"]]
    facts += [f"{document['characters']:,} characters", f"{document['words']:,} words"]
    if (document["cluster_size"] or 1) > 1:
        facts.append(f"stands for {document['cluster_size']:,}")
    facts.append(document["id"])
    rest = document["characters"] - len(document["excerpt"])
    text = document["excerpt"] + (f" … ({rest:,} more characters)" if rest else "")
    line = first[:_LINE] + ("…" if len(first) > _LINE else "") or document["path"]
    return tag(
        "details",
        tag("summary", *words, tag("span", line), *([" ", tag("em", note)] if note else [])),
        html.paragraph(" · ".join(fact for fact in facts if fact), css="origin"),
        html.preformatted(text) if document["excerpt"] else "",
        css="document",
    )

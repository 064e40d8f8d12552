"""The report as a page: draws the numbers and computes none."""

from collections.abc import Iterable, Mapping, Sequence

from smoljax import report_page as html
from smoljax.curation.report import charts
from smoljax.report_page import Html, tag

_STYLE = """
svg .tick { font-size: 11px; fill: var(--faint); } svg .label { font-size: 12px; font-weight: 600; fill: var(--removed); }
svg .grid { stroke: var(--line); stroke-width: 0.6; } svg .axis { stroke: var(--faint); stroke-width: 0.8; }
svg .bound { stroke: var(--removed); stroke-width: 1.6; stroke-dasharray: 5 3; } svg .area { fill: var(--removed); opacity: 0.07; }
svg .inside { fill: var(--model); } svg .beyond { fill: var(--removed); } svg .all { opacity: 0.3; } svg .track { fill: var(--card); }
svg.stage { display: block; width: 150px; height: 14px; margin-top: 4px; border-radius: 3px; }
.key { display: inline-block; width: 0.8em; height: 0.8em; border-radius: 2px; margin: 0 0.2em 0 0.5em; }
.key.inside { background: var(--model); } .key.beyond { background: var(--removed); } .key.all { opacity: 0.3; }
.rule { display: grid; grid-template-columns: minmax(0, 1fr) 15rem; gap: 4px 24px; align-items: start; }
.rule figure { margin: 8px 0 0; }
.rule table { font-size: 0.84rem; } .rule td, .rule th { padding: 3px 9px 3px 0; }
@media screen and (max-width: 760px) { .rule { grid-template-columns: minmax(0, 1fr); } }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(340px, 100%), 1fr)); gap: 4px 20px; }
.sides h4, h4 { margin: 12px 0 4px; font-size: 0.9rem; }
.document { padding: 6px 10px; margin: 6px 0; font-size: 0.88rem; } .document summary { font-weight: 400; }
.document summary b { font-variant-numeric: tabular-nums; margin-right: 0.4em; }
.document pre { max-height: 22rem; font-size: 0.8rem; }
.document em { color: var(--removed); font-style: normal; font-size: 0.82rem; }
.stage-table td, .stage-table th { padding-right: 12px; }
.narrow table { width: auto; font-size: 0.84rem; } .narrow td, .narrow th { padding-top: 3px; padding-bottom: 3px; }
.stage-table .scroll { margin: 8px 0; }
@media print { html { font-size: 65%; } body { font-size: 10.5px; } main { max-width: none; padding: 0; }
  .card b { font-size: 1.5rem; } svg.stage { width: 90px; } figure svg { min-width: 0; }
  .document pre { max-height: none; overflow: visible; } details.document { break-inside: avoid; } }
"""
_COLUMNS = ("documents", "bytes", "tokens")
_UNITS = {
    "tokens": "Tokens are those of the run's tokenizer",
    "words": "Tokens are words between spaces, since there is no tokenizer yet",
}
_LINE = 110
_REASONS = 8
_SIZES = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 9), (10, 99), (100, 999), (1_000, 10**9))


def render(numbers: Mapping, title: str) -> str:
    """The whole page.

    Args:
      numbers: from numbers.collect.
      title: of the page.
    """
    presets = numbers["presets"]
    links = [
        ("all", "All stages"),
        *((f"p{i}", f"Preset {name}") for i, name in enumerate(presets)),
    ]
    body = [
        tag("h1", title),
        html.paragraph(
            "What each stage and each threshold takes out, and which documents stand on both sides of it.",
            css="faint",
        ),
        tag("nav", *(Html(f'<a href="#{anchor}">{html.text(name)}</a>') for anchor, name in links)),
        _cards(numbers),
        _guide(numbers),
        _all_stages(numbers),
        *(_preset(i, name, preset, numbers) for i, (name, preset) in enumerate(presets.items())),
    ]
    return html.page(title, html.join(body), style=_STYLE)


def _cards(numbers: Mapping) -> Html:
    read, kept = _ends(numbers["presets"].values())
    extracted = [_stage(preset, "extract")["out"] for preset in numbers["presets"].values()]
    before = sum(amount["bytes"] for amount in extracted)
    return html.cards(
        [
            (f"{read:,}", "documents read"),
            (f"{kept['documents']:,}", f"documents kept, {_percent(kept['documents'], read)}"),
            (_megabytes(kept["bytes"]), f"of text kept, out of {_megabytes(before)}"),
            (_count(kept["tokens"]), f"{numbers['tokens']} kept, estimated"),
        ]
    )


def _ends(presets: Iterable[Mapping]) -> tuple[int, dict]:
    """Documents read, and what was kept."""
    read, kept = 0, dict.fromkeys(_COLUMNS, 0)
    for preset in presets:
        read += preset["stages"][0]["in"]["documents"]
        for name in _COLUMNS:
            kept[name] += preset["stages"][-1]["out"][name] or 0
    return read, kept


def _stage(preset: Mapping, name: str) -> Mapping:
    return next(stage for stage in preset["stages"] if stage["name"] == name)


def _guide(numbers: Mapping) -> Html:
    limits = numbers["limits"]
    key = Html(
        'In the histograms, <span class="key all inside"></span><span class="key all beyond"></span>pale bars are all documents '
        'that reach the stage. Full bars are those that no other rule of the stage removes: <span class="key inside"></span>kept, '
        '<span class="key beyond"></span>removed by this rule alone. Counts have a logarithmic axis.'
    )
    return html.join(
        [
            tag("p", key),
            html.folded(
                "How to read this page",
                "",
                html.paragraph(
                    "Counts of documents and bytes, and how many documents each reason removed, are those of the whole corpus. "
                    f"Histograms, and all that is said to be of the sample, come from at most {limits['sample_documents']:,} "
                    f"documents and {_megabytes(limits['sample_bytes'])} of text of each preset, drawn by the hash of their ids "
                    f"from at most {limits['work_items']} work items, before any filter. Intervals are Wilson's, at 95 %."
                ),
                html.paragraph(
                    "The documents that reach a stage are those that all stages before it kept. Removed: the rule is the first "
                    "of its stage to fail, which gives the reason. Beyond: on the wrong side of the threshold, whatever other "
                    "rules say. Alone: beyond this threshold and no other of the stage; so many documents would pass the stage "
                    "if the rule were off. A rule that removes much and little alone repeats what its neighbours say."
                ),
                html.paragraph(
                    "A threshold is too strict if the removed documents next to it read as well as those kept; it is too loose "
                    "if those kept next to it should go. Where the histogram is steep at the threshold, its exact value matters. "
                    "The removed documents nearest to a threshold come from the sample and from up to "
                    f"{limits['drawn_by_reason']} more that were removed for this reason."
                ),
            ),
        ]
    )


def _all_stages(numbers: Mapping) -> Html:
    read, kept = _ends(numbers["presets"].values())
    text = (
        f"{kept['documents']:,} of {read:,} documents are kept. {_UNITS[numbers['tokens']]}, estimated from how many there "
        "are in a byte of the sample."
    )
    if len(numbers["presets"]) > 1:
        text += " Not every stage is in every preset: the documents that go in are those of the presets that have it."
    sources = [
        [
            name,
            source["preset"],
            source["train"]["documents"],
            source["heldout"]["documents"],
            source["removed"],
            html.Number(_megabytes(source["train"]["bytes"] + source["heldout"]["bytes"])),
        ]
        for name, source in numbers["sources"].items()
    ]
    return html.section(
        "all",
        "All stages",
        html.paragraph(text),
        _stage_table(numbers["stages"], read, None),
        tag("h3", "Sources"),
        html.table(["source", "preset", "train", "held out", "removed", "text kept"], sources),
        *_decontamination(numbers["decontamination"]),
    )


def _decontamination(found: Mapping | None) -> list[Html]:
    """Hits by evaluation set."""
    if found is None:
        return []
    columns = ["items", "short", "ngrams", "items_hit", "documents"]
    rows = [[name, *(counts[c] for c in columns)] for name, counts in found["sets"].items()]
    heads = ["evaluation set", "items", "too short to look for", "n-grams", "items hit"]
    return [
        tag("h3", "Decontamination"),
        html.paragraph(
            f"Documents that share {found['ngram']} words in a row with an item of an evaluation set are removed."
        ),
        html.table([*heads, "documents removed"], rows),
    ]


def _stage_table(stages: Sequence[Mapping], read: int, anchor: str | None) -> Html:
    rows = []
    for place, stage in enumerate(stages):
        before, after = stage["in"], stage["out"]
        name = html.text(stage["name"])
        if anchor is not None and _has_section(stage):
            name = Html(f'<a href="#{anchor}s{place}">{name}</a>')
        rows.append(
            [
                name,
                charts.bar(after["documents"], stage["removed"], read),
                before["documents"],
                stage["removed"],
                html.Number(_percent(stage["removed"], before["documents"])),
                after["documents"],
                html.Number(_megabytes(before["bytes"]).removesuffix(" MB")),
                html.Number(_megabytes(after["bytes"]).removesuffix(" MB")),
                html.Number(_count(before["tokens"])),
                html.Number(_count(after["tokens"])),
            ]
        )
    columns = ["stage", "of all documents", "in", "removed", "", "out", "MB in", "MB out"]
    columns += ["tokens in", "out"]
    return tag("div", html.table(columns, rows), css="stage-table")


def _preset(number: int, name: str, preset: Mapping, numbers: Mapping) -> Html:
    anchor = f"p{number}"
    read, _ = _ends([preset])
    sample = preset["sample"]
    text = (
        f"Sources: {', '.join(preset['sources'])}. The sample has {sample['documents']:,} of {preset['extracted']:,} extracted "
        f"documents, {_megabytes(sample['bytes'])} of text"
    )
    if preset["work_items_read"] < preset["work_items"]:
        text += f", drawn from {preset['work_items_read']} of {preset['work_items']:,} work items"
    text += ". In the tables of rules, beyond, alone and the median are of the sample"
    stages = preset["stages"]
    shown = [_stage_section(f"{anchor}s{i}", s) for i, s in enumerate(stages) if _has_section(s)]
    table = _stage_table(stages, read, anchor)
    parts = [html.paragraph(f"{text}."), table, _reasons(stages, read, anchor), *shown]
    return html.section(anchor, f"Preset {name}", *parts)


def _reasons(stages: Sequence[Mapping], read: int, anchor: str) -> Html:
    """The reasons that remove most, with links to their rules."""
    found = [
        (count, reason, f"{anchor}s{place}", stage)
        for place, stage in enumerate(stages)
        for reason, count in stage["removed_by_reason"].items()
    ]
    if not found:
        return html.paragraph("Nothing was removed.", css="faint")
    largest = sorted(found, key=lambda row: (-row[0], row[1]))[:_REASONS]
    rows = []
    for count, reason, at, stage in largest:
        numbers = [i for i, rule in enumerate(stage["rules"]) if rule["reason"] == reason]
        target = f"{at}r{numbers[0]}" if numbers else at
        link = Html(f'<a href="#{target}">{html.text(reason)}</a>')
        bar = charts.bar(0, count, largest[0][0])
        alone = _share(stage["rules"][numbers[0]]["alone"]) if len(numbers) == 1 else "–"
        rows.append([link, bar, count, html.Number(_percent(count, read)), html.Number(alone)])
    columns = ["what removes most", "", "removed", "of all read", "alone, of the stage"]
    return tag("div", html.table(columns, rows), css="stage-table")


def _has_section(stage: Mapping) -> bool:
    """Whether there is more to say of a stage than its line in the table."""
    names = ("rules", "drawn", "edits", "languages", "clusters")
    return any(stage.get(name) for name in names)


def _removes(removed: int, reached: int) -> str:
    if not removed:
        return f"removes none of {reached:,} documents"
    return f"removes {removed:,} of {reached:,} documents, {_percent(removed, reached)}"


def _stage_section(anchor: str, stage: Mapping) -> Html:
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
                f"{rule['removes']} {charts.number_text(rule['bound'])}",
                html.Number(removed),
                html.Number(_percent(share["removed"], share["reached"])),
                html.Number(_share(rule["beyond"])),
                html.Number(_share(rule["alone"])),
                html.Number(charts.number_text(rule["quantiles"]["0.5"])),
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
        f"{_name(rule)}: {rule['removes']} {charts.number_text(rule['bound'])} ",
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
    values = [html.Number(charts.number_text(value)) for value in rule["quantiles"].values()]
    return html.table(["quantile", *columns], [["value", *values]])


def _what_if(rule: Mapping) -> Html:
    """What the rule does to the sample, and what other thresholds would do."""
    facts = [
        [name, html.Number(_share(rule[name])), html.Number(_interval(rule[name]))]
        for name in ("beyond", "alone")
    ]
    others = [
        [f"{100 * row['share']:g} %", html.Number(charts.number_text(row["bound"]))]
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
        words = [tag("b", charts.number_text(value, beside=document["bound"]))]
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


def _share(share: Mapping) -> str:
    return "–" if share["share"] is None else f"{100 * share['share']:.1f} %"


def _interval(share: Mapping) -> str:
    if share["share"] is None or share["low"] == share["high"]:
        return "–"
    return f"{100 * share['low']:.1f} to {100 * share['high']:.1f}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "–"


def _megabytes(size: int | None) -> str:
    return "–" if size is None else f"{size / 1e6:,.2f} MB"


def _count(value: int | None) -> str:
    """A number of tokens, in three digits."""
    if value is None:
        return "–"
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return str(value)

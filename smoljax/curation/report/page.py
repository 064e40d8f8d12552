"""The report as a page: draws the numbers and computes none."""

from collections.abc import Iterable, Mapping, Sequence

from smoljax import report_page as html
from smoljax.curation.report import amounts, charts, stage_page
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
# Of the reasons that remove most, how many are listed.
_REASONS = 8


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
            (
                f"{kept['documents']:,}",
                f"documents kept, {amounts.percent(kept['documents'], read)}",
            ),
            (amounts.megabytes(kept["bytes"]), f"of text kept, out of {amounts.megabytes(before)}"),
            (amounts.count(kept["tokens"]), f"{numbers['tokens']} kept, estimated"),
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
                    f"documents and {amounts.megabytes(limits['sample_bytes'])} of text of each preset, drawn by the hash of their ids "
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
            html.Number(amounts.megabytes(source["train"]["bytes"] + source["heldout"]["bytes"])),
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
        if anchor is not None and stage_page.has_section(stage):
            name = Html(f'<a href="#{anchor}s{place}">{name}</a>')
        rows.append(
            [
                name,
                charts.bar(after["documents"], stage["removed"], read),
                before["documents"],
                stage["removed"],
                html.Number(amounts.percent(stage["removed"], before["documents"])),
                after["documents"],
                html.Number(amounts.megabytes(before["bytes"]).removesuffix(" MB")),
                html.Number(amounts.megabytes(after["bytes"]).removesuffix(" MB")),
                html.Number(amounts.count(before["tokens"])),
                html.Number(amounts.count(after["tokens"])),
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
        f"documents, {amounts.megabytes(sample['bytes'])} of text"
    )
    if preset["work_items_read"] < preset["work_items"]:
        text += f", drawn from {preset['work_items_read']} of {preset['work_items']:,} work items"
    text += ". In the tables of rules, beyond, alone and the median are of the sample"
    stages = preset["stages"]
    shown = [
        stage_page.section(f"{anchor}s{i}", s)
        for i, s in enumerate(stages)
        if stage_page.has_section(s)
    ]
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
        alone = amounts.share(stage["rules"][numbers[0]]["alone"]) if len(numbers) == 1 else "–"
        rows.append(
            [link, bar, count, html.Number(amounts.percent(count, read)), html.Number(alone)]
        )
    columns = ["what removes most", "", "removed", "of all read", "alone, of the stage"]
    return tag("div", html.table(columns, rows), css="stage-table")

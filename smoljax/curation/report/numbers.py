"""The numbers of the report, as JSON can write them: the page draws these and no others."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from smoljax.curation.report import histogram, inputs, rules
from smoljax.curation.report.inputs import Document, Preset
from smoljax.curation.report.rules import Measured, Rule, Stage

if TYPE_CHECKING:
    from smoljax.tokens.tokenizer import Tokenizer

# Of each rule: documents nearest to the threshold on each side, and of each reason: documents drawn.
NEAREST = 3
DRAWN = 5
EXCERPT = 1200
LANGUAGES = 8
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SHARES = (0.001, 0.01, 0.05, 0.1, 0.25)


def collect(manifest: Mapping, presets: Sequence[Preset], tokenizer: "Tokenizer | None") -> dict:
    """Everything that the page shows.

    Args:
      manifest: of the documents.
      presets: what was read of each.
      tokenizer: counts tokens; without one, words between spaces are counted.
    """
    found = {preset.name: _preset(preset, tokenizer) for preset in presets}
    names = [stage["name"] for stage in manifest["stages"]]
    return {
        "limits": {
            "sample_documents": inputs.DOCUMENTS,
            "sample_bytes": inputs.TEXT_BYTES,
            "work_items": inputs.WORK_ITEMS,
            "drawn_by_reason": inputs.PER_REASON,
        },
        "tokens": "words" if tokenizer is None else "tokens",
        "sources": manifest["sources"],
        "decontamination": manifest["decontamination"],
        "stages": [_sum_stage(name, found.values()) for name in names],
        "presets": found,
    }


def _sum_stage(name: str, presets: Sequence[Mapping]) -> dict:
    """A stage over all presets that have it."""
    parts = [s for preset in presets for s in preset["stages"] if s["name"] == name]
    reasons: Counter[str] = Counter()
    for part in parts:
        reasons.update(part["removed_by_reason"])
    return {
        "name": name,
        "in": _sum_amounts([part["in"] for part in parts]),
        "out": _sum_amounts([part["out"] for part in parts]),
        "removed": sum(part["removed"] for part in parts),
        "removed_by_reason": dict(sorted(reasons.items())),
    }


def _sum_amounts(amounts: Sequence[Mapping]) -> dict:
    def total(field: str) -> int | None:
        values = [amount[field] for amount in amounts]
        return None if None in values else sum(values)

    return {field: total(field) for field in ("documents", "bytes", "tokens")}


def _preset(preset: Preset, tokenizer: "Tokenizer | None") -> dict:
    tokens = _count_tokens(preset.sample, tokenizer)
    extracted = preset.stages["extract"]["kept"]
    return {
        "sources": list(preset.sources),
        "arguments": preset.arguments,
        "work_items": preset.work_items,
        "work_items_read": preset.work_items_read,
        "extracted": extracted,
        "sample": {
            "documents": len(preset.sample),
            "bytes": sum(_size(document) for document in preset.sample),
            "tokens": sum(tokens.values()),
        },
        "stages": [_stage(preset, stage, tokens) for stage in rules.stages(preset)],
    }


def _count_tokens(documents: Sequence[Document], tokenizer: "Tokenizer | None") -> dict[str, int]:
    """id -> tokens, or words."""
    texts = [document.text for document in documents]
    pieces = (
        [text.split() for text in texts] if tokenizer is None else tokenizer.encode_batch(texts)
    )
    return {document.id: len(found) for document, found in zip(documents, pieces)}


def _stage(preset: Preset, stage: Stage, tokens: Mapping[str, int]) -> dict:
    counts = preset.stages[stage.name]
    removed = sum(counts["removed_by_reason"].values())
    names = list(preset.stages)
    behind = names.index(stage.name) - names.index("extract")
    found = {
        "name": stage.name,
        "in": _amount(counts["kept"] + removed, counts["read_bytes"], stage.reached, tokens)
        if behind > 0
        else _pages(counts["kept"] + removed),
        "out": _amount(
            counts["kept"],
            counts["kept_bytes"],
            stage.kept if behind > 0 else preset.sample,
            tokens,
        )
        if behind >= 0
        else _pages(counts["kept"]),
        "removed": removed,
        "removed_by_reason": dict(sorted(counts["removed_by_reason"].items())),
        "edits": dict(sorted(counts["edits"].items())),
        "reached": len(stage.reached),
        "rules": [_rule(rule, stage, preset) for rule in stage.rules],
        "drawn": _drawn(preset, stage),
    }
    if stage.name == "language":
        found["languages"] = _languages(stage)
    if stage.name == "dedup":
        found["cluster_sizes"] = {str(size): n for size, n in preset.cluster_sizes.items()}
        found["clusters"] = [_shown(document) for document in preset.clusters]
    return found


def _pages(documents: int) -> dict:
    """Of documents that are not text yet."""
    return {"documents": documents, "bytes": None, "tokens": None}


def _amount(
    documents: int, size: int, sample: Sequence[Document], tokens: Mapping[str, int]
) -> dict:
    """Documents and bytes as counted, tokens by those of a byte in the sample as it was extracted."""
    sampled = sum(_size(document) for document in sample)
    estimate = round(size * sum(tokens[d.id] for d in sample) / sampled) if sampled else None
    return {"documents": documents, "bytes": size, "tokens": estimate if size else 0}


def _rule(rule: Rule, stage: Stage, preset: Preset) -> dict:
    values = np.array([measured.value for measured in rule.sample], float)
    alone = [measured for measured in rule.sample if not measured.others]
    reason = f"{stage.name}:{rule.name}"
    counts = preset.stages[stage.name]
    whole = len(preset.sample) == preset.stages["extract"]["kept"]

    def share(count: int) -> dict:
        return _share(count, len(rule.sample), exact=whole)

    return {
        "rule": rule.name,
        "reason": reason,
        "languages": list(rule.languages),
        "bound": rule.bound,
        "removes": "below" if rule.low else "above",
        "measured": len(rule.sample),
        "beyond": share(sum(measured.fails for measured in rule.sample)),
        "decides": share(sum(measured.document.reason == reason for measured in rule.sample)),
        "alone": share(sum(measured.fails for measured in alone)),
        "corpus": {
            "reached": counts["kept"] + sum(counts["removed_by_reason"].values()),
            "removed": counts["removed_by_reason"].get(reason, 0),
        },
        "quantiles": {f"{q:g}": v for q, v in zip(QUANTILES, _quantiles(values))},
        "bounds": [
            {"share": share, "bound": _bound(values, share, low=rule.low)} for share in SHARES
        ],
        "histogram": histogram.histogram(
            values,
            bound=rule.bound,
            low=rule.low,
            passed=np.array([not measured.others for measured in rule.sample], bool),
        ),
        "nearest": {
            "kept": _nearest(rule, [m for m in alone if not m.fails]),
            "removed": _nearest(rule, [m for m in (*rule.sample, *rule.removed) if m.fails]),
        },
    }


def _share(count: int, total: int, *, exact: bool) -> dict:
    """A count as a share, with Wilson's interval (1927) of 95 % where the documents are a sample of more."""
    if not total:
        return {"documents": 0, "share": None, "low": None, "high": None}
    found = count / total
    low = high = found
    if not exact:
        z = 1.96
        middle = (found + z * z / (2 * total)) / (1 + z * z / total)
        half = (
            math.sqrt(found * (1 - found) / total + (z / (2 * total)) ** 2)
            * z
            / (1 + z * z / total)
        )
        low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"documents": count, "share": found, "low": low, "high": high}


def _quantiles(values: np.ndarray) -> list[float | None]:
    """Values that documents have, none in between."""
    if not len(values):
        return [None] * len(QUANTILES)
    return np.quantile(values, QUANTILES, method="inverted_cdf").tolist()


def _bound(values: np.ndarray, share: float, *, low: bool) -> float | None:
    """The bound that removes most, but at most this share of the documents."""
    if not len(values):
        return None
    ordered = np.sort(values) if low else -np.sort(-values)
    return float(ordered[math.floor(share * len(values))])


def _nearest(rule: Rule, measured: Sequence[Measured]) -> list[dict]:
    ordered = sorted(measured, key=lambda m: (abs(m.value - rule.bound), m.document.id))
    return [
        {"value": m.value, "also_removed_by": list(m.others), **_shown(m.document)}
        for m in ordered[:NEAREST]
    ]


def _drawn(preset: Preset, stage: Stage) -> dict[str, list[dict]]:
    """Removed documents by reason, with the value for which each was removed."""
    values = {
        (rule.name, m.document.id): (m.value, rule.bound)
        for rule in stage.rules
        for m in (*rule.sample, *rule.removed)
    }
    found = {}
    for reason in sorted(preset.stages[stage.name]["removed_by_reason"]):
        found[reason] = []
        for document in preset.removed.get(reason, ())[:DRAWN]:
            value, bound = values.get((reason.partition(":")[2], document.id), (None, None))
            found[reason].append({"value": value, "bound": bound, **_shown(document)})
    return found


def _languages(stage: Stage) -> list[dict]:
    """What languages the sample is in, the most frequent first."""
    kept = {document.id for document in stage.kept}
    found: dict[str, list[Document]] = {}
    for document in stage.reached:
        found.setdefault(document.language or "", []).append(document)
    rows = [
        {
            "language": code,
            "documents": len(documents),
            "kept": sum(document.id in kept for document in documents),
            "median_score": float(np.median([d.language_score or 0.0 for d in documents])),
        }
        for code, documents in found.items()
    ]
    return sorted(rows, key=lambda row: (-row["documents"], row["language"]))[:LANGUAGES]


def _shown(document: Document) -> dict:
    return {
        "id": document.id,
        "source": document.source,
        "path": document.path,
        "url": document.url,
        "language": document.language,
        "cluster_size": document.cluster_size,
        "characters": len(document.text),
        "words": len(document.text.split()),
        "excerpt": document.text[:EXCERPT],
    }


def _size(document: Document) -> int:
    return len(document.text.encode())

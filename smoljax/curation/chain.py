"""From a preset, which is plain values, to the stages that the documents of a shard pass.

A preset names its stages in order, and gives the arguments of those that do not take their defaults:
  {"order": ("url", "extract", "language", "gopher_quality", "dedup", "pii"),
   "language": {"languages": ("en", "fr"), "min_score": 0.65},
   "by_language": {"fr": {"gopher_quality": {"min_mean_word_length": 2}}}}
"extract" turns pages into text; before it only "url" can run. "dedup" compares documents of all shards
(`dedup.DedupConfig`); what stands before it and behind it sees one document at a time. `by_language` adds to a
stage's arguments, or replaces them, for the documents of one language. "decontamination" need not be named
(`decontaminated`).
"""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from smoljax.curation import extract, filters, formatters, schema
from smoljax.curation.decontamination import Decontamination
from smoljax.curation.dedup import DedupConfig
from smoljax.curation.dedup import config as dedup_config
from smoljax.errors import SmoljaxError

_FILTERS: dict[str, schema.Stage] = {name: getattr(filters, name) for name in filters.__all__}
_FORMATTERS: dict[str, Callable[..., formatters.Formatter]] = {
    "encoding": formatters.Encoding,
    "pii": formatters.Pii,
    "symbol_lines": formatters.SymbolLines,
}
# Of these, one is made for each shard.
_MADE = {"extract": extract.Extractor, **_FORMATTERS}
_ON_PAGES = ("url",)
# They run before the language is known, or on all documents alike.
_NOT_BY_LANGUAGE = ("extract", "language", "decontamination", "dedup", *_FORMATTERS)


class Step(NamedTuple):
    """One stage of a chain, with its arguments.

    Attributes:
      name: of the stage.
      run: RecordBatch -> (kept, removed).
      arguments: language -> arguments of the filter; the entry None holds for all others.
      edits: what a formatter has edited so far, by kind; None of all other stages.
    """

    name: str
    run: schema.Stage
    arguments: Mapping[str | None, Mapping]
    edits: Counter[str] | None = None


class Chain(NamedTuple):
    """The stages of a preset, in the stretches in which they run."""

    pages: tuple[Step, ...]
    extract: Step
    before_dedup: tuple[Step, ...]
    dedup: DedupConfig | None
    after_dedup: tuple[Step, ...]


def build(preset: Mapping) -> Chain:
    """The chain of a preset; one for each shard, since a formatter may count from document to document."""
    order = tuple(preset["order"])
    at, end = order.index("extract"), len(order)
    dedup = order.index("dedup") if "dedup" in order else end
    steps = {name: _step(name, preset) for name in order if name != "dedup"}

    def stretch(names: tuple[str, ...]) -> tuple[Step, ...]:
        return tuple(steps[name] for name in names)

    return Chain(
        pages=stretch(order[:at]),
        extract=steps["extract"],
        before_dedup=stretch(order[at + 1 : dedup]),
        dedup=dedup_arguments(preset),
        after_dedup=stretch(order[dedup + 1 :]),
    )


def check(field: str, preset: Mapping) -> None:
    """Raises a SmoljaxError that names the entry below `field` which is no stage, or has wrong arguments."""
    known = {"extract", "decontamination", "dedup", *_FILTERS, *_FORMATTERS}
    order = tuple(preset.get("order", ()))
    for name in order:
        if name not in known:
            raise SmoljaxError(
                f"{field}.order names {name!r}: there are {', '.join(sorted(known))}"
            )
    if order.count("extract") != 1 or len(set(order)) != len(order):
        raise SmoljaxError(f'{field}.order is {order}: it must name "extract", and nothing twice')
    early = [name for name in order[: order.index("extract")] if name not in _ON_PAGES]
    if early:
        raise SmoljaxError(
            f'{field}.order has {early[0]!r} before "extract": it needs the text of the page, put it behind'
        )
    for name in preset:
        if name not in ("order", "by_language") and name not in order:
            raise SmoljaxError(
                f"{field}.{name} does not run: {field}.order names {', '.join(order)}"
            )
    for name in order:
        _check_arguments(f"{field}.{name}", name, preset.get(name, {}))
        for code, overrides in preset.get("by_language", {}).items():
            if name in overrides:
                if name in _NOT_BY_LANGUAGE:
                    raise SmoljaxError(
                        f"{field}.by_language.{code}.{name}: {name!r} takes the same arguments for all languages: "
                        f"set {field}.{name}"
                    )
                _check_arguments(
                    f"{field}.by_language.{code}.{name}",
                    name,
                    {**preset.get(name, {}), **overrides[name]},
                )


def stages(preset: Mapping) -> tuple[str, ...]:
    """Names of a preset's stages, in order."""
    return tuple(preset["order"])


def removing(order: Sequence[str]) -> tuple[str, ...]:
    """The stages in an order that remove documents for what they are: neither "extract" nor "decontamination"."""
    others = ("extract", "decontamination", *_FORMATTERS)
    return tuple(name for name in order if name not in others)


def decontaminated(preset: Mapping, index: str) -> dict:
    """The preset with "decontamination" by an index: where it names it, or else right before "dedup", or last.

    Before "dedup", so that of two near-duplicates of which one is contaminated the other stays, whichever is first.
    """
    order = tuple(preset["order"])
    if "decontamination" not in order:
        at = order.index("dedup") if "dedup" in order else len(order)
        order = (*order[:at], "decontamination", *order[at:])
    return {**preset, "order": order, "decontamination": {"index": index}}


def dedup_arguments(preset: Mapping) -> DedupConfig | None:
    """How the documents of a preset are compared; None where its order does not name "dedup"."""
    if "dedup" not in preset["order"]:
        return None
    return dedup_config.build("dedup", preset.get("dedup", {}))


def _step(name: str, preset: Mapping) -> Step:
    arguments: dict[str | None, Mapping] = {None: dict(preset.get(name, {}))}
    for code, overrides in preset.get("by_language", {}).items():
        if name in overrides:
            arguments[code] = {**arguments[None], **overrides[name]}
    if name == "decontamination":
        return Step(name, Decontamination(**arguments[None]), arguments)
    if name in _FORMATTERS:
        formatter = _FORMATTERS[name](**arguments[None])
        return Step(name, functools.partial(_format, formatter), arguments, formatter.edits)
    if name == "extract":
        return Step(name, extract.Extractor(**arguments[None]), arguments)
    function = _FILTERS[name]
    reads_language = "language" in inspect.signature(function).parameters
    if len(arguments) == 1 and not reads_language:
        return Step(name, functools.partial(function, **arguments[None]), arguments)
    run = functools.partial(_by_language, function, arguments, reads_language)
    return Step(name, run, arguments)


def _format(
    formatter: formatters.Formatter, batch: pa.RecordBatch
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    return schema.part(formatter(batch), [None] * batch.num_rows)


def _by_language(
    function: Callable,
    arguments: Mapping[str | None, Mapping],
    reads_language: bool,
    batch: pa.RecordBatch,
) -> tuple[pa.RecordBatch, pa.RecordBatch]:
    """Runs a filter on the rows of each language with the arguments of that language; rows keep their order."""
    languages = [code or schema.LANGUAGE for code in batch.column("language").to_pylist()]

    def run(part: pa.RecordBatch, code: str) -> tuple[pa.RecordBatch, pa.RecordBatch]:
        given = arguments.get(code, arguments[None])
        return function(part, **given, **({"language": code} if reads_language else {}))

    found = sorted(set(languages)) or [schema.LANGUAGE]
    if len(found) == 1:
        return run(batch, found[0])
    numbered = batch.append_column("row", pa.array(range(batch.num_rows), pa.int64()))
    kept, removed = [], []
    for code in found:
        rows = pa.array([language == code for language in languages], pa.bool_())
        kept_part, removed_part = run(numbered.filter(rows), code)
        kept.append(kept_part)
        removed.append(removed_part)
    return _in_order(kept), _in_order(removed)


def _in_order(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
    table = pa.Table.from_batches(parts).sort_by("row").drop_columns(["row"]).combine_chunks()
    batches = table.to_batches()
    return batches[0] if batches else pa.RecordBatch.from_pylist([], schema=table.schema)


def _check_arguments(field: str, name: str, arguments: Mapping) -> None:
    if name == "dedup":
        dedup_config.build(field, arguments)
        return
    if name == "decontamination":
        if arguments:
            raise SmoljaxError(
                f"{field} has {', '.join(arguments)}: it takes no arguments; its words are counted by "
                "config.curation.decontamination_ngram"
            )
        return
    function = _MADE.get(name) or _FILTERS[name]
    try:
        if name in _MADE:
            function(**arguments)
        else:
            inspect.signature(function).bind(None, **arguments)
    except TypeError as error:
        known = [p for p in inspect.signature(function).parameters if p not in ("batch", "text")]
        raise SmoljaxError(f"{field} has {error}: it takes {', '.join(known)}") from error

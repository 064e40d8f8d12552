"""What each rule of a preset does to a sample: the documents that reach it, their statistic, and who stands nearest.

The documents that reach a stage are those that all stages before it have kept. They are measured on the text that the
stage saw: extracted, and edited by the stages before.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import pyarrow as pa

from smoljax.curation import chain, filters, schema
from smoljax.curation.filters.check import Check, Filter, below
from smoljax.curation.report.inputs import Document, Preset


@dataclasses.dataclass(frozen=True)
class Measured:
    """A document at one rule.

    Attributes:
      document: which.
      value: the statistic.
      fails: whether the rule removes it.
      others: the stage's other rules that remove it too.
    """

    document: Document
    value: float
    fails: bool
    others: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """One threshold of a stage.

    Attributes:
      name: of the rule, the second half of the reason.
      bound: its threshold.
      low: whether documents are removed below it, or above.
      languages: of the documents that are held to this bound; () if the rule has one bound for all.
      sample: the documents of the sample that reach the stage and are held to this bound, in the order of their ids.
      removed: more documents that this rule removed, drawn by their reason.
    """

    name: str
    bound: float
    low: bool
    languages: tuple[str, ...]
    sample: tuple[Measured, ...]
    removed: tuple[Measured, ...]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a preset.

    Attributes:
      name: of the stage.
      reached: documents of the sample that reach it.
      kept: those of them that it keeps.
      rules: its thresholds in the order of the decision; () of stages that have none.
    """

    name: str
    reached: tuple[Document, ...]
    kept: tuple[Document, ...]
    rules: tuple[Rule, ...]


# The checks of a document's text, and the text as the stage leaves it.
_Examine = Callable[[Document, str], tuple[list[Check], str]]


def stages(preset: Preset) -> Iterator[Stage]:
    """The stages of a preset with what the sample shows of them; those up to "extract" have no sample."""
    names = list(preset.stages)
    of_reason = {
        reason: name
        for name, entry in preset.stages.items()
        for reason in entry["removed_by_reason"]
    }
    end = len(names)
    leaves = {d.id: names.index(of_reason[d.reason]) if d.reason else end for d in preset.sample}
    steps = _steps(preset.arguments)
    texts = {document.id: document.text for document in preset.sample}
    for at, name in enumerate(names):
        if at <= names.index("extract"):
            yield Stage(name, (), (), ())
            continue
        reached = tuple(d for d in preset.sample if leaves[d.id] >= at)
        kept = tuple(d for d in reached if leaves[d.id] > at)
        rules: tuple[Rule, ...] = ()
        if name in steps:
            examine = _examine(steps[name], preset.arguments)
            if examine is not None:
                drawn = [
                    document
                    for reason, documents in preset.removed.items()
                    for document in documents
                    if of_reason.get(reason) == name and document.id not in texts
                ]
                rules = tuple(_rules(examine, reached, texts, drawn))
            elif steps[name].edits is not None:
                texts |= _edited(steps[name], reached, texts)
        yield Stage(name, reached, kept, rules)


def _steps(arguments: Mapping) -> dict[str, chain.Step]:
    """The stages that see one text at a time; but for decontamination, which needs the run's index."""
    order = tuple(name for name in arguments["order"] if name != "decontamination")
    built = chain.build({**arguments, "order": order})
    return {step.name: step for step in (*built.before_dedup, *built.after_dedup)}


def failing(measured: Sequence[Check]) -> tuple[str, ...]:
    """Names of the rules that remove a document."""
    return tuple(dict.fromkeys(check.reason for check in measured if check.fails))


def _rules(
    examine: _Examine,
    reached: Sequence[Document],
    texts: dict[str, str],
    drawn: Sequence[Document],
) -> Iterator[Rule]:
    """The rules of a stage; `texts` then holds what it made of those that it kept."""
    samples: dict[str, dict[tuple[float, bool], list[Measured]]] = {}
    for document in reached:
        checks, texts[document.id] = examine(document, texts[document.id])
        for name, bound, measured in _measured(document, checks):
            samples.setdefault(name, {}).setdefault(bound, []).append(measured)
    more: dict[tuple, list[Measured]] = {}
    for document in drawn:
        checks, _ = examine(document, document.text)
        for name, bound, measured in _measured(document, checks):
            if document.reason.partition(":")[2] == name:
                samples.setdefault(name, {}).setdefault(bound, [])
                more.setdefault((name, bound), []).append(measured)
    for name, bounds in samples.items():
        rules = [
            Rule(
                name=name,
                bound=bound[0],
                low=bound[1],
                languages=_languages(sample) if len(bounds) > 1 else (),
                sample=tuple(sample),
                removed=tuple(more.get((name, bound), ())),
            )
            for bound, sample in bounds.items()
        ]
        yield from sorted(rules, key=lambda rule: (rule.languages, rule.bound))


def _measured(
    document: Document, checks: Sequence[Check]
) -> Iterator[tuple[str, tuple[float, bool], Measured]]:
    """(rule, (bound, low), what it finds) for each check; of a rule that is checked twice the failing check counts."""
    fail = failing(checks)
    counted: dict[str, Check] = {}
    for check in checks:
        first = counted.get(check.reason)
        # An infinite bound turns a rule off.
        if math.isfinite(check.bound) and (first is None or check.fails > first.fails):
            counted[check.reason] = check
    for check in counted.values():
        others = tuple(name for name in fail if name != check.reason)
        found = Measured(document, float(check.value), check.fails, others)
        yield check.reason, (float(check.bound), check.low), found


def _languages(sample: Sequence[Measured]) -> tuple[str, ...]:
    return tuple(sorted({measured.document.language or "" for measured in sample}))


def _examine(step: chain.Step, arguments: Mapping) -> _Examine | None:
    """How a stage looks at a document; None of a stage that has no thresholds."""
    if step.name == "language":
        return _examine_language(arguments.get("language", {}))
    function = getattr(filters, step.name, None)
    return _examine_text(function, step) if isinstance(function, Filter) else None


def _examine_text(function: Filter, step: chain.Step) -> _Examine:
    reads_language = "language" in inspect.signature(function.checks).parameters

    def examine(document: Document, text: str) -> tuple[list[Check], str]:
        language = document.language or schema.LANGUAGE
        given = dict(step.arguments.get(language, step.arguments[None]))
        if reads_language:
            given["language"] = language
        checks, found = function.checks(text, **given), []
        while True:
            try:
                found.append(next(checks))
            except StopIteration as end:
                return found, text if end.value is None else end.value

    return examine


def _examine_language(arguments: Mapping) -> _Examine:
    """The scores of the wanted languages are held to their thresholds; other languages have none."""
    signature = inspect.signature(filters.language).bind(None, **arguments)
    signature.apply_defaults()
    wanted, least = signature.arguments["languages"], signature.arguments["min_scores"] or {}

    def examine(document: Document, text: str) -> tuple[list[Check], str]:
        code = document.language
        if code is None or (wanted and code not in wanted):
            return [], text
        bound = least.get(code, signature.arguments["min_score"])
        return [below("low_score", document.language_score, bound)], text

    return examine


def _edited(
    step: chain.Step, reached: Sequence[Document], texts: Mapping[str, str]
) -> dict[str, str]:
    """The texts as a formatter leaves them."""
    rows = [dataclasses.asdict(d) | {"media_type": "", "text": texts[d.id]} for d in reached]
    edited, _ = step.run(pa.RecordBatch.from_pylist(rows, schema=schema.DOCUMENT))
    return dict(zip(edited.column("id").to_pylist(), edited.column("text").to_pylist()))

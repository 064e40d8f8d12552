"""The steps of curation in their order, each a set of work items, and the folder of documents put together at the end.

Documents keep the order of their shards and of their rows in them. What an item writes is a pure function of its
argument (`steps`), and an item's key is the hash of all that it depends on.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from smoljax import files
from smoljax.curation import chain, decontamination, items, runner, steps
from smoljax.curation.decontamination import steps as decontamination_steps
from smoljax.curation.shards import Shard
from smoljax.errors import SmoljaxError

# Raised when the same input and configuration give other output than before: finished items are then redone.
CODE_VERSION = 4


def hash_of(*parts: object) -> str:
    """32 hexadecimal digits of anything that JSON can write."""
    return xxhash.xxh3_128_hexdigest(as_json(parts).encode())


def as_json(value: object) -> str:
    """A configuration as JSON; equal ones give equal text."""
    return json.dumps(value, sort_keys=True, default=_jsonable)


def fingerprint(shard: Shard) -> str:
    """Of a shard's input: names, sizes and versions, but not where the folder lies."""
    pieces = [asdict(piece) for piece in shard.pieces]
    for piece in pieces:
        del piece["path"], piece["directory"]
    return hash_of(shard.source, shard.preset, pieces)


def run_steps(
    shards: Sequence[Shard],
    directory: str,
    *,
    presets: Mapping[str, Mapping],
    max_document_bytes: int,
    heldout_fractions: Mapping[str, float],
    evaluation_sets: Sequence[decontamination.EvaluationSet],
    ngram: int,
    workers: int,
    beam_options: Sequence[str] | None,
) -> tuple[list[dict], list[dict], dict | None]:
    """Runs all steps in `directory`.

    Returns:
      results of the last step in shard order; the stage table; and what was found of the evaluation sets:
      {"ngram", "sets": {name: counts of `decontamination.steps.summary`}}, None without sets.
    """
    root = directory
    configured = chains = [presets[shard.preset] for shard in shards]
    if evaluation_sets:
        index = _index(directory, evaluation_sets, ngram)
        # A key holds what the index was made from, and not where it lies.
        configured = [chain.decontaminated(preset, index.keys[0]) for preset in configured]
        chains = [chain.decontaminated(preset, index.folders[0]) for preset in chains]
    run = _Runner(root, shards, {"workers": workers, "beam_options": beam_options})

    extracted = run.each(
        "extract",
        steps.extract,
        keys=[
            hash_of(fingerprint(shard), max_document_bytes, _up_to_extract(preset))
            for shard, preset in zip(shards, configured)
        ],
        arguments=[(shard, preset, max_document_bytes) for shard, preset in zip(shards, chains)],
        sizes=[sum(piece.size for piece in shard.pieces) for shard in shards],
    )
    sizes = [result["text_bytes"] for result in extracted.results]
    filtered = run.each(
        "filter",
        steps.filter,
        keys=[hash_of(key, preset) for key, preset in zip(extracted.keys, configured)],
        arguments=[(f"{root}/extract/{name}", preset) for name, preset in zip(run.names, chains)],
        sizes=sizes,
    )
    exact = run.one(
        "exact",
        steps.exact,
        key=hash_of(filtered.keys),
        argument=[f"{root}/filter/{name}" for name in run.names],
        size=sum(sizes),
    )
    fractions = [heldout_fractions[shard.source] for shard in shards]
    finished = run.each(
        "finish",
        steps.finish,
        keys=[hash_of(exact.keys, name, part) for name, part in zip(run.names, fractions)],
        arguments=[(root, *rest) for rest in zip(run.names, chains, fractions)],
        sizes=sizes,
    )
    table = _stage_table((extracted, filtered, finished), chains)
    for row in table:
        if row["name"] == "dedup":
            row["seconds"] = round(sum(exact.seconds), 2)
    contamination = None
    if evaluation_sets:
        contamination = {"ngram": ngram, "sets": _hits(run, index, finished)}
    return finished.results, table, contamination


def assemble(shards: Sequence[Shard], directory: str, workdir: Path, manifest: Mapping) -> None:
    """Puts `documents/` together: the last step's files, numbered within each source, and the manifest."""
    numbers: Counter[str] = Counter()
    for left in workdir.glob(".documents.*"):  # By a run that was killed at this point.
        shutil.rmtree(left, ignore_errors=True)
    with files.atomic_directory(workdir / "documents") as folder:
        for number, shard in enumerate(shards):
            for part in ("train", "heldout", "removed"):
                source = items.verified(f"{directory}/finish/{number:05d}", f"{part}.parquet")
                target = folder / shard.source / part / f"{numbers[shard.source]:05d}.parquet"
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    os.link(source, target)
                except OSError:  # Another file system, or one without links.
                    shutil.copyfile(source, target)
            items.forget_fetched()
            numbers[shard.source] += 1
        if manifest["decontamination"] is not None:
            _write_hits(folder, directory, len(shards), manifest["decontamination"])
        files.atomic_write_json(folder / "manifest.json", manifest)


def _index(
    directory: str, evaluation_sets: Sequence[decontamination.EvaluationSet], ngram: int
) -> "_Done":
    """The index of the sets' n-grams, made by this process: the benchmark files need not be where workers can read them."""
    key = hash_of("evaluation", CODE_VERSION, decontamination.fingerprint(evaluation_sets), ngram)
    size = sum(file.size for wanted in evaluation_sets for file in wanted.inputs())
    item = items.WorkItem(
        "all",
        key,
        decontamination_steps.build_index,
        (evaluation_sets, ngram),
        size,
        "the evaluation sets",
    )
    folder = f"{directory}/evaluation"
    (manifest,) = runner.run([item], folder, stage="evaluation", workers=1)
    return _Done([key], [f"{folder}/all"], [manifest["result"]], [manifest["seconds"]])


def _hits(run: "_Runner", index: "_Done", finished: "_Done") -> dict[str, dict]:
    """What each evaluation set had in the removed documents."""
    found = run.each(
        "contamination",
        decontamination_steps.find_hits,
        keys=[hash_of(key, index.keys) for key in finished.keys],
        arguments=[(folder, index.folders[0]) for folder in finished.folders],
        sizes=[result["removed"] for result in finished.results],
    )
    return decontamination_steps.summary(
        index.folders[0], index.results[0], found.folders, found.results
    )


def _write_hits(folder: Path, directory: str, shards: int, contamination: Mapping) -> None:
    """documents/decontamination.json, the counts; documents/decontamination.jsonl, every hit in the order of the shards."""
    files.atomic_write_json(folder / "decontamination.json", contamination)
    with open(folder / "decontamination.jsonl", "wb") as target:
        for number in range(shards):
            with open(
                items.verified(f"{directory}/contamination/{number:05d}", "hits.jsonl"), "rb"
            ) as found:
                shutil.copyfileobj(found, target)
    items.forget_fetched()


@dataclass(frozen=True)
class _Done:
    """A finished step: its items' keys, folders, results and seconds, in order."""

    keys: list[str]
    folders: list[str]
    results: list[dict]
    seconds: list[float]


class _Runner:
    """Makes the work items of a step and runs them."""

    def __init__(self, root: str, shards: Sequence[Shard], options: Mapping):
        self._root, self._shards, self._options = root, shards, options
        self.names = [f"{number:05d}" for number in range(len(shards))]

    def each(
        self, step: str, work: Callable, *, keys: list[str], arguments: list, sizes: list[int]
    ) -> _Done:
        """One item per shard."""
        labels = [f"{s.source} shard {name}" for s, name in zip(self._shards, self.names)]
        return self._run(step, work, self.names, keys, arguments, sizes, labels)

    def one(self, step: str, work: Callable, *, key: str, argument: object, size: int) -> _Done:
        """One item over all shards."""
        return self._run(step, work, ["all"], [key], [argument], [size], ["all shards"])

    def _run(self, step, work, names, keys, arguments, sizes, labels) -> _Done:
        keys = [hash_of(step, CODE_VERSION, key) for key in keys]
        todo = [
            items.WorkItem(name, key, work, argument, size, label)
            for name, key, argument, size, label in zip(names, keys, arguments, sizes, labels)
        ]
        manifests = runner.run(todo, f"{self._root}/{step}", stage=step, **self._options)
        folders = [f"{self._root}/{step}/{name}" for name in names]
        return _Done(
            keys, folders, [m["result"] for m in manifests], [m["seconds"] for m in manifests]
        )


def _up_to_extract(preset: Mapping) -> list:
    """What the output of extraction depends on: changed thresholds behind it do not read the input again."""
    order = chain.stages(preset)
    early = order[: order.index("extract") + 1]
    return [early, {name: preset[name] for name in early if name in preset}]


# Of a stage: what is counted by name.
_COUNTED = ("removed_by_reason", "edits")


def _stage_table(done: Sequence[_Done], chains: Sequence[Mapping]) -> list[dict]:
    """The stages in the order in which they run, with counts summed over items."""
    totals: dict[str, dict] = {}
    for step in done:
        for result in step.results:
            for name, entry in result["stages"].items():
                total = totals.setdefault(name, {field: Counter() for field in _COUNTED})
                for field in ("kept", "read_bytes", "kept_bytes", "seconds"):
                    total[field] = total.get(field, 0) + entry[field]
                for field in _COUNTED:
                    total[field].update(entry[field])
    return [
        {
            "name": name,
            "kept": totals[name]["kept"],
            "removed": sum(totals[name]["removed_by_reason"].values()),
            "removed_by_reason": dict(sorted(totals[name]["removed_by_reason"].items())),
            "read_bytes": totals[name]["read_bytes"],
            "kept_bytes": totals[name]["kept_bytes"],
            "edits": dict(sorted(totals[name]["edits"].items())),
            "seconds": round(totals[name]["seconds"], 2),
        }
        for name in _merged_order(chains)
        if name in totals
    ]


def _merged_order(chains: Sequence[Mapping]) -> list[str]:
    """The stages of all chains, each chain's order kept where they agree."""
    merged = ["read"]
    for preset in chains:
        order = chain.stages(preset)
        for position, name in enumerate(order):
            if name not in merged:
                following = (merged.index(n) for n in order[position:] if n in merged)
                merged.insert(next(following, len(merged)), name)
    return merged


def _jsonable(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise SmoljaxError(f"a configuration cannot hold {value!r} of type {type(value).__name__}")

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
from smoljax.curation import chain, decontamination, dedup, items, runner, steps
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
    configured = chains = [presets[shard.preset] for shard in shards]
    if evaluation_sets:
        index = _index(directory, evaluation_sets, ngram)
        # A key holds what the index was made from, and not where it lies.
        configured = [chain.decontaminated(preset, index.keys[0]) for preset in configured]
        chains = [chain.decontaminated(preset, index.folders[0]) for preset in chains]
    names = [f"{number:05d}" for number in range(len(shards))]
    labels = {name: f"{shard.source} shard {name}" for name, shard in zip(names, shards)}
    run = _Runner(directory, labels, {"workers": workers, "beam_options": beam_options})

    extracted = run(
        "extract",
        steps.extract,
        names,
        keys=[
            hash_of(fingerprint(shard), max_document_bytes, _up_to("extract", preset))
            for shard, preset in zip(shards, configured)
        ],
        arguments=[(shard, preset, max_document_bytes) for shard, preset in zip(shards, chains)],
        sizes=[sum(piece.size for piece in shard.pieces) for shard in shards],
    )
    sizes = [result["text_bytes"] for result in extracted.results]
    filtered = run(
        "filter",
        steps.filter,
        names,
        keys=[
            hash_of(key, _up_to("dedup", preset)) for key, preset in zip(extracted.keys, configured)
        ],
        arguments=[(run.folder("extract", name), preset) for name, preset in zip(names, chains)],
        sizes=sizes,
    )
    clusters, seconds = _run_dedup(
        run,
        _groups(names, shards, chains),
        dict(zip(names, filtered.keys)),
        dict(zip(names, sizes)),
    )
    fractions = [heldout_fractions[shard.source] for shard in shards]
    found = [clusters.get(name, (None, None)) for name in names]
    finished = run(
        "finish",
        steps.finish,
        names,
        keys=[
            hash_of(key, name, preset, fraction, clusters_key)
            for key, name, preset, fraction, (_, clusters_key) in zip(
                filtered.keys, names, configured, fractions, found
            )
        ],
        arguments=[
            (directory, name, preset, fraction, folder)
            for name, preset, fraction, (folder, _) in zip(names, chains, fractions, found)
        ],
        sizes=sizes,
    )
    table = _stage_table((extracted, filtered, finished), chains)
    for row in table:
        if row["name"] == "dedup":
            row["seconds"] = round(seconds, 2)
    contamination = None
    if evaluation_sets:
        contamination = {"ngram": ngram, "sets": _hits(run, index, finished, sizes)}
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
            folders = [f"{directory}/contamination/{number:05d}" for number in range(len(shards))]
            decontamination_steps.write_hits(folder, folders, manifest["decontamination"])
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


def _hits(
    run: "_Runner", index: "_Done", finished: "_Done", sizes: Sequence[int]
) -> dict[str, dict]:
    """What each evaluation set had in the removed documents."""
    found = run(
        "contamination",
        decontamination_steps.find_hits,
        [folder.rpartition("/")[2] for folder in finished.folders],
        keys=[hash_of(key, index.keys) for key in finished.keys],
        arguments=[(folder, index.folders[0]) for folder in finished.folders],
        sizes=sizes,
    )
    return decontamination_steps.summary(
        index.folders[0], index.results[0], found.folders, found.results
    )


@dataclass(frozen=True)
class _Group:
    """Shards whose documents are compared with each other: their presets give "dedup" the same arguments.

    Attributes:
      name: of the group's work items.
      config: those arguments.
      shards: names of the shards' work items.
    """

    name: str
    config: dedup.DedupConfig
    shards: list[str]


def _groups(
    names: Sequence[str], shards: Sequence[Shard], chains: Sequence[Mapping]
) -> list[_Group]:
    """In the order of their first shards; a shard whose preset does not name "dedup" is in none."""
    found: dict[tuple, list[str]] = {}
    for name, shard, preset in zip(names, shards, chains):
        config = chain.dedup_arguments(preset)
        if config is not None:
            source = shard.source if config.scope == "source" else None
            found.setdefault((config, source), []).append(name)
    return [
        _Group(f"{number:03d}", config, members)
        for number, ((config, _), members) in enumerate(found.items())
    ]


def _run_dedup(
    run: "_Runner", groups: Sequence[_Group], keys: Mapping[str, str], sizes: Mapping[str, int]
) -> tuple[dict[str, tuple[str, str]], float]:
    """Finds the duplicates in each group.

    Args:
      run: runs work items.
      groups: of shards.
      keys, sizes: of each shard's filtered documents, by its name.

    Returns:
      for each shard the folder of its clusters, and the key of what is in there; and the seconds it took.
    """
    members = sorted((name, group.config) for group in groups for name in group.shards)
    names = [name for name, _ in members]
    signed = run(
        "signatures",
        steps.signatures,
        names,
        keys=[hash_of(keys[name], asdict(config)) for name, config in members],
        arguments=[(run.folder("filter", name), config) for name, config in members],
        sizes=[sizes[name] for name in names],
    )
    key_of = dict(zip(names, signed.keys))
    rows_of = {name: result["rows"] for name, result in zip(names, signed.results)}
    # All that follows is made of these alone.
    group_keys = {g.name: hash_of(g.shards, [key_of[name] for name in g.shards]) for g in groups}
    group_sizes = {g.name: sum(sizes[name] for name in g.shards) for g in groups}
    folders = {g.name: [run.folder("signatures", name) for name in g.shards] for g in groups}
    copies = {g.name: run.folder("exact", g.name) if g.config.exact else None for g in groups}

    compared = [group.name for group in groups if group.config.exact]
    exact = run(
        "exact",
        steps.exact,
        compared,
        keys=[group_keys[name] for name in compared],
        arguments=[folders[name] for name in compared],
        sizes=[group_sizes[name] for name in compared],
    )
    buckets = {
        f"{group.name}-{bucket:02d}": (group, bucket)
        for group in groups
        if group.config.minhash is not None
        for bucket in range(group.config.minhash.buckets)
    }
    bands = run(
        "bands",
        steps.bands,
        list(buckets),
        keys=[hash_of(group_keys[group.name], bucket) for group, bucket in buckets.values()],
        arguments=[
            (folders[group.name], copies[group.name], group.config.minhash, bucket)
            for group, bucket in buckets.values()
        ],
        sizes=[
            group_sizes[group.name] // group.config.minhash.buckets for group, _ in buckets.values()
        ],
    )
    clusters = run(
        "clusters",
        steps.clusters,
        [group.name for group in groups],
        keys=[group_keys[group.name] for group in groups],
        arguments=[
            (
                [run.folder("bands", name) for name, (g, _) in buckets.items() if g is group],
                copies[group.name],
                group.shards,
                [rows_of[name] for name in group.shards],
            )
            for group in groups
        ],
        sizes=[group_sizes[group.name] for group in groups],
    )
    seconds = sum(sum(step.seconds) for step in (signed, exact, bands, clusters))
    found = {
        name: (run.folder("clusters", group.name), group_keys[group.name])
        for group in groups
        for name in group.shards
    }
    return found, seconds


@dataclass(frozen=True)
class _Done:
    """A finished step: its items' keys, folders, results and seconds, in order."""

    keys: list[str]
    folders: list[str]
    results: list[dict]
    seconds: list[float]


class _Runner:
    """Makes the work items of a step and runs them."""

    def __init__(self, root: str, labels: Mapping[str, str], options: Mapping):
        """`labels` says what an item of a name works on, for errors."""
        self._root, self._labels, self._options = root, labels, options

    def __call__(
        self,
        step: str,
        work: Callable,
        names: Sequence[str],
        *,
        keys: Sequence[str],
        arguments: Sequence,
        sizes: Sequence[int],
    ) -> _Done:
        keys = [hash_of(step, CODE_VERSION, key) for key in keys]
        todo = [
            items.WorkItem(
                name, key, work, argument, size, self._labels.get(name, f"{step} {name}")
            )
            for name, key, argument, size in zip(names, keys, arguments, sizes, strict=True)
        ]
        manifests = runner.run(todo, f"{self._root}/{step}", stage=step, **self._options)
        folders = [f"{self._root}/{step}/{name}" for name in names]
        return _Done(
            keys, folders, [m["result"] for m in manifests], [m["seconds"] for m in manifests]
        )

    def folder(self, step: str, name: str) -> str:
        """Where an item writes."""
        return f"{self._root}/{step}/{name}"


def _up_to(end: str, preset: Mapping) -> list:
    """What the output of the stages before `end`, and of "extract" itself, depends on.

    So changed arguments behind a stage do not run what lies before it again.
    """
    order = chain.stages(preset)
    stop = order.index(end) if end in order else len(order)
    early = order[: max(stop, order.index("extract") + 1)]
    by_language = {
        code: {name: overrides[name] for name in early if name in overrides}
        for code, overrides in preset.get("by_language", {}).items()
    }
    return [early, {name: preset[name] for name in early if name in preset}, by_language]


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

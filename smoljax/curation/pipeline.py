"""The steps of curation in their order, each a set of work items, and the folder of documents put together at the end.

Documents keep the order of their shards and of their rows in them. What an item writes is a pure function of its
argument (`steps`), and an item's key is the hash of all that it depends on.
"""

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from smoljax import files
from smoljax.curation import chain, decontamination, duplicates, items, runner, steps
from smoljax.curation.decontamination import steps as decontamination_steps
from smoljax.curation.items import hash_of
from smoljax.curation.shards import Shard
from smoljax.curation.stage_table import stage_table
from smoljax.curation.step_runner import CODE_VERSION, Done, StepRunner


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
    run = StepRunner(directory, labels, {"workers": workers, "beam_options": beam_options})

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
    clusters, seconds = duplicates.find(
        run,
        duplicates.group_shards(names, shards, chains),
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
    table = stage_table((extracted, filtered, finished), chains)
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
) -> Done:
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
    return Done([key], [f"{folder}/all"], [manifest["result"]], [manifest["seconds"]])


def _hits(run: StepRunner, index: Done, finished: Done, sizes: Sequence[int]) -> dict[str, dict]:
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

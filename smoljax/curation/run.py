"""From a recipe to documents: the configuration, the run and the table that a person reads afterwards."""

import importlib.util
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq

from smoljax import files
from smoljax.curation import chain, decontamination, items, pipeline, presets, runner, step_runner
from smoljax.curation import sources as sources_module
from smoljax.errors import SmoljaxError

MANIFEST = "manifest.json"
# Beside the work items and not in the manifest: documents/ then holds the same bytes after any run.
_SECONDS = "curation/seconds.json"


@dataclass(frozen=True)
class CurationConfig:
    """What is curated, and how.

    Attributes:
      recipe: path of a file with `sources(workdir, **arguments) -> tuple of sources`; looked for from the working
        directory, then beside the smoljax package.
      arguments: what the recipe is called with.
      presets: preset -> its stages and their arguments (`chain`; by default `presets.defaults()`).
      heldout_fraction: share of documents that is held out, chosen by the hash of their text.
      heldout_fractions: the same for single sources, by name; 1 for a source that is only scored.
      shard_bytes: about how many input bytes one work item reads.
      max_document_bytes: larger documents are removed unread.
      decontamination_ngram: documents that share so many words in a row with an evaluation set are removed; 0 keeps
        them. 13 as GPT-3, 12 as datatrove.
      directory: where the work items write; by default WORKDIR/curation. On Beam a URL that all workers can reach.
      beam_options: Apache Beam's flags, () for its runner inside this process; None uses processes of this machine.
    """

    recipe: str
    arguments: Mapping[str, object] = field(default_factory=dict)
    presets: Mapping[str, Mapping[str, Mapping]] = field(default_factory=presets.defaults)
    heldout_fraction: float = 0.01
    heldout_fractions: Mapping[str, float] = field(default_factory=dict)
    shard_bytes: int = 64 << 20
    max_document_bytes: int = 64 << 20
    decontamination_ngram: int = 13
    directory: str = ""
    beam_options: tuple[str, ...] | None = None

    def __post_init__(self):
        for name in ("shard_bytes", "max_document_bytes"):
            if getattr(self, name) < 1:
                raise SmoljaxError(
                    f"config.curation.{name} is {getattr(self, name)}: it must be at least 1"
                )
        if self.decontamination_ngram and not 5 <= self.decontamination_ngram <= 50:
            raise SmoljaxError(
                f"config.curation.decontamination_ngram is {self.decontamination_ngram}: it must be from 5 to 50 words, "
                "or 0 for no decontamination"
            )
        for name, fraction in {"": self.heldout_fraction, **self.heldout_fractions}.items():
            if not 0.0 <= fraction <= 1.0:
                label = f"heldout_fractions.{name}" if name else "heldout_fraction"
                raise SmoljaxError(f"config.curation.{label} is {fraction}: it must be from 0 to 1")
        for name, preset in self.presets.items():
            chain.check(f"config.curation.presets.{name}", preset)


def curate(
    config: CurationConfig,
    workdir: Path | str,
    *,
    evaluation_sets: Mapping[str, object] | None = None,
    workers: int | None = None,
) -> dict:
    """Makes `<workdir>/documents/` from the recipe's sources and returns its manifest.

    Finished work of an earlier or interrupted run is kept where neither its input nor the configuration that it
    depends on has changed. The documents do not depend on `workers`.

    Args:
      config: what to curate.
      workdir: local folder of the run.
      evaluation_sets: config.evaluation.sets, the benchmarks whose text no document may hold (`decontamination`).
      workers: processes; by default the cores that this process may use.

    Raises:
      SmoljaxError: the recipe or its input is missing, another run is at work in `workdir`, the disk is full, or
        no document is left at the end.
      KeyboardInterrupt: on Ctrl-C, with all workers stopped and finished work kept.
    """
    workdir = Path(workdir)
    workers = workers or len(os.sched_getaffinity(0))
    directory = config.directory or str(workdir / "curation")
    with runner.only_run_in(workdir / "curation"):
        shards = sources_module.shards(recipe_sources(config, workdir), config.shard_bytes)
        sets = _evaluation_sets(config, evaluation_sets or {})
        config_hash, inputs_hash, fractions = _hashes(config, shards, sets)
        finished = _finished(workdir, config_hash, inputs_hash)
        if finished is not None:
            return finished
        results, stage_table, contamination = pipeline.run_steps(
            shards,
            directory,
            presets=config.presets,
            max_document_bytes=config.max_document_bytes,
            heldout_fractions=fractions,
            evaluation_sets=sets,
            ngram=config.decontamination_ngram,
            workers=workers,
            beam_options=config.beam_options,
        )
        seconds = {stage["name"]: stage.pop("seconds") for stage in stage_table}
        manifest = {
            "stages": stage_table,
            "sources": _sum_by_source(shards, results),
            "decontamination": contamination,
            "presets": json.loads(items.as_json(config.presets)),
            "config_hash": config_hash,
            "inputs_hash": inputs_hash,
        }
        if not any(source["train"]["documents"] for source in manifest["sources"].values()):
            raise SmoljaxError(_nothing_left(manifest))
        files.atomic_write_json(workdir / _SECONDS, seconds)
        pipeline.assemble(shards, directory, workdir, manifest)
        return manifest


def stage_seconds(workdir: Path | str) -> dict[str, float]:
    """Stage -> seconds that it took on all workers together, whenever its items were run; {} if WORKDIR/curation is gone."""
    path = Path(workdir) / _SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_documents(
    workdir: Path | str, source: str, *, part: str = "train"
) -> Iterator[pa.RecordBatch]:
    """Yields the documents of a source in their order.

    Args:
      workdir: of the run.
      source: its name.
      part: "train", "heldout" or "removed".
    """
    folder = Path(workdir) / "documents" / source / part
    if not folder.is_dir():
        raise SmoljaxError(f"{folder} is not there: run smoljax.curate on this --workdir first")
    for path in sorted(folder.glob("*.parquet")):
        yield from pq.ParquetFile(path).iter_batches()


def table(manifest: Mapping, seconds: Mapping[str, float]) -> str:
    """Kept and removed by stage with reasons, and documents and bytes by source, as lines of text.

    Args:
      manifest: of `curate`.
      seconds: of `stage_seconds`.
    """
    lines = [f"{'stage':<20}{'kept':>10}{'removed':>10}{'seconds':>10}  removed because of"]
    for stage in manifest["stages"]:
        reasons = sorted(stage["removed_by_reason"].items(), key=lambda item: (-item[1], item[0]))
        text = ", ".join(f"{name.partition(':')[2]} {count:,}" for name, count in reasons)
        lines.append(
            f"{stage['name']:<20}{stage['kept']:>10,}{stage['removed']:>10,}"
            f"{seconds.get(stage['name'], math.nan):>10.1f}  {text}"
        )
    lines += ["", f"{'source':<20}{'train':>10}{'MB':>10}{'heldout':>10}{'MB':>10}{'removed':>10}"]
    for name, source in manifest["sources"].items():
        train, heldout = source["train"], source["heldout"]
        lines.append(
            f"{name:<20}{train['documents']:>10,}{train['bytes'] / 1e6:>10.2f}"
            f"{heldout['documents']:>10,}{heldout['bytes'] / 1e6:>10.2f}{source['removed']:>10,}"
        )
    return "\n".join([*lines, *_decontamination_lines(manifest["decontamination"])])


def _decontamination_lines(found: Mapping | None) -> list[str]:
    """What each evaluation set had in the documents; without sets, or with decontamination off, nothing."""
    if found is None:
        return []
    lines = [
        "",
        f"{'evaluation set':<20}{'items':>10}{'hit':>10}{'too short':>10}{'documents':>10}",
    ]
    for name, row in found["sets"].items():
        lines.append(
            f"{name:<20}{row['items']:>10,}{row['items_hit']:>10,}{row['short']:>10,}{row['documents']:>10,}"
        )
    return [
        *lines,
        f"(hit: shares {found['ngram']} words in a row with a removed document; too short: has fewer words, and was not "
        "looked for; documents/decontamination.jsonl has each hit)",
    ]


def recipe_sources(config: CurationConfig, workdir: Path) -> tuple[sources_module.Source, ...]:
    """The sources of the recipe, fetched where it fetches them.

    Raises:
      SmoljaxError: the recipe is missing, a source asks for an unknown preset, or heldout_fractions for an unknown source.
    """
    found = _load(config.recipe).sources(workdir, **config.arguments)
    for source in found:
        if source.preset not in config.presets:
            raise SmoljaxError(
                f"source {source.name!r} asks for preset {source.preset!r}: config.curation.presets has "
                f"{', '.join(sorted(config.presets))}"
            )
    unknown = set(config.heldout_fractions) - {source.name for source in found}
    if unknown:
        raise SmoljaxError(
            f"config.curation.heldout_fractions names {', '.join(sorted(unknown))}: the recipe has "
            f"{', '.join(source.name for source in found)}"
        )
    return found


def _load(recipe: str) -> ModuleType:
    beside = Path(__file__).parent.parent.parent / recipe
    path = Path(recipe) if Path(recipe).is_file() else beside
    if not path.is_file():
        raise SmoljaxError(
            f"config.curation.recipe is {recipe!r}: neither that file nor {beside} is there"
        )
    spec = importlib.util.spec_from_file_location(f"smoljax_recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "sources"):
        raise SmoljaxError(f"recipe {path} has no function sources(workdir, ...)")
    return module


def _evaluation_sets(
    config: CurationConfig, section: Mapping[str, object]
) -> tuple[decontamination.EvaluationSet, ...]:
    sets = decontamination.evaluation_sets("config.evaluation.sets", section)
    if not config.decontamination_ngram:
        sets = ()
    for name, preset in config.presets.items():
        if not sets and "decontamination" in preset["order"]:
            raise SmoljaxError(
                f"config.curation.presets.{name}.order names 'decontamination', and there is nothing to look for: "
                "name benchmarks in config.evaluation.sets (and words in config.curation.decontamination_ngram), "
                "or take it out of the order"
            )
    return sets


def _hashes(config: CurationConfig, shards, sets) -> tuple[str, str, dict[str, float]]:
    fractions = {
        shard.source: config.heldout_fractions.get(shard.source, config.heldout_fraction)
        for shard in shards
    }
    looked_for = [config.decontamination_ngram, decontamination.fingerprint(sets)] if sets else []
    config_hash = items.hash_of(
        step_runner.CODE_VERSION, config.presets, config.max_document_bytes, fractions, looked_for
    )
    return config_hash, items.hash_of([pipeline.fingerprint(s) for s in shards]), fractions


def _nothing_left(manifest: Mapping) -> str:
    reasons: dict[str, int] = {}
    for stage in manifest["stages"]:
        reasons |= stage["removed_by_reason"]
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    found = ", ".join(f"{reason} {count:,}" for reason, count in ordered) or "the input holds none"
    heldout = sum(source["heldout"]["documents"] for source in manifest["sources"].values())
    return (
        f"the corpus is empty: no document is left to train on (held out {heldout}; removed: {found}): "
        "check the input, the source's preset and the thresholds in config.curation.presets"
    )


def _finished(workdir: Path, config_hash: str, inputs_hash: str) -> dict | None:
    try:
        manifest = json.loads((workdir / "documents" / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = manifest["config_hash"] == config_hash and manifest["inputs_hash"] == inputs_hash
    return manifest if same else None


def _sum_by_source(shards, results: list[dict]) -> dict:
    sources: dict[str, dict] = {}
    for shard, result in zip(shards, results):
        total = sources.setdefault(
            shard.source,
            {
                "preset": shard.preset,
                "train": {"documents": 0, "bytes": 0},
                "heldout": {"documents": 0, "bytes": 0},
                "removed": 0,
            },
        )
        for side in ("train", "heldout"):
            for unit in ("documents", "bytes"):
                total[side][unit] += result[side][unit]
        total["removed"] += result["removed"]
    return sources

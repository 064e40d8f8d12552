"""What each filter of a curation preset is worth: the same small model trained on what it leaves.

FineWeb's proof (Penedo et al. 2024, section 3.1): documents that a filter removed were worth removing if a model
that reads as many tokens of the survivors is better. Variants of the preset:
  raw      its extraction alone
  NAME     the same, and the stage NAME alone
  all      the whole preset
Each is curated, tokenized with one tokenizer (trained on raw), and trained with several seeds for the same number of
steps; then the bits per byte of sources that no variant trains on are compared. Those are chosen apart from the filters:
they should be text that one wishes the model to know, and from elsewhere than the pages.

Everything lies under WORKDIR/ablation and is named by what it was made from, so finished runs are not repeated, and
changed ones are made anew.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from smoljax import configuration, files
from smoljax.errors import SmoljaxError
from smoljax.research.statistics import Estimate, estimate
from smoljax.tokens.config import ShardsConfig, TokenizerConfig

RAW, ALL = "raw", "all"


@dataclasses.dataclass(frozen=True)
class AblationConfig:
    """Which preset is taken apart, and how it is judged.

    Attributes:
      preset: of config.curation.presets; the sources that pass it are trained on.
      heldout: sources of other presets that are only scored.
      variants: "raw", "all" or names of the preset's stages; () is all of them.
      seeds: runs of each variant; a seed names initial parameters and data order.
    """

    preset: str
    heldout: tuple[str, ...]
    variants: tuple[str, ...] = ()
    seeds: int = 3

    def __post_init__(self):
        if not self.heldout:
            raise SmoljaxError(
                "config.ablation.heldout is empty: name the sources whose bits per byte are compared"
            )
        if self.seeds < 2:
            raise SmoljaxError(
                f"config.ablation.seeds is {self.seeds}: an interval needs at least 2 runs of each variant"
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one variant led to.

    Attributes:
      variant: its name.
      documents, tokens: that it leaves to train on.
      epochs: how often training went through them.
      bits_per_byte: of the held-out sources together, one for each seed.
    """

    variant: str
    documents: int
    tokens: int
    epochs: float
    bits_per_byte: tuple[float, ...]


def variants_of(preset: Mapping) -> dict[str, dict]:
    """Variant -> the preset that it is; formatters alone remove nothing, and are part of "all" only."""
    from smoljax.curation import chain

    order = tuple(preset["order"])
    shared = {name: preset[name] for name in ("extract",) if name in preset}
    variants = {RAW: {"order": ("extract",), **shared}}
    for name in chain.removing(order):
        kept = tuple(stage for stage in order if stage in (name, "extract"))
        arguments = {name: preset[name]} if name in preset else {}
        by_language = {
            code: {name: overrides[name]}
            for code, overrides in preset.get("by_language", {}).items()
            if name in overrides
        }
        variants[name] = {"order": kept, **shared, **arguments}
        if by_language:
            variants[name]["by_language"] = by_language
    return {**variants, ALL: dict(preset)}


def ablate(config: Mapping, workdir: Path) -> list[Outcome] | None:
    """Runs what is missing and writes WORKDIR/ablation/ablation.{json,md,png}.

    Args:
      config: with the sections ablation, curation, tokenizer, shards, data, model, optimizer and training.
      workdir: of the run.

    Returns:
      the outcomes in the order of the variants, or None when a run was stopped on request.

    Raises:
      SmoljaxError: the preset or a variant is unknown, a variant leaves nothing to train on, or whatever curation and
        training raise.
    """
    settings = configuration.build(AblationConfig, config.get("ablation", {}), "ablation")
    presets = _presets(config)
    chosen = _chosen(settings, presets)
    _check_heldout(config, workdir, settings, presets)
    folder = workdir / "ablation"
    curated = {
        name: _curate(config, folder, settings, {**presets, settings.preset: preset}, name)
        for name, preset in ({RAW: variants_of(presets[settings.preset])[RAW]} | chosen).items()
    }
    tokenizer = _tokenizer(config, folder, curated[RAW])
    outcomes = []
    for name in chosen:
        shards = _tokenize(config, folder, name, curated[name], tokenizer)
        outcome = _train(config, folder / name, settings, shards, tokenizer)
        if outcome is None:
            return None
        outcomes.append(outcome)
    _write(folder, settings, outcomes)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """Documents, tokens, epochs and bits per byte by variant, with the difference to raw paired by seed, in Markdown."""
    raw = next((outcome for outcome in outcomes if outcome.variant == RAW), None)
    lines = [
        "| trained on what is left by | documents | tokens | epochs | held-out bits per byte | less than raw, paired |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        difference = "-"
        if raw is not None and outcome is not raw:
            difference = "{:+.4f} ± {:.4f}".format(*_gain(raw, outcome)[:2])
        lines.append(
            f"| {outcome.variant} | {outcome.documents:,} | {outcome.tokens:,} | {outcome.epochs:.2f} "
            f"| {estimate(outcome.bits_per_byte)} | {difference} |"
        )
    seeds = len(outcomes[0].bits_per_byte)
    return "\n".join(lines) + f"\n\nMean and 95% interval of {seeds} seeds.\n"


def _presets(config: Mapping) -> dict:
    from smoljax.curation import presets

    return {**presets.defaults(), **config.get("curation", {}).get("presets", {})}


def _chosen(settings: AblationConfig, presets: Mapping) -> dict[str, dict]:
    if settings.preset not in presets:
        raise SmoljaxError(
            f"config.ablation.preset is {settings.preset!r}: config.curation.presets has {', '.join(sorted(presets))}"
        )
    variants = variants_of(presets[settings.preset])
    for name in settings.variants:
        if name not in variants:
            raise SmoljaxError(
                f"config.ablation.variants names {name!r}: the preset {settings.preset!r} has {', '.join(variants)}"
            )
    return {name: variants[name] for name in settings.variants or variants}


def _check_heldout(
    config: Mapping, workdir: Path, settings: AblationConfig, presets: Mapping
) -> None:
    from smoljax import curation

    section = {**config["curation"], "presets": presets, "heldout_fractions": {}}
    built = configuration.build(curation.CurationConfig, section, "curation")
    preset_of = {source.name: source.preset for source in curation.recipe_sources(built, workdir)}
    for name in settings.heldout:
        if preset_of.get(name, settings.preset) == settings.preset:
            raise SmoljaxError(
                f"config.ablation.heldout names {name!r}: it must be a source of another preset than "
                f"{settings.preset!r}; the recipe has "
                f"{', '.join(f'{source} ({preset})' for source, preset in preset_of.items())}"
            )


def _curate(
    config: Mapping, folder: Path, settings: AblationConfig, presets: Mapping, name: str
) -> dict:
    """The manifest of a variant's documents; the work items of the variants share a folder, so pages are read once."""
    from smoljax import curation
    from smoljax.evaluation.config import EvaluationConfig

    print(f"ablation: documents of {name}", flush=True)
    section = {
        "directory": str(folder / "curation"),
        **config["curation"],
        "presets": presets,
        "heldout_fraction": 0.0,
        "heldout_fractions": dict.fromkeys(settings.heldout, 1.0),
    }
    built = configuration.build(curation.CurationConfig, section, "curation")
    scored = configuration.build(EvaluationConfig, config.get("evaluation", {}), "evaluation")
    manifest = curation.curate(built, folder / name, evaluation_sets=scored.sets)
    for source in settings.heldout:
        if not manifest["sources"][source]["heldout"]["documents"]:
            raise SmoljaxError(
                f"config.ablation.heldout names {source!r}, of which its own preset leaves no document"
            )
    return manifest


def _tokenizer(config: Mapping, folder: Path, raw: Mapping) -> TokenizerConfig:
    """The tokenizer that config.tokenizer names, or one trained on what extraction alone leaves."""
    from smoljax.tokens import documents, tokenizer

    section = configuration.build(TokenizerConfig, config.get("tokenizer", {}), "tokenizer")
    if section.directory:
        return section
    path = (
        folder
        / f"tokenizer-{_hash(raw['config_hash'], raw['inputs_hash'], dataclasses.asdict(section))}"
    )
    if not path.is_dir():
        print("ablation: tokenizer", flush=True)
        texts = documents.read_texts(folder / RAW / "documents", "train")
        tokenizer.train(
            texts, path, vocab_size=section.vocab_size, special_tokens=section.special_tokens
        )
    return dataclasses.replace(section, directory=str(path))


def _tokenize(
    config: Mapping, folder: Path, name: str, curated: Mapping, tokenizer: TokenizerConfig
) -> dict:
    """Manifests of the shards of a variant, by source."""
    from smoljax.tokens import documents

    sizes = configuration.build(ShardsConfig, config.get("shards", {}), "shards")
    return documents.tokenize_documents(
        folder / name / "documents",
        folder / name / "shards",
        tokenizer.load(folder),
        sources=list(curated["sources"]),
        block_tokens=sizes.block_tokens,
        tokens_per_file=sizes.tokens_per_file,
        rehydrate=sizes.rehydrate,
    )


def _train(
    config: Mapping,
    folder: Path,
    settings: AblationConfig,
    shards: Mapping,
    tokenizer: TokenizerConfig,
) -> Outcome | None:
    """Trains a variant, whose folder it is, once for each seed."""
    name = folder.name
    sections = {
        **{key: config[key] for key in ("model", "mesh", "optimizer", "training") if key in config},
        "data": {
            **config["data"],
            "directory": str(folder / "shards"),
            "sources": tuple(shards),
            "stages": (),  # Each source by what the variant leaves of it.
        },
        "tokenizer": dataclasses.asdict(tokenizer),
    }
    made_from = _hash(sections, shards)
    scores = []
    for seed in range(settings.seeds):
        run = folder / f"seed{seed}-{made_from}"
        score = _score(run, sections["training"]["num_steps"])
        if score is None:
            score = _train_once({**sections, "seed": seed}, run)
            if score is None:
                return None
        print(f"ablation: {name}, seed {seed}: {score:.4f} bits per byte", flush=True)
        scores.append(score)
    splits = [shards[source]["splits"]["train"] for source in shards]
    tokens = sum(split["tokens"] for split in splits)
    data = sections["data"]
    read = sections["training"]["num_steps"] * data["batch_size"] * data["seq_len"]
    return Outcome(
        name, sum(split["documents"] for split in splits), tokens, read / tokens, tuple(scores)
    )


def _train_once(config: Mapping, run: Path) -> float | None:
    from smoljax.training import Run, train

    if train(Run(dict(config), run)):
        return None
    return _score(run, config["training"]["num_steps"])


def _score(run: Path, num_steps: int) -> float | None:
    """Bits per byte of all held-out text at the last step, or None before it."""
    from smoljax.training.metrics import read_metrics

    for row in read_metrics(run / "train"):
        if row["step"] == num_steps and "heldout/all/bits_per_byte" in row:
            return row["heldout/all/bits_per_byte"]
    return None


def _write(folder: Path, settings: AblationConfig, outcomes: list[Outcome]) -> None:
    rows = [dataclasses.asdict(outcome) for outcome in outcomes]
    files.atomic_write_json(
        folder / "ablation.json", {"settings": dataclasses.asdict(settings), "variants": rows}
    )
    files.atomic_write_text(folder / "ablation.md", table(outcomes))
    _plot(outcomes, folder / "ablation.png")


def _gain(raw: Outcome, other: Outcome) -> Estimate:
    """By how many bits per byte a variant needs less than raw, seed by seed."""
    return estimate([a - b for a, b in zip(raw.bits_per_byte, other.bits_per_byte, strict=True)])


def _plot(outcomes: list[Outcome], path: Path) -> None:
    """Bits per byte of each variant with its interval and the single seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.2 + 0.4 * len(outcomes)
    figure, axes = plt.subplots(figsize=(7.5, height), layout="constrained")
    for row, outcome in enumerate(outcomes):
        mean, half_width, _ = estimate(outcome.bits_per_byte)
        axes.errorbar(mean, row, xerr=half_width, fmt="o", color="tab:blue", capsize=4)
        axes.plot(outcome.bits_per_byte, [row] * len(outcome.bits_per_byte), "|", color="black")
    raw = next((outcome for outcome in outcomes if outcome.variant == RAW), None)
    if raw is not None:
        axes.axvline(estimate(raw.bits_per_byte).mean, color="gray", linestyle=":", zorder=0)
    axes.set_yticks(range(len(outcomes)), [outcome.variant for outcome in outcomes])
    axes.invert_yaxis()
    axes.set(
        xlabel="bits per byte of the held-out sources (mean, 95% interval; strokes are seeds)",
        title="The same model on what each filter leaves, at equal tokens",
    )
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]

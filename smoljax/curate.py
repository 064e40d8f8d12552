"""Raw bytes to token shards: `python -m smoljax.curate --config=configs/quickstart.py --workdir=runs/quickstart`.

Five parts, each skipped while it is up to date; --only names one:
  documents   runs the recipe config.curation.recipe; writes WORKDIR/documents, removed documents with their reasons
              (among them those that share 13 words in a row with a benchmark of config.evaluation.sets)
  quality     if the config has a section quality: scores documents by a head that is trained on a language model's scores
              of a few (WORKDIR/quality; without those it writes requests for them); writes WORKDIR/selected, from which
              the tokenizer and the shards are then made
  tokenizer   trains SentencePiece on the train split; writes WORKDIR/tokenizer (or checks config.tokenizer.directory)
  shards      writes token shards of every source to WORKDIR/shards
  report      writes WORKDIR/curation_report.html and .json (smoljax.curation.report): what each threshold removes, and
              the documents next to it
One more runs only when it is named:
  ablation    trains the config's model on raw text, on what each filter leaves, and on what all leave
              (smoljax.research.data_ablation); writes WORKDIR/ablation
Exit codes: 0 done, 1 failed, 42 stopped on request (SIGTERM, Ctrl-C), with finished work kept.
"""

import signal
import sys
from pathlib import Path

from smoljax import command_line

OPTIONS = {
    "only": "documents, quality, tokenizer, shards, report or ablation; the first five when not given"
}
PARTS = ("documents", "quality", "tokenizer", "shards", "report")


def main(config: dict, workdir: Path, *, only: str) -> int:
    """Brings the parts up to date, in order."""
    from smoljax.errors import SmoljaxError

    parts = {
        "documents": _documents,
        "quality": _quality,
        "tokenizer": _tokenizer,
        "shards": _shards,
        "report": _report,
        "ablation": _ablation,
    }
    if only and only not in parts:
        raise SmoljaxError(f"--only={only}: there are {', '.join(parts)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part in (only,) if only else PARTS:
            if part != "quality" or only or config.get("quality"):
                parts[part](config, workdir)
    except KeyboardInterrupt:
        print("stopped on request; the same command goes on from what is done", file=sys.stderr)
        return command_line.STOPPED
    return 0


def _documents(config: dict, workdir: Path) -> None:
    from smoljax import configuration, curation
    from smoljax.evaluation.config import EvaluationConfig

    settings = configuration.build(curation.CurationConfig, config.get("curation", {}), "curation")
    scored = configuration.build(EvaluationConfig, config.get("evaluation", {}), "evaluation")
    manifest = curation.curate(settings, workdir, evaluation_sets=scored.sets)
    print(curation.table(manifest, curation.stage_seconds(workdir)))


def _quality(config: dict, workdir: Path) -> None:
    from smoljax import configuration
    from smoljax.quality import run
    from smoljax.quality.config import QualityConfig

    settings = configuration.build(QualityConfig, config.get("quality", {}), "quality")
    print(run.run(settings, workdir))


def _curated(config: dict, workdir: Path) -> Path:
    """The folder of the documents that are tokenized: the selected ones, where the config says how they are selected."""
    from smoljax.errors import SmoljaxError

    if not config.get("quality"):
        return workdir / "documents"
    if not (workdir / "selected").is_dir():
        raise SmoljaxError(
            f"the config has a section quality, and no documents are selected yet in {workdir / 'selected'}: run "
            "--only=quality, which says what it needs"
        )
    return workdir / "selected"


def _tokenizer(config: dict, workdir: Path) -> None:
    from smoljax.tokens import documents, tokenizer

    settings = _tokenizer_config(config)
    if settings.directory:
        trained = settings.load(workdir)
    else:
        texts = documents.read_texts(_curated(config, workdir), "train")
        trained = tokenizer.train(
            texts,
            workdir / "tokenizer",
            vocab_size=settings.vocab_size,
            special_tokens=settings.special_tokens,
        )
    print(f"tokenizer: {trained.vocab_size:,} tokens, fingerprint {trained.fingerprint[:16]}")


def _tokenizer_config(config: dict):
    from smoljax import configuration
    from smoljax.tokens.config import TokenizerConfig

    return configuration.build(TokenizerConfig, config.get("tokenizer", {}), "tokenizer")


def _shards(config: dict, workdir: Path) -> None:
    from smoljax import configuration
    from smoljax.tokens import documents
    from smoljax.tokens.config import ShardsConfig

    sizes = configuration.build(ShardsConfig, config.get("shards", {}), "shards")
    manifests = documents.tokenize_documents(
        _curated(config, workdir),
        workdir / "shards",
        _tokenizer_config(config).load(workdir),
        block_tokens=sizes.block_tokens,
        tokens_per_file=sizes.tokens_per_file,
        rehydrate=sizes.rehydrate,
    )
    for source, manifest in manifests.items():
        counts = manifest["splits"]
        print(
            f"{source:20} "
            + "  ".join(
                f"{split} {counts[split]['documents']:,} documents, {counts[split]['tokens']:,} tokens"
                for split in counts
            )
        )


def _report(config: dict, workdir: Path) -> None:
    from smoljax import configuration, curation
    from smoljax.curation import report

    settings = configuration.build(curation.CurationConfig, config.get("curation", {}), "curation")
    tokenizer = _tokenizer_config(config)
    trained = tokenizer.directory or (workdir / "tokenizer").is_dir()
    path = report.write(
        workdir,
        directory=settings.directory,
        tokenizer=tokenizer.load(workdir) if trained else None,
    )
    print(f"report: {path}")


def _ablation(config: dict, workdir: Path) -> None:
    from smoljax.research import data_ablation

    outcomes = data_ablation.ablate(config, workdir)
    if outcomes is None:  # Training saves what it has, and says so, before it returns.
        raise KeyboardInterrupt
    print(data_ablation.table(outcomes))


if __name__ == "__main__":
    command_line.run(main, usage=__doc__, options=OPTIONS)

"""The quality classifier from annotations to WORKDIR/selected, each part only where something has changed.

What lies in WORKDIR/quality:
  requests.jsonl      documents that are put up for annotation
  annotations.jsonl   their scores, by you
  head.json           the head (head.py); evaluation.json and evaluation.md say what it is worth
  scores/             of all documents, file by file (apply.py)
  select/             the files of WORKDIR/selected (select.py), which are linked there
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np

from smoljax import files
from smoljax.curation import items, runner
from smoljax.errors import SmoljaxError
from smoljax.progress import Progress
from smoljax.quality import annotations, apply, evaluation, scores
from smoljax.quality import head as heads
from smoljax.quality import select as selection
from smoljax.quality.config import QualityConfig
from smoljax.quality.embedders import Embedder, open_embedder
from smoljax.tokens.shards import file_sha256

# Raised when the same annotations and embedder give another head or evaluation than before.
CODE_VERSION = 1
_LEAST = 50  # Annotations, below which neither a head nor its F1 means anything.
_ROWS = 512  # Annotated texts that are embedded between two lines of progress.


def run(config: QualityConfig, workdir: Path, *, workers: int | None = None) -> str:
    """Brings the quality classifier and WORKDIR/selected up to date; returns what a person should read.

    Without annotations it writes requests for them, and selects nothing.

    Args:
      config: how documents are scored and which are kept.
      workdir: of the run.
      workers: processes that write the selected documents; by default the cores that this process may use. All devices
        embed, whatever it is.

    Raises:
      SmoljaxError: there are no documents, the annotations cannot teach a head, the embedder is missing, or the head is of another
        embedder.
      KeyboardInterrupt: on Ctrl-C; the files that are scored stay.
    """
    directory = workdir / "quality"
    annotated = Path(config.annotations) if config.annotations else directory / "annotations.jsonl"
    with runner.only_run_in(directory):
        if not config.head and not config.annotations and not annotated.is_file():
            return _request(config, workdir, annotated)
        listed = [] if config.head else _read(annotated)
        found = scores.find_files(workdir / "documents", config.sources)
        if not any(file.rows for file in found if file.judged):
            raise SmoljaxError(
                f"{workdir / 'documents'} holds no document to judge: curate some first"
            )
        embedder = open_embedder(config.embedder, max_tokens=config.max_tokens)
        if config.head:
            path = Path(config.head)
            head, report = heads.load(path), f"head: {path}"
            heads.check(head, path, embedder=embedder.fingerprint, chunks=config.chunks)
        else:
            head, report = _train(config, workdir, annotated, listed, found, embedder)
        keys = apply.score(found, directory / "scores", embedder=embedder, head=head)
        judged = [scores.read(directory / "scores", file) for file in found if file.judged]
        cutoff = config.rule.cutoff(np.concatenate(judged))
        workers = workers or len(os.sched_getaffinity(0))
        manifest = selection.select(found, workdir, cutoff=cutoff, keys=keys, workers=workers)
        return f"{report}\n{_summary(manifest)}"


def _request(config: QualityConfig, workdir: Path, annotated: Path) -> str:
    """Writes the requests, unless they are there: somebody may have added replies to them."""
    path = workdir / "quality" / "requests.jsonl"
    if not path.is_file():
        annotations.write_requests(
            workdir / "documents", path, count=config.requests, sources=config.sources
        )
    with path.open(encoding="utf-8") as file:
        count = sum(1 for _ in file)
    return f"""there are no scores yet, so nothing is selected. What to do:
  1. {path} holds {count:,} requests, one a line: send the field "request" of each to a language model.
  2. Add its answer to the line as the field "reply" (or give the number itself as "score"; leave "id" as it is).
  3. Save the lines as {annotated}
  4. Run the same command again: it trains the head, says how good it is, and selects documents."""


def _read(annotated: Path) -> list[annotations.Annotation]:
    """The annotations; replies without a score are counted on stderr."""
    listed, failures = annotations.read(annotated)
    for line in failures[:3]:
        print(f"note: {line}", file=sys.stderr)
    if len(failures) > 3:
        print(f"note: {len(failures):,} replies have no score", file=sys.stderr)
    return listed


def _train(
    config: QualityConfig,
    workdir: Path,
    annotated: Path,
    listed: list[annotations.Annotation],
    found: list[scores.File],
    embedder: Embedder,
) -> tuple[heads.Head, str]:
    """The head that was trained on these annotations, and the table of what it is worth."""
    directory = workdir / "quality"
    path, report = directory / "head.json", directory / "evaluation.md"
    key = items.hash_of(
        CODE_VERSION,
        file_sha256(annotated),
        [file.sha256 for file in found],
        (embedder.fingerprint, config.chunks, config.heldout_fraction),
        (config.rule.int_score, config.rule.score, config.rule.fraction),
    )
    if path.is_file() and report.is_file():
        head = heads.load(path)
        if head.about.get("key") == key:
            return head, report.read_text(encoding="utf-8")
    texts, labels, heldout = _texts(config, workdir, annotated, listed)
    vectors = _vectors(embedder, texts, config.chunks)
    weight, bias, about = heads.fit(vectors[~heldout], labels[~heldout])
    about |= {"embedder": config.embedder, "annotations": len(labels), "key": key}
    head = heads.Head(weight, bias, embedder.fingerprint, config.chunks, about)
    guesses = head.scores(vectors[heldout], np.arange(heldout.sum()))
    result = evaluation.evaluate(guesses, labels[heldout], config.rule)
    result |= {"trained_on": int((~heldout).sum()), "head": head.fingerprint}
    files.atomic_write_json(directory / "evaluation.json", result)
    files.atomic_write_text(report, evaluation.table(result))
    heads.save(path, head)
    return head, evaluation.table(result)


def _vectors(embedder: Embedder, texts: list[str], chunks: str) -> np.ndarray:
    """The mean of each text's vectors, f32 [texts, width]."""
    progress = Progress("embed annotations", len(texts), unit="documents")
    parts = []
    for start in range(0, len(texts), _ROWS):
        some = texts[start : start + _ROWS]
        parts.append(heads.mean_vectors(*embedder.embed(some, chunks=chunks)))
        progress.update(start + len(some))
    progress.close()
    return np.concatenate(parts)


def _texts(
    config: QualityConfig, workdir: Path, path: Path, listed: list[annotations.Annotation]
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, scores (f32) and which are held out (bool), of the annotations whose documents are there.

    Raises:
      SmoljaxError: too few, or their scores leave nothing to learn or to judge.
    """
    wanted = {one.id for one in listed if one.text is None}
    texts = annotations.look_up(workdir / "documents", wanted) if wanted else {}
    known = [one for one in listed if one.text is not None or one.id in texts]
    lost = sorted(wanted - set(texts))
    if lost:
        print(
            f"note: {len(lost):,} of {len(listed):,} annotations in {path} are of documents that are not in "
            f"{workdir / 'documents'} ({lost[0]!r}), and are left out",
            file=sys.stderr,
        )
    if len(known) < _LEAST:
        raise SmoljaxError(
            f"{path} has scores of {len(known)} documents of {workdir / 'documents'} ({len(lost)} more are of others): a head "
            f"needs at least {_LEAST}, and some hundreds to be good"
        )
    labels = np.array([one.score for one in known], np.float32)
    heldout = np.array([_is_heldout(one.id, config.heldout_fraction) for one in known])
    _check_labels(path, labels, heldout, config)
    return [texts.get(one.id, one.text) for one in known], labels, heldout


def _check_labels(
    path: Path, labels: np.ndarray, heldout: np.ndarray, config: QualityConfig
) -> None:
    wanted = labels >= config.rule.cutoff(labels)
    for side, chosen in (("train the head", ~heldout), ("evaluate it", heldout)):
        if wanted[chosen].all() or not wanted[chosen].any():
            counts = dict(zip(*(x.tolist() for x in np.unique(labels, return_counts=True))))
            raise SmoljaxError(
                f"{path}: of the {chosen.sum()} scores that {side}, {'all' if wanted[chosen].any() else 'none'} are of "
                f"{config.rule.cutoff(labels):.3f} or more (all scores and how often: {counts}), so what is kept cannot be "
                "told from what is not: annotate more documents, or change config.quality.threshold"
            )


def _is_heldout(document_id: str, fraction: float) -> bool:
    digest = hashlib.sha256(f"evaluate {document_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def _summary(manifest: dict) -> str:
    counts = ", ".join(f"{score}: {n:,}" for score, n in enumerate(manifest["int_scores"]))
    lines = [f"rounded scores of all documents: {counts}", ""]
    lines.append(f"{'source':<20}{'train':>10}{'MB':>10}{'heldout':>10}{'removed':>10}")
    for name, source in manifest["sources"].items():
        train = source["train"]
        lines.append(
            f"{name:<20}{train['documents']:>10,}{train['bytes'] / 1e6:>10.2f}"
            f"{source['heldout']['documents']:>10,}{source['removed']:>10,}"
        )
    return "\n".join(lines)

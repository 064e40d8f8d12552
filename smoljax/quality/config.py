"""The section `quality` of a config, and the rules by which documents are kept."""

import dataclasses
import math

import numpy as np

from smoljax.errors import SmoljaxError

MAX_SCORE = 5
CHUNKS = ("start", "start_end")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which scores are kept: those of at least a cutoff, which is fixed or that of the best share of a corpus.

    Attributes:
      int_score: least rounded score that is kept; rounded as FineWeb-Edu does, see `int_scores`.
      score: least score that is kept.
      fraction: share of the corpus that is kept, the best.
    """

    int_score: int | None = None
    score: float | None = None
    fraction: float | None = None

    def cutoff(self, scores: np.ndarray) -> np.float32:
        """The least score that is kept in a corpus with these scores [N], float32."""
        if self.int_score is not None:
            return int_score_cutoff(self.int_score)
        if self.score is not None:
            return np.float32(self.score)
        kept = max(1, math.ceil(self.fraction * len(scores)))
        return np.partition(scores.astype(np.float32), len(scores) - kept)[len(scores) - kept]


PRESETS = {
    "fineweb_edu": Rule(int_score=3),
    "fineweb_edu_score_2": Rule(int_score=2),
    "finepdfs_edu": Rule(fraction=0.10),
}


def int_scores(scores: np.ndarray) -> np.ndarray:
    """Scores [N] rounded and clipped to 0..5, as in FineWeb-Edu's column int_score; halves go to the even number."""
    return np.clip(np.rint(scores), 0, MAX_SCORE).astype(np.int32)


def int_score_cutoff(int_score: int) -> np.float32:
    """The least float32 that `int_scores` rounds to `int_score` or more."""
    half = np.float32(int_score - 0.5)
    return half if int_score % 2 == 0 else np.nextafter(half, np.float32(np.inf))


@dataclasses.dataclass(frozen=True)
class QualityConfig:
    """How documents are scored and which are kept. At most one of preset, threshold and keep_fraction is given.

    Attributes:
      embedder: a folder of sentence-transformers (BERT or XLM-RoBERTa), of a Hugging Face decoder (SmolLM3, Llama,
        Qwen3), or "model:WORKDIR", a run of smoljax.train.
      annotations: the file of scores (smoljax.quality.annotations); "" is WORKDIR/quality/annotations.jsonl.
      head: a head that was trained before, the quality/head.json of another run; "" trains one on the annotations.
      preset: "fineweb_edu" (rounded score of at least 3; the default), "fineweb_edu_score_2" (of at least 2) or
        "finepdfs_edu" (the best tenth of all scored documents).
      threshold: least score that is kept.
      keep_fraction: share of all scored documents that is kept, the best.
      sources: those that are judged; others pass with the score null. All, when empty.
      chunks: what of a long document is read: "start", its first `max_tokens` (FineWeb-Edu), or "start_end", the mean
        of its first and its last (FinePDFs-Edu reads both).
      max_tokens: of a chunk; None is what the embedder was made for (at most 512 for a decoder).
      heldout_fraction: share of the annotations that only evaluates the head, chosen by the hash of the id.
      requests: documents that are put up for annotation when there are no annotations yet.
    """

    embedder: str
    annotations: str = ""
    head: str = ""
    preset: str | None = None
    threshold: float | None = None
    keep_fraction: float | None = None
    sources: tuple[str, ...] = ()
    chunks: str = "start"
    max_tokens: int | None = None
    heldout_fraction: float = 0.2
    requests: int = 1000

    def __post_init__(self):
        if not self.embedder:
            raise SmoljaxError(
                'config.quality.embedder is "": name a sentence-transformers folder, or "model:WORKDIR"'
            )
        if self.head and self.annotations:
            raise SmoljaxError(
                "config.quality has head and annotations: give one of them, since a head is trained on annotations"
            )
        given = [
            name
            for name in ("preset", "threshold", "keep_fraction")
            if getattr(self, name) is not None
        ]
        if len(given) > 1:
            raise SmoljaxError(
                f"config.quality has {' and '.join(given)}: give one of them, since each says what is kept"
            )
        if self.preset is not None and self.preset not in PRESETS:
            raise SmoljaxError(
                f"config.quality.preset is {self.preset!r}: set it to one of {', '.join(PRESETS)}"
            )
        if self.chunks not in CHUNKS:
            raise SmoljaxError(
                f"config.quality.chunks is {self.chunks!r}: set it to one of {', '.join(CHUNKS)}"
            )
        for name in ("keep_fraction", "heldout_fraction"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < 1.0:
                raise SmoljaxError(
                    f"config.quality.{name} is {value}: it must be above 0 and below 1"
                )
        for name, least in (("requests", 1), ("max_tokens", 8)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SmoljaxError(f"config.quality.{name} is {value}: it must be at least {least}")

    @property
    def rule(self) -> Rule:
        """What is kept."""
        if self.threshold is not None:
            return Rule(score=self.threshold)
        if self.keep_fraction is not None:
            return Rule(fraction=self.keep_fraction)
        return PRESETS[self.preset or "fineweb_edu"]

"""Held-out bits per byte: the one figure that compares models across tokenizers."""

import math
from collections.abc import Callable

from jax.sharding import Mesh

from smoljax import parallel

# What the loss reads of a batch.
BATCH_DTYPES = {"tokens": "int32", "targets": "int32", "segment_ids": "int32", "loss_mask": "bool"}


def bits_per_byte(nats: float, num_targets: int, *, tokens: int, text_bytes: int) -> float:
    """Bits per UTF-8 byte of text.

    Args:
      nats: summed cross-entropy of `num_targets` tokens.
      num_targets: tokens that were scored.
      tokens: all targets of the split (every token but each document's first).
      text_bytes: bytes of the split's text. When everything was scored this is nats / ln 2 / bytes.
    """
    return nats / num_targets * tokens / text_bytes / math.log(2)


def held_out(
    eval_step: Callable,
    params: dict,
    mixture,
    *,
    mesh: Mesh,
    batch_size: int,
    max_batches: int | None = None,
) -> dict[str, dict[str, float]]:
    """Scores the held-out split of each source, in order.

    Args:
      eval_step: see smoljax.training.make_eval_step.
      params: the model's parameters.
      mixture: token shards, opened by smoljax.input_pipeline.open_mixture.
      mesh: the device mesh.
      batch_size: windows per batch.
      max_batches: score so many batches of each source, spread evenly; all of it when None.

    Returns:
      For each source, and for "all" together: bits_per_byte, loss (nats per token), tokens (scored),
      documents and bytes (of the split).
    """
    rows = parallel.local_rows(mesh, batch_size)
    results = {}
    for source in mixture.config.sources:
        sums = []
        for batch in mixture.heldout_batches(source, batch_size, max_batches=max_batches):
            local = {key: batch[key][rows] for key in BATCH_DTYPES}
            on_mesh = parallel.put_batch(local, mesh, rows=rows, batch_size=batch_size)
            sums.append(eval_step(params, on_mesh))
        nats = math.fsum(float(row["cross_entropy"]) for row in sums)
        scored = sum(int(row["num_targets"]) for row in sums)
        if not scored:
            continue
        split = mixture.reader(source, "heldout")
        results[source] = {
            "bits_per_byte": bits_per_byte(
                nats,
                scored,
                tokens=split.num_tokens - split.num_documents,
                text_bytes=split.text_bytes,
            ),
            "loss": nats / scored,
            "tokens": scored,
            "documents": split.num_documents,
            "bytes": split.text_bytes,
        }
    return results | {"all": combine(results)}


def combine(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """All sources as one text: bits of each source weighted by its bytes, nats by its scored tokens."""
    text_bytes = sum(row["bytes"] for row in results.values())
    scored = sum(row["tokens"] for row in results.values())
    return {
        "bits_per_byte": math.fsum(row["bits_per_byte"] * row["bytes"] for row in results.values())
        / text_bytes,
        "loss": math.fsum(row["loss"] * row["tokens"] for row in results.values()) / scored,
        "tokens": scored,
        "documents": sum(row["documents"] for row in results.values()),
        "bytes": text_bytes,
    }

"""Predicted beside published throughput: how far the closed forms of `smoljax.plan` are off.

Command:  python benchmarks/plan_calibration.py [--json=FILE]     (seconds; nothing is compiled)

Every row uses the same constants (smoljax/planning/estimate.py), with pure FSDP and full rematerialisation: nothing is fitted to a
row. Where a source does not state its batch, 4 sequences per chip are assumed; marked *. Shapes: Llama 2 (arXiv 2307.09288, table 1, and
the released configs), Llama 3 (arXiv 2407.21783, table 3). Published numbers: MaxText's reference/models/tiering.md, axlearn's
comments in fuji.py ("fuji") and its paper as listed elsewhere ("paper").
"""

import json
import statistics
import sys
from pathlib import Path

from smoljax.model import ModelConfig
from smoljax.planning.estimate import roofline
from smoljax.planning.topologies import topology


def _llama(layers, width, feed_forward, heads, kv_heads, *, vocabulary):
    return ModelConfig(
        vocab_size=vocabulary,
        num_layers=layers,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_heads=heads,
        num_kv_heads=kv_heads,
        no_rope_layer_interval=0,
        max_seq_len=8192,
        tie_embeddings=False,
        compute_dtype="bfloat16",
        remat="full",
    )


MODELS = {
    "Llama 2 7B": _llama(32, 4096, 11008, 32, 32, vocabulary=32_000),
    "Llama 2 70B": _llama(80, 8192, 28672, 64, 8, vocabulary=32_000),
    "Llama 3.1 8B": _llama(32, 4096, 14336, 32, 8, vocabulary=128_256),
    "Llama 3.1 70B": _llama(80, 8192, 28672, 64, 8, vocabulary=128_256),
    "Llama 3.1 405B": _llama(126, 16384, 53248, 128, 8, vocabulary=128_256),
}
_AXLEARN_TOKENS = 4_194_304
# source, model, topology, sequence, tokens a step (None: 4 sequences per chip), published tokens/s/chip, or seconds a step.
ROWS = [
    ("MaxText", "Llama 2 70B", "v5p-1024", 4096, None, 692, None),
    ("MaxText", "Llama 3.1 8B", "v6e-256", 8192, None, 7207, None),
    ("MaxText", "Llama 3.1 70B", "v6e-256", 8192, None, 960, None),
    ("MaxText", "Llama 3.1 405B", "v6e-256", 8192, None, 123, None),
    ("MaxText", "Llama 2 70B", "v6e-256", 4096, None, 900, None),
    ("axlearn fuji", "Llama 2 7B", "v5e-256x4", 4096, _AXLEARN_TOKENS, None, 2.21),
    ("axlearn fuji", "Llama 2 7B", "h100x256", 4096, _AXLEARN_TOKENS, None, 1.78),
    ("axlearn fuji", "Llama 2 70B", "v6e-256x4", 4096, _AXLEARN_TOKENS, None, 4.9),
    ("axlearn fuji", "Llama 2 70B", "v6e-256", 4096, _AXLEARN_TOKENS, None, 19.5),
    ("axlearn fuji", "Llama 2 70B", "h100x512", 4096, _AXLEARN_TOKENS, None, 12.9),
    ("axlearn paper", "Llama 2 7B", "v5p-512", 4096, _AXLEARN_TOKENS, None, 2.5),
    ("axlearn paper", "Llama 2 70B", "v5p-1024", 4096, _AXLEARN_TOKENS, None, 11.6),
]


def measure(row: tuple) -> dict:
    """One row: published and predicted tokens/s/chip, and the error as a share of the published."""
    source, name, machine_name, seq_len, tokens, per_chip, seconds = row
    machine, model = topology(machine_name), MODELS[name]
    chips = machine.num_chips
    assumed = tokens is None
    tokens = tokens or 4 * seq_len * chips
    times = roofline(model, machine, seq_len=seq_len, tokens=tokens, params_split=chips)
    published = per_chip or tokens / seconds / chips
    predicted = tokens / times.step / chips
    return {
        "source": source + ("*" if assumed else ""),
        "model": name,
        "machine": machine_name,
        "published": published,
        "predicted": predicted,
        "low": tokens / times.slowest / chips,
        "high": tokens / times.fastest / chips,
        "error": predicted / published - 1,
    }


def main() -> None:
    """Prints the table and the errors."""
    rows = [measure(row) for row in ROWS]
    print(
        f"{'source':15} {'model':15} {'machine':10} {'published':>10} {'predicted':>10} {'range':>16} {'error':>7}   (tokens/s/chip)"
    )
    for row in rows:
        span = f"{row['low']:,.0f} to {row['high']:,.0f}"
        print(
            f"{row['source']:15} {row['model']:15} {row['machine']:10} {row['published']:10,.0f} {row['predicted']:10,.0f} "
            f"{span:>16} {100 * row['error']:+6.0f}%"
        )
    errors = [row["error"] for row in rows]
    inside = sum(row["low"] <= row["published"] <= row["high"] for row in rows)
    print(
        f"mean error {100 * statistics.mean(errors):+.0f}%, mean absolute error {100 * statistics.mean(map(abs, errors)):.0f}%, "
        f"largest {100 * max(errors, key=abs):+.0f}%; {inside} of {len(rows)} published figures lie in the predicted range"
    )
    for argument in sys.argv[1:]:
        if argument.startswith("--json="):
            Path(argument.removeprefix("--json=")).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

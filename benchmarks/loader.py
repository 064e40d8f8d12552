"""Tokens per second of the loader on one core, beside a plain memmap gather and Grain's packing on the fly.

Command:   python benchmarks/loader.py [--trainer-tokens-per-second=4000] [--seconds=2] [--rounds=3]
Data:      16M random uint16 tokens in documents of lognormal length (median 400), files in the page cache; two sources
           mixed 0.7 to 0.3. The same documents on every side.
Sides:     "batch" is mixture.batch(step) for one step after the other; "loader" the same through Grain with its
           prefetch thread; "memmap" only gathers tokens and targets of random windows from a flat file (no
           segments, positions, masks, documents, mixture or checks); "grain packing" is grain's
           ConcatThenSplitIterDataset over shuffled documents in memory.
Reading:   one core, seconds of CPU time (so that other work on the machine does not count); sides alternate, the
           fastest of --rounds rounds counts.

2026-11-24, one x86-64 core of a busy machine, grain 0.2.18, numpy 2.4.6, --seconds=1 --rounds=4; in Mtok/s, and how many
times that is what a trainer of 4,000 tok/s takes:
    side                        seq 256 x 16     seq 2048 x 8
    batch                      19.9  (4,966x)   90.0 (22,493x)
    loader, 1 thread           13.0  (3,256x)   52.0 (12,996x)
    loader, 16 threads         12.2  (3,056x)   50.4 (12,596x)
    memmap gather             176.2 (44,051x)  356.1 (89,032x)
    grain packing               7.4  (1,859x)   13.4  (3,355x)
"""

import argparse
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grain
import numpy as np

from smoljax.input_pipeline import MixtureConfig, open_mixture
from smoljax.tokens.shards import write_shards

NUM_TOKENS = 16 * 2**20
VOCAB_SIZE = 8192


class RandomTokens:
    """Stands where the tokenizer goes: "17" becomes 17 random ids."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = VOCAB_SIZE, 1, 2, 3, "random"

    def __init__(self):
        self._generator = np.random.default_rng(0)

    def encode_batch(self, texts: list[str], *, num_threads: int | None = None) -> list[np.ndarray]:
        """Random ids, as many as each text says."""
        return [self._generator.integers(4, VOCAB_SIZE, int(text)) for text in texts]


def document_lengths() -> list[int]:
    """Lengths of documents that together have NUM_TOKENS tokens."""
    lengths = np.random.default_rng(1).lognormal(np.log(400), 1.2, NUM_TOKENS // 400)
    lengths = lengths.astype(int) + 1
    return lengths[: np.searchsorted(np.cumsum(lengths), NUM_TOKENS)].tolist()


def loader_batches(directory: Path, seq_len: int, batch_size: int) -> Iterator[int]:
    """Tokens of each batch of the mixture, made when asked."""
    mixture = open_mixture(_config(directory, seq_len, batch_size))
    step = 0
    while True:
        yield mixture.batch(step)["tokens"].size
        step += 1


def loader_with_grain(
    directory: Path, seq_len: int, batch_size: int, *, num_threads: int
) -> Iterator[int]:
    """Tokens of each batch of the mixture, through Grain."""
    mixture = open_mixture(_config(directory, seq_len, batch_size))
    for _, batch in mixture.loader(num_threads=num_threads, prefetch=max(8, num_threads)):
        yield batch["tokens"].size


def memmap_gather(path: Path, seq_len: int, batch_size: int) -> Iterator[int]:
    """Tokens of each batch of random windows of a flat file; tokens and targets and nothing else."""
    flat = np.memmap(path, np.uint16, mode="r")
    generator = np.random.default_rng(0)
    columns = np.arange(seq_len + 1)
    while True:
        starts = generator.integers(0, len(flat) - seq_len - 1, batch_size)
        rows = flat[starts[:, None] + columns].astype(np.int32)
        tokens, targets = rows[:, :-1], rows[:, 1:]
        yield min(tokens.size, targets.size)


def grain_packing(documents: list[np.ndarray], seq_len: int, batch_size: int) -> Iterator[int]:
    """Tokens of each batch that Grain packs from shuffled documents while it goes."""
    dataset = grain.MapDataset.source(documents).seed(0).shuffle().repeat()
    dataset = dataset.map(lambda document: {"tokens": document})
    dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    dataset = grain.experimental.ConcatThenSplitIterDataset(
        dataset, length_struct={"tokens": seq_len + 1}
    )
    for batch in dataset.batch(batch_size):
        yield batch["tokens"].size - batch_size


def rate(open_side: Callable[[], Iterator[int]], seconds: float) -> float:
    """Tokens per second of CPU time of this process (all threads), from the second batch on."""
    batches = open_side()
    next(batches)
    tokens, begin = 0, time.process_time()
    while (elapsed := time.process_time() - begin) < seconds:
        tokens += next(batches)
    if hasattr(batches, "close"):
        batches.close()
    return tokens / elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trainer-tokens-per-second", type=float, default=4000)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        flat, documents = _write_data(directory)
        print(
            f"{datetime.date.today()}  {platform.machine()}, one core; grain {grain.__version__}, "
            f"numpy {np.__version__}; {len(documents):,} documents, {NUM_TOKENS:,} tokens"
        )
        trainer = arguments.trainer_tokens_per_second
        print(
            f"{'side':<28}{'seq 256 x 16':>16}{'seq 2048 x 8':>16}   Mtok/s (times a trainer of {trainer:,.0f} tok/s)"
        )
        shapes = ((256, 16), (2048, 8))
        sides = {
            "batch": lambda *shape: loader_batches(directory, *shape),
            "loader, 1 thread (default)": lambda *shape: loader_with_grain(
                directory, *shape, num_threads=1
            ),
            "loader, 16 threads": lambda *shape: loader_with_grain(
                directory, *shape, num_threads=16
            ),
            "memmap gather": lambda *shape: memmap_gather(flat, *shape),
            "grain packing": lambda *shape: grain_packing(documents, *shape),
        }
        best = {(name, shape): 0.0 for name in sides for shape in shapes}
        for _ in range(arguments.rounds):
            for name, shape in best:
                measured = rate(lambda: sides[name](*shape), arguments.seconds)  # noqa: B023
                best[name, shape] = max(best[name, shape], measured)
        for name in sides:
            cells = (
                f"{best[name, shape] / 1e6:.1f} ({best[name, shape] / trainer:,.0f}x)"
                for shape in shapes
            )
            print(f"{name:<28}" + "".join(f"{cell:>16}" for cell in cells))


def _config(directory: Path, seq_len: int, batch_size: int) -> MixtureConfig:
    return MixtureConfig(
        directory=str(directory),
        sources=("first", "second"),
        stages=((0, {"first": 0.7, "second": 0.3}),),
        seq_len=seq_len,
        batch_size=batch_size,
    )


def _write_data(directory: Path) -> tuple[Path, list[np.ndarray]]:
    """Shards of two sources, and the same tokens as a flat file and as a list of documents."""
    lengths = document_lengths()
    cut = int(len(lengths) * 0.7)
    for source, part in (("first", lengths[:cut]), ("second", lengths[cut:])):
        stream = (("train", str(i), str(length)) for i, length in enumerate(part))
        write_shards(stream, directory, RandomTokens(), source=source)
    documents = RandomTokens().encode_batch([str(length) for length in lengths])
    documents = [document.astype(np.uint16) for document in documents]
    path = directory / "flat.uint16"
    np.concatenate(documents).tofile(path)
    return path, documents


if __name__ == "__main__":
    main()

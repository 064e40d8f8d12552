"""Batches of a mixture of sources, by step.

The state of the loader is the step number. A batch is found by arithmetic (source of each row, window within the
source) and read from at most a few blocks, of which each source keeps `group_blocks` in memory: about
`sources * group_blocks` MiB at uint16 and 2**19 tokens per block, however long the run.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from smoljax.errors import SmoljaxError, require
from smoljax.input_pipeline.batch_sizes import BatchSizes
from smoljax.input_pipeline.mixture import Schedule
from smoljax.input_pipeline.rows import SOURCE_SHIFT, Recent, assemble
from smoljax.input_pipeline.windows import WindowOrder, order_of
from smoljax.tokens.reader import ShardReader
from smoljax.tokens.shards import VERSION, shard_directory

_NUM_STEPS = 2**48  # A number of steps that no run reaches.
_PLANS = 4  # Blocks of the mixture whose rows stay resolved: neighbouring batches share one.
Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
    """What to train on, and in which order.

    Attributes:
      directory: holds `<source>/1.0.0/`, as `smoljax.tokens` writes them.
      sources: names of the sources.
      seq_len: inputs of a window.
      batch_size: windows of a step, over all hosts.
      batch_ramp: (step, windows) pairs: so many windows before that step, while the batch grows to batch_size.
      stages: (first step, {source: weight}) from step 0 on; weights are divided by their sum. Empty: each source by
        its number of windows, so that all finish an epoch together.
      seed: names the order.
      split: "train" or "heldout".
      tokenizer_fingerprint: refuse shards that another tokenizer wrote; None accepts any that agree.
      group_blocks: blocks whose windows are shuffled together, and kept in memory, per source.
    """

    directory: str
    sources: tuple[str, ...]
    seq_len: int
    batch_size: int
    batch_ramp: tuple[tuple[int, int], ...] = ()
    stages: tuple[tuple[int, Mapping[str, float]], ...] = ()
    seed: int = 0
    split: str = "train"
    tokenizer_fingerprint: str | None = None
    group_blocks: int = 16

    def __post_init__(self):
        if not self.sources:
            raise SmoljaxError("mixture sources is empty: name at least one source")
        if len(set(self.sources)) != len(self.sources):
            raise SmoljaxError(f"mixture sources names one twice: {', '.join(self.sources)}")
        for name in ("seq_len", "batch_size", "group_blocks"):
            if getattr(self, name) < 1:
                raise SmoljaxError(f"mixture {name} is {getattr(self, name)}, expected at least 1")
        BatchSizes(self.batch_size, self.batch_ramp)

    @property
    def batch_sizes(self) -> BatchSizes:
        """Windows of each step."""
        return BatchSizes(self.batch_size, self.batch_ramp)


def open_mixture(config: MixtureConfig) -> "Mixture":
    """Opens the shards of a mixture; reads manifests only.

    Raises:
      SmoljaxError: shards are missing, damaged, or of another tokenizer; a sequence is longer than a block; a source
        with a weight has no documents; stages or weights are wrong.
    """
    return Mixture(config)


class Mixture:
    """See `open_mixture`. Can be pickled, and used by several threads.

    Attributes:
      config: the configuration.
      schedule: source of every sample; `schedule.counts(config.batch_sizes.before(step))` tells what each source has given.
      readers: `ShardReader` by source, with its manifest and counts.
      orders: `WindowOrder` by source; absent where a source is empty.
      vocab_size, pad_id, tokenizer_fingerprint: of the tokenizer that wrote the shards.
    """

    def __init__(self, config: MixtureConfig):
        self.config = config
        self.readers = _open_sources(config, config.split)
        tokenizer = self.readers[config.sources[0]].manifest["tokenizer"]
        self.vocab_size, self.pad_id = tokenizer["vocab_size"], tokenizer["pad_id"]
        self.tokenizer_fingerprint = tokenizer["fingerprint"]
        self.orders = {
            name: _order(config, reader)
            for name, reader in self.readers.items()
            if reader.num_tokens
        }
        stages = config.stages or ((0, _windows_by_source(config, self.orders)),)
        self.schedule = Schedule(config.sources, stages, config.batch_sizes, config.seed)
        for step, weights in stages:
            for name, weight in weights.items():
                if weight and name not in self.orders:
                    raise SmoljaxError(
                        f"mixture stage at step {step} gives {name!r} the weight {weight}, but its {config.split} split "
                        "has no documents: set the weight to 0, or see which filter removed them"
                    )
        self._plans = Recent(_PLANS)
        self._blocks = {name: Recent(config.group_blocks) for name in config.sources}

    def batch(self, step: int, rows: slice = slice(None)) -> Batch:
        """The batch of a step, or those rows of it: arrays [rows, seq_len].

        tokens, targets, segment_ids (1, 2, ... within a window; 0 is padding), positions (inside the document, from
        0 at its bos, going on across windows): int32. loss_mask: bool, False where the target is the first token of a
        document, or padding. document_ids: int64; `document(id)` names the document, -1 is padding.

        Raises:
          SmoljaxError: a block is damaged.
        """
        windows = [
            (source, self._block(name, block), window)
            for source, name, block, window in self._locate(step, rows)
        ]
        return assemble(windows, self.config.seq_len, pad_id=self.pad_id)

    def document(self, number: int) -> tuple[str, str]:
        """Source and document id of an entry of `document_ids`."""
        name = self.config.sources[number >> SOURCE_SHIFT]
        return name, self.readers[name].document_id(number & ((1 << SOURCE_SHIFT) - 1))

    def documents(self, step: int, rows: slice = slice(None)) -> list[list[tuple[str, str]]]:
        """For each row of a batch, source and id of its documents in order: how a loss spike is investigated."""
        numbers_RS = self.batch(step, rows)["document_ids"]
        return [
            [self.document(number) for number in np.unique(row[row >= 0]).tolist()]
            for row in numbers_RS
        ]

    def loader(
        self,
        start_step: int = 0,
        *,
        rows: slice | Mapping[int, slice] = slice(None),
        num_workers: int = 0,
        num_threads: int = 1,
        prefetch: int = 8,
    ) -> Iterator[tuple[int, Batch]]:
        """Yields (step, batch) from `start_step` on, without end, made ahead of need by Grain.

        Args:
          start_step: first step; starting at any step takes the same time.
          rows: the rows of each batch that this host loads; by batch size where it is ramped up.
          num_workers: processes that make batches; each keeps its own blocks in memory. 0 uses threads only, which
            is enough by far (see benchmarks/loader.py).
          num_threads: threads that make batches, in each process. More than 1 pays only where reading a block
            waits for a network; with blocks in memory they contend for the interpreter. 0 makes a batch when asked.
          prefetch: batches made ahead.
        """
        grain = require("grain", extra="train")
        dataset = grain.MapDataset.source(BatchSource(self, rows))[start_step:]
        dataset = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        )
        if num_workers:
            _settle_absl_flags()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=num_workers,
                    per_worker_buffer_size=max(1, prefetch // num_workers),
                )
            )
        iterator = iter(dataset)
        try:
            for step, batch in iterator:
                if num_workers:
                    # Workers hand arrays over in shared memory, which lives no longer than they do.
                    batch = {key: np.array(array) for key, array in batch.items()}
                yield step, batch
        finally:
            iterator.close()

    def heldout_batches(
        self,
        source: str,
        batch_size: int,
        *,
        max_batches: int | None = None,
        split: str = "heldout",
    ) -> Iterator[Batch]:
        """Every window of a split of one source once, in the order of the text; the last batch is padded.

        With `max_batches`, no more than that many batches, of windows spread evenly over the split: the first ones
        would be of a few documents only.

        Rows of padding have segment_ids 0 and loss_mask False. A split without documents yields nothing.

        Raises:
          SmoljaxError: the source is not in the mixture, or its shards are damaged.
        """
        if source not in self.readers:
            raise SmoljaxError(
                f"source {source!r} is not in this mixture; sources are {', '.join(self.readers)}"
            )
        reader = self.reader(source, split)
        if not reader.num_tokens:
            return
        number, order = self.config.sources.index(source), _order(self.config, reader)
        blocks = Recent(1)
        total = order.windows_per_epoch
        chosen = min(total, (max_batches or total) * batch_size)
        for begin in range(0, chosen, batch_size):
            picks = np.arange(begin, min(begin + batch_size, chosen)) * total // chosen
            places = zip(*order.in_order(picks), strict=True)
            windows = [
                (number, blocks.get(block, lambda block=block: reader.block(block)), window)
                for block, window in ((int(b), int(w)) for b, w in places)
            ]
            windows += [None] * (batch_size - len(windows))
            yield assemble(windows, self.config.seq_len, pad_id=self.pad_id)

    def reader(self, source: str, split: str) -> ShardReader:
        """The reader of any split of a source: counts, text bytes and document ids of the held-out text, say."""
        if split == self.config.split:
            return self.readers[source]
        directory = shard_directory(self.config.directory, source)
        return ShardReader(directory, split, expected_fingerprint=self.tokenizer_fingerprint)

    def _block(self, name: str, number: int):
        return self._blocks[name].get(number, lambda: self.readers[name].block(number))

    def _locate(self, step: int, rows: slice) -> Iterator[tuple[int, str, int, int]]:
        """Number and name of the source, block and window of each row."""
        if not 0 <= step < _NUM_STEPS:
            raise SmoljaxError(f"step is {step}, expected 0 to {_NUM_STEPS - 1}")
        begin = end = 0
        sizes = self.config.batch_sizes
        first = sizes.before(step)
        for row in range(sizes.size(step))[rows]:
            sample = first + row
            if not begin <= sample < end:
                key = self.schedule.block_of(sample)
                begin, end = self.schedule.block_span(*key)
                plan = self._plans.get(key, lambda key=key: self._plan(*key))
            source, block, window = plan[sample - begin]
            yield source, self.config.sources[source], block, window

    def _plan(self, stage: int, mixture_block: int) -> list[tuple[int, int, int]]:
        """Source, block and window of each sample of a block of the mixture."""
        source, ordinal = self.schedule.block(stage, mixture_block)
        block, window = np.empty_like(ordinal), np.empty_like(ordinal)
        for number, name in enumerate(self.config.sources):
            here = source == number
            if here.any():
                _, block[here], window[here] = self.orders[name].locate(ordinal[here])
        return list(zip(source.tolist(), block.tolist(), window.tolist(), strict=True))


class BatchSource:
    """Steps as a random-access source for Grain: `grain.MapDataset.source(BatchSource(mixture))`.

    Element k is (k, rows of the batch of step k).
    """

    def __init__(self, mixture: Mixture, rows: slice | Mapping[int, slice] = slice(None)):
        self._mixture, self._rows = mixture, rows

    def __len__(self) -> int:
        return _NUM_STEPS

    def __getitem__(self, step: int) -> tuple[int, Batch]:
        rows = self._rows
        if not isinstance(rows, slice):
            rows = rows[self._mixture.config.batch_sizes.size(step)]
        return step, self._mixture.batch(step, rows)


def _open_sources(config: MixtureConfig, split: str) -> dict[str, ShardReader]:
    root = Path(config.directory)
    readers, fingerprint = {}, config.tokenizer_fingerprint
    for name in config.sources:
        directory = shard_directory(root, name)
        if not directory.is_dir():
            there = sorted(path.parent.name for path in root.glob(f"*/{VERSION}"))
            raise SmoljaxError(
                f"shards of source {name!r} are missing: {directory} does not exist "
                f"({root} holds {', '.join(there) or 'none'}): tokenize its documents first"
            )
        readers[name] = ShardReader(directory, split, expected_fingerprint=fingerprint)
        fingerprint = readers[name].manifest["tokenizer"]["fingerprint"]
    return readers


def _order(config: MixtureConfig, reader: ShardReader) -> WindowOrder:
    return order_of(
        reader.source,
        config.seed,
        num_tokens=reader.num_tokens,
        block_tokens=reader.block_tokens,
        seq_len=config.seq_len,
        group_blocks=config.group_blocks,
    )


def _windows_by_source(config: MixtureConfig, orders: Mapping[str, WindowOrder]) -> dict[str, int]:
    if not orders:
        raise SmoljaxError(
            f"no source of the mixture has a document in its {config.split} split ({', '.join(config.sources)}): "
            "curate and tokenize documents first"
        )
    return {name: order.windows_per_epoch for name, order in orders.items()}


def _settle_absl_flags() -> None:
    """Grain reads absl flags when it starts worker processes, and fails where nobody has parsed any (a notebook)."""
    flags = require("absl.flags", extra="train").FLAGS
    if not flags.is_parsed():
        flags.mark_as_parsed()  # Their defaults hold.

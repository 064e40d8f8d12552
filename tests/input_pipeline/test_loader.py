import collections
import dataclasses
import itertools
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.input_pipeline import BatchSource, MixtureConfig, open_mixture
from smoljax.tokens.shards import write_shards

KEYS = ["document_ids", "loss_mask", "positions", "segment_ids", "targets", "tokens"]


class Counting:
    """A tokenizer that gives every text token an id of its own, so that each can be followed through the loader."""

    vocab_size, bos_id, eos_id, pad_id, fingerprint = 2**22, 1, 2, 3, "counting"

    def __init__(self, first: int = 10):
        self._next = first

    def encode_batch(self, texts, *, num_threads=None):
        batches = []
        for text in texts:
            batches.append(np.arange(self._next, self._next + len(text), dtype=np.int32))
            self._next += len(text)
        return batches


def write_counting(
    root, source, lengths, *, block_tokens, blocks_per_file=3, split="train", first=10
):
    """Writes documents of these lengths; returns the flat stream as [n, 3]: token, document, position."""
    documents = ((split, f"{source}/{i}", "x" * n) for i, n in enumerate(lengths))
    write_shards(
        documents,
        root,
        Counting(first),
        source=source,
        block_tokens=block_tokens,
        tokens_per_file=blocks_per_file * block_tokens,
    )
    stream, token = [], first
    for index, length in enumerate(lengths):
        body = [1, *range(token, token + length), 2]
        token += length
        stream += [(t, index, position) for position, t in enumerate(body)]
    return np.array(stream)


def assert_same(first, second):
    assert sorted(first) == sorted(second) == KEYS
    for key in KEYS:
        np.testing.assert_array_equal(first[key], second[key])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=40),
    block_tokens=st.integers(4, 64),
    blocks_per_file=st.integers(1, 3),
    share=st.floats(0.05, 1),
    group_blocks=st.integers(1, 4),
    batch_size=st.integers(1, 7),
    epoch=st.sampled_from([0, 1, 1000]),
)
def test_every_token_is_an_input_exactly_once_per_epoch(
    tmp_path_factory, lengths, block_tokens, blocks_per_file, share, group_blocks, batch_size, epoch
):
    root = tmp_path_factory.mktemp("epoch")
    stream = write_counting(
        root, "docs", lengths, block_tokens=block_tokens, blocks_per_file=blocks_per_file
    )
    config = MixtureConfig(
        directory=str(root),
        sources=("docs",),
        seq_len=max(1, int(block_tokens * share)),
        batch_size=batch_size,
        group_blocks=group_blocks,
    )
    mixture = open_mixture(config)
    per_epoch = mixture.orders["docs"].windows_per_epoch
    seen = []
    for sample in range(epoch * per_epoch, (epoch + 1) * per_epoch):
        step, row = divmod(sample, batch_size)
        batch = mixture.batch(step, slice(row, row + 1))
        real = batch["segment_ids"] > 0
        seen += zip(*(batch[key][real].tolist() for key in ("tokens", "document_ids", "positions")))
        # A target follows its input, and is no target where a document begins.
        follows = batch["loss_mask"]
        assert (batch["targets"][follows] != 1).all()
        assert (batch["targets"][real & ~follows] == 1).all()
    assert collections.Counter(seen) == collections.Counter(map(tuple, stream.tolist()))


def test_negative_control_overlapping_windows_would_be_noticed(tmp_path):
    """With a stride that is one short, as when the lookahead is forgotten, tokens repeat."""
    stream = write_counting(tmp_path, "docs", [50] * 10, block_tokens=64)
    tokens = stream[:64, 0]
    seen = np.concatenate([tokens[a : a + 16] for a in range(0, 49, 15)])
    assert len(np.unique(seen)) < len(seen)


@pytest.fixture(scope="module")
def config(library):
    root, tokenizer = library
    return MixtureConfig(
        directory=str(root),
        sources=("first", "second"),
        seq_len=128,
        batch_size=16,
        stages=((0, {"first": 0.8, "second": 0.20565}), (150, {"first": 0.1, "second": 0.9})),
        seed=7,
        tokenizer_fingerprint=tokenizer.fingerprint,
        group_blocks=4,
    )


@pytest.fixture(scope="module")
def mixture(config):
    return open_mixture(config)


def test_restart_at_any_step_gives_the_same_batches(config, mixture):
    whole = dict(itertools.islice(mixture.loader(), 200))
    assert list(whole) == list(range(200))
    for start in (0, 1, 57, 127, 128, 149, 150, 199):
        step, batch = next(open_mixture(config).loader(start))
        assert step == start
        assert_same(batch, whole[start])
        assert_same(open_mixture(config).batch(start), whole[start])


@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_load_the_batch(config, mixture, hosts):
    size = config.batch_size // hosts
    slices = [slice(host * size, (host + 1) * size) for host in range(hosts)]
    loaders = [open_mixture(config).loader(140, rows=rows) for rows in slices]
    for step in range(140, 160):
        parts = [next(loader) for loader in loaders]
        assert [part[0] for part in parts] == [step] * hosts
        joined = {key: np.concatenate([part[1][key] for part in parts]) for key in KEYS}
        assert_same(joined, mixture.batch(step))


def test_a_ramp_cuts_the_same_windows_into_smaller_batches_first(config):
    ramp = ((20, 2), (50, 8))
    one_stage = dataclasses.replace(config, stages=config.stages[:1])
    plain = open_mixture(one_stage)
    ramped = open_mixture(dataclasses.replace(one_stage, batch_ramp=ramp))
    rows = {key: np.concatenate([plain.batch(step)[key] for step in range(40)]) for key in KEYS}
    loader = ramped.loader(rows={2: slice(0, 2), 8: slice(0, 8), 16: slice(0, 16)})
    begin = 0
    for step in range(60):
        number, batch = next(loader)
        size = 2 if step < 20 else 8 if step < 50 else 16
        assert number == step
        assert_same(batch, {key: array[begin : begin + size] for key, array in rows.items()})
        begin += size
    assert_same(next(ramped.loader(47))[1], ramped.batch(47))

    staged = open_mixture(dataclasses.replace(config, batch_ramp=ramp))
    first = staged.config.batch_sizes.before(150)  # Stages change at their step, ramp or not.
    assert [staged.schedule.stage_of(sample) for sample in (first - 1, first)] == [0, 1]


@pytest.mark.parametrize(("workers", "threads"), [(0, 0), (0, 4), (1, 1), (2, 1)])
def test_any_number_of_workers_and_threads(mixture, workers, threads):
    loader = mixture.loader(145, num_workers=workers, num_threads=threads)
    for expected, (step, batch) in zip(range(145, 157), loader, strict=False):
        assert step == expected
        assert_same(batch, mixture.batch(step))
        assert type(batch["tokens"]) is np.ndarray
    loader.close()


def test_worker_processes_start_in_a_plain_script(config, tmp_path):
    """No absl app has parsed flags there; Grain alone fails then."""
    script = tmp_path / "train.py"
    script.write_text(
        "from smoljax.input_pipeline import MixtureConfig, open_mixture\n"
        "if __name__ == '__main__':\n"
        f"    config = MixtureConfig({config.directory!r}, ('first',), seq_len=64, batch_size=4)\n"
        "    for step, batch in open_mixture(config).loader(3, num_workers=1):\n"
        "        if step == 5:\n"
        "            break\n"
        "    print(step, batch['tokens'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, script, "--some_flag=1"], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "5 (4, 64)\n", done.stderr
    assert "leaked" not in done.stderr


def test_grain_iterators_checkpoint_one_number(mixture):
    grain = pytest.importorskip("grain")
    dataset = grain.MapDataset.source(BatchSource(mixture))
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    iterator = iter(dataset.to_iter_dataset(options))
    for _ in range(10):
        next(iterator)
    state = iterator.get_state()
    iterator.close()
    again = iter(dataset.to_iter_dataset(options))
    again.set_state(state)
    step, batch = next(again)
    assert step == 10
    assert_same(batch, mixture.batch(10))


def test_elastic_iterator_resumes_on_another_number_of_hosts(config, mixture):
    """Rows as a MapDataset are all that Grain's ElasticIterator needs: four hosts stop, two go on."""
    grain = pytest.importorskip("grain")
    size = config.batch_size

    def row(sample):
        step, at = divmod(int(sample), size)
        return {key: array[0] for key, array in mixture.batch(step, slice(at, at + 1)).items()}

    def open_on(hosts):
        return [
            grain.experimental.ElasticIterator(
                grain.MapDataset.range(100 * size).map(row),
                size,
                grain.sharding.ShardOptions(shard_index=host, shard_count=hosts),
                read_options=grain.ReadOptions(num_threads=1, prefetch_buffer_size=4),
            )
            for host in range(hosts)
        ]

    def check(iterators, step):
        parts = [next(iterator) for iterator in iterators]
        joined = {key: np.stack([part[key] for part in parts], axis=1) for key in KEYS}
        assert_same(
            {key: array.reshape(size, -1) for key, array in joined.items()}, mixture.batch(step)
        )

    four = [iter(iterator) for iterator in open_on(4)]
    for step in range(3):
        check(four, step)
    state = four[2].get_state()
    two = [iter(iterator) for iterator in open_on(2)]
    for iterator in two:
        iterator.set_state(state)
    for step in range(3, 6):
        check(two, step)


def test_counts_of_each_source_follow_the_weights_and_change_at_their_step(config, mixture):
    rows = {"first": 0, "second": 0}
    per_step = []
    for step in range(400):
        sources = mixture.batch(step)["document_ids"][:, 0] >> 40
        per_step.append(int((sources == 0).sum()))
        rows["first"] += per_step[-1]
        rows["second"] += len(sources) - per_step[-1]
        if step + 1 in (128, 150, 278):  # Ends of blocks of 2048 samples: exact there.
            counts = mixture.schedule.counts((step + 1) * config.batch_size)
            assert counts == tuple(rows.values())
    share = 0.8 / 1.00565
    assert abs(sum(per_step[:150]) - 150 * 16 * share) <= 1
    assert abs(sum(per_step[150:]) / (250 * 16) - 0.1) < 0.01
    assert abs(np.mean(per_step[140:150]) / 16 - share) < 0.15
    assert abs(np.mean(per_step[150:160]) / 16 - 0.1) < 0.15


def test_a_source_goes_on_with_the_next_epoch(mixture, config):
    """The second source is small: at step 2000 it is many epochs in, and each epoch held every window once."""
    order = mixture.orders["second"]
    given = mixture.schedule.counts(2000 * config.batch_size)[1]
    assert given > 3 * order.windows_per_epoch
    seen = collections.Counter()
    for step in range(2000):
        batch = mixture.batch(step)
        mine = batch["document_ids"][:, 0] >> 40 == 1
        seen.update(
            zip(batch["document_ids"][mine, 0].tolist(), batch["positions"][mine, 0].tolist())
        )
    epochs = given / order.windows_per_epoch
    assert len(seen) == order.windows_per_epoch
    assert set(seen.values()) <= {int(epochs), int(epochs) + 1}


def test_without_stages_all_sources_finish_an_epoch_together(config):
    plain = open_mixture(dataclasses.replace(config, stages=()))
    per_epoch = [order.windows_per_epoch for order in plain.orders.values()]
    assert plain.schedule.counts(sum(per_epoch)) == tuple(per_epoch)


def test_batches_hold_the_text(mixture, library):
    """Decoded segment by segment, a batch is pieces of the documents that it names."""
    _, tokenizer = library
    batch = mixture.batch(3)
    for row in range(4):
        for number in np.unique(batch["document_ids"][row]):
            inside = batch["document_ids"][row] == number
            source, document = mixture.document(int(number))
            assert document.startswith(f"{source}/")
            positions = batch["positions"][row][inside]
            assert (np.diff(positions) == 1).all()
            text = tokenizer.decode(batch["tokens"][row][inside]).strip("\ufffd")
            name = document.removeprefix(f"{source}/")
            whole = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text("utf-8", "replace")
            assert text in whole


def test_documents_of_a_step(mixture):
    documents = mixture.documents(3, slice(2, 4))
    ids = mixture.batch(3)["document_ids"][2:4]
    assert [len(row) for row in documents] == [len(np.unique(row)) for row in ids]
    assert documents[0][0] == mixture.document(int(ids[0, 0]))


def test_heldout_windows_come_once_and_in_order(mixture, library):
    _, tokenizer = library
    for source in ("first", "second"):
        batches = list(mixture.heldout_batches(source, 8))
        tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
        reader = mixture.reader(source, "heldout")
        flat = np.concatenate([reader.block(i).tokens[:-1] for i in range(reader.num_blocks)])
        np.testing.assert_array_equal(tokens, flat)
        assert all(b["tokens"].shape == (8, 128) for b in batches)
        assert not batches[-1]["loss_mask"][batches[-1]["segment_ids"] == 0].any()
        # Every text token and every eos is a target once; bos never is.
        targets = sum(int(b["loss_mask"].sum()) for b in batches)
        assert targets == reader.num_tokens - reader.num_documents
        assert len(tokenizer.decode(flat).encode()) == reader.text_bytes
    with pytest.raises(SmoljaxError, match="source 'third' is not in this mixture"):
        next(mixture.heldout_batches("third", 8))


def test_memory_and_time_do_not_grow_with_the_step(config):
    mixture = open_mixture(config)
    mixture.batch(0)
    tracemalloc.start()
    try:
        sizes, seconds = [], []
        for step in (10**3, 10**6, 10**9, 10**12):
            begin = time.process_time()
            for k in range(200):
                mixture.batch(step + k)
            seconds.append(time.process_time() - begin)
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    limit = sum(2 * 2**12 * 2 * config.group_blocks for _ in config.sources) + 2**22
    assert max(sizes) < limit
    assert sizes[-1] < sizes[0] + 2**20
    assert seconds[-1] < 5 * seconds[0]
    assert all(len(recent) <= config.group_blocks for recent in mixture._blocks.values())


def test_same_in_another_process_and_after_pickling(config, mixture):
    assert_same(pickle.loads(pickle.dumps(mixture)).batch(77), mixture.batch(77))
    script = (
        "import sys, zlib\nfrom smoljax.input_pipeline import MixtureConfig, open_mixture\n"
        "import pickle\nconfig = pickle.load(open(sys.argv[1], 'rb'))\n"
        "batch = open_mixture(config).batch(77)\n"
        "print([zlib.crc32(batch[key].tobytes()) for key in sorted(batch)])\n"
        "assert not {'jax', 'tensorflow', 'flax', 'grain'} & set(sys.modules)\n"
    )
    with tempfile.NamedTemporaryFile(suffix=".pickle") as file:
        file.write(pickle.dumps(config))
        file.flush()
        out = subprocess.run(
            [sys.executable, "-c", script, file.name],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": "99", "PATH": ""},
        )
    batch = mixture.batch(77)
    assert out.stdout.strip() == str([zlib.crc32(batch[key].tobytes()) for key in KEYS])


def test_seeds_differ(config, mixture):
    other = open_mixture(dataclasses.replace(config, seed=8))
    assert (other.batch(0)["tokens"] == mixture.batch(0)["tokens"]).mean() < 0.2


def test_adding_a_source_leaves_the_order_of_the_others(config, mixture):
    alone = open_mixture(dataclasses.replace(config, sources=("second",), stages=()))
    ordinals = np.arange(500)
    for ours, theirs in zip(
        alone.orders["second"].locate(ordinals),
        mixture.orders["second"].locate(ordinals),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_sequence_that_blocks_do_not_divide_into(config):
    odd = open_mixture(dataclasses.replace(config, seq_len=3000, stages=()))
    batch = odd.batch(0)
    assert (batch["segment_ids"] == 0).any()
    assert odd.orders["first"].fill < 0.8


def test_refusals(config, library, tmp_path):
    root, _ = library

    def refused(message, **changes):
        with pytest.raises(SmoljaxError, match=message):
            open_mixture(dataclasses.replace(config, **changes))

    refused("seq_len is 5000, expected 1 to 4096", seq_len=5000)
    refused("seq_len is 0, expected at least 1", seq_len=0)
    refused("sources is empty", sources=())
    refused("names one twice: first, first", sources=("first", "first"))
    refused(r"shards of source 'third' are missing.*holds first, second", sources=("third",))
    refused("written with the tokenizer", tokenizer_fingerprint="another")
    refused("gives a weight to 'third'", stages=((0, {"third": 1}),))
    refused("split 'test' is not in", split="test")
    with pytest.raises(SmoljaxError, match="step is -1"):
        open_mixture(config).batch(-1)

    write_counting(tmp_path, "docs", [5], block_tokens=4096, split="heldout")
    empty = MixtureConfig(str(tmp_path), ("docs",), seq_len=8, batch_size=2)
    with pytest.raises(SmoljaxError, match="no source of the mixture has a document in its train"):
        open_mixture(empty)
    with pytest.raises(SmoljaxError, match="its train split has no documents"):
        open_mixture(dataclasses.replace(empty, stages=((0, {"docs": 1}),)))
    # Two sources of different tokenizers do not mix.
    (tmp_path / "first").symlink_to(root / "first")
    with pytest.raises(SmoljaxError, match="written with the tokenizer"):
        open_mixture(dataclasses.replace(empty, sources=("docs", "first")))


def test_damage_is_reported_through_threads_and_processes(config, library, tmp_path):
    root, _ = library
    shutil.copytree(root, tmp_path / "copy")
    for file in (tmp_path / "copy" / "first" / "1.0.0").glob("first-train.array_record-*"):
        data = bytearray(file.read_bytes())
        data[3000] ^= 1
        file.write_bytes(data)
    damaged = open_mixture(dataclasses.replace(config, directory=str(tmp_path / "copy")))
    for workers in (0, 1):
        with pytest.raises(SmoljaxError, match=r"first-train\.array_record-\d+-of-\d+ is damaged"):
            collections.deque(itertools.islice(damaged.loader(num_workers=workers), 50), maxlen=0)

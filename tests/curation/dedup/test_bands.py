"""The external sort of a bucket, against a sort of everything in memory."""

import itertools
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.curation import items, runner
from smoljax.curation.dedup import bands
from smoljax.curation.dedup.minhash import MinHashConfig
from smoljax.errors import SmoljaxError
from tests.curation.dedup.test_signature_files import write

CONFIG = MinHashConfig(buckets=2, hashes_per_bucket=2)


def shards_of(folder: Path, sizes: list[int], *, kinds: int, seed: int) -> tuple[list[str], list]:
    """Files of documents whose hashes are drawn from `kinds` values, so that many agree in one hash or in all."""
    random = np.random.default_rng(seed)
    paths, shards = [], []
    for number, size in enumerate(sizes):
        signatures = random.integers(0, kinds, (size, 4), np.uint64)
        valid = random.random(size) > 0.1
        paths.append(write(folder / f"{number}.bin", CONFIG, (signatures, valid)))
        shards.append((signatures, valid))
    return paths, shards


def expected(shards: list, bucket: int, compared: np.ndarray | None = None) -> list[tuple]:
    """The pairs of neighbours in the sorted list of (band, document), in Python's own order of tuples."""
    records, start = [], 0
    for shard, (signatures, valid) in enumerate(shards):
        for row in range(len(valid)):
            if valid[row] and (compared is None or compared[start + row]):
                band = signatures[row, 2 * bucket : 2 * bucket + 2].tolist()
                records.append((*band, shard * 2**32 + row))
        start += len(valid)
    records.sort()
    return [(a[-1], b[-1]) for a, b in itertools.pairwise(records) if a[:-1] == b[:-1]]


def edges(output: Path) -> list[tuple]:
    return [tuple(pair) for pair in np.fromfile(output, np.uint64).reshape(-1, 2).tolist()]


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 200), max_size=4),
    kinds=st.sampled_from([1, 2, 10, 1000]),
    memory=st.sampled_from([0, 300, 1000, 5000, 1 << 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_edges_are_the_neighbours_in_sorted_order_in_any_memory(
    tmp_path_factory, sizes, kinds, memory, seed
):
    """From two records at a time to all at once; with one kind all documents are one cluster."""
    folder = tmp_path_factory.mktemp("bands")
    paths, shards = shards_of(folder, sizes, kinds=kinds, seed=seed)
    compared = np.random.default_rng(seed).random(sum(sizes)) > 0.3
    for bucket, wanted in ((0, None), (1, compared)):
        output = folder / "edges.bin"
        count = bands.write_edges(
            paths, CONFIG, bucket=bucket, output=output, compared=wanted, memory_bytes=memory
        )
        found = edges(output)
        assert found == expected(shards, bucket, wanted)
        assert count == len(found)
    assert len(list(folder.iterdir())) == len(paths) + 1  # No run is left.


def test_a_damaged_signature_file_is_named_and_no_run_is_left(tmp_path):
    paths, _ = shards_of(tmp_path, [500, 500], kinds=10, seed=0)
    data = bytearray(Path(paths[1]).read_bytes())
    data[-1] ^= 1
    Path(paths[1]).write_bytes(data)
    with pytest.raises(SmoljaxError, match=r"1\.bin is damaged: the bytes of bucket 1 do not fit"):
        bands.write_edges(paths, CONFIG, bucket=1, output=tmp_path / "edges.bin", memory_bytes=3000)
    assert not list(tmp_path.glob(".*"))


SCRIPT = """
import sys
from pathlib import Path
from smoljax.curation.dedup import bands
from smoljax.curation.dedup.minhash import MinHashConfig

paths, output, memory = sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3])
bands.write_edges(paths, MinHashConfig(buckets=2, hashes_per_bucket=2), bucket=0, output=output, memory_bytes=memory)
"""


def run(paths: list[str], output: Path, memory: int, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, ",".join(paths), str(output), str(memory)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_leaves_no_run(tmp_path):
    """A file may hold 64 KiB, a run has 240 KB."""
    paths, _ = shards_of(tmp_path, [20_000], kinds=1 << 40, seed=0)

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    process = run(paths, tmp_path / "edges.bin", 720_000, preexec_fn=limit)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "File too large" in error
    assert not list(tmp_path.glob(".*"))


def sort_onto_a_full_device(paths: list[str], folder: Path) -> dict:
    os.symlink("/dev/full", folder / "edges.bin")
    bands.write_edges(paths, CONFIG, bucket=0, output=folder / "edges.bin", memory_bytes=3000)
    return {}


def test_a_full_device_is_explained_and_nothing_is_left(tmp_path):
    paths, _ = shards_of(tmp_path, [500], kinds=2, seed=0)
    item = items.WorkItem("000-00", "k", sort_onto_a_full_device, paths, 1, "bucket 0")
    with pytest.raises(SmoljaxError, match="the disk is full while writing"):
        runner.run([item], tmp_path / "bands", workers=1, stage="bands")
    assert not list((tmp_path / "bands").iterdir())


def test_memory_stays_bounded(tmp_path):
    """1.2 million records of 24 bytes in 2 MB: the process grows by less than a third of what they take."""
    paths, _ = shards_of(tmp_path, [400_000] * 3, kinds=1 << 40, seed=0)
    peaks = []
    for some in (paths[:1], paths):
        process = run(some, tmp_path / "edges.bin", 2 << 20)
        _, status, usage = os.wait4(process.pid, 0)
        process.stderr.close()
        assert status == 0
        peaks.append(usage.ru_maxrss * 1024)
    assert peaks[1] - peaks[0] < 0.3 * 800_000 * 24


def test_killed_while_it_sorts_and_started_again(tmp_path):
    """As an item of the runner: its folder of runs goes when the same step starts again."""
    paths, shards = shards_of(tmp_path, [30_000] * 2, kinds=3000, seed=1)
    script = tmp_path / "step.py"
    script.write_text(ITEM)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, str(script), ",".join(paths), str(tmp_path / "step")]
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("step/.*/.edges.bin.run*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.001)
    psutil.Process(process.pid).kill()
    process.wait()
    assert list(tmp_path.glob("step/.*"))
    subprocess.run(command, env=environment, check=True)
    assert [path.name for path in (tmp_path / "step").iterdir()] == ["all"]
    assert {p.name for p in (tmp_path / "step/all").iterdir()} == {"edges.bin", "manifest.json"}
    assert edges(items.verified(str(tmp_path / "step/all"), "edges.bin")) == expected(shards, 0)


ITEM = """
import sys
from smoljax.curation import items, runner
from smoljax.curation.dedup import bands
from smoljax.curation.dedup.minhash import MinHashConfig

CONFIG = MinHashConfig(buckets=2, hashes_per_bucket=2)


def work(paths, folder):
    return {"edges": bands.write_edges(paths, CONFIG, bucket=0, output=folder / "edges.bin", memory_bytes=30_000)}


item = items.WorkItem("all", "k", work, sys.argv[1].split(","), 1, "all shards")
runner.run([item], sys.argv[2], workers=1, stage="bands")
"""

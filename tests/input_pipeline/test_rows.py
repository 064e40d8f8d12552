import pickle
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.input_pipeline.rows import SOURCE_SHIFT, Recent, assemble
from smoljax.tokens.records import Block


def _block(lengths, begin, end, dtype=np.uint16):
    """A block cut from documents of these lengths, and its tokens, documents and positions one by one."""
    document = np.repeat(np.arange(len(lengths)), lengths)
    position = np.concatenate([np.arange(n) for n in lengths])
    token = 10 + np.arange(len(document))
    document, position, token = (
        np.append(document, len(lengths)),
        np.append(position, 0),
        np.append(token, 9),
    )
    span = slice(begin, end + 1)
    starts = np.flatnonzero(position[span] == 0).astype(np.int32)
    block = Block(token[span].astype(dtype), starts, int(document[begin]), int(position[begin]))
    return block, token[span], document[span], position[span]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 20), min_size=1, max_size=20),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seq_len=st.integers(1, 30),
    source=st.integers(0, 5),
)
def test_against_one_token_at_a_time(lengths, cut, seq_len, source):
    total = sum(lengths)
    begin = int(min(cut) * (total - 1))
    end = max(begin + 1, int(max(cut) * total))
    block, token, document, position = _block(lengths, begin, end)
    windows = -(-block.num_tokens // seq_len)
    rows = [(source, block, number) for number in range(windows)] + [None]
    batch = assemble(rows, seq_len, pad_id=3)
    for row in range(windows + 1):
        segment, previous = 0, None
        for column in range(seq_len):
            at = row * seq_len + column
            values = {key: array[row, column].item() for key, array in batch.items()}
            if row == windows or at >= block.num_tokens:
                assert values == {
                    "tokens": 3,
                    "targets": 3,
                    "segment_ids": 0,
                    "positions": 0,
                    "loss_mask": False,
                    "document_ids": -1,
                }
                continue
            segment += document[at] != previous
            previous = document[at]
            assert values == {
                "tokens": token[at],
                "targets": token[at + 1],
                "segment_ids": segment,
                "positions": position[at],
                "loss_mask": bool(position[at + 1] != 0),
                "document_ids": (source << SOURCE_SHIFT) + document[at],
            }


def test_shapes_and_dtypes():
    block, *_ = _block([5, 7, 9], 2, 18, np.uint32)
    batch = assemble([(0, block, 0), (0, block, 1)], 8, pad_id=0)
    dtypes = {key: array.dtype.name for key, array in batch.items()}
    assert dtypes == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "loss_mask": "bool",
        "document_ids": "int64",
    }
    assert all(array.shape == (2, 8) for array in batch.values())


def test_recent_forgets_the_oldest_and_makes_each_value_once():
    recent, made = Recent(2), []

    def make(key):
        return lambda: made.append(key) or key

    for key in (1, 2, 1, 3, 1, 2):
        assert recent.get(key, make(key)) == key
    assert made == [1, 2, 3, 2]
    assert len(recent) == 2
    assert len(pickle.loads(pickle.dumps(recent))) == 0


def test_threads_that_ask_together_wait_for_one_making():
    recent, made = Recent(4), []

    def slow():
        time.sleep(0.05)
        made.append(1)
        return 7

    threads = [threading.Thread(target=recent.get, args=("key", slow)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


def test_a_failed_making_is_tried_again():
    recent = Recent(2)

    def fail():
        raise OSError("network")

    for _ in range(2):
        with pytest.raises(OSError, match="network"):
            recent.get("key", fail)
    assert recent.get("key", lambda: 5) == 5

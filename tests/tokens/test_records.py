import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.tokens.records import Block, decode_block, encode_block


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 2**16 - 1), min_size=2, max_size=300),
    starts=st.lists(st.integers(0, 2**31 - 1), max_size=30),
    document=st.integers(0, 2**62),
    position=st.integers(0, 2**62),
)
def test_round_trip(tokens, starts, document, position):
    block = Block(np.array(tokens, np.uint16), np.array(starts, np.int32), document, position)
    back = decode_block(encode_block(block), np.dtype(np.uint16))
    np.testing.assert_array_equal(back.tokens, block.tokens)
    np.testing.assert_array_equal(back.document_starts, block.document_starts)
    assert (back.first_document, back.first_position) == (document, position)
    assert back.num_tokens == len(tokens) - 1


def test_tensorflow_reads_the_same_example():
    tf = pytest.importorskip("tensorflow")
    block = Block(np.arange(300, dtype=np.uint16), np.array([0, 7], np.int32), 128, 0)
    example = tf.train.Example.FromString(encode_block(block))
    feature = example.features.feature
    assert feature["tokens"].bytes_list.value[0] == block.tokens.tobytes()
    assert feature["document_starts"].bytes_list.value[0] == block.document_starts.tobytes()
    assert list(feature["first_document"].int64_list.value) == [128]
    assert list(feature["first_position"].int64_list.value) == [0]
    # And what TensorFlow writes, in whichever order of its map, is read back.
    back = decode_block(example.SerializeToString(), np.dtype(np.uint16))
    np.testing.assert_array_equal(back.tokens, block.tokens)
    assert back.first_document == 128


@pytest.mark.parametrize("record", [b"", b"\x0a\x05abc", b"junk", bytes(40)])
def test_other_bytes_are_refused(record):
    with pytest.raises(ValueError, match="not a block of tokens"):
        decode_block(record, np.dtype(np.uint16))

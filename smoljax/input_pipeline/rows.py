"""Windows of token blocks to the arrays of a batch; segments and positions are rebuilt from document starts."""

# R rows, S sequence

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

import numpy as np

from smoljax.tokens.records import Block

# A document's number in a batch is `source << SOURCE_SHIFT | index within the source`; -1 where there is padding.
SOURCE_SHIFT = 40


def assemble(
    windows: Sequence[tuple[int, Block, int] | None], seq_len: int, *, pad_id: int
) -> dict[str, np.ndarray]:
    """Makes a batch of windows.

    Args:
      windows: for each row the number of its source, its block and the number of the window in the block; None for a
        row of padding.
      seq_len: inputs of a window.
      pad_id: token where a window has none.

    Returns:
      arrays [R, S]: tokens, targets, segment_ids, positions (int32), loss_mask (bool), document_ids (int64).
    """
    shape = (len(windows), seq_len)
    tokens_RS = np.full(shape, pad_id, np.int32)
    targets_RS = np.full(shape, pad_id, np.int32)
    loss_mask_RS = np.ones(shape, bool)
    # Both are running sums: of 1 where a document begins, and of 1 with a fall back to 0 where one begins.
    new_segment_RS = np.zeros(shape, np.int32)
    position_step_RS = np.ones(shape, np.int32)
    new_segment_RS[:, 0] = 1
    first_document_R = np.zeros(len(windows), np.int64)
    lengths = []
    for row, window in enumerate(windows):
        if window is None:
            lengths.append(0)
            continue
        source, block, number = window
        begin = number * seq_len
        length = min(seq_len, block.num_tokens - begin)
        lengths.append(length)
        tokens_RS[row, :length] = block.tokens[begin : begin + length]
        targets_RS[row, :length] = block.tokens[begin + 1 : begin + length + 1]
        starts = block.document_starts
        # Documents that begin after the first input, up to the last target.
        low, high = starts.searchsorted((begin + 1, begin + length + 1)).tolist()
        if low:
            first_position = begin - int(starts[low - 1])
        else:
            first_position = block.first_position + begin
        # first_document is the one that begins at 0, if one does: it is not to be counted twice.
        document = block.first_document + low - (len(starts) > 0 and starts[0] == 0)
        first_document_R[row] = (source << SOURCE_SHIFT) + document
        position_step_RS[row, 0] = first_position
        if high > low:
            inside = starts[low:high] - begin
            loss_mask_RS[row, inside - 1] = False
            if inside[-1] == seq_len:
                inside = inside[:-1]
            new_segment_RS[row, inside] = 1
            position_step_RS[row, inside] = 1 - np.diff(inside, prepend=-first_position)
    segment_ids_RS = np.cumsum(new_segment_RS, axis=1, dtype=np.int32)
    positions_RS = np.cumsum(position_step_RS, axis=1, dtype=np.int32)
    document_ids_RS = segment_ids_RS + (first_document_R - 1)[:, None]
    for row, length in enumerate(lengths):
        if length < seq_len:
            segment_ids_RS[row, length:] = 0
            positions_RS[row, length:] = 0
            loss_mask_RS[row, length:] = False
            document_ids_RS[row, length:] = -1
    return {
        "tokens": tokens_RS,
        "targets": targets_RS,
        "segment_ids": segment_ids_RS,
        "positions": positions_RS,
        "loss_mask": loss_mask_RS,
        "document_ids": document_ids_RS,
    }


class Recent:
    """The values made last, at most `capacity` of them; several threads that ask for one wait for one making."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._values: collections.OrderedDict[Hashable, Future] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], object]) -> object:
        """The value of `key`, made now if it is not at hand."""
        with self._lock:
            future = self._values.get(key)
            if mine := future is None:
                future = self._values[key] = Future()
                if len(self._values) > self._capacity:
                    self._values.popitem(last=False)
            else:
                self._values.move_to_end(key)
        if mine:
            try:
                future.set_result(make())
            except BaseException as error:
                with self._lock:
                    self._values.pop(key, None)
                future.set_exception(error)
        return future.result()

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple:
        return Recent, (self._capacity,)  # Another process begins with nothing at hand.

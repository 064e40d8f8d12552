"""Windows of token blocks to the arrays of a batch; segments and positions are rebuilt from document starts."""

# R rows, S sequence, S1 sequence and one token more

import collections
import threading
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future

import numpy as np

from smoljax.tokens.records import Block

# A document's number in a batch is `source << SOURCE_SHIFT | index within the source`; -1 where there is padding.
SOURCE_SHIFT = 40
_NO_STARTS = np.empty(0, np.int32)


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
    window_RS1 = np.full((len(windows), seq_len + 1), pad_id, np.int32)
    first_document_R = np.zeros(len(windows), np.int64)
    first_position_R = np.zeros(len(windows), np.int32)
    lengths, starts = [], []  # of the inputs; of documents within each row, without its first
    for row, window in enumerate(windows):
        if window is None:
            lengths.append(0)
            starts.append(_NO_STARTS)
            continue
        source, block, number = window
        begin = number * seq_len
        length = min(seq_len, block.num_tokens - begin)
        window_RS1[row, : length + 1] = block.tokens[begin : begin + length + 1]
        # Documents that begin after the first input, up to the last target.
        low, high = block.document_starts.searchsorted((begin + 1, begin + length + 1)).tolist()
        if low:
            first_position_R[row] = begin - block.document_starts[low - 1]
        else:
            first_position_R[row] = block.first_position + begin
        # first_document is the one that begins at 0, if one does: it is not to be counted twice.
        document = block.first_document + low - (low > 0 and block.document_starts[0] == 0)
        first_document_R[row] = (source << SOURCE_SHIFT) + document
        lengths.append(length)
        starts.append(block.document_starts[low:high] - begin if high > low else _NO_STARTS)
    segment_ids_RS, positions_RS, loss_mask_RS = _segments(starts, first_position_R, seq_len)
    document_ids_RS = segment_ids_RS + (first_document_R - 1)[:, None]
    tokens_RS, targets_RS = window_RS1[:, :-1].copy(), window_RS1[:, 1:].copy()
    for row, length in enumerate(lengths):
        if length < seq_len:
            tokens_RS[row, length:] = pad_id
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


def _segments(
    starts: Sequence[np.ndarray], first_position_R: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Segment ids, positions and loss mask [R, S] of rows in which documents begin at `starts` (each in 1..seq_len)."""
    shape = (len(starts), seq_len)
    # Both are running sums: of 1 where a document begins, and of 1 with a fall back to 0 where one begins.
    new_segment_RS = np.zeros(shape, np.int32)
    position_step_RS = np.ones(shape, np.int32)
    loss_mask_RS = np.ones(shape, bool)
    new_segment_RS[:, 0] = 1
    position_step_RS[:, 0] = first_position_R
    counts = np.array([len(row) for row in starts])
    row, column = np.repeat(np.arange(len(starts)), counts), np.concatenate(starts)
    previous = np.empty_like(column)
    previous[1:] = column[:-1]
    heads = np.flatnonzero(counts)
    previous[(np.cumsum(counts) - counts)[heads]] = -first_position_R[heads]
    loss_mask_RS[row, column - 1] = False
    inside = column < seq_len  # A document that begins at the last target is in no input.
    row, column, previous = row[inside], column[inside], previous[inside]
    new_segment_RS[row, column] = 1
    position_step_RS[row, column] = 1 - (column - previous)
    segment_ids_RS = np.cumsum(new_segment_RS, axis=1, dtype=np.int32)
    positions_RS = np.cumsum(position_step_RS, axis=1, dtype=np.int32)
    return segment_ids_RS, positions_RS, loss_mask_RS


class Recent:
    """The values made last, at most `capacity` of them; several threads that ask for one wait for one making."""

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._values: collections.OrderedDict[Hashable, object] = collections.OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], object]) -> object:
        """The value of `key`, made now if it is not at hand."""
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
            else:
                making = self._values[key] = Future()
                if len(self._values) > self._capacity:
                    self._values.popitem(last=False)
        if isinstance(value, Future):
            return value.result()
        if value is not None:
            return value
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                self._values.pop(key, None)
            making.set_exception(error)
            raise
        with self._lock:
            if self._values.get(key) is making:
                self._values[key] = value
        making.set_result(value)
        return value

    def __len__(self) -> int:
        return len(self._values)

    def __reduce__(self) -> tuple:
        return Recent, (self._capacity,)  # Another process begins with nothing at hand.

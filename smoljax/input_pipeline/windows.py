"""Which window of which block is the i-th sample of a source: pure arithmetic, in any order, at any i.

A window is `seq_len` inputs and the token after them; windows start every `seq_len` tokens of a block, so that each
token is an input exactly once in an epoch. In each epoch the blocks are permuted, and then the windows within each
group of `group_blocks` consecutive blocks of that order: reading samples one after the other touches only the blocks
of one group, which is what has to be in memory.
"""

import dataclasses

import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.input_pipeline.permutation import hash_integers, invert, key_of, permute


@dataclasses.dataclass(frozen=True)
class WindowOrder:
    """The order of the windows of one source.

    When `seq_len` does not divide `block_tokens`, the last window of each block is padded: of `windows_per_block *
    seq_len` input positions, `block_tokens` hold a token (`fill` is that ratio; 1.0 for powers of two).

    Args:
      num_tokens: tokens of the split, all blocks together.
      block_tokens: tokens in every block but the last, which holds the rest.
      seq_len: inputs of a window.
      group_blocks: blocks whose windows are shuffled together.
      key: names the order (`permutation.key_of`).

    Raises:
      SmoljaxError: a window does not fit in a block, or there are no tokens.
    """

    num_tokens: int
    block_tokens: int
    seq_len: int
    group_blocks: int
    key: np.uint64

    def __post_init__(self):
        if not 1 <= self.seq_len <= self.block_tokens:
            raise SmoljaxError(
                f"seq_len is {self.seq_len}, expected 1 to {self.block_tokens}, the block_tokens of the shards: "
                "lower seq_len, or write the shards again with larger blocks"
            )
        if self.group_blocks < 1:
            raise SmoljaxError(f"group_blocks is {self.group_blocks}, expected at least 1")
        if self.num_tokens < 1:
            raise SmoljaxError("there are no tokens to make windows of")

    @property
    def num_blocks(self) -> int:
        """Blocks of the split."""
        return -(-self.num_tokens // self.block_tokens)

    @property
    def windows_per_block(self) -> int:
        """Windows of every block but the last."""
        return -(-self.block_tokens // self.seq_len)

    @property
    def last_windows(self) -> int:
        """Windows of the last block."""
        last_tokens = self.num_tokens - (self.num_blocks - 1) * self.block_tokens
        return -(-last_tokens // self.seq_len)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of the split."""
        return (self.num_blocks - 1) * self.windows_per_block + self.last_windows

    @property
    def fill(self) -> float:
        """Share of the input positions of an epoch that hold a token."""
        return self.num_tokens / (self.windows_per_epoch * self.seq_len)

    def locate(self, ordinals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Epoch, block and window within the block of the samples with these numbers (int64, any shape)."""
        epoch, index = np.divmod(np.asarray(ordinals, np.int64), self.windows_per_epoch)
        epoch_key = hash_integers(epoch.astype(np.uint64), self.key)
        last_at = invert(np.full_like(epoch, self.num_blocks - 1), self.num_blocks, epoch_key)
        group, size, at = self._find_group(index, last_at)
        group_key = hash_integers(group.astype(np.uint64), ~epoch_key)
        at = permute(at, size, group_key)
        place, window = self._find_block(at, group, last_at)
        return epoch, permute(place, self.num_blocks, epoch_key), window

    def in_order(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Block and window of the samples of one epoch in the order of the text (for evaluation)."""
        return np.divmod(np.asarray(index, np.int64), self.windows_per_block)

    def _find_group(self, index, last_at) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Group of each sample, the number of windows in it, and the sample's place among them.

        All groups have the same number of windows, except the one with the short last block and the one at the end.
        """
        per_block, missing = self.windows_per_block, self.windows_per_block - self.last_windows
        per_group = self.group_blocks * per_block
        last_group = last_at // self.group_blocks
        # Fill the short block up in thought: what comes after its group moves back by what it misses.
        group_end = np.minimum((last_group + 1) * self.group_blocks, self.num_blocks) * per_block
        after = index >= group_end - missing
        index = index + after * missing
        group = index // per_group
        blocks = np.minimum((group + 1) * self.group_blocks, self.num_blocks)
        blocks = blocks - group * self.group_blocks
        size = blocks * per_block - (group == last_group) * missing
        return group, size, index - group * per_group

    def _find_block(self, at, group, last_at) -> tuple[np.ndarray, np.ndarray]:
        """Place of the block in the order of blocks, and the window in it, of the `at`-th window of a group."""
        per_block, missing = self.windows_per_block, self.windows_per_block - self.last_windows
        first = group * self.group_blocks
        last_end = (last_at - first + 1) * per_block - missing
        here = last_at // self.group_blocks == group
        at = at + (here & (at >= last_end)) * missing
        return first + at // per_block, at % per_block


def order_of(
    source: str, seed: int, *, num_tokens: int, block_tokens: int, seq_len: int, group_blocks: int
) -> WindowOrder:
    """The order of a source under a seed: it depends on no other source and on no position in a list."""
    key = key_of("windows", seed, source)
    return WindowOrder(num_tokens, block_tokens, seq_len, group_blocks, key)

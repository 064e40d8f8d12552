"""The `tokenizer` and `shards` sections of a config."""

import dataclasses
from pathlib import Path

from smoljax.tokens.shards import BLOCK_TOKENS, TOKENS_PER_FILE
from smoljax.tokens.tokenizer import Tokenizer, load


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer a run uses.

    Attributes:
      directory: a SentencePiece model, a tokenizer.json, or the folder of one; "" trains one into WORKDIR/tokenizer.
      vocab_size: of the tokenizer to train.
      special_tokens: of the tokenizer to train, beside <unk>, <s>, </s> and <pad>; a model that shall learn to chat
        needs "<|im_start|>" and "<|im_end|>" (smoljax.interop.chat_template).
      bos, eos, pad: names of the special tokens, where the file of `directory` does not say.
    """

    directory: str = ""
    vocab_size: int = 8192
    special_tokens: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    pad: str | None = None

    def load(self, workdir: Path) -> Tokenizer:
        """The tokenizer of the run in `workdir`."""
        path = Path(self.directory) if self.directory else workdir / "tokenizer"
        return load(path, bos=self.bos, eos=self.eos, pad=self.pad)


@dataclasses.dataclass(frozen=True)
class ShardsConfig:
    """How token shards are cut.

    Attributes:
      block_tokens: tokens of a block, the unit that is read at once; a sequence cannot be longer.
      tokens_per_file: tokens after which a new file is begun.
      rehydrate: repeat documents of the train split by the size of their cluster of near-duplicates
        (smoljax.tokens.rehydration).
    """

    block_tokens: int = BLOCK_TOKENS
    tokens_per_file: int = TOKENS_PER_FILE
    rehydrate: bool = False

"""A model small enough to train in a test, and a batch of packed documents for it."""

import numpy as np

from smoljax.model import ModelConfig
from smoljax.optim import OptimizerConfig

MODEL = ModelConfig(
    vocab_size=128,
    num_layers=4,
    hidden_size=32,
    intermediate_size=64,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=32,
    scan_layers=False,
)
ADAMW = OptimizerConfig(name="adamw", learning_rate=1e-2, warmup_steps=2)
MUON = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=2)


def packed_batch(seed: int, *, batch_size: int = 8, seq_len: int = 32) -> dict[str, np.ndarray]:
    """Rows of several documents each, of random lengths, as the loader packs them."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, MODEL.vocab_size, (batch_size, seq_len + 1), dtype=np.int32)
    starts = rng.random((batch_size, seq_len + 1)) < 0.1
    starts[:, 0] = True
    segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, np.arange(seq_len + 1), 0), axis=1)
    positions = (np.arange(seq_len + 1) - begin).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segment_ids[:, :-1],
        "positions": positions[:, :-1],
        "loss_mask": ~starts[:, 1:],
    }

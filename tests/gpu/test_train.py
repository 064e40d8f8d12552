"""A small model trains on the GPU: its loss falls, and it takes the attention kernel that reads documents.

B batch, S sequence
"""

from pathlib import Path

import numpy as np
import pytest

from smoljax import parallel
from smoljax.kernels.attention import pallas_gpu
from smoljax.kernels.attention.request import Request
from smoljax.training import Run, make_state

pytestmark = pytest.mark.gpu
B, S, STEPS = 8, 256, 30


def small_run() -> Run:
    return Run(
        {
            "data": {"sources": ("text",), "stages": (), "seq_len": S, "batch_size": B},
            "model": {
                "vocab_size": 512,
                "num_layers": 4,
                "hidden_size": 256,
                "intermediate_size": 512,
                "num_heads": 4,
                "num_kv_heads": 2,
                "max_seq_len": S,
                "compute_dtype": "bfloat16",
                "scan_layers": True,
                "remat": "save_attention",
            },
            "mesh": {"data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            "optimizer": {"name": "adamw", "learning_rate": 3e-3, "warmup_steps": 3},
            "training": {"num_steps": STEPS, "loss_chunk": 1024, "eval_every": STEPS},
        },
        Path("."),
    )


def test_loss_falls_on_packed_documents():
    run = small_run()
    rows = np.random.default_rng(0).integers(1, 8, (B, S + 1)).cumsum(1).astype(np.int32) % 512
    batch = {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "segment_ids": np.broadcast_to(np.arange(S, dtype=np.int32) // 100 + 1, (B, S)),
        "loss_mask": np.ones((B, S), bool),
    }
    batch = parallel.put_batch(batch, run.mesh, rows=slice(0, B), batch_size=B)
    step = run.train_step()
    state = make_state(run.model, run.optimizer, seed=0, shardings=run.shardings)
    with parallel.active(run.mesh):
        text = step.lower(state, batch).as_text()
    hopper = (
        pallas_gpu.refusal(
            Request("gpu", "bfloat16", run.model.head_dim, seq_len=run.model.max_seq_len)
        )
        is None
    )
    # Forward, dq, dk and dv of the scanned layer: saved attention is not computed again.
    assert text.count("custom_call @mosaic_gpu_v2") == (3 if hopper else 0)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 5.5  # log 512 is 6.2.
    assert losses[-1] < losses[0] - 2.0

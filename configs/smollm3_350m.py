"""A SmolLM3-style model of SmolLM2-360M's shape, 4.1 trillion tokens.

361,821,120 parameters: 32 layers, width 960, 15 query and 5 key-value heads of 64, SwiGLU 2560, 49,152 tokens, tied;
RoPE in three layers of four, documents masked from each other: SmolLM3's decoder.
Optimizer and schedule of SmolLM2-360M as published (huggingface/smollm, text/pretraining/smollm2): AdamW 3e-3, decay
0.01, warm-up 2,000, linear decay to 0 from step 2,080,000 for 520,000, 1,572,864 tokens a step. Data: SmolLM3's stage 1.

Command:   python -m smoljax.train --config=configs/smollm3_350m.py --workdir=DIR   (on every host)
Shards:    one folder per source of data/smollm3_mixtures.py below WORKDIR/shards, written by `smoljax.curate`,
           with the tokenizer in WORKDIR/tokenizer (49,152 tokens, such as SmolLM2's); config.data.directory names another place.
Hardware:  planned for one TPU host or one 8-GPU node and up. Of each chip's memory with 4 sequences per chip, by `python -m smoljax.plan`:
           v5e-256 9.5 of 15.75 GiB, v6e-256 9.9 of 31.25, v5p-128 8.2 of 95 (without rematerialisation 17.5, 19.5 and 17.9: not on v5e).
Expected:  not yet run with this code: no loss is claimed.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MIXTURES = runpy.run_path(str(Path(__file__).parent.parent / "data" / "smollm3_mixtures.py"))


def get_config() -> ConfigDict:
    """Model, data, optimizer and schedule of the run."""
    config = ConfigDict()
    config.name = "smollm3_350m"
    config.seed = 8
    config.tokenizer = ConfigDict(dict(directory=""))
    config.data = ConfigDict(
        dict(
            directory="",
            sources=MIXTURES["SOURCES"],
            stages=((0, MIXTURES["STAGE_1"]),),
            seq_len=2_048,
            batch_size=768,
        )
    )
    config.model = ConfigDict(
        dict(
            vocab_size=49_152,
            num_layers=32,
            hidden_size=960,
            intermediate_size=2_560,
            num_heads=15,
            num_kv_heads=5,
            rope_theta=50_000.0,
            no_rope_layer_interval=4,
            max_seq_len=2_048,
            tie_embeddings=True,
            norm_eps=1e-5,
            init_std=0.03227,
            compute_dtype="bfloat16",
            remat="dots",
        )
    )
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))
    config.optimizer = ConfigDict(
        dict(
            name="adamw",
            learning_rate=3e-3,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.01,
            no_decay_roles=("embedding",),
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=2_000,
            decay_start=2_080_000,
            decay_steps=520_000,
            decay_tail="linear",
            final_fraction=0.0,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=2_600_000,
            micro_batches=1,
            loss_chunk=8_192,
            z_loss=0.0,
            log_every=10,
            eval_every=1_000,
            eval_batches=8,
            checkpoint_every=2_000,
            keep_checkpoints=3,
            checkpoint_directory="",
        )
    )
    config.generation = ConfigDict(
        dict(
            prompts=("The capital of France is",),
            max_new_tokens=128,
            temperature=0.6,
            top_k=0,
            top_p=0.95,
            seed=0,
        )
    )
    return config

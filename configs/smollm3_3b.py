"""SmolLM3-3B: three pretraining stages over 11.1 trillion tokens.

3,075,098,624 parameters: 36 layers, width 2048, 16 query and 4 key-value heads of 128, SwiGLU 11008, 128,256
tokens, tied; RoPE (theta 50,000) in three layers of four.
As published (huggingface/smollm, text/pretraining/smollm3): AdamW 2e-4, 2,000 steps of warm-up, linear decay to 0 from
step 4,198,000 for 522,000 steps, 2,359,296 tokens a step (576 sequences of 4,096), no decay on embeddings, seed 6.

Command:   python -m smoljax.train --config=configs/smollm3_3b.py --workdir=DIR   (on every host)
Shards:    one folder per source of data/smollm3_mixtures.py below WORKDIR/shards, written by `smoljax.curate`,
           with the tokenizer in WORKDIR/tokenizer (Llama 3.2's); config.data.directory names another place.
Hardware:  planned for 256 or more TPU chips; the published run took 384 H100 for 24 days. Temporaries with 4 sequences per chip, by
           `python -m smoljax.plan`: v5e-256 6.9 GiB, 3.6 with --config.training.micro_batches=2; v5p-128 8.6 GiB; v6e-256 8.5 GiB.
           On v5p-128 its own batch, 9 sequences per chip, fits with --config.model.remat=dots: 2.57 instead of 2.83 s a step by estimate, 83.0
           instead of 18.7 of 95 GiB (`python -m smoljax.plan --config=configs/smollm3_3b.py --topology=v5p-128 --search=6`).
           On v6e-256 with 4 sequences per chip the same search (15 minutes) finds nothing better: remat=full 1.182 s a step, its own 1.186 s.
Expected:  not yet run with this code: no loss is claimed.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MIXTURES = runpy.run_path(str(Path(__file__).parent.parent / "data" / "smollm3_mixtures.py"))


def get_config() -> ConfigDict:
    """Model, data, optimizer and schedule of the run."""
    config = ConfigDict()
    config.name = "smollm3_3b"
    config.seed = 6
    config.tokenizer = ConfigDict(dict(directory=""))
    config.data = ConfigDict(
        dict(
            directory="",
            sources=MIXTURES["SOURCES"],
            stages=MIXTURES["STAGES"],
            seq_len=4_096,
            batch_size=576,
        )
    )
    config.model = ConfigDict(
        dict(
            vocab_size=128_256,
            num_layers=36,
            hidden_size=2_048,
            intermediate_size=11_008,
            num_heads=16,
            num_kv_heads=4,
            rope_theta=50_000.0,
            no_rope_layer_interval=4,
            max_seq_len=4_096,
            tie_embeddings=True,
            norm_eps=1e-6,
            init_std=0.02,
            compute_dtype="bfloat16",
            remat="save_attention",
        )
    )
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=1))
    config.optimizer = ConfigDict(
        dict(
            name="adamw",
            learning_rate=2e-4,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            no_decay_roles=("embedding",),
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=2_000,
            decay_start=4_198_001,
            decay_steps=522_000,
            decay_tail="linear",
            final_fraction=0.0,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=4_720_000,
            micro_batches=1,
            loss_chunk=1_024,
            z_loss=0.0,
            log_every=10,
            eval_every=4_000,
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

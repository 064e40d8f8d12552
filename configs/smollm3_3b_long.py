"""SmolLM3-3B from 32k to 64k tokens: the second half of its long-context extension, by ring attention.

The published stage (huggingface/smollm, text/pretraining/smollm3/long_context_32k_to_64.yaml): weights of the 32k stage, fresh
optimizer, RoPE theta 5,000,000, 36 sequences of 65,536 tokens (2,359,296 a step), 22,000 steps (51.9 billion tokens), AdamW
2e-5, 1,000 steps of warm-up, cosine to 0. Its mixture adds sources of its own; here it is that of the last pretraining stage, of
which long documents were not upsampled. The first half, from 4k to 32k, is this file with a workdir of its own and
--config.model.rope_theta=2e6 --config.data.seq_len=32768 --config.data.batch_size=72 --config.training.num_steps=20000.

Begins with the weights of a model of another theta (of the first half; that with configs/smollm3_3b.py's), so through a Hugging Face
folder, in which rope_theta is set to the new one:
           python -m smoljax.convert --config=configs/smollm3_3b_long.py --config.model.rope_theta=2e6 --workdir=FIRST --to=huggingface --output=FOLDER
           (set rope_theta to 5000000.0 wherever FOLDER/config.json has it)
           python -m smoljax.convert --config=configs/smollm3_3b_long.py --workdir=DIR --to=orbax --from=FOLDER
Command:   python -m smoljax.train --config=configs/smollm3_3b_long.py --workdir=DIR   (on every host)
Shards:    as for configs/smollm3_3b.py, of the sources of its last stage; config.data.directory names another place.
Hardware:  planned for v5p-128 (64 chips, fsdp 4 x context 16; with more chips fsdp grows, and the batch has to divide over it):
           33.1 of 95 GiB per chip by `python -m smoljax.plan --topology=v5p-128`. Published: data 12 x tensor 2 x context 4.
Expected:  not yet run with this code: no loss is claimed.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MIXTURES = runpy.run_path(str(Path(__file__).parent.parent / "data" / "smollm3_mixtures.py"))


def get_config() -> ConfigDict:
    """Model, data, optimizer and schedule of the run."""
    config = ConfigDict()
    config.name = "smollm3_3b_long"
    config.seed = 6
    config.tokenizer = ConfigDict(dict(directory=""))
    config.data = ConfigDict(
        dict(
            directory="",
            sources=tuple(MIXTURES["STAGE_3"]),
            stages=((0, MIXTURES["STAGE_3"]),),
            seq_len=65_536,
            batch_size=36,
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
            rope_theta=5_000_000.0,
            no_rope_layer_interval=4,
            max_seq_len=65_536,
            tie_embeddings=True,
            norm_eps=1e-6,
            init_std=0.02,
            compute_dtype="bfloat16",
            remat="save_attention",
        )
    )
    config.mesh = ConfigDict(dict(data=1, fsdp=-1, tensor=1, context=16))
    config.optimizer = ConfigDict(
        dict(
            name="adamw",
            learning_rate=2e-5,
            b1=0.9,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            no_decay_roles=("embedding",),
            clip_norm=1.0,
            schedule="cosine",
            warmup_steps=1_000,
            final_fraction=0.0,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=22_000,
            micro_batches=1,
            loss_chunk=1_024,
            z_loss=0.0,
            log_every=10,
            eval_every=2_000,
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

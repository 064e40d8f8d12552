"""Muon against AdamW on the quickstart corpus: equal steps, each at its best learning rate, three seeds.

Command:   python benchmarks/muon_vs_adamw.py --workdir=runs/quickstart
           (one run: python -m smoljax.train --config=configs/ablations/muon_vs_adamw.py:muon --workdir=DIR)
Hardware:  2 CPU cores, about a minute a run, 11 runs.

Result, 2026-11-24 (1.9M parameters, 200 steps of 2,048 tokens, decay over the second half, all of the held-out text,
benchmarks/results/muon_vs_adamw.json):
    held-out loss, seed 0, by learning rate    AdamW  3e-3 6.296   6e-3 6.241   1.2e-2 6.423
                                               Muon   6e-3 5.365   1.2e-2 5.353  2.4e-2 5.406
    at each best rate, 3 seeds, mean and 95% interval
        AdamW  6.224 +- 0.174 nats per token, 2.344 bits per byte
        Muon   5.364 +- 0.040 nats per token, 2.020 bits per byte
    AdamW minus Muon, paired by seed: 0.860 +- 0.150 nats per token.
A run of 200 steps is the beginning of training, where Muon is furthest ahead; it says nothing of long runs.
"""

from ml_collections import ConfigDict


def get_config(optimizer: str = "muon") -> ConfigDict:
    """A small model trained with `optimizer`, "muon" or "adamw"; everything else is the same."""
    config = ConfigDict()
    config.name = f"muon_vs_adamw_{optimizer}"
    config.seed = 0
    config.tokenizer = ConfigDict(dict(directory="runs/quickstart/tokenizer"))
    config.data = ConfigDict(
        dict(
            directory="runs/quickstart/shards",
            sources=(
                "django_docs",
                "django_code",
                "sqlalchemy_html",
                "pypdf_pdf",
                "newspaper_html",
                "sphinx_docs",
            ),
            stages=(),
            seq_len=256,
            batch_size=8,
        )
    )
    config.model = ConfigDict(
        dict(
            vocab_size=8192,
            num_layers=4,
            hidden_size=128,
            intermediate_size=344,
            num_heads=4,
            num_kv_heads=2,
            rope_theta=10_000.0,
            max_seq_len=256,
            tie_embeddings=True,
            compute_dtype="float32",
            scan_layers=False,
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, context=1))
    config.optimizer = ConfigDict(
        dict(
            name=optimizer,
            learning_rate=1e-2,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=20,
            decay_fraction=0.5,
            final_fraction=0.0,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=200,
            loss_chunk=2048,
            log_every=20,
            eval_every=200,
            eval_batches=1000,  # All of the held-out split.
            checkpoint_every=200,
            keep_checkpoints=1,
            checkpoint_directory="",
        )
    )
    return config

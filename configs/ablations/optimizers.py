"""Five optimizers on one small model: equal tokens, decay to the end, each at the best rate of its own grid.

Command:   python benchmarks/optimizers.py --workdir=runs/quickstart
           (one run: python -m smoljax.train --config=configs/ablations/optimizers.py:soap --workdir=DIR)
Hardware:  2 CPU cores, two to three minutes a run, 32 runs.

Result, 2026-11-24 (5.0M parameters, 150 steps of 2,048 tokens, decay over the second half, 3 seeds, mean and 95% interval,
24,576 held-out tokens; benchmarks/results/optimizers.md):
    AdamW    6.472 +- 0.212 nats per token      at 3e-3
    SOAP     6.014 +- 0.052                     at 7.5e-4
    MuonH    5.726 +- 0.026                     at 4e-2
    Muon     5.675 +- 0.015                     at 6e-3
    NorMuon  5.649 +- 0.033                     at 6e-3
150 steps are the beginning of training, where matrix optimizers are furthest ahead: it says nothing of long runs.
"""

from ml_collections import ConfigDict

OPTIMIZERS = ("adamw", "muon", "normuon", "soap", "muonh")


def get_config(optimizer: str = "muon") -> ConfigDict:
    """The quickstart's model trained with `optimizer`, one of OPTIMIZERS; everything else is the same."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(
            f"{optimizer!r} is not compared here: choose one of {', '.join(OPTIMIZERS)}"
        )
    config = ConfigDict()
    config.name = f"optimizers_{optimizer}"
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
            stages=(
                (
                    0,
                    dict(
                        django_docs=0.27,
                        django_code=0.35,
                        sqlalchemy_html=0.27,
                        pypdf_pdf=0.02,
                        newspaper_html=0.01,
                        sphinx_docs=0.08,
                    ),
                ),
            ),
            seq_len=256,
            batch_size=8,
        )
    )
    config.model = ConfigDict(
        dict(
            vocab_size=8192,
            num_layers=4,
            hidden_size=256,
            intermediate_size=688,
            num_heads=4,
            num_kv_heads=2,
            rope_theta=10_000.0,
            max_seq_len=256,
            tie_embeddings=True,
            compute_dtype="float32",
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, context=1))
    config.optimizer = ConfigDict(
        dict(
            name=optimizer,
            learning_rate=6e-3,
            # Embedding and norms, which AdamW keeps beside a matrix optimizer: at AdamW's own best rate.
            adamw_learning_rate=3e-3,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=10,
            decay_fraction=0.5,
            final_fraction=0.0,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=150,
            loss_chunk=1024,
            log_every=10,
            eval_every=15,
            eval_batches=2,  # Of each source: the same 24,576 tokens for every run.
            checkpoint_every=150,
            keep_checkpoints=1,
            checkpoint_directory="",
        )
    )
    return config

"""What FineWeb's filters are worth: one small model trained on raw pages, on what each filter leaves, and on what all leave.

Command:   python -m benchmarks.curation_ablation --workdir=runs/curation_ablation
           (writes the pages as WARC files, then runs
           python -m smoljax.curate --only=ablation --config=configs/ablations/curation.py --workdir=DIR)
Hardware:  one CPU core (Intel Xeon), with other work beside it.
Time:      40 minutes for 8 variants of 3 seeds.
Expected:  (2026-11-25) bits per byte of the books: raw 2.591, all of the preset 2.484, which is 0.107 ± 0.035 less by pairs of
           equal seed (95% interval). Of the stages alone gopher_quality (0.123 ± 0.088), language (0.061 ± 0.050) and
           gopher_repetition (0.044 ± 0.006) help; c4, fineweb and dedup cannot be told from none here. It is the beginning of
           training: 409,600 tokens. Table and plot: benchmarks/results/curation_ablation.{md,png}.
"""

from ml_collections import ConfigDict

from smoljax.curation import presets


def get_config() -> ConfigDict:
    """Sources `web` (trained on) and `books` (scored only), a model of a million parameters, equal tokens."""
    config = ConfigDict()
    config.name = "curation_ablation"
    config.curation = ConfigDict(
        dict(
            recipe="data/files.py",
            arguments=dict(
                patterns=dict(
                    web="runs/curation_ablation/raw/web-*.warc.gz",
                    books="runs/curation_ablation/raw/books-*.warc.gz",
                ),
                presets=dict(web="fast", books="books"),
            ),
            presets=dict(
                fast=presets.defaults()["fast"],
                # Chosen, not filtered: the text of the books as it is.
                books=dict(order=("extract",)),
            ),
            shard_bytes=4 << 20,
        )
    )
    config.ablation = ConfigDict(dict(preset="fast", heldout=("books",), seeds=3))
    config.tokenizer = ConfigDict(dict(directory="", vocab_size=4096))
    config.shards = ConfigDict(dict(block_tokens=2**16))
    config.data = ConfigDict(dict(directory="", sources=(), seq_len=256, batch_size=8))
    config.model = ConfigDict(
        dict(
            vocab_size=4096,
            num_layers=3,
            hidden_size=128,
            intermediate_size=344,
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
            name="muon",
            learning_rate=6e-3,
            adamw_learning_rate=6e-3,
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
            log_every=50,
            eval_every=200,
            eval_batches=64,
            checkpoint_every=200,
            keep_checkpoints=1,
            checkpoint_directory="",
        )
    )
    return config

"""Raw pages and PDFs to a small talking model, on two CPU cores in minutes.

Command:   make quickstart
           (= python -m smoljax.flow --config=configs/quickstart.py --workdir=runs/quickstart)
Hardware:  2 CPU cores (Intel Xeon), less than 2 GB of memory.
Time:      4 minutes after installation, of which training 3.
Expected:  1.642 bits per byte of all held-out text (gzip -9 2.206, xz -9 1.877), measured on 2026-11-25:
           django_docs 1.590, django_code 1.437, sqlalchemy_html 1.480, newspaper_html 3.083, sphinx_docs 1.945 are ahead of xz;
           pypdf_pdf 2.916 stays behind it, with too little text to learn from.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The whole path: documents, tokenizer, shards, training, evaluation, samples."""
    config = ConfigDict()
    config.name = "quickstart"
    config.seed = 0
    config.curation = ConfigDict(
        dict(
            recipe="data/quickstart.py",
            heldout_fraction=0.05,
            # About as much held-out text of each large source, and some of each small one.
            heldout_fractions=dict(
                django_code=0.015, newspaper_html=0.3, pypdf_pdf=0.3, sphinx_docs=0.1
            ),
            shard_bytes=8 << 20,
        )
    )
    config.tokenizer = ConfigDict(dict(directory="", vocab_size=8192))
    config.shards = ConfigDict(dict(block_tokens=2**19, tokens_per_file=2**27))
    config.data = ConfigDict(
        dict(
            directory="",
            sources=(
                "django_docs",
                "django_code",
                "sqlalchemy_html",
                "pypdf_pdf",
                "newspaper_html",
                "sphinx_docs",
            ),
            # Code is more than half of the text; weighed by size it would crowd out the manuals.
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
            no_rope_layer_interval=4,
            max_seq_len=256,
            tie_embeddings=True,
            init_std=0.02,
            compute_dtype="float32",
            remat="none",
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, context=1))
    config.optimizer = ConfigDict(
        dict(
            name="muon",
            learning_rate=5e-3,
            adamw_learning_rate=3e-3,
            weight_decay=0.1,
            clip_norm=1.0,
            schedule="wsd",
            warmup_steps=20,
            decay_fraction=0.5,
            decay_tail="linear",
            final_fraction=0.0,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=400,
            micro_batches=1,
            loss_chunk=1024,
            z_loss=0.0,
            log_every=10,
            eval_every=100,
            eval_batches=3,
            checkpoint_every=100,
            keep_checkpoints=2,
            checkpoint_directory="",
        )
    )
    config.generation = ConfigDict(
        dict(
            prompts=(
                "def get_",
                "class Book(models.Model):\n",
                "To install Django, ",
                "The Session object ",
            ),
            max_new_tokens=96,
            temperature=0.6,
            top_k=0,
            top_p=0.95,
            min_p=0.0,
            repetition_penalty=1.0,
            seed=0,
        )
    )
    return config

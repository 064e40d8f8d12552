"""Raw pages and PDFs to a small talking model, on two CPU cores in minutes.

Command:   make quickstart
           (= python -m smoljax.flow --config=configs/quickstart.py --workdir=runs/quickstart)
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The whole path: documents, tokenizer, shards, training, evaluation, generation."""
    config = ConfigDict()
    config.name = "quickstart"
    config.seed = 0

    config.tokenizer = ConfigDict(dict(vocab_size=8192, directory=""))

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
            stages=(),
            seq_len=256,
            batch_size=16,
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
            compute_dtype="float32",
            scan_layers=False,
            remat="none",
        )
    )
    return config

"""The whole path in a size for tests: Python's own library as text and the project's own README, a model of 50,000 parameters."""

import sysconfig

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """As configs/quickstart.py, smaller."""
    library = sysconfig.get_path("stdlib")
    config = ConfigDict()
    config.name = "tiny"
    config.seed = 0
    config.curation = ConfigDict(
        dict(
            recipe="data/files.py",
            arguments=dict(
                patterns=dict(code=f"{library}/email/*.py", more=f"{library}/json/*.py"),
                preset="code",
            ),
            heldout_fraction=0.3,
            heldout_fractions=dict(
                more=0.0
            ),  # A source without held-out text, whatever the Python.
        )
    )
    config.tokenizer = ConfigDict(dict(directory="", vocab_size=512))
    config.shards = ConfigDict(dict(block_tokens=4096))
    config.data = ConfigDict(
        dict(directory="", sources=("code", "more"), stages=(), seq_len=32, batch_size=8)
    )
    config.model = ConfigDict(
        dict(
            vocab_size=512,
            num_layers=4,
            hidden_size=32,
            intermediate_size=64,
            num_heads=4,
            num_kv_heads=2,
            max_seq_len=64,
            scan_layers=False,
        )
    )
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1, context=1))
    config.optimizer = ConfigDict(
        dict(
            name="muon",
            learning_rate=1e-2,
            warmup_steps=5,
            decay_fraction=0.5,
            newton_schulz_steps=5,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=60,
            micro_batches=1,
            loss_chunk=256,
            log_every=1,
            eval_every=25,
            eval_batches=2,
            checkpoint_every=20,
            keep_checkpoints=2,
            checkpoint_directory="",
        )
    )
    config.generation = ConfigDict(
        dict(prompts=("def ", "import "), max_new_tokens=16, temperature=0.6, top_p=0.95, seed=0)
    )
    return config

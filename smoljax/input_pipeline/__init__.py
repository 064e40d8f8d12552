"""Token shards to batches: the batch of a step is a pure function of (configuration, step).

mixture = open_mixture(MixtureConfig(directory="runs/quickstart/shards", sources=("docs", "news"),
                                     stages=((0, {"docs": 0.7, "news": 0.3}),), seq_len=256, batch_size=16))
mixture.batch(1000)                       # any step, at once
for step, batch in mixture.loader(start_step=1000): ...
"""

import importlib

_HOMES = {
    "BatchSource": "loader",
    "Mixture": "loader",
    "MixtureConfig": "loader",
    "open_mixture": "loader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)

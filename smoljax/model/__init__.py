"""The SmolLM3-style decoder: a config and pure functions."""

from smoljax.model.config import ModelConfig
from smoljax.model.functions import forward, hidden, init, logical_axes, unembedding

__all__ = ["ModelConfig", "forward", "hidden", "init", "logical_axes", "unembedding"]

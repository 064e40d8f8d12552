"""The SmolLM3-style decoder: a config and pure functions."""

from smoljax.model.config import ModelConfig
from smoljax.model.functions import forward, hidden, init, logical_axes, unembedding
from smoljax.model.generate import generate, stream

__all__ = [
    "ModelConfig",
    "forward",
    "generate",
    "hidden",
    "init",
    "logical_axes",
    "stream",
    "unembedding",
]

"""The SmolLM3-style decoder: a config and pure functions."""

from smoljax.model.config import ModelConfig
from smoljax.model.functions import (
    forward,
    hidden,
    hidden_and_max_logits,
    init,
    logical_axes,
    param_shapes,
    unembedding,
)
from smoljax.model.generate import generate, stream

__all__ = [
    "ModelConfig",
    "forward",
    "generate",
    "hidden",
    "hidden_and_max_logits",
    "init",
    "logical_axes",
    "param_shapes",
    "stream",
    "unembedding",
]

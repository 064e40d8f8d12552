"""Gradient transformations, schedules and the builder that puts them together. Needs only jax and optax."""

from optax import adamw

from smoljax.optim.build import (
    OptimizerConfig,
    build,
    learning_rate_schedule,
    metrics,
    treatments,
)
from smoljax.optim.clip import ClipState, clip_by_global_norm, global_norm
from smoljax.optim.muon import SCALES, MuonState, muon, scale_by_muon
from smoljax.optim.newton_schulz import COEFFICIENTS, newton_schulz
from smoljax.optim.partition import RULES, Assignment, MatrixSpec, Rule, Treatment, assign, describe
from smoljax.optim.placement import place_state
from smoljax.optim.schedules import TAILS, constant, cosine, linear, wsd

__all__ = [
    "COEFFICIENTS",
    "RULES",
    "SCALES",
    "TAILS",
    "Assignment",
    "ClipState",
    "MatrixSpec",
    "MuonState",
    "OptimizerConfig",
    "Rule",
    "Treatment",
    "adamw",
    "assign",
    "build",
    "clip_by_global_norm",
    "constant",
    "cosine",
    "describe",
    "global_norm",
    "learning_rate_schedule",
    "linear",
    "metrics",
    "muon",
    "newton_schulz",
    "place_state",
    "scale_by_muon",
    "treatments",
    "wsd",
]

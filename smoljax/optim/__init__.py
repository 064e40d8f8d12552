"""Gradient transformations, schedules and the builder that puts them together. Needs only jax and optax.

In a project of your own: `optim.muon(...)` and its kin are optax transformations for matrices, to be put beside AdamW with
optax.partition; or let `optim.build` do so from an OptimizerConfig and rules that say what each parameter is.
"""

from optax import adamw

from smoljax.optim.adamuon import adamuon, scale_by_adamuon
from smoljax.optim.averaging import AverageState, ema_weights, evaluation_params, tail_average
from smoljax.optim.blocks import GradientReport, stacked_axes
from smoljax.optim.build import build
from smoljax.optim.clip import adagc, clip_by_global_norm, global_norm, zclip
from smoljax.optim.config import (
    OptimizerConfig,
    averages,
    learning_rate_schedule,
    treatments,
    update_rule,
)
from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.gradients import centralize, normalize_blocks
from smoljax.optim.hyperball import adamh, hyperball, muonh
from smoljax.optim.metrics import Metrics, measure_updates, metrics
from smoljax.optim.muon import SCALES, MuonState, muon, scale_by_muon
from smoljax.optim.newton_schulz import COEFFICIENTS, newton_schulz
from smoljax.optim.normuon import normalize_neurons, normuon
from smoljax.optim.parametrization import (
    ForwardMultipliers,
    Multipliers,
    forward_multipliers,
    multipliers,
)
from smoljax.optim.partition import RULES, Assignment, MatrixSpec, Rule, Treatment, assign, describe
from smoljax.optim.placement import place_state
from smoljax.optim.qk_clip import HeadKernel, QKClipSpec, clipped_heads, qk_clip
from smoljax.optim.schedules import (
    TAILS,
    batch_size_ramp,
    constant,
    cosine,
    cyclic_wsd,
    inverse_sqrt,
    linear,
    wsd,
)
from smoljax.optim.skip import SkipState, skip_spikes
from smoljax.optim.soap import scale_by_soap, soap

__all__ = [
    "COEFFICIENTS",
    "RULES",
    "SCALES",
    "TAILS",
    "Assignment",
    "AverageState",
    "ForwardMultipliers",
    "GradientReport",
    "HeadKernel",
    "MatrixSpec",
    "Metrics",
    "Multipliers",
    "MuonState",
    "OptimizerConfig",
    "QKClipSpec",
    "Rule",
    "SkipState",
    "Treatment",
    "adagc",
    "adamh",
    "adamuon",
    "adamw",
    "add_decayed_weights",
    "assign",
    "averages",
    "batch_size_ramp",
    "build",
    "centralize",
    "clip_by_global_norm",
    "clipped_heads",
    "constant",
    "cosine",
    "cyclic_wsd",
    "describe",
    "ema_weights",
    "evaluation_params",
    "forward_multipliers",
    "global_norm",
    "hyperball",
    "inverse_sqrt",
    "learning_rate_schedule",
    "linear",
    "measure_updates",
    "metrics",
    "multipliers",
    "muon",
    "muonh",
    "newton_schulz",
    "normalize_blocks",
    "normalize_neurons",
    "normuon",
    "place_state",
    "qk_clip",
    "scale_by_adamuon",
    "scale_by_muon",
    "scale_by_soap",
    "skip_spikes",
    "soap",
    "stacked_axes",
    "tail_average",
    "treatments",
    "update_rule",
    "wsd",
    "zclip",
]

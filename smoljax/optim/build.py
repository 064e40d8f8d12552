"""One builder: from an OptimizerConfig and the parameters' roles to an optax transformation."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.errors import SmoljaxError
from smoljax.optim import schedules
from smoljax.optim.clip import ClipState, clip_by_global_norm
from smoljax.optim.muon import SCALES, scale_by_muon
from smoljax.optim.newton_schulz import coefficient_rows
from smoljax.optim.partition import (
    RULES,
    Assignment,
    Rule,
    Treatment,
    assign,
    path_string,
    treatment_of,
)

NAMES = ("adamw", "muon")
SCHEDULES = ("wsd", "cosine", "linear", "constant")
ROLES = ("hidden", "embedding", "head", "norm")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """What `build` needs to know. The defaults are SmolLM3's, and with name="muon" they hold as they are.

    Every learning rate below is a peak: the rate of a leaf at a step is the schedule's share of the peak at that step (0
    to 1, the same for all leaves) times the peak of its group. Weight decay is multiplied by that same rate.

    Attributes:
      name: "adamw", or "muon" for the hidden matrices with AdamW for embedding, head and norms.
      learning_rate: peak rate of the optimizer that `name` says.
      adamw_learning_rate: with "muon": peak rate of the leaves that AdamW keeps. None: learning_rate, right for scale "rms".
      b1, b2, eps: AdamW's moments.
      weight_decay: decoupled decay, of all roles but no_decay_roles.
      no_decay_roles: roles without decay. SmolLM3 decays everything, norms too, except the embedding.
      clip_norm: largest global gradient norm; None never clips.
      momentum: Muon's beta.
      nesterov: whether Muon looks one gradient ahead.
      scale: Muon's "rms", "spectral" or "keller"; the last two need a learning_rate near 0.02.
      coefficients: Newton-Schulz coefficients by name, or rows (a, b, c).
      newton_schulz_steps: number of steps.
      newton_schulz_dtype: "float32" or "bfloat16"; None: bfloat16 on accelerators, float32 on a CPU.
      schedule: "wsd", "cosine", "linear" or "constant".
      warmup_steps: steps from rate 0 to the peak.
      decay_steps: "wsd": length of the decay; None: decay_fraction of all steps.
      decay_fraction: "wsd": length of the decay as a share of all steps.
      decay_start: "wsd": last step at the peak; None: the decay ends with the last step.
      decay_tail: "wsd": "linear", "cosine" or "1-sqrt".
      final_fraction: rate at the end, as a share of the peak.
    """

    name: str = "adamw"
    learning_rate: float = 2e-4
    adamw_learning_rate: float | None = None
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay_roles: tuple[str, ...] = ("embedding",)
    clip_norm: float | None = 1.0
    momentum: float = 0.95
    nesterov: bool = True
    scale: str = "rms"
    coefficients: str | tuple = "polar_express"
    newton_schulz_steps: int = 5
    newton_schulz_dtype: str | None = None
    schedule: str = "wsd"
    warmup_steps: int = 0
    decay_steps: int | None = None
    decay_fraction: float = 0.1
    decay_start: int | None = None
    decay_tail: str = "linear"
    final_fraction: float = 0.0

    def __post_init__(self):
        _choice("name", self.name, NAMES)
        _choice("scale", self.scale, tuple(SCALES))
        _choice("schedule", self.schedule, SCHEDULES)
        _choice("decay_tail", self.decay_tail, tuple(schedules.TAILS))
        _choice("newton_schulz_dtype", self.newton_schulz_dtype, (None, "float32", "bfloat16"))
        for role in self.no_decay_roles:
            _choice("no_decay_roles", role, ROLES)
        coefficient_rows(self.coefficients, self.newton_schulz_steps)
        _positive("learning_rate", self.learning_rate)
        _positive("adamw_learning_rate", self.adamw_learning_rate)
        _positive("clip_norm", self.clip_norm)
        for field in ("b1", "b2", "momentum"):
            _within(field, getattr(self, field), 0, 1)
        for field in ("weight_decay", "warmup_steps", "eps"):
            _within(field, getattr(self, field), 0, None)
        for field in ("decay_fraction", "final_fraction"):
            _within(field, getattr(self, field), 0, 1)


def build(
    config: OptimizerConfig,
    params: optax.Params,
    *,
    logical_axes: object | None = None,
    num_steps: int,
    rules: Sequence[Rule] = RULES,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """The whole update: clip, AdamW or Muon by role, decoupled weight decay, learning rate.

    Its state is a dict of NamedTuples and arrays: "clip", "moments", "decay", "learning_rate". The arrays inside that are
    as large as parameters sit under the parameters' own paths (see place_state).

    Args:
      config: the optimizer and its schedule.
      params: the parameters, or their ShapeDtypeStructs.
      logical_axes: the same tree with a tuple of axis names for each leaf; None when all rules go by path.
      num_steps: steps of the whole run, for the schedule.
      rules: the role table.
      mesh: as in scale_by_muon.
      mesh_axis: as in scale_by_muon.

    Raises:
      SmoljaxError: a parameter has no role, a role no treatment, or a schedule does not fit num_steps.
    """
    table = treatments(config)
    assignments = assign(params, logical_axes=logical_axes, rules=rules)
    chosen = {path: treatment_of(leaf.role, table) for path, leaf in assignments.items()}

    def per_leaf(value):
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: value(path_string(path)), tree
        )

    moments = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    if config.name == "muon":
        moments = optax.partition(
            {"adamw": moments, "muon": _muon(config, assignments, mesh, mesh_axis)},
            per_leaf(lambda path: chosen[path].optimizer),
        )
    return optax.named_chain(
        ("clip", clip_by_global_norm(config.clip_norm)),
        ("moments", moments),
        (
            "decay",
            optax.add_decayed_weights(
                config.weight_decay, per_leaf(lambda path: chosen[path].decay)
            ),
        ),
        (
            "learning_rate",
            _scale_by_rates(
                learning_rate_schedule(config, num_steps),
                per_leaf(lambda path: chosen[path].multiplier),
            ),
        ),
    )


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> schedules.Schedule:
    """The rate of the hidden matrices by step (from 0); a leaf's own rate is this times its multiplier.

    Raises:
      SmoljaxError: the schedule does not fit num_steps.
    """
    options = {"warmup_steps": config.warmup_steps}
    if config.schedule == "constant":
        return schedules.constant(config.learning_rate, **options)
    options["final_fraction"] = config.final_fraction
    if config.schedule in ("cosine", "linear"):
        make = {"cosine": schedules.cosine, "linear": schedules.linear}[config.schedule]
        return make(config.learning_rate, num_steps=num_steps, **options)
    decay_steps = config.decay_steps
    if decay_steps is None:
        decay_steps = round(config.decay_fraction * num_steps)
    decay_start = config.decay_start
    if decay_start is None:
        decay_start = num_steps - decay_steps
    return schedules.wsd(
        config.learning_rate,
        decay_start=decay_start,
        decay_steps=decay_steps,
        tail=config.decay_tail,
        **options,
    )


def treatments(config: OptimizerConfig) -> dict[str, Treatment]:
    """The table from role to optimizer, learning-rate multiplier and decay that `build` follows."""
    others = 1.0
    if config.name == "muon" and config.adamw_learning_rate is not None:
        others = config.adamw_learning_rate / config.learning_rate
    return {
        role: Treatment(
            optimizer="muon" if config.name == "muon" and role == "hidden" else "adamw",
            multiplier=1.0 if role == "hidden" else others,
            decay=role not in config.no_decay_roles,
        )
        for role in ROLES
    }


def metrics(state: object) -> dict[str, jax.Array]:
    """What the last update of a `build` transformation reports: float32 scalars "gradient_norm" (before clipping) and "clipped"."""
    clip: ClipState = state["clip"]
    return {"gradient_norm": clip.norm, "clipped": clip.clipped}


class RatesState(NamedTuple):
    """State of the last link: count, int32 scalar, updates so far."""

    count: jax.Array


def _scale_by_rates(
    schedule: schedules.Schedule, multipliers: Callable[[optax.Params], object]
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> RatesState:
        del params
        return RatesState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        rate = -schedule(state.count)
        updates = jax.tree.map(
            lambda update, multiplier: (rate * multiplier).astype(update.dtype) * update,
            updates,
            multipliers(updates),
        )
        return updates, RatesState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _muon(
    config: OptimizerConfig,
    assignments: dict[str, Assignment],
    mesh: Mesh | None,
    mesh_axis: str | tuple[str, ...] | None,
) -> optax.GradientTransformation:
    def specs(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: assignments[path_string(path)].spec, tree
        )

    return scale_by_muon(
        specs,
        beta=config.momentum,
        nesterov=config.nesterov,
        coefficients=config.coefficients,
        steps=config.newton_schulz_steps,
        scale=config.scale,
        dtype=config.newton_schulz_dtype,
        mesh=mesh,
        mesh_axis=mesh_axis,
    )


def _choice(field: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise SmoljaxError(
            f"config.optimizer.{field} is {value!r}: choose one of {', '.join(map(repr, choices))}"
        )


def _within(field: str, value: float, low: float, high: float | None) -> None:
    if not value >= low or (high is not None and not value <= high):
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise SmoljaxError(f"config.optimizer.{field} is {value}: give a number {expected}")


def _positive(field: str, value: float | None) -> None:
    if value is not None and not value > 0:
        raise SmoljaxError(f"config.optimizer.{field} is {value}: give a number above 0")

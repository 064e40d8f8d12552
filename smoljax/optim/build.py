"""One builder: from an OptimizerConfig and the parameters' roles to an optax transformation."""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.errors import SmoljaxError
from smoljax.optim.adamuon import scale_by_adamuon
from smoljax.optim.averaging import ema_weights, tail_average
from smoljax.optim.blocks import stacked_axes
from smoljax.optim.clip import adagc, clip_by_global_norm, zclip
from smoljax.optim.config import (
    ON_THE_SPHERE,
    OptimizerConfig,
    decay_start,
    learning_rate_schedule,
    treatments,
)
from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.gradients import centralize, normalize_blocks
from smoljax.optim.hyperball import hyperball
from smoljax.optim.metrics import measure_updates
from smoljax.optim.muon import scale_by_muon
from smoljax.optim.normuon import normalize_neurons
from smoljax.optim.parametrization import Multipliers
from smoljax.optim.partition import (
    RULES,
    Assignment,
    Rule,
    Treatment,
    assign,
    by_path,
    path_string,
    treatment_of,
)
from smoljax.optim.schedules import Schedule
from smoljax.optim.skip import skip_spikes
from smoljax.optim.soap import scale_by_soap


def build(
    config: OptimizerConfig,
    params: optax.Params,
    *,
    logical_axes: object | None = None,
    num_steps: int,
    rules: Sequence[Rule] = RULES,
    multipliers: Mapping[str, Multipliers] | None = None,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The whole update: gradient treatment, directions by role, decoupled weight decay, learning rates, averages.

    Its state is a dict of NamedTuples and arrays by link: "clip", "moments", "decay", "learning_rate", and those that the
    config asks for. The arrays inside that are as large as parameters sit under the parameters' own paths (see place_state).
    With skip_spikes, `update` takes the loss as `value`.

    Args:
      config: the optimizer and its schedule.
      params: the parameters, or their ShapeDtypeStructs.
      logical_axes: the same tree with a tuple of axis names for each leaf; None when all rules go by path.
      num_steps: steps of the whole run, for the schedule.
      rules: the role table.
      multipliers: factors on rate, decay and eps by role (see smoljax.optim.multipliers); None is all ones.
      mesh: as in scale_by_muon.
      mesh_axis: as in scale_by_muon.

    Raises:
      SmoljaxError: a parameter has no role, a role no treatment, a group no parameter, or a schedule does not fit num_steps.
    """
    leaves = _Leaves(
        assign(params, logical_axes=logical_axes, rules=_with_heads(rules, config)),
        treatments(config, multipliers),
        {} if logical_axes is None else by_path(stacked_axes(logical_axes)),
    )
    for role in config.groups:
        if role not in leaves.roles:
            raise SmoljaxError(
                f"config.optimizer.groups names the role {role!r}, which no parameter has: "
                f"choose from {', '.join(leaves.roles)}"
            )
    schedules = {
        role: learning_rate_schedule(config, num_steps, role=role, multipliers=multipliers)
        for role in leaves.roles
    }
    links = [
        *_gradient_links(config, leaves),
        ("moments", _directions(config, leaves, mesh=mesh, mesh_axis=mesh_axis)),
        ("decay", _decay(config, leaves, schedules)),
        ("learning_rate", _rates(config, leaves, schedules)),
    ]
    if config.average:
        links.append(("average", _average(config, num_steps)))
    if config.metrics:
        links.append(("sizes", measure_updates()))
    transform = optax.named_chain(*links)
    if config.name == "schedule_free":
        schedule = learning_rate_schedule(config, num_steps)
        transform = optax.contrib.schedule_free(transform, schedule, b1=config.b1)
    return skip_spikes(transform) if config.skip_spikes else transform


@dataclasses.dataclass(frozen=True)
class _Leaves:
    """What is known of every leaf, by path. Its methods make trees of it like the one that they are given."""

    assignments: Mapping[str, Assignment]
    table: Mapping[str, Treatment]
    num_batch_axes: Mapping[str, int]

    @property
    def roles(self) -> list[str]:
        """The roles that some leaf has."""
        return sorted({assignment.role for assignment in self.assignments.values()})

    def treatment(self, path: str) -> Treatment:
        """What happens to a leaf."""
        return treatment_of(self.assignments[path].role, self.table)

    def tree_of(self, value: Callable[[str], object]) -> Callable[[optax.Params], object]:
        """A function from any tree with these leaves to the tree of what `value` says of their paths."""
        return lambda tree: jax.tree_util.tree_map_with_path(
            lambda path, _: value(path_string(path)), tree
        )

    def specs(self, tree: optax.Params) -> object:
        """MatrixSpecs."""
        return self.tree_of(lambda path: self.assignments[path].spec)(tree)

    def batch_axes(self, tree: optax.Params) -> object:
        """How many leading axes count layers or experts."""
        return self.tree_of(lambda path: self.num_batch_axes.get(path, 0))(tree)

    def having(self, condition: Callable[[str], bool]) -> Callable[[optax.Params], object]:
        """A mask of the leaves whose role satisfies the condition."""
        return self.tree_of(lambda path: condition(self.assignments[path].role))


def _gradient_links(config: OptimizerConfig, leaves: _Leaves) -> list[tuple]:
    """What happens to gradients before any optimizer sees them."""
    clips = {
        "global_norm": lambda: clip_by_global_norm(config.clip_norm),
        "adagc": lambda: adagc(max_norm=config.clip_norm, batch_axes=leaves.batch_axes),
        "zclip": zclip,
    }
    links = [("clip", clips[config.clip]())]
    if config.centralize_gradients:
        is_hidden = leaves.having(lambda role: role == "hidden")
        links.append(("centralize", optax.masked(centralize(leaves.specs), is_hidden)))
    if config.normalize_gradients:
        links.append(("normalize", normalize_blocks(batch_axes=leaves.batch_axes)))
    return links


def _directions(
    config: OptimizerConfig,
    leaves: _Leaves,
    *,
    mesh: Mesh | None,
    mesh_axis: str | tuple[str, ...] | None,
) -> optax.GradientTransformation:
    """Gradients to directions, every leaf by the optimizer and eps of its role."""

    def label(role: str) -> str:
        """The optimizer's name, with the role's behind it where roles of one optimizer differ in eps."""
        name = leaves.table[role].optimizer
        eps = {leaves.table[r].eps for r in leaves.roles if leaves.table[r].optimizer == name}
        return name if len(eps) == 1 else f"{name}_{role}"

    transforms = {
        label(role): _direction(leaves.table[role], config, leaves, mesh, mesh_axis)
        for role in leaves.roles
    }
    if len(transforms) == 1:
        return next(iter(transforms.values()))
    return optax.partition(
        transforms, leaves.tree_of(lambda path: label(leaves.assignments[path].role))
    )


def _direction(
    treatment: Treatment, config: OptimizerConfig, leaves: _Leaves, mesh, mesh_axis
) -> optax.GradientTransformation:
    """Gradients to directions for the leaves of one treatment."""
    name, eps = treatment.optimizer, treatment.eps
    orthogonal = {
        "beta": config.momentum,
        "coefficients": config.coefficients,
        "steps": config.newton_schulz_steps,
        "dtype": config.newton_schulz_dtype,
        "momentum_dtype": config.momentum_dtype,
        "nesterov": config.nesterov,
        "mesh": mesh,
        "mesh_axis": mesh_axis,
    }
    if name in ("adamw", "adamh"):
        return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=eps)
    if name == "schedule_free":  # No momentum: the averaging around it is one (arXiv 2405.15682).
        return optax.scale_by_rms(decay=config.b2, eps=eps, eps_in_sqrt=False, bias_correction=True)
    if name == "lion":
        return optax.scale_by_lion(b1=config.b1, b2=config.b2)
    if name == "adafactor":  # arXiv 1804.04235, algorithm 4, with an absolute rate and no momentum.
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if name == "soap":
        return scale_by_soap(
            leaves.specs,
            b1=config.momentum,
            b2=config.matrix_b2,
            eps=eps,
            precondition_every=config.precondition_every,
            mesh=mesh,
            mesh_axis=mesh_axis,
        )
    if name == "adamuon":
        return scale_by_adamuon(leaves.specs, **orthogonal)
    muon = scale_by_muon(leaves.specs, scale=config.scale, metrics=config.metrics, **orthogonal)
    if name == "normuon":
        return optax.chain(muon, normalize_neurons(leaves.specs, b2=config.matrix_b2))
    return muon


def _decay(
    config: OptimizerConfig, leaves: _Leaves, schedules: Mapping[str, Schedule]
) -> optax.GradientTransformation:
    """Decoupled weight decay: one link for all roles of one strength and schedule."""
    follows = config.weight_decay_schedule == "learning_rate"
    groups: dict[tuple, list[str]] = {}
    for role in leaves.roles:
        strength = leaves.table[role].weight_decay
        if strength:
            groups.setdefault((strength, role if follows else None), []).append(role)
    links = []
    for (strength, role), members in groups.items():
        amount = strength
        if role is not None:
            peak, schedule = leaves.table[role].learning_rate, schedules[role]
            amount = functools.partial(_share, strength / peak, schedule)
        links.append(
            add_decayed_weights(
                amount,
                leaves.having(functools.partial(operator.contains, members)),
                cautious=config.cautious_weight_decay,
            )
        )
    return optax.chain(*links) if links else optax.identity()


def _share(factor: float, schedule: Schedule, step: jax.Array) -> jax.Array:
    return factor * schedule(step)


class RatesState(NamedTuple):
    """State of the last link: count, int32 scalar, updates so far."""

    count: jax.Array


def _rates(
    config: OptimizerConfig, leaves: _Leaves, schedules: Mapping[str, Schedule]
) -> optax.GradientTransformation:
    """Directions to updates: times the negative rate of the role, or a step on the sphere."""
    scaled = _scale_by_rates(schedules, leaves.tree_of(lambda path: leaves.assignments[path].role))
    if config.name not in ON_THE_SPHERE:
        return scaled
    return optax.partition(
        {"scaled": scaled, "sphere": hyperball(schedules["hidden"], leaves.specs)},
        leaves.tree_of(
            lambda path: "sphere" if leaves.treatment(path).optimizer in ON_THE_SPHERE else "scaled"
        ),
    )


def _scale_by_rates(
    schedules: Mapping[str, Schedule], roles: Callable[[optax.Params], object]
) -> optax.GradientTransformation:
    def init(params: optax.Params) -> RatesState:
        del params
        return RatesState(count=jnp.zeros([], jnp.int32))

    def update(updates, state, params=None):
        del params
        rates = {role: -schedule(state.count) for role, schedule in schedules.items()}
        updates = jax.tree.map(
            lambda update, role: rates[role].astype(update.dtype) * update, updates, roles(updates)
        )
        return updates, RatesState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _average(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    start = config.average_start
    if config.average == "ema":
        return ema_weights(config.average_decay, start_step=start or 0)
    return tail_average(decay_start(config, num_steps) if start is None else start)


def _with_heads(rules: Sequence[Rule], config: OptimizerConfig) -> list[Rule]:
    """The rules, with every `heads_per_matrix` heads of an attention kernel as a matrix of their own."""
    if config.heads_per_matrix is None:
        return list(rules)
    split = []
    for rule in rules:
        axes = rule.axes or ()
        head_axis = next((name for name in ("heads", "kv_heads") if name in axes), None)
        if head_axis is not None:
            heads = (axes.index(head_axis) - len(axes), config.heads_per_matrix)
            rule = dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, heads=heads))
        split.append(rule)
    return split

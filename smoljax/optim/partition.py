"""Which optimizer each parameter gets: decided by its role, which its path or its logical axes tell, never by its rank."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError


@dataclasses.dataclass(frozen=True)
class MatrixSpec:
    """Which axes of a kernel are the input of its matrix and which the output; every other axis counts matrices.

    A fused query, key and value kernel [D, N + 2 K, H] whose heads are orthogonalised in pairs:
    MatrixSpec(inputs=(-3,), outputs=(-2, -1), split=(N, K, K), heads=(-2, 2)).

    Attributes:
      inputs: axes that x @ W sums over, counted from the end (-2 is the last but one) or from the front.
      outputs: axes of the result, likewise.
      split: sizes of the pieces along the first output axis of a fused kernel; each piece holds matrices of its own.
        Empty: the kernel is one piece.
      heads: (axis, per_matrix): along this input or output axis every `per_matrix` heads make a matrix of their own.
        None: all heads together make one.
    """

    inputs: tuple[int, ...] = (-2,)
    outputs: tuple[int, ...] = (-1,)
    split: tuple[int, ...] = ()
    heads: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of the role table: leaves that match get the role.

    Attributes:
      role: "hidden", "embedding", "head", "norm", or a name of your own.
      axes: logical axis names that the leaf must have, after leading batch axes (BATCH_AXES) are taken off.
      path: regular expression that is searched in the leaf's path ("layers/mlp/gate").
      spec: the matrix inside the leaf; for roles that Muon updates.
    """

    role: str
    axes: tuple[str, ...] | None = None
    path: str | None = None
    spec: MatrixSpec = MatrixSpec()


@dataclasses.dataclass(frozen=True)
class Treatment:
    """What happens to the leaves of one role.

    Attributes:
      optimizer: name of what turns their gradients into directions ("muon", "adamw", ...).
      learning_rate: their peak rate.
      weight_decay: strength of the decoupled decay; 0 is none.
      eps: Adam's.
      schedule: name of the schedule that their rate follows.
    """

    optimizer: str
    learning_rate: float
    weight_decay: float
    eps: float
    schedule: str


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The role of one leaf and the matrix inside it."""

    role: str
    spec: MatrixSpec


BATCH_AXES = ("layers", "experts")  # Each index along them is a matrix, or a vector, of its own.

_TO_HEADS = MatrixSpec(inputs=(-3,), outputs=(-2, -1))
_FROM_HEADS = MatrixSpec(inputs=(-3, -2), outputs=(-1,))

# The roles of smoljax.model's parameters. The first rule that matches counts.
RULES = (
    Rule("embedding", axes=("vocab", "embed")),
    Rule("head", axes=("embed", "vocab")),
    Rule("norm", axes=("embed",)),
    Rule("norm", axes=("head_dim",)),
    Rule("hidden", axes=("embed", "heads", "head_dim"), spec=_TO_HEADS),
    Rule("hidden", axes=("embed", "kv_heads", "head_dim"), spec=_TO_HEADS),
    Rule("hidden", axes=("heads", "head_dim", "embed"), spec=_FROM_HEADS),
    Rule("hidden", axes=("embed", "mlp")),
    Rule("hidden", axes=("mlp", "embed")),
)


def assign(
    params: optax.Params,
    *,
    logical_axes: object | None = None,
    rules: Sequence[Rule] = RULES,
) -> dict[str, Assignment]:
    """The role of every leaf, by path.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      logical_axes: the same tree with a tuple of axis names for each leaf; None when all rules go by path.
      rules: the role table; the first rule that matches counts.

    Raises:
      SmoljaxError: a leaf that no rule matches (all of them are listed), a leaf that is not a real float, axis names
        that do not fit a leaf, or a rule whose matrix the leaf cannot hold.
    """
    axes = _axes_by_path(logical_axes)
    assignments, unmatched = {}, []
    for path, leaf in by_path(params).items():
        check_float(path, leaf)
        if logical_axes is not None and len(axes.get(path, ())) != leaf.ndim:
            raise SmoljaxError(
                f"parameter {path} has shape {list(leaf.shape)} and logical axes {axes.get(path)}: "
                "give one axis name for each axis"
            )
        rule = next((rule for rule in rules if _matches(rule, path, axes.get(path))), None)
        if rule is None:
            unmatched.append(f"{path} {list(leaf.shape)} axes {axes.get(path)}")
        else:
            assignments[path] = Assignment(rule.role, rule.spec)
    if unmatched:
        raise SmoljaxError(
            f"no role rule matches {len(unmatched)} parameter(s): {'; '.join(unmatched)}. "
            "Add a smoljax.optim.Rule for them: their rank does not tell which optimizer they need"
        )
    return assignments


def describe(
    params: optax.Params,
    treatments: Mapping[str, Treatment],
    *,
    logical_axes: object | None = None,
    rules: Sequence[Rule] = RULES,
) -> str:
    """A table of every leaf: path, shape, parameters, role, optimizer, peak learning rate, weight decay, schedule.

    Args:
      params: tree of arrays or ShapeDtypeStructs.
      treatments: what happens to each role (see smoljax.optim.treatments).
      logical_axes: the same tree with a tuple of axis names for each leaf.
      rules: the role table.
    """
    assignments = assign(params, logical_axes=logical_axes, rules=rules)
    lines = [("parameter", "shape", "count", "role", "optimizer", "rate", "decay", "schedule")]
    counts: dict[str, int] = {}
    for path, leaf in by_path(params).items():
        role = assignments[path].role
        treatment = treatment_of(role, treatments)
        count = math.prod(leaf.shape)
        counts[treatment.optimizer] = counts.get(treatment.optimizer, 0) + count
        lines.append(
            (
                path,
                "x".join(str(size) for size in leaf.shape) or "scalar",
                f"{count:,}",
                role,
                treatment.optimizer,
                f"{treatment.learning_rate:g}",
                f"{treatment.weight_decay:g}",
                treatment.schedule,
            )
        )
    empty = ("",) * 5
    for optimizer in sorted(counts):
        lines.append((f"all of {optimizer}", "", f"{counts[optimizer]:,}", *empty))
    lines.append(("all", "", f"{sum(counts.values()):,}", *empty))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    right = (False, False, True, False, False, True, True, False)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right)
        ).rstrip()
        for line in lines
    )


def treatment_of(role: str, treatments: Mapping[str, Treatment]) -> Treatment:
    """The treatment of a role.

    Raises:
      SmoljaxError: the table has no such role.
    """
    if role not in treatments:
        raise SmoljaxError(
            f"role {role!r} has no treatment: add it to the table, which has {', '.join(treatments)}"
        )
    return treatments[role]


def by_path(tree: object) -> dict[str, object]:
    """The leaves of a tree by their path, as in "layers/mlp/gate", in tree order.

    Raises:
      SmoljaxError: two leaves have one path, as {"a/b": x, "a": {"b": y}} has.
    """
    leaves = [
        (path_string(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    ]
    found = dict(leaves)
    if len(found) < len(leaves):
        paths = [path for path, _ in leaves]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        raise SmoljaxError(
            f"several leaves of the tree have the path {', '.join(twice)}: rename a key that has a slash in it"
        )
    return found


def path_string(path: tuple) -> str:
    """A tree path joined by slashes."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def check_float(path: str, leaf: jax.typing.ArrayLike | jax.ShapeDtypeStruct) -> None:
    """Raises a SmoljaxError for a leaf that is not a real float."""
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise SmoljaxError(
            f"parameter {path} is {dtype}: optimizers here update real floats; keep it out of the parameters "
            "(optax.masked, optax.partition)"
        )


def check_floats(params: optax.Params) -> None:
    """check_float of every leaf."""
    for path, leaf in by_path(params).items():
        check_float(path, leaf)


def _axes_by_path(logical_axes: object | None) -> dict[str, tuple[str, ...]]:
    if logical_axes is None:
        return {}
    leaves = jax.tree_util.tree_flatten_with_path(
        logical_axes, is_leaf=lambda node: isinstance(node, tuple)
    )[0]
    return {path_string(path): names for path, names in leaves}


def _matches(rule: Rule, path: str, axes: tuple[str, ...] | None) -> bool:
    if rule.path is None and rule.axes is None:
        raise SmoljaxError(f"the rule for role {rule.role!r} has neither axes nor a path: give one")
    if rule.path is not None and not re.search(rule.path, path):
        return False
    if rule.axes is None:
        return True
    if axes is None:
        return False
    split = len(axes) - len(rule.axes)
    return split >= 0 and axes[split:] == rule.axes and all(a in BATCH_AXES for a in axes[:split])

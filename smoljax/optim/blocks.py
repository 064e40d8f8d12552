"""Blocks of a gradient, each with a norm of its own: a leaf, or each index of the leaf's leading axes that count layers.

C leading axes of a leaf that count its blocks; B all blocks of a tree
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.partition import BATCH_AXES, by_path, path_string

BatchAxes = object | Callable[[optax.Params], object] | None


class GradientReport(NamedTuple):
    """What a transformation of the gradient did in its last update. All are float32 scalars.

    Attributes:
      norm: the global L2 norm before it.
      clipped: the share of blocks that it scaled down (0 or 1 where the whole gradient is one block).
      cosine: between the gradient that it returned and the one that it was given; 1 when it kept the direction.
    """

    norm: jax.Array
    clipped: jax.Array
    cosine: jax.Array


def no_report() -> GradientReport:
    """The report before the first update."""
    return GradientReport(
        norm=jnp.zeros([], jnp.float32),
        clipped=jnp.zeros([], jnp.float32),
        cosine=jnp.ones([], jnp.float32),
    )


def stacked_axes(logical_axes: object) -> object:
    """The tree of batch_axes that the logical axis names tell: how many names at the front are "layers" or "experts".

    Args:
      logical_axes: tree with a tuple of axis names for each leaf.
    """

    def count(names: tuple[str, ...]) -> int:
        leading = 0
        while leading < len(names) and names[leading] in BATCH_AXES:
            leading += 1
        return leading

    return jax.tree.map(count, logical_axes, is_leaf=lambda node: isinstance(node, tuple))


def axes_by_path(batch_axes: BatchAxes, tree: optax.Params) -> dict[str, int]:
    """How many leading axes of each leaf count blocks; by path, so that trees masked by optax work too.

    Args:
      batch_axes: tree with an integer for each leaf, or a function from the tree to one. None: each leaf is one block.
      tree: parameters, updates, or their shapes.

    Raises:
      SmoljaxError: a leaf without a number, or with one that its shape does not allow.
    """
    leaves = by_path(tree)
    if batch_axes is None:
        return dict.fromkeys(leaves, 0)
    found = by_path(batch_axes(tree) if callable(batch_axes) else batch_axes)
    for path, leaf in leaves.items():
        axes = found.get(path)
        if not isinstance(axes, int) or not 0 <= axes <= leaf.ndim:
            raise SmoljaxError(
                f"batch_axes of parameter {path}, which has shape {list(leaf.shape)}, is {axes!r}: "
                f"give the number of its leading axes that count blocks, 0 to {leaf.ndim}"
            )
    return found


def block_norms(tree: optax.Updates, axes: dict[str, int]) -> object:
    """A tree like the given one with the L2 norms of each leaf's blocks: float32 [*C]."""

    def norms(path: tuple, leaf: jax.Array) -> jax.Array:
        within = tuple(range(axes[path_string(path)], leaf.ndim))
        return jnp.sqrt(jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=within))

    return jax.tree_util.tree_map_with_path(norms, tree)


def norm_of_all(norms: object) -> jax.Array:
    """The global norm from the norms of the blocks: a float32 scalar."""
    return jnp.sqrt(sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(norms)), 0.0))


def scale_blocks(tree: optax.Updates, factors: object) -> optax.Updates:
    """The tree with each block times its factor [*C], in the leaf's dtype. A block whose factor is 1 stays bitwise as it is."""

    def scale(leaf: jax.Array, factor: jax.Array) -> jax.Array:
        factor = factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))
        return (leaf.astype(jnp.float32) * factor).astype(leaf.dtype)

    return jax.tree.map(scale, tree, factors)


def scaling_report(norms: object, factors: object) -> GradientReport:
    """The report on scale_blocks, from the norms and factors of the blocks alone.

    With r_b = f_b g_b the cosine is sum f_b |g_b|^2 / sqrt(sum f_b^2 |g_b|^2 * sum |g_b|^2): the gradient is not read again.
    """
    norm_B, factor_B = _flat(norms), _flat(factors)
    # Relative to the largest, so that no square overflows; where all are 0, every term below is 0 anyway.
    share_B = norm_B / _or_one(jnp.max(norm_B, initial=0.0))
    scale_B = factor_B / _or_one(jnp.max(factor_B, initial=0.0))
    before = jnp.sum(jnp.square(share_B))
    both = jnp.sum(scale_B * jnp.square(share_B))
    after = jnp.sum(jnp.square(scale_B * share_B))
    return GradientReport(
        norm=norm_of_all(norms),
        clipped=jnp.sum((factor_B < 1).astype(jnp.float32)) / max(norm_B.size, 1),
        cosine=jnp.where(both == 0, 1.0, both / jnp.sqrt(before * after)),
    )


def _flat(tree: object) -> jax.Array:
    leaves = [leaf.astype(jnp.float32).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros([0], jnp.float32)


def _or_one(number: jax.Array) -> jax.Array:
    return jnp.where(number == 0, 1.0, number)

"""Clipping by the global norm, which remembers the norm and whether it clipped."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError


class ClipState(NamedTuple):
    """What the last update saw.

    Attributes:
      norm: float32 scalar, the global L2 norm of the gradient before clipping.
      clipped: float32 scalar, 1 if the gradient was scaled down, else 0.
    """

    norm: jax.Array
    clipped: jax.Array


def clip_by_global_norm(max_norm: float | None) -> optax.GradientTransformation:
    """Scales the gradient to the norm `max_norm` when its global norm is larger (Pascanu et al., arXiv 1211.5063).

    The values are those of optax.clip_by_global_norm; the norm is accumulated in float32 for every leaf dtype.
    A gradient that holds NaN passes on as NaN.

    Args:
      max_norm: the largest norm that passes unchanged; None only measures.

    Raises:
      SmoljaxError: max_norm is not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise SmoljaxError(
            f"clip_norm is {max_norm}: give a positive number, or None for no clipping"
        )

    def init(params: optax.Params) -> ClipState:
        del params
        return ClipState(norm=jnp.zeros([], jnp.float32), clipped=jnp.zeros([], jnp.float32))

    def update(
        updates: optax.Updates, state: ClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipState]:
        del state, params
        norm = global_norm(updates)
        if max_norm is None:
            return updates, ClipState(norm=norm, clipped=jnp.zeros([], jnp.float32))
        within = norm < max_norm
        updates = jax.tree.map(
            lambda leaf: jnp.where(within, leaf, (leaf / norm.astype(leaf.dtype)) * max_norm),
            updates,
        )
        return updates, ClipState(norm=norm, clipped=1.0 - within.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


def global_norm(tree: optax.Updates) -> jax.Array:
    """L2 norm of all leaves together: a float32 scalar."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))

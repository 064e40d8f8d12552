"""Clipping of gradients: by a fixed global norm, per tensor by its own history (AdaGC), by the z-score of the norm (ZClip)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from smoljax.optim.blocks import (
    BatchAxes,
    GradientReport,
    axes_by_path,
    block_norms,
    no_report,
    norm_of_all,
    scale_blocks,
    scaling_report,
)
from smoljax.optim.hyperparameters import check_number
from smoljax.optim.partition import check_floats


class ClipState(NamedTuple):
    """State of clip_by_global_norm: what the last update saw.

    Attributes:
      norm: float32 scalar, the global L2 norm of the gradient before clipping.
      clipped: float32 scalar, 1 if the gradient was scaled down, else 0.
    """

    norm: jax.Array
    clipped: jax.Array

    @property
    def report(self) -> GradientReport:
        """The two, and the cosine, which a factor common to all leaves cannot change."""
        cosine = jnp.where(jnp.isfinite(self.norm), 1.0, jnp.nan)
        return GradientReport(norm=self.norm, clipped=self.clipped, cosine=cosine)


def clip_by_global_norm(max_norm: float | None) -> optax.GradientTransformation:
    """Scales the gradient to the norm `max_norm` when its global norm is larger (Pascanu et al., arXiv 1211.5063).

    The values are those of optax.clip_by_global_norm; the norm is accumulated in float32 for every leaf dtype.
    A gradient that holds NaN passes on as NaN.

    Args:
      max_norm: the largest norm that passes unchanged; None only measures.

    Raises:
      SmoljaxError: at once for a max_norm that is not positive; in init for a leaf that is no real float.
    """
    if max_norm is not None:
        check_number("clip_norm", max_norm, above=0)

    def init(params: optax.Params) -> ClipState:
        check_floats(params)
        return ClipState(norm=jnp.zeros([], jnp.float32), clipped=jnp.zeros([], jnp.float32))

    def update(
        updates: optax.Updates, state: ClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipState]:
        del state, params
        norm = global_norm(updates)
        if max_norm is None:
            return updates, ClipState(norm=norm, clipped=jnp.zeros([], jnp.float32))
        within = norm < max_norm

        def clip(leaf: jax.Array) -> jax.Array:
            clipped = (leaf / norm.astype(leaf.dtype)) * max_norm
            return jnp.where(within, leaf, clipped.astype(leaf.dtype))

        updates = jax.tree.map(clip, updates)
        return updates, ClipState(norm=norm, clipped=1.0 - within.astype(jnp.float32))

    return optax.GradientTransformation(init, update)


class AdaGCState(NamedTuple):
    """State of adagc.

    Attributes:
      count: int32 scalar, updates so far.
      averages: tree like the parameters with the moving average of the clipped norm of each block, float32
        [*C]; inf for a block that has had no norm yet.
      report: what the last update did.
    """

    count: jax.Array
    averages: object
    report: GradientReport


def adagc(
    *,
    relative: float = 1.04,
    beta: float = 0.99,
    max_norm: float | None = 1.0,
    warmup_steps: int = 100,
    batch_axes: BatchAxes = None,
) -> optax.GradientTransformation:
    """Clips each tensor against the moving average of its own clipped norms (AdaGC, arXiv 2502.11034).

    Up to warmup_steps the whole gradient is clipped to the global norm max_norm, and the average a_b of block b is the
    smallest clipped norm so far. Afterwards, for each block,

      h_b = min(1, relative * a_b / |g_b|),   g_b <- h_b g_b,   a_b <- beta * a_b + (1 - beta) * |h_b g_b|.

    So one bad tensor does not shrink the others, as it does under a global norm. The defaults are those of the authors'
    code (github.com/lishuai-97/AdaGC, megatron-gpt2.patch at 32c249f: clip-ratio 1.04, clip-beta 0.99, 100 steps, norm
    1.0 for a GPT of 345M). Other ports use relative 1.05 and beta 0.98; whether the paper gives these is not verified.

    Two rules are ours. Norms that are not finite, or that are 0, never enter an average: a block whose gradient is 0 at the
    first step (behind a projection that starts at 0) would have average 0, and be clipped to 0, for ever. And a block, or in the
    warmup a gradient, whose norm is not finite passes unchanged: NaN propagates.

    An average grows by at most the factor beta + (1 - beta) * relative per step (1.0004 by default), so a
    block whose smallest norm in the warmup was far below the usual one stays clipped for long: with such starts, warm up
    the learning rate first, or lower beta.

    Args:
      relative: the largest norm that passes, as a multiple of the average.
      beta: decay of the average.
      max_norm: the global norm of the warmup; None does not clip there.
      warmup_steps: updates with the global norm.
      batch_axes: tree with the number of leading axes that count blocks for each leaf, or a function from the tree to one: with 1,
        a scanned [L, ...] leaf clips each layer alone (see stacked_axes). None: each leaf is one block. Under
        optax.inject_hyperparams, name it in static_args.

    Raises:
      SmoljaxError: at once for a number out of range; in init for a leaf that is no real float, or batch_axes that do not fit.
    """
    check_number("relative", relative, above=0)
    check_number("beta", beta, at_least=0, below=1)
    check_number("warmup_steps", warmup_steps, at_least=0)
    if max_norm is not None:
        check_number("max_norm", max_norm, above=0)

    def init(params: optax.Params) -> AdaGCState:
        check_floats(params)
        axes = axes_by_path(batch_axes, params)
        norms = jax.eval_shape(lambda tree: block_norms(tree, axes), params)
        return AdaGCState(
            count=jnp.zeros([], jnp.int32),
            averages=jax.tree.map(lambda norm: jnp.full(norm.shape, jnp.inf, norm.dtype), norms),
            report=no_report(),
        )

    def update(
        updates: optax.Updates, state: AdaGCState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, AdaGCState]:
        del params
        norms = block_norms(updates, axes_by_path(batch_axes, updates))
        total = norm_of_all(norms)
        warm = state.count < warmup_steps
        of_all = 1.0 if max_norm is None else _factor(total, max_norm)

        def factor(norm: jax.Array, average: jax.Array) -> jax.Array:
            return jnp.where(warm, of_all, _factor(norm, relative * average))

        def averaged(norm: jax.Array, average: jax.Array, factor: jax.Array) -> jax.Array:
            norm = factor * norm
            moved = jnp.where(jnp.isinf(average), norm, beta * average + (1 - beta) * norm)
            moved = jnp.where(warm, jnp.minimum(average, norm), moved)
            counts = jnp.isfinite(norm) & (norm > 0) & (~warm | jnp.isfinite(total))
            return jnp.where(counts, moved, average)

        factors = jax.tree.map(factor, norms, state.averages)
        return scale_blocks(updates, factors), AdaGCState(
            count=optax.safe_increment(state.count),
            averages=jax.tree.map(averaged, norms, state.averages, factors),
            report=scaling_report(norms, factors),
        )

    return optax.GradientTransformation(init, update)


class ZClipState(NamedTuple):
    """State of zclip.

    Attributes:
      count: int32 scalar, norms that entered the statistics so far.
      mean: float32 scalar, of the norms.
      variance: float32 scalar, likewise.
      report: what the last update did.
    """

    count: jax.Array
    mean: jax.Array
    variance: jax.Array
    report: GradientReport


def zclip(
    *,
    alpha: float = 0.97,
    threshold: float = 2.5,
    warmup_steps: int = 25,
    max_norm: float | None = None,
    eps: float = 1e-6,
) -> optax.GradientTransformation:
    """Clips the gradient when the z-score of its global norm is high (ZClip, arXiv 2504.02507).

    With the moving mean m and standard deviation s of the norm, z = (|g| - m) / (s + eps), and where z > threshold the
    gradient is scaled to the norm

      c = m + threshold^2 / z * s,

    so the larger the spike, the nearer to the mean. Then, with n = c or, unclipped, n = |g|,

      m <- alpha * m + (1 - alpha) * n,   s^2 <- alpha * s^2 + (1 - alpha) * (n - m)^2   with the new m.

    The first warmup_steps norms only start the statistics, with their mean and variance. Rule and defaults are those of the
    authors' code (github.com/bluorion-com/ZClip, zclip.py at 1acb085, mode "zscore" with "adaptive_scaling"); it too keeps
    the limit max_norm out of the statistics, and its own default for that limit is 1.0, in the README None.

    A norm that is not finite does not enter the statistics (ours), and its gradient passes unchanged: NaN propagates.

    Args:
      alpha: decay of the mean and the variance.
      threshold: the largest z-score that passes.
      warmup_steps: norms that start the statistics; nothing is clipped meanwhile, except to max_norm. At least 2.
      max_norm: a limit for all norms besides; None: none.
      eps: added to the standard deviation.

    Raises:
      SmoljaxError: at once for a number out of range; in init for a leaf that is no real float.
    """
    check_number("alpha", alpha, at_least=0, below=1)
    check_number("threshold", threshold, above=0)
    check_number("warmup_steps", warmup_steps, at_least=2)
    check_number("eps", eps, at_least=0)
    if max_norm is not None:
        check_number("max_norm", max_norm, above=0)

    def init(params: optax.Params) -> ZClipState:
        check_floats(params)
        return ZClipState(
            count=jnp.zeros([], jnp.int32),
            mean=jnp.zeros([], jnp.float32),
            variance=jnp.zeros([], jnp.float32),
            report=no_report(),
        )

    def update(
        updates: optax.Updates, state: ZClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ZClipState]:
        del params
        norm = global_norm(updates)
        warm = state.count < warmup_steps
        deviation = jnp.sqrt(state.variance)
        z = (norm - state.mean) / (deviation + eps)
        spike = ~warm & (z > threshold)
        limit = jnp.where(spike, state.mean + threshold**2 / z * deviation, norm)
        largest = limit if max_norm is None else jnp.minimum(limit, max_norm)
        factor = _factor(norm, largest)

        # Welford's running mean and variance in the warmup: the first norms need not be kept.
        seen = (state.count + 1).astype(jnp.float32)
        weight = jnp.where(warm, 1 / seen, 1 - alpha)
        mean = state.mean + weight * (limit - state.mean)
        square = jnp.where(warm, (limit - state.mean) * (limit - mean), jnp.square(limit - mean))
        variance = state.variance + weight * (square - state.variance)
        finite = jnp.isfinite(norm)
        return scale_blocks(updates, jax.tree.map(lambda _: factor, updates)), ZClipState(
            count=jnp.where(finite, optax.safe_increment(state.count), state.count),
            mean=jnp.where(finite, mean, state.mean),
            variance=jnp.where(finite, variance, state.variance),
            report=GradientReport(
                norm=norm,
                clipped=(factor < 1).astype(jnp.float32),
                cosine=jnp.where(finite, 1.0, jnp.nan),
            ),
        )

    return optax.GradientTransformation(init, update)


def global_norm(tree: optax.Updates) -> jax.Array:
    """L2 norm of all leaves together: a float32 scalar."""
    leaves = jax.tree.leaves(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def _factor(norm: jax.Array, largest: jax.typing.ArrayLike) -> jax.Array:
    """What takes the norm down to the largest; 1 for a norm that is within it or not finite."""
    above = jnp.isfinite(norm) & (norm > largest)
    return jnp.where(above, largest / jnp.where(above, norm, 1.0), 1.0)

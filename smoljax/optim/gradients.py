"""What can be done to gradients before an optimizer sees them, beside clipping: unit size per block, mean removed."""

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
from smoljax.optim.matrices import Specs, check_matrices, specs_by_path
from smoljax.optim.partition import by_path, check_floats, path_string


class NormalizeState(NamedTuple):
    """State of normalize_blocks: report, what the last update did."""

    report: GradientReport


class CentralizeState(NamedTuple):
    """State of centralize: report, what the last update did."""

    report: GradientReport


def normalize_blocks(
    *, batch_axes: BatchAxes = None, rms: float = 1.0
) -> optax.GradientTransformation:
    """Scales the gradient of each block to one root mean square, keeping its direction.

    Blocks with small gradients then weigh as much as those with large ones (block-normalised gradient descent, arXiv
    1707.04822); within a block nothing changes but the length. A block of zeros stays zero, one that holds NaN becomes NaN.

    Args:
      batch_axes: how many leading axes of each leaf count blocks (layers); None: each leaf is one block.
      rms: the root mean square that each block gets.

    Raises:
      SmoljaxError: at once for an rms that is not positive; in init for a leaf that is no real float, or batch_axes that do
        not fit it.
    """
    check_number("rms", rms, above=0)

    def init(params: optax.Params) -> NormalizeState:
        check_floats(params)
        axes_by_path(batch_axes, params)
        return NormalizeState(no_report())

    def update(updates, state, params=None):
        del state, params
        norms = block_norms(updates, axes_by_path(batch_axes, updates))

        def factor(norm: jax.Array, leaf: jax.Array) -> jax.Array:
            size = leaf.size / max(norm.size, 1)
            return jnp.where(norm == 0, 1.0, rms * size**0.5 / jnp.where(norm == 0, 1.0, norm))

        factors = jax.tree.map(factor, norms, updates)
        return scale_blocks(updates, factors), NormalizeState(scaling_report(norms, factors))

    return optax.GradientTransformation(init, update)


def centralize(specs: Specs = None) -> optax.GradientTransformation:
    """Takes from the gradient of each output neuron its mean over the inputs (gradient centralization, arXiv 2004.01461, equation 1).

    Args:
      specs: as in scale_by_muon: which axes of a leaf are inputs.

    Raises:
      SmoljaxError: in init for a leaf that holds no matrix or no real float.
    """

    def init(params: optax.Params) -> CentralizeState:
        check_matrices(params, specs_by_path(specs, params))
        return CentralizeState(no_report())

    def update(updates, state, params=None):
        del state, params
        spec = specs_by_path(specs, updates)

        def centre(path: tuple, leaf: jax.Array) -> jax.Array:
            mean = jnp.mean(
                leaf.astype(jnp.float32), axis=spec[path_string(path)].inputs, keepdims=True
            )
            return (leaf.astype(jnp.float32) - mean).astype(leaf.dtype)

        centred = jax.tree_util.tree_map_with_path(centre, updates)
        whole = dict.fromkeys(by_path(updates), 0)
        before = norm_of_all(block_norms(updates, whole))
        after = norm_of_all(block_norms(centred, whole))
        # What is taken away is at right angles to what stays, so the cosine is the ratio of the norms.
        cosine = jnp.where(before == 0, 1.0, after / jnp.where(before == 0, 1.0, before))
        return centred, CentralizeState(GradientReport(before, jnp.zeros([], jnp.float32), cosine))

    return optax.GradientTransformation(init, update)

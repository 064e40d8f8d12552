"""What an optimizer did in its last step, read from its state: norms, clips, skips, and the size of every leaf's update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.blocks import GradientReport
from smoljax.optim.clip import AdaGCState, ClipState, ZClipState
from smoljax.optim.gradients import CentralizeState, NormalizeState
from smoljax.optim.muon import MuonState
from smoljax.optim.partition import by_path, check_floats
from smoljax.optim.qk_clip import MaxLogits, clipped_heads
from smoljax.optim.skip import SkipState


class Metrics(NamedTuple):
    """All float32 scalars, or dicts of them by the path of the leaf; None or empty where nothing measures it.

    Attributes:
      gradient_norm: global L2 norm of the gradient as it came.
      clipped: share of the tensors that were scaled down.
      gradient_cosine: cosine between the gradient after clipping and before; 1 when only its length changed.
      centralized_cosine: likewise for centralize, over the leaves that it centres.
      normalized_cosine: likewise for normalize_blocks.
      skipped: steps left out so far.
      max_logit: the largest attention logit of all heads, of the max_logits given.
      qk_clipped: the fraction of heads that qk_clip scales down at these.
      update_rms: root mean square of each leaf's update.
      update_ratio: L2 norm of each leaf's update over that of the leaf.
      orthogonality_error: Muon: RMS of sigma^2 - 1 over the singular values of the matrices in a leaf.
      momentum_cosine: Muon: cosine between momentum and gradient.
    """

    gradient_norm: jax.Array | None
    clipped: jax.Array | None
    gradient_cosine: jax.Array | None
    centralized_cosine: jax.Array | None
    normalized_cosine: jax.Array | None
    skipped: jax.Array | None
    max_logit: jax.Array | None
    qk_clipped: jax.Array | None
    update_rms: dict[str, jax.Array]
    update_ratio: dict[str, jax.Array]
    orthogonality_error: dict[str, jax.Array]
    momentum_cosine: dict[str, jax.Array]

    def scalars(self) -> dict[str, jax.Array]:
        """All that is measured under one name each, as in "update_rms/layers/mlp/gate"."""
        named = {}
        for field, value in self._asdict().items():
            if isinstance(value, dict):
                named |= {f"{field}/{path}": scalar for path, scalar in value.items()}
            elif value is not None:
                named[field] = value
        return named


class UpdateSizes(NamedTuple):
    """State of measure_updates: trees of the parameters' structure with a float32 scalar for each leaf."""

    rms: object
    ratio: object


def measure_updates() -> optax.GradientTransformation:
    """A last link that changes nothing and remembers how large every leaf's update was.

    Raises:
      SmoljaxError: in init for a leaf that is no real float; in update, when it gets no parameters.
    """

    def init(params: optax.Params) -> UpdateSizes:
        check_floats(params)
        zeros = jax.tree.map(lambda _: jnp.zeros([], jnp.float32), params)
        return UpdateSizes(rms=zeros, ratio=zeros)

    def update(updates, state, params=None):
        del state
        if params is None:
            raise SmoljaxError(
                "measure_updates needs the parameters: call update(updates, state, params)"
            )
        squares = jax.tree.map(_sum_of_squares, updates)
        rms = jax.tree.map(lambda square, leaf: jnp.sqrt(square / leaf.size), squares, updates)
        ratio = jax.tree.map(
            lambda square, leaf: jnp.sqrt(square / jnp.maximum(_sum_of_squares(leaf), 1e-30)),
            squares,
            params,
        )
        return updates, UpdateSizes(rms=rms, ratio=ratio)

    return optax.GradientTransformation(init, update)


def metrics(
    state: optax.OptState, *, max_logits: MaxLogits | None = None, tau: float = 100.0
) -> Metrics:
    """What the links inside an optimizer state report of their last update, wherever they are in it.

    Args:
      state: an optimizer state after an update.
      max_logits: what qk_clip got in this step, and tau; None where it is not used.
    """
    logits = [jnp.max(each) for each in jax.tree.leaves(max_logits)]
    clip = _report(state, (ClipState, AdaGCState, ZClipState))
    centralized, normalized = _report(state, CentralizeState), _report(state, NormalizeState)
    skips = _found(state, SkipState)
    sizes = _found(state, UpdateSizes)
    matrices = {
        path: measured
        for muon in _found(state, MuonState)
        for path, measured in (muon.metrics or {}).items()
    }
    return Metrics(
        gradient_norm=clip and clip.norm,
        clipped=clip and clip.clipped,
        gradient_cosine=clip and clip.cosine,
        centralized_cosine=centralized and centralized.cosine,
        normalized_cosine=normalized and normalized.cosine,
        skipped=skips[0].report.skipped_total if skips else None,
        max_logit=jnp.max(jnp.stack(logits)).astype(jnp.float32) if logits else None,
        qk_clipped=None if max_logits is None else clipped_heads(max_logits, tau),
        update_rms=by_path(sizes[0].rms) if sizes else {},
        update_ratio=by_path(sizes[0].ratio) if sizes else {},
        orthogonality_error={path: each.orthogonality_error for path, each in matrices.items()},
        momentum_cosine={path: each.momentum_cosine for path, each in matrices.items()},
    )


def _report(state: object, kind: type | tuple[type, ...]) -> GradientReport | None:
    """What the first state of a type reports; None where there is none."""
    return next((node.report for node in _found(state, kind)), None)


def _found(state: object, kind: type | tuple[type, ...]) -> list:
    """Every node of a type in a tree, in tree order."""
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in nodes if isinstance(node, kind)]


def _sum_of_squares(leaf: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(jnp.asarray(leaf, jnp.float32)))

"""One training step and one evaluation step: pure functions, compiled over the mesh.

B batch, S sequence, A micro-batches
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax import losses, parallel
from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, hidden, unembedding
from smoljax.training.state import TrainState


def loss_sum(
    config: ModelConfig, params: dict, batch: dict, *, loss_chunk: int, z_loss: float
) -> tuple[jax.Array, dict]:
    """Summed loss of a batch in nats, with the cross-entropy alone and the number of targets beside it.

    Args:
      config: the model.
      params: its parameters.
      batch: [B, S] arrays tokens, targets, segment_ids (int32) and loss_mask (bool).
      loss_chunk: tokens per chunk of the cross-entropy; no more logits than that exist at once.
      z_loss: weight of the squared log-normaliser (PaLM, section 5); 0 leaves it out.
    """
    # RoPE counts from the start of the row, not of the document: only differences matter, a token sees no
    # other document, and small angles are exact (position 60,000 has an error of 0.004 radians in f32).
    hidden_BSD = hidden(config, params, batch["tokens"], batch["segment_ids"])
    total, num_targets, metrics = losses.cross_entropy(
        hidden_BSD,
        unembedding(config, params),
        batch["targets"],
        batch["loss_mask"],
        chunk_size=loss_chunk,
        z_loss=z_loss,
    )
    return total, {"cross_entropy": metrics["cross_entropy"], "num_targets": num_targets}


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    shardings: TrainState,
    micro_batches: int,
    loss_chunk: int,
    z_loss: float,
    quantization: str = "",
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Compiles (state, batch) -> (state, metrics), with the state donated.

    The gradient is that of the mean over all targets of the batch, however many micro-batches it is
    taken in. Metrics (f32 scalars): loss (nats per target), grad_norm, param_norm, num_targets.
    """
    loss = functools.partial(loss_sum, config, loss_chunk=loss_chunk, z_loss=z_loss)
    gradient = jax.grad(_rounded(loss, config, quantization), has_aux=True)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        grads, sums = _accumulate(gradient, state.params, batch, micro_batches)
        num_targets = jnp.maximum(sums["num_targets"], 1)
        grads = jax.tree.map(lambda grad: grad / num_targets, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": sums["cross_entropy"] / num_targets,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            "num_targets": sums["num_targets"],
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    compiled = jax.jit(
        step,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
    )
    return _on_mesh(compiled, mesh)


def make_eval_step(
    config: ModelConfig, *, mesh: Mesh, shardings: dict, loss_chunk: int, quantization: str = ""
) -> Callable[[dict, dict], dict]:
    """Compiles (params, batch) -> {"cross_entropy": sum in nats, "num_targets"}."""

    loss = functools.partial(loss_sum, config, loss_chunk=loss_chunk, z_loss=0.0)
    loss = _rounded(loss, config, quantization)

    def step(params: dict, batch: dict) -> dict:
        return loss(params, batch)[1]

    compiled = jax.jit(step, in_shardings=(shardings, parallel.batch_sharding(mesh)))
    return _on_mesh(compiled, mesh)


def _rounded(loss: Callable, config: ModelConfig, quantization: str) -> Callable:
    """The loss of (params, batch) with rounded weights, through which gradients pass; itself when nothing is rounded."""
    if not quantization:
        return loss
    from smoljax.interop import quantize  # qwix comes with the extra "export".

    if quantization not in quantize.SCHEMES:
        raise SmoljaxError(
            f'config.training.quantization is {quantization!r}: set it to one of {", ".join(quantize.SCHEMES)}, or to ""'
        )

    def rounded(params: dict, batch: dict) -> tuple[jax.Array, dict]:
        return loss(quantize.fake_quantized(config, params, quantization), batch)

    return quantize.integer_matmuls(rounded)


def _accumulate(gradient: Callable, params: dict, batch: dict, micro_batches: int):
    if micro_batches == 1:
        return gradient(params, batch)

    # Micro-batch a takes every A-th row: so each device keeps its own rows, and nothing is exchanged.
    def split(x_BS):
        rows = x_BS.shape[0] // micro_batches
        return jnp.swapaxes(x_BS.reshape(rows, micro_batches, *x_BS.shape[1:]), 0, 1)

    def add(sums, micro_batch):
        return jax.tree.map(jnp.add, sums, gradient(params, micro_batch)), None

    batch_ABS = jax.tree.map(split, batch)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x_ABS: x_ABS[0], batch_ABS)),
    )
    sums, _ = jax.lax.scan(add, zeros, batch_ABS)
    return sums


def _on_mesh(function: Callable, mesh: Mesh) -> Callable:
    @functools.wraps(function)
    def call(*args):
        with parallel.active(mesh):
            return function(*args)

    call.lower = function.lower
    return call

"""One training step and one evaluation step: pure functions, compiled over the mesh.

B batch, S sequence, A micro-batches, L layers, N query heads
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax import losses, optim, parallel
from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig, hidden, hidden_and_max_logits, param_shapes, unembedding
from smoljax.optim.qk_clip import QKClipSpec, clipped_heads, qk_clip
from smoljax.training.state import TrainState, compiler_options

_QUERIES_AND_KEYS = QKClipSpec("layers/attention/query", "layers/attention/key")


def loss_sum(
    config: ModelConfig,
    params: dict,
    batch: dict,
    *,
    loss_chunk: int,
    z_loss: float,
    return_max_logits: bool = False,
) -> tuple[jax.Array, dict]:
    """Summed loss of a batch in nats, with the cross-entropy alone and the number of targets beside it.

    Args:
      config: the model.
      params: its parameters.
      batch: [B, S] arrays tokens, targets, segment_ids (int32) and loss_mask (bool).
      loss_chunk: tokens per device whose logits fill the memory that logits may take (smoljax.losses.cross_entropy).
      z_loss: weight of the squared log-normaliser (PaLM, section 5); 0 leaves it out.
      return_max_logits: also put "max_logits" beside it, f32 [L, N]: the largest attention logit of each head.
    """
    # RoPE counts from the start of the row, not of the document: only differences matter, a token sees no
    # other document, and small angles are exact (position 60,000 has an error of 0.004 radians in f32).
    aux = {}
    if return_max_logits:
        hidden_BSD, aux["max_logits"] = hidden_and_max_logits(
            config, params, batch["tokens"], batch["segment_ids"]
        )
    else:
        hidden_BSD = hidden(config, params, batch["tokens"], batch["segment_ids"])
    total, num_targets, metrics = losses.cross_entropy(
        hidden_BSD,
        unembedding(config, params),
        batch["targets"],
        batch["loss_mask"],
        chunk_size=loss_chunk,
        z_loss=z_loss,
    )
    aux |= {"cross_entropy": metrics["cross_entropy"], "num_targets": num_targets}
    return total, aux


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
    qk_clip_tau: float | None = None,
) -> Callable[[TrainState, dict], tuple[TrainState, dict]]:
    """Compiles (state, batch) -> (state, metrics), with the state donated.

    The gradient is that of the mean over all targets of the batch, however many micro-batches it is
    taken in; the optimizer also gets the mean loss, z-loss included, as `value`. Metrics (f32 scalars): loss (nats
    per target), grad_norm, param_norm, num_targets, what the optimizer measures (smoljax.optim.metrics) as optimizer/...,
    and with qk_clip_tau max_logit (the largest of all heads in this step's forward pass) and qk_clipped (fraction of heads).

    Args:
      qk_clip_tau: after the update, the heads whose largest logit in the forward pass was above this have their query
        weights scaled down (their key weights too where each head has its own; smoljax.optim.qk_clip). None: never.

    Raises:
      SmoljaxError: qk_clip_tau is not positive, or the model has QK-norm.
    """
    clips = qk_clip_tau is not None
    if clips:
        _check_qk_clip(config, qk_clip_tau)
    loss = functools.partial(
        loss_sum, config, loss_chunk=loss_chunk, z_loss=z_loss, return_max_logits=clips
    )
    gradient = jax.value_and_grad(_rounded(loss, config, quantization), has_aux=True)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        (total, sums), grads = _accumulate(gradient, state.params, batch, micro_batches)
        num_targets = jnp.maximum(sums["num_targets"], 1)
        grads = jax.tree.map(lambda grad: grad / num_targets, grads)
        updates, opt_state = optimizer.update(
            grads, state.opt_state, state.params, value=total / num_targets
        )
        params = optax.apply_updates(state.params, updates)
        metrics = {}
        if clips:
            max_logits_LN = sums["max_logits"]
            params = qk_clip(params, max_logits_LN, tau=qk_clip_tau, spec=_QUERIES_AND_KEYS)
            metrics["max_logit"] = jnp.max(max_logits_LN)
            metrics["qk_clipped"] = clipped_heads(max_logits_LN, qk_clip_tau)
        metrics |= {
            "loss": sums["cross_entropy"] / num_targets,
            "grad_norm": optax.global_norm(grads),
            "param_norm": optax.global_norm(params),
            "num_targets": sums["num_targets"],
        }
        metrics |= {
            f"optimizer/{name}": value for name, value in optim.metrics(opt_state).scalars().items()
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    compiled = jax.jit(
        step,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
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

    compiled = jax.jit(
        step,
        in_shardings=(shardings, parallel.batch_sharding(mesh)),
        compiler_options=compiler_options(mesh),
    )
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

    def accumulate(so_far, micro_batch):
        (total, sums), grads = so_far
        (one_total, one_sums), one_grads = gradient(params, micro_batch)
        sums = {
            name: jnp.maximum(sums[name], value) if name == "max_logits" else sums[name] + value
            for name, value in one_sums.items()
        }
        return ((total + one_total, sums), jax.tree.map(jnp.add, grads, one_grads)), None

    batch_ABS = jax.tree.map(split, batch)
    (total, sums), grads = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(gradient, params, jax.tree.map(lambda x_ABS: x_ABS[0], batch_ABS)),
    )
    if "max_logits" in sums:
        sums["max_logits"] -= jnp.inf
    start = ((total, sums), grads)
    return jax.lax.scan(accumulate, start, batch_ABS)[0]


def _check_qk_clip(config: ModelConfig, tau: float) -> None:
    """Raises a SmoljaxError now, and not when the step is traced."""
    if config.qk_norm:
        raise SmoljaxError(
            f"config.optimizer.qk_clip_tau is {tau} and config.model.qk_norm True: the norm makes logits independent of the size "
            "of query and key weights, so clipping them does nothing; set qk_clip_tau to None, or qk_norm to False"
        )
    max_logits_LN = jax.ShapeDtypeStruct((config.num_layers, config.num_heads), jnp.float32)
    clip = functools.partial(qk_clip, tau=tau, spec=_QUERIES_AND_KEYS)
    jax.eval_shape(clip, param_shapes(config), max_logits_LN)


def _on_mesh(function: Callable, mesh: Mesh) -> Callable:
    @functools.wraps(function)
    def call(*args):
        with parallel.active(mesh):
            return function(*args)

    def lower(*args):
        with parallel.active(mesh):
            return function.lower(*args)

    call.lower = lower
    return call

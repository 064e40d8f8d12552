"""Which tensor of a Hugging Face checkpoint is which part of smoljax's parameters.

torch keeps a matrix as [out, in] and one tensor per layer; smoljax keeps [in, out], heads on an axis of their own, and
all layers stacked: "query" [L, D, N, H] is, per layer, the transpose of q_proj [N H, D].

D model width, N query heads, K key-value heads, H head width, F feed-forward width, V vocabulary, L layers
"""

import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError
from smoljax.model import ModelConfig

_log = logging.getLogger("smoljax")
# Heads that predict further tokens; the exported families have no place for them.
_TRAINING_ONLY = "mtp"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the parameters.

    Attributes:
      path: keys from the top.
      name: of the tensor; "{}" stands for the layer's number in a stacked leaf.
      shape: of the leaf, without the axis of layers.
      layers: length of the axis of layers in front; 0 when there is none.
      inputs: the first so many axes of `shape` are the matrix's input, and the tensor is its transpose; 0: the
        tensor is as the leaf.
    """

    path: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    layers: int
    inputs: int

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the leaf, with the axis of layers."""
        return (self.layers, *self.shape) if self.layers else self.shape

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Shape of each tensor."""
        if not self.inputs:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors, in the order of the layers."""
        return tuple(self.name.format(i) for i in range(self.layers)) or (self.name,)


def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """All leaves of a model, in the order of a forward pass."""
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_layers
    N, K, H = config.num_heads, config.num_kv_heads, config.head_dim

    def layer(path: str, name: str, shape: tuple[int, ...], inputs: int = 0) -> Leaf:
        name = f"model.layers.{{}}.{name}.weight"
        return Leaf(("layers", *path.split("/")), name, shape, L, inputs)

    qk_norm = (
        layer("attention/query_norm", "self_attn.q_norm", (H,)),
        layer("attention/key_norm", "self_attn.k_norm", (H,)),
    )
    head = Leaf(("head",), "lm_head.weight", (D, V), 0, 1)
    return (
        Leaf(("embedding",), "model.embed_tokens.weight", (V, D), 0, 0),
        layer("attention_norm", "input_layernorm", (D,)),
        layer("attention/query", "self_attn.q_proj", (D, N, H), 1),
        layer("attention/key", "self_attn.k_proj", (D, K, H), 1),
        layer("attention/value", "self_attn.v_proj", (D, K, H), 1),
        *(qk_norm if config.qk_norm else ()),
        layer("attention/output", "self_attn.o_proj", (N, H, D), 2),
        layer("mlp_norm", "post_attention_layernorm", (D,)),
        layer("mlp/gate", "mlp.gate_proj", (D, F), 1),
        layer("mlp/up", "mlp.up_proj", (D, F), 1),
        layer("mlp/down", "mlp.down_proj", (F, D), 1),
        Leaf(("final_norm",), "model.norm.weight", (D,), 0, 0),
        *(() if config.tie_embeddings else (head,)),
    )


def flatten(params: dict) -> dict[tuple[str, ...], object]:
    """Leaves of nested dicts by path."""
    flat = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat |= {(key, *path): leaf for path, leaf in flatten(value).items()}
        else:
            flat[(key,)] = value
    return flat


def unflatten(flat: dict[tuple[str, ...], object]) -> dict:
    """The inverse of `flatten`."""
    params: dict = {}
    for path, leaf in flat.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return params


def exported(config: ModelConfig, params: dict, path: object) -> dict[tuple[str, ...], object]:
    """The leaves that go out to `path`, checked; a subtree "mtp" stays behind, and a warning says so.

    Other programs know no multipliers (muP, CompleteP): they are multiplied into the weights, where they give the same model.

    Raises:
      SmoljaxError: see check_leaves.
    """
    if _TRAINING_ONLY in params:
        _log.warning(
            "params[%r] is for training only: it is not exported to %s", _TRAINING_ONLY, path
        )
    flat = flatten({key: value for key, value in params.items() if key != _TRAINING_ONLY})
    check_leaves(config, flat)
    for name, factor in _factors(config).items():
        if factor != 1:
            flat[name] = flat[name] * np.asarray(factor, flat[name].dtype)
    return flat


def _factors(config: ModelConfig) -> dict[tuple[str, ...], float]:
    """What the forward pass multiplies by, at the leaf where it is linear: the last of a residual branch, the last gain, the queries."""
    forward = config.forward_multipliers
    queries = "query_norm" if config.qk_norm else "query"
    return {
        ("layers", "attention", "output"): forward.residual,
        ("layers", "mlp", "down"): forward.residual,
        ("layers", "attention", queries): forward.attention,
        ("final_norm",): forward.readout,
    }


def check_leaves(config: ModelConfig, flat: dict[tuple[str, ...], object]) -> None:
    """Refuses parameters that are not those of `config`.

    Raises:
      SmoljaxError: a leaf is missing, unexpected, of another shape, or no floating-point array.
    """
    wanted = {leaf.path: leaf.full_shape for leaf in leaves(config)}
    for path, shape in wanted.items():
        if path not in flat:
            raise SmoljaxError(f"params lack {'/'.join(path)} {list(shape)}, which the config has")
        if not isinstance(flat[path], jax.Array | np.ndarray):
            raise SmoljaxError(
                f"params {'/'.join(path)} is a {type(flat[path]).__name__}, expected an array: "
                "export the parameters that were trained, not quantised ones"
            )
        if not jnp.issubdtype(flat[path].dtype, jnp.floating):
            raise SmoljaxError(
                f"params {'/'.join(path)} has dtype {flat[path].dtype}, expected a floating-point one"
            )
        if tuple(flat[path].shape) != shape:
            raise SmoljaxError(
                f"params {'/'.join(path)} has shape {list(flat[path].shape)}, the config says {list(shape)}: "
                "give the config that the parameters were made with"
            )
    for path in flat:
        if path not in wanted:
            raise SmoljaxError(
                f"params have {'/'.join(path)}, which this config does not: it cannot be exported"
            )

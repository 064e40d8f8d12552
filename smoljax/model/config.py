"""What a model is: sizes, and everything that can be computed from them alone."""

import dataclasses
import math

from smoljax.errors import SmoljaxError
from smoljax.kernels.attention.api import BACKENDS
from smoljax.model import rope
from smoljax.optim.parametrization import (
    KINDS,
    ForwardMultipliers,
    Multipliers,
    forward_multipliers,
    multipliers,
)

COMPUTE_DTYPES = ("float32", "bfloat16")
# Fields that say how a model is run, or was begun, and not which function its parameters stand for.
EXECUTION = ("max_seq_len", "init_std", "compute_dtype", "scan_layers", "remat", "attention")
REMAT_POLICIES = ("none", "full", "dots", "save_attention", "save_projections")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A SmolLM3-style decoder (huggingface/smollm, stage1_8T.yaml), with what Llama 3 and Qwen3 need beside it.

    Parameters are always float32.

    Attributes:
      vocab_size: entries of the embedding table.
      num_layers: decoder layers.
      hidden_size: width of the residual stream.
      intermediate_size: width of the SwiGLU feed-forward layer.
      num_heads: query heads.
      num_kv_heads: key and value heads (grouped-query attention); divides num_heads.
      head_dim: width of a head, even; None means hidden_size // num_heads.
      rope_theta: base of the rotary embedding.
      rope_scaling: of the rotary embedding, for contexts longer than the trained one; None, or a mapping such as
        {"kind": "yarn", "factor": 2.0, "original_max_seq_len": 65536} (smoljax.model.rope names the fields).
      no_rope_layer_interval: layers i with (i + 1) % interval == 0 go without RoPE; 0 means none does.
      nope_layers: numbers (from 0) of the layers without RoPE, instead of an interval; None follows the interval.
      sliding_window: in `windowed_layers`, a token sees only keys less than this many positions back.
      windowed_layers: numbers (from 0) of the layers with a sliding window.
      qk_norm: RMSNorm of each head's queries and keys before RoPE, with a gain per layer (Qwen3).
      max_seq_len: longest sequence that the model is meant for, in tokens.
      tie_embeddings: the output head is the transposed embedding.
      norm_eps: epsilon of RMSNorm.
      init_std: standard deviation of every initial matrix (of the base model's, see below); gains start at 1.
      parametrization: how the model's numbers follow its size (smoljax.optim.parametrization): "standard", or "mup" for
        the width, or "completep" for width and depth. Rates and init_std are then those of the base model.
      base_hidden_size: width of the base model.
      base_num_layers: layers of the base model; "completep" only.
      base_head_dim: width of the base model's heads; None where it is this one's.
      compute_dtype: dtype of activations and of the parameters inside a matmul. On a CPU "bfloat16" is faster where the processor
        multiplies it (AMX): 1.07 s of CPU time against 2.12 for a step of benchmarks/train_cpu.py on one core.
      scan_layers: one compiled layer run in a loop; False repeats it num_layers times in the program, which compiles
        longer and runs faster on a CPU. None: a loop everywhere but on a CPU. The parameters are the same.
      remat: what the backward pass recomputes. "none": nothing. "full": all of a layer. "dots": all but
        the outputs of matmuls and of attention. "save_attention": all but the attention output. "save_projections":
        all but queries, keys, values and the attention output.
      attention: name of an attention implementation (smoljax.kernels.attention), or None for the platform's.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    rope_theta: float = 50_000.0
    rope_scaling: rope.Yarn | rope.Llama3 | None = None
    no_rope_layer_interval: int = 4
    nope_layers: tuple[int, ...] | None = None
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    qk_norm: bool = False
    max_seq_len: int = 4096
    tie_embeddings: bool = True
    norm_eps: float = 1e-6
    init_std: float = 0.02
    parametrization: str = "standard"
    base_hidden_size: int | None = None
    base_num_layers: int | None = None
    base_head_dim: int | None = None
    compute_dtype: str = "float32"
    scan_layers: bool | None = None
    remat: str = "none"
    attention: str | None = None

    def __post_init__(self):
        for field in (
            "vocab_size",
            "num_layers",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "max_seq_len",
        ):
            _require_positive_int(field, getattr(self, field))
        if self.num_heads % self.num_kv_heads:
            legal = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise SmoljaxError(
                f"model.num_kv_heads is {self.num_kv_heads}, which does not divide num_heads={self.num_heads}: "
                f"set it to one of {legal}"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise SmoljaxError(
                    f"model.hidden_size is {self.hidden_size}, which num_heads={self.num_heads} does not divide: "
                    "set head_dim, or make hidden_size a multiple of num_heads"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _require_positive_int("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise SmoljaxError(
                f"model.head_dim is {self.head_dim}: RoPE turns pairs, so set it to an even number"
            )
        interval = self.no_rope_layer_interval
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 0:
            raise SmoljaxError(
                f"model.no_rope_layer_interval is {interval!r}: set it to 0 (RoPE in every layer) or to a whole "
                "number n (every n-th layer without RoPE)"
            )
        object.__setattr__(self, "rope_scaling", rope.scaling(self.rope_scaling))
        for field in ("nope_layers", "windowed_layers"):
            if (layers := getattr(self, field)) is not None:
                object.__setattr__(self, field, _layer_numbers(field, layers, self.num_layers))
        if self.sliding_window is not None:
            _require_positive_int("sliding_window", self.sliding_window)
        if (self.sliding_window is None) != (not self.windowed_layers):
            raise SmoljaxError(
                f"model.sliding_window is {self.sliding_window} and model.windowed_layers {self.windowed_layers}: "
                "give both, or neither (None and ())"
            )
        for field in ("rope_theta", "norm_eps", "init_std"):
            value = getattr(self, field)
            if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
                raise SmoljaxError(f"model.{field} is {value!r}: set it to a positive number")
        _require_choice("parametrization", self.parametrization, KINDS)
        self._check_base()
        _require_choice("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _require_choice("remat", self.remat, REMAT_POLICIES)
        if self.attention is not None:
            _require_choice("attention", self.attention, tuple(BACKENDS))

    def as_section(self) -> dict:
        """The fields as the `model` section of a config writes them, JSON-able; configuration.build reads them back."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return fields | {"rope_scaling": rope.as_mapping(self.rope_scaling)}

    def multipliers(self, rule: str) -> dict[str, Multipliers]:
        """By role, what init_std, learning rate, weight decay and Adam's eps are multiplied by at this size.

        Args:
          rule: what updates the hidden matrices, one of smoljax.optim.parametrization.UPDATE_RULES.

        Raises:
          SmoljaxError: an unknown rule.
        """
        return multipliers(self.parametrization, **self._relative_size, rule=rule)

    @property
    def forward_multipliers(self) -> ForwardMultipliers:
        """The factors that the forward pass applies; all 1 in the standard parametrization."""
        head_width = self.head_dim / (self.base_head_dim or self.head_dim)
        return forward_multipliers(
            self.parametrization, **self._relative_size, head_width=head_width
        )

    @property
    def attention_scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.head_dim**-0.5 * self.forward_multipliers.attention

    @property
    def _relative_size(self) -> dict[str, float]:
        return {
            "width": self.hidden_size / (self.base_hidden_size or self.hidden_size),
            "depth": self.num_layers / (self.base_num_layers or self.num_layers),
        }

    def _check_base(self) -> None:
        """The base model's sizes are there where they are used, and only there."""
        kinds = {
            "base_hidden_size": ("mup", "completep"),
            "base_num_layers": ("completep",),
            "base_head_dim": ("mup", "completep"),
        }
        for field, used_by in kinds.items():
            value, used = getattr(self, field), self.parametrization in used_by
            if value is None and used and field != "base_head_dim":
                raise SmoljaxError(
                    f"model.{field} is None: model.parametrization={self.parametrization!r} needs that size of the "
                    "model at which the learning rate was found"
                )
            if value is not None and not used:
                raise SmoljaxError(
                    f"model.{field} is {value!r}, which model.parametrization={self.parametrization!r} does not use: "
                    f"set it to None, or the parametrization to {' or '.join(used_by)}"
                )
            if value is not None:
                _require_positive_int(field, value)

    @property
    def num_params_without_embedding(self) -> int:
        """Parameters without the embedding table (and without an untied head)."""
        D, H = self.hidden_size, self.head_dim
        attention = 2 * D * self.num_heads * H + 2 * D * self.num_kv_heads * H
        mlp = 3 * D * self.intermediate_size
        norms = 2 * D + (2 * H if self.qk_norm else 0)
        return self.num_layers * (attention + mlp + norms) + D

    @property
    def num_params(self) -> int:
        """All parameters; a tied embedding counts once."""
        tables = 1 if self.tie_embeddings else 2
        return self.num_params_without_embedding + tables * self.vocab_size * self.hidden_size

    def flops_per_token(self, seq_len: int, attention: str = "causal") -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `seq_len`.

        "none":   6 M, with M the matrix parameters: the layers' matrices and the output head. An embedding look-up
                  costs none, so a tied table counts once (as the head), and gains are left out.
        "full":   6 M + 12 L S N H: scores and weighted values take 2 x 2 S N H forward, and twice that backward.
        "causal": 6 M + 6 L S N H: half of it, as position t sees t + 1 of S keys (S/2 by convention).

        M is N of "6 N" (Kaplan et al. 2020, section 2.1) to within the gains, for a tied model.

        Args:
          seq_len: S, tokens.
          attention: "none", "causal" or "full".
        """
        pairs = {"none": 0, "causal": 6, "full": 12}
        _require_choice("flops_per_token(attention=...)", attention, tuple(pairs))
        gains = (2 * self.num_layers + 1) * self.hidden_size
        gains += 2 * self.num_layers * self.head_dim if self.qk_norm else 0
        head = self.vocab_size * self.hidden_size
        matrices = self.num_params_without_embedding - gains + head
        width = self.num_heads * self.head_dim
        return 6.0 * matrices + pairs[attention] * self.num_layers * seq_len * width

    def uses_rope(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) turns its queries and keys."""
        if self.nope_layers is not None:
            return layer not in self.nope_layers
        interval = self.no_rope_layer_interval
        return interval == 0 or (layer + 1) % interval != 0

    def window(self, layer: int) -> int | None:
        """The sliding window of layer number `layer` (from 0); None is no limit."""
        return self.sliding_window if layer in self.windowed_layers else None


def _layer_numbers(field: str, layers: object, num_layers: int) -> tuple[int, ...]:
    if not isinstance(layers, list | tuple) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < num_layers for i in layers
    ):
        raise SmoljaxError(
            f"model.{field} is {layers!r}: set it to layer numbers from 0 to {num_layers - 1}"
        )
    return tuple(sorted(set(layers)))


def _require_positive_int(field: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise SmoljaxError(f"model.{field} is {value!r}: set it to a whole number of at least 1")


def _require_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise SmoljaxError(f"model.{field} is {value!r}: set it to one of {', '.join(choices)}")

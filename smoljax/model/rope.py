"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), and its two scalings for longer contexts.

B batch, S sequence, N heads, H head width, R half a head width
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071): slow frequencies are divided by `factor`, fast ones kept, a ramp between.

    Attributes:
      factor: by how much the context grows.
      original_max_seq_len: the context that the model was trained on, in tokens.
      beta_fast: dimensions that turn more often than this over the original context are kept.
      beta_slow: dimensions that turn less often than this are divided by `factor`.
      attention_factor: multiplies cos and sin; None is 0.1 ln(factor) + 1.
      truncate: the ends of the ramp are rounded outwards to whole dimensions.
    """

    factor: float
    original_max_seq_len: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def scale(self, frequency_R: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies."""
        R = len(frequency_R)

        def dimension_that_turns(times: float) -> float:
            turns = self.original_max_seq_len / (times * 2 * math.pi)
            return R * math.log(turns) / math.log(theta)

        low, high = dimension_that_turns(self.beta_fast), dimension_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # transformers clips to the width of a head, not to the R frequencies: it matters for small heads.
        low, high = max(low, 0), min(high, 2 * R - 1)
        ramp_R = np.clip((np.arange(R) - low) / ((high - low) or 0.001), 0, 1)
        return frequency_R * (1 - ramp_R) + frequency_R / self.factor * ramp_R

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1 if self.factor > 1 else 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: wavelengths beyond the original context are stretched by `factor`, short ones kept.

    Attributes:
      factor: by how much the long wavelengths grow.
      original_max_seq_len: the context that the model was trained on, in tokens.
      low_freq_factor: wavelengths above original_max_seq_len / low_freq_factor are stretched whole.
      high_freq_factor: wavelengths below original_max_seq_len / high_freq_factor are kept.
    """

    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    amplitude = 1.0

    def scale(self, frequency_R: np.ndarray, theta: float) -> np.ndarray:
        """The scaled frequencies."""
        del theta
        turns_R = self.original_max_seq_len * frequency_R / (2 * math.pi)
        width = self.high_freq_factor - self.low_freq_factor
        kept_R = np.clip((turns_R - self.low_freq_factor) / width, 0, 1)
        return frequency_R * kept_R + frequency_R / self.factor * (1 - kept_R)


SCALINGS = {"yarn": Yarn, "llama3": Llama3}


def scaling(value: Yarn | Llama3 | Mapping | None) -> Yarn | Llama3 | None:
    """The scaling that a config names: `{"kind": "yarn", "factor": 2.0, "original_max_seq_len": 65536}`.

    Raises:
      SmoljaxError: an unknown kind or field, or a value out of its range.
    """
    if isinstance(value, Mapping):
        value = _from_mapping(value)
    if value is None:
        return None
    if not isinstance(value, Yarn | Llama3):
        raise SmoljaxError(
            f"model.rope_scaling is {value!r}: set it to None or to a mapping with a kind ({', '.join(SCALINGS)})"
        )
    for field in dataclasses.fields(value):
        number = getattr(value, field.name)
        if field.name == "truncate" or (field.name == "attention_factor" and number is None):
            continue
        if (
            isinstance(number, bool)
            or not isinstance(number, int | float)
            or not 0 < number < math.inf
        ):
            raise SmoljaxError(
                f"model.rope_scaling.{field.name} is {number!r}: set it to a positive number"
            )
    if isinstance(value, Llama3) and value.high_freq_factor <= value.low_freq_factor:
        raise SmoljaxError(
            f"model.rope_scaling.high_freq_factor is {value.high_freq_factor}: set it above "
            f"low_freq_factor ({value.low_freq_factor})"
        )
    return value


def _from_mapping(value: Mapping) -> Yarn | Llama3:
    kind = value.get("kind")
    if kind not in SCALINGS:
        raise SmoljaxError(
            f"model.rope_scaling.kind is {kind!r}: set it to one of {', '.join(SCALINGS)}"
        )
    fields = {field.name: field for field in dataclasses.fields(SCALINGS[kind])}
    given = {name: value[name] for name in value if name != "kind"}
    for name in given:
        if name not in fields:
            raise SmoljaxError(
                f"model.rope_scaling.{name} is not a field of {kind}: it has {', '.join(fields)}"
            )
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in given:
            raise SmoljaxError(f"model.rope_scaling lacks {name}, which {kind} needs")
    return SCALINGS[kind](**given)


def as_mapping(scaling: Yarn | Llama3 | None) -> dict | None:
    """The form in which a config writes it."""
    if scaling is None:
        return None
    kind = next(kind for kind, cls in SCALINGS.items() if isinstance(scaling, cls))
    return {"kind": kind, **dataclasses.asdict(scaling)}


def frequencies(*, head_dim: int, theta: float, scaling: Yarn | Llama3 | None) -> np.ndarray:
    """Radians per position, f64 [R]: theta ** (-2 i / head_dim), scaled."""
    frequency_R = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    return frequency_R if scaling is None else scaling.scale(frequency_R, theta)


def rope_tables(
    positions_BS: jax.Array,
    *,
    head_dim: int,
    theta: float,
    scaling: Yarn | Llama3 | None = None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, S, 1, R] of position times frequency, computed in f32; YaRN's are multiplied by its amplitude."""
    frequency_R = jnp.asarray(
        frequencies(head_dim=head_dim, theta=theta, scaling=scaling), jnp.float32
    )
    angle_BS1R = positions_BS[:, :, None, None] * frequency_R[None, None, None]
    amplitude = 1.0 if scaling is None else scaling.amplitude
    return (jnp.cos(angle_BS1R) * amplitude).astype(dtype), (
        jnp.sin(angle_BS1R) * amplitude
    ).astype(dtype)


def rotate(x_BSNH: jax.Array, cos_BS1R: jax.Array, sin_BS1R: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H / 2) of each head (half-split, as Llama lays it out)."""
    first_BSNR, second_BSNR = jnp.split(x_BSNH, 2, axis=-1)
    return jnp.concatenate(
        [
            first_BSNR * cos_BS1R - second_BSNR * sin_BS1R,
            second_BSNR * cos_BS1R + first_BSNR * sin_BS1R,
        ],
        axis=-1,
    )

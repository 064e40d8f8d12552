"""The RoPE settings of a config.json, in the spellings of transformers 4 and 5 (modeling_rope_utils.py)."""

import math
from collections.abc import Mapping

from smoljax.errors import SmoljaxError
from smoljax.model.rope import Llama3, Yarn

_YARN = (
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
_LLAMA3 = (
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
)
_FIELDS = {"default": (), "yarn": _YARN, "llama3": _LLAMA3}


def read(
    values: Mapping, *, default_theta: float
) -> tuple[float, Yarn | Llama3 | None, tuple[str, ...]]:
    """(theta, scaling, names of fields that are not understood) of a config.json.

    Args:
      values: the whole config.json.
      default_theta: what the family uses when no theta is given.

    Raises:
      SmoljaxError: both spellings are given and disagree, a scaling of another kind, or a missing or bad value.
    """
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    for place in ("rope_parameters", "rope_scaling"):
        if values.get(place) is not None:
            _kind(values[place], place)
    top = values.get("rope_theta")
    thetas = {
        name: value
        for name, value in {
            "rope_theta": top,
            "rope_parameters.rope_theta": (new or {}).get("rope_theta"),
            "rope_scaling.rope_theta": (old or {}).get("rope_theta"),
        }.items()
        if value is not None
    }
    theta = next(iter(thetas.values()), default_theta)
    if any(value != theta for value in thetas.values()):
        raise SmoljaxError(f"config.json: {_listed(thetas)} disagree: keep the right one")
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise SmoljaxError(f"config.json: rope_theta is {theta!r}, expected a positive number")
    scalings = {
        name: _scaling(values, name)
        for name in ("rope_parameters", "rope_scaling")
        if values.get(name) is not None or (name == "rope_scaling" and name in values)
    }
    if len(set(scalings.values())) > 1:
        raise SmoljaxError(
            f"config.json: rope_parameters is {new!r} and rope_scaling {old!r}, which are two spellings of one thing and "
            "disagree: keep the right one"
        )
    unknown = tuple(
        f"{place}.{name}"
        for place, section in (("rope_parameters", new), ("rope_scaling", old))
        for name in section or ()
        if name not in ("type", "rope_type", "rope_theta", "partial_rotary_factor")
        and name not in _FIELDS[_kind(section, place)]
    )
    return float(theta), next(iter(scalings.values()), None), unknown


def write(theta: float, scaling: Yarn | Llama3 | None) -> dict:
    """The fields rope_theta, rope_scaling and rope_parameters that say the same."""
    if scaling is None:
        section = None
    elif isinstance(scaling, Yarn):
        section = {
            "rope_type": "yarn",
            "factor": float(scaling.factor),
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "beta_fast": float(scaling.beta_fast),
            "beta_slow": float(scaling.beta_slow),
        }
        if scaling.attention_factor is not None:
            section["attention_factor"] = float(scaling.attention_factor)
        if not scaling.truncate:
            section["truncate"] = False
    else:
        section = {
            "rope_type": "llama3",
            "factor": float(scaling.factor),
            "original_max_position_embeddings": scaling.original_max_seq_len,
            "low_freq_factor": float(scaling.low_freq_factor),
            "high_freq_factor": float(scaling.high_freq_factor),
        }
    return {
        "rope_theta": float(theta),
        "rope_scaling": section,
        "rope_parameters": {**(section or {"rope_type": "default"}), "rope_theta": float(theta)},
    }


def _kind(section: Mapping, place: str) -> str:
    if not isinstance(section, Mapping):
        raise SmoljaxError(f"config.json: {place} is {section!r}, expected an object or null")
    kind = section.get("rope_type", section.get("type", "default"))
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise SmoljaxError(
            f"config.json: {place}.rope_type is {kind!r}, expected one of {', '.join(_FIELDS)}"
        )
    for name, value in section.items():
        if isinstance(value, Mapping):
            raise SmoljaxError(
                f"config.json: {place}.{name} gives RoPE settings of its own to some layers; this decoder has one for all"
            )
    if section.get("partial_rotary_factor", 1) not in (1, None):
        raise SmoljaxError(
            f"config.json: {place}.partial_rotary_factor is {section['partial_rotary_factor']!r}; this decoder turns whole heads"
        )
    return kind


def _scaling(values: Mapping, place: str) -> Yarn | Llama3 | None:
    section = values[place]
    kind = "default" if section is None else _kind(section, place)
    if kind == "default":
        return None
    original = values.get("original_max_position_embeddings") or section.get(
        "original_max_position_embeddings", values.get("max_position_embeddings")
    )
    if isinstance(original, bool) or not isinstance(original, int) or original < 1:
        raise SmoljaxError(
            f"config.json: {place}.original_max_position_embeddings is {original!r}, expected a number of tokens"
        )
    if kind == "llama3":
        return Llama3(
            factor=_number(section, "factor", place),
            original_max_seq_len=original,
            low_freq_factor=_number(section, "low_freq_factor", place),
            high_freq_factor=_number(section, "high_freq_factor", place),
        )
    if section.get("factor") is None and "factor" in section:
        factor = values["max_position_embeddings"] / original  # As DeepSeek-V3's configs have it.
    else:
        factor = _number(section, "factor", place)
    return Yarn(
        factor=factor,
        original_max_seq_len=original,
        beta_fast=_number(section, "beta_fast", place) if section.get("beta_fast") else 32.0,
        beta_slow=_number(section, "beta_slow", place) if section.get("beta_slow") else 1.0,
        attention_factor=_attention_factor(section, place, factor),
        truncate=bool(section.get("truncate", True)),
    )


def _attention_factor(section: Mapping, place: str, factor: float) -> float | None:
    if section.get("attention_factor") is not None:
        return _number(section, "attention_factor", place)
    if not (section.get("mscale") and section.get("mscale_all_dim")):
        return None
    if factor <= 1:
        return 1.0
    over, under = (_number(section, name, place) for name in ("mscale", "mscale_all_dim"))
    return (0.1 * over * math.log(factor) + 1) / (0.1 * under * math.log(factor) + 1)


def _number(section: Mapping, field: str, place: str) -> float:
    value = section.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SmoljaxError(f"config.json: {place}.{field} is {value!r}, expected a number")
    return float(value)


def _listed(values: Mapping) -> str:
    return " and ".join(f"{name} {value!r}" for name, value in values.items())

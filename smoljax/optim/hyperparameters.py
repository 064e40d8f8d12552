"""Checks of numbers that are hyper-parameters."""

import math

import jax.numpy as jnp

from smoljax.errors import SmoljaxError


def check_number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Raises a SmoljaxError that names the hyper-parameter unless it is a number within the bounds.

    An array passes: optax.inject_hyperparams makes one of every number, and inside jit its value cannot be looked at.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        if above < value < below and at_least <= value <= at_most:
            return
    elif hasattr(value, "dtype"):
        return
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (
            ("above", above),
            ("at least", at_least),
            ("at most", at_most),
            ("below", below),
        )
        if math.isfinite(bound)
    ]
    raise SmoljaxError(f"{name} is {value!r}: give a number {' and '.join(bounds)}")


def check_float_dtype(name: str, dtype: object) -> None:
    """Raises a SmoljaxError that names the option unless it is a real floating dtype, or None."""
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise SmoljaxError(f"{name} is {dtype!r}: give a real float dtype, as in 'bfloat16'")


def check_whole(name: str, value: object, *, at_least: int) -> None:
    """Raises a SmoljaxError that names the hyper-parameter unless it is a Python integer of that size."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= at_least:
        return
    static = (
        "; under optax.inject_hyperparams, name it in static_args"
        if hasattr(value, "dtype")
        else ""
    )
    raise SmoljaxError(f"{name} is {value!r}: give a whole number from {at_least}{static}")

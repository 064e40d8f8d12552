"""Kernels: for each a slow reference, fast backends, and one call that picks. Needs only jax."""

from smoljax.kernels.attention.api import attention

__all__ = ["attention"]

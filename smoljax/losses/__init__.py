"""Losses: sums over targets, in chunks, so that the logits of a whole batch are never stored."""

from smoljax.losses.cross_entropy import cross_entropy

__all__ = ["cross_entropy"]

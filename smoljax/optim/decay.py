"""Decoupled weight decay: by a number or a schedule, of every entry or only where it pushes the way the step goes."""

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.hyperparameters import check_number
from smoljax.optim.partition import check_floats


def add_decayed_weights(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: object | None = None,
    *,
    cautious: bool = False,
) -> optax.GradientTransformation:
    """Adds weight_decay * W to the update; stands between the direction and the learning rate.

    There an update u is a direction before the learning rate's minus sign: W <- W - learning_rate * (u + weight_decay * W).
    The step moves an entry by -learning_rate * u and the decay by -learning_rate * weight_decay * W: both the same way where
    u and W have the same sign. Cautious decay (arXiv 2510.12402, algorithm 1: where u W >= 0) acts on those entries alone, and
    on the ones whose u is 0, so that it never takes back what the step does.

    Without `cautious` it is optax.add_decayed_weights, bit for bit.

    Args:
      weight_decay: strength; a number, or a schedule by step. It is multiplied by the learning rate that follows.
      mask: tree of booleans like the parameters (or a prefix of it), or a function from the parameters to one: what decays.
      cautious: whether only the entries decay where update and weight agree in sign.

    Raises:
      SmoljaxError: at once for a negative weight_decay. With `cautious`: in init for a leaf that is no real float; in update,
        when it gets no parameters.
    """
    if not callable(weight_decay):
        check_number("weight_decay", weight_decay, at_least=0)
    decay = optax.add_decayed_weights(weight_decay, mask)
    if not cautious:
        return decay

    def init(params: optax.Params) -> optax.OptState:
        check_floats(params)
        return decay.init(params)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None:
            raise SmoljaxError(
                "cautious weight decay needs the parameters: call update(updates, state, params)"
            )
        # Signs, not a product: that would round to 0 where both are tiny, and 0 counts as agreement.
        agreeing = jax.tree.map(
            lambda u, w: jnp.where(jnp.sign(u) * jnp.sign(w) >= 0, w, jnp.zeros_like(w)),
            updates,
            params,
        )
        return decay.update(updates, state, agreeing)

    return optax.GradientTransformation(init, update)

"""Where the arrays of an optimizer state live: those as large as a parameter go where the parameter is."""

import jax
import optax

from smoljax.optim.partition import by_path, path_string


def place_state(
    state: object, params: optax.Params, placements: object, *, otherwise: object
) -> object:
    """A tree like the state with the parameter's placement for every array of its shape, and `otherwise` for the rest.

    A state leaf belongs to the parameter whose path its own path ends with, whatever optax wrapped around it
    (masked trees have other structures than the parameters, so structure does not tell).

    Args:
      state: an optimizer state, or its shapes (jax.eval_shape(transform.init, params)).
      params: the parameters, or their shapes.
      placements: tree like the parameters, of NamedShardings or anything else that is a leaf.
      otherwise: for counters and other arrays.
    """
    shapes = {path: leaf.shape for path, leaf in by_path(params).items()}
    places = by_path(placements)

    def place(path: tuple, leaf: jax.Array) -> object:
        for start in range(len(path)):
            name = path_string(path[start:])
            if shapes.get(name) == leaf.shape:
                return places[name]
        return otherwise

    return jax.tree_util.tree_map_with_path(place, state)

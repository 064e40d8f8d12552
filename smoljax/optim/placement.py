"""Where the arrays of an optimizer state live: with the parameter that they belong to, split over the same mesh axes."""

import math

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from smoljax.optim.partition import by_path, path_string


def place_state(
    state: object, params: optax.Params, placements: object, *, otherwise: object
) -> object:
    """A tree like the state with a placement for every array.

    A state leaf belongs to the parameter whose path its own path ends with, up to an index into a tuple, whatever optax
    wrapped around it (masked trees have other structures than the parameters, so structure does not tell). One of the
    parameter's shape goes where the parameter is. One of another shape (statistics of neurons and matrices, SOAP's
    preconditioners) is split over the mesh axes that its parameter is split over, each along the parameter's axis where
    both have it, else along the first axis that it divides; an axis that divides none holds copies.

    Args:
      state: an optimizer state, or its shapes (jax.eval_shape(transform.init, params)).
      params: the parameters, or their shapes.
      placements: tree like the parameters, of NamedShardings; of anything else that is a leaf, where no state leaf of
        another shape is to be split.
      otherwise: for counters and other arrays.
    """
    shapes = {path: leaf.shape for path, leaf in by_path(params).items()}
    places = by_path(placements)

    def place(path: tuple, leaf: jax.Array) -> object:
        for start in range(len(path)):
            for stop in (len(path), len(path) - 1):
                name = path_string(path[start:stop])
                if name not in shapes:
                    continue
                if shapes[name] == leaf.shape:
                    return places[name]
                if isinstance(places[name], NamedSharding) and leaf.ndim:
                    return _spread(leaf.shape, shapes[name], places[name])
        return otherwise

    return jax.tree_util.tree_map_with_path(place, state)


def _spread(shape: tuple[int, ...], of: tuple[int, ...], place: NamedSharding) -> NamedSharding:
    """The mesh axes of a parameter of shape `of` along the axes of an array of another shape."""
    names: list[tuple[str, ...]] = [()] * len(shape)
    for axis, entry in enumerate(place.spec):
        for name in () if entry is None else (entry,) if isinstance(entry, str) else entry:
            candidates = sorted(range(len(shape)), key=lambda each: bool(names[each]))
            if len(shape) == len(of) and shape[axis] == of[axis]:
                candidates.insert(0, axis)
            for candidate in candidates:
                split = math.prod(place.mesh.shape[each] for each in (*names[candidate], name))
                if shape[candidate] % split == 0:
                    names[candidate] += (name,)
                    break
    return NamedSharding(place.mesh, PartitionSpec(*(each or None for each in names)))

"""The table of `python -m smoljax.train --describe`: every parameter, where the mesh puts it, and who updates it. From shapes alone."""

import math

import jax
from jax.sharding import AbstractMesh, NamedSharding

from smoljax import configuration, optim, parallel
from smoljax.model import logical_axes
from smoljax.optim.partition import by_path
from smoljax.training.run import Run
from smoljax.training.state import state_shapes, state_shardings

_HEADER = (
    "parameter",
    "shape",
    "dtype",
    "logical axes",
    "mesh axes",
    "bytes/device",
    "role",
    "optimizer",
    "rate",
    "decay",
)
_NUMBERS = ("bytes/device", "rate", "decay")


def describe(run: Run, *, num_devices: int | None = None) -> str:
    """One line for each parameter, and the bytes of parameters, gradients and optimizer state. Nothing is allocated or compiled.

    A mesh axis of each axis of a parameter is "-" where it is whole on every device, and "tensor+fsdp" where both split it.

    Args:
      run: its config is read, no file.
      num_devices: of the mesh; None is what config.mesh multiplies to, or the devices here where one of its axes is -1.

    Raises:
      SmoljaxError: the mesh does not fit the devices, or does not divide the model.
    """
    mesh = _mesh(run, num_devices)
    axes = logical_axes(run.model)
    # Without the mesh: it changes where an update is computed, not what the state holds.
    optimizer = optim.build(
        run.optimizer_config,
        run.params_shapes,
        logical_axes=axes,
        num_steps=run.training.num_steps,
        multipliers=run.multipliers,
    )
    shapes = state_shapes(run.model, optimizer)
    shardings = state_shardings(mesh, run.model, shapes)
    treatments = optim.treatments(run.optimizer_config, run.multipliers)
    roles = optim.assign(run.params_shapes, logical_axes=axes)
    names, places = _axes_by_path(axes), by_path(shardings.params)
    rows = [_HEADER]
    for path, leaf in by_path(shapes.params).items():
        treatment = treatments[roles[path].role]
        rows.append(
            (
                path,
                "x".join(map(str, leaf.shape)),
                str(leaf.dtype),
                " ".join(names[path]),
                _places(places[path], leaf.ndim),
                f"{_bytes(leaf, places[path]):,}",
                roles[path].role,
                treatment.optimizer,
                f"{treatment.learning_rate:g}",
                f"{treatment.weight_decay:g}",
            )
        )
    params = _total(shapes.params, shardings.params)
    state = _total(shapes.opt_state, shardings.opt_state)
    lines = [
        *_aligned(rows),
        "",
        f"mesh {' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}: {mesh.size} devices",
        f"parameters       {run.model.num_params:,}, {_size(*params)}",
        f"gradients        {_size(*params)}, in a step",
        f"optimizer state  {_size(*state)}",
        f"together         {_size(*(2 * p + s for p, s in zip(params, state)))}",
    ]
    return "\n".join(lines)


def _mesh(run: Run, num_devices: int | None) -> AbstractMesh:
    config = configuration.build(parallel.MeshConfig, run.config.get("mesh", {}), "mesh")
    if num_devices is None:
        counts = [getattr(config, axis) for axis in parallel.AXES]
        num_devices = jax.device_count() if -1 in counts else math.prod(counts)
    kinds = (jax.sharding.AxisType.Auto,) * len(parallel.AXES)
    return AbstractMesh(config.shape(num_devices), parallel.AXES, axis_types=kinds)


def _axes_by_path(axes: dict) -> dict[str, tuple[str, ...]]:
    flat = jax.tree.leaves_with_path(axes, is_leaf=lambda node: isinstance(node, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): names for path, names in flat}


def _places(place: NamedSharding, num_axes: int) -> str:
    """The mesh axes, of more than one device, of each axis of an array."""
    words = []
    for part in (*place.spec, *(None,) * (num_axes - len(place.spec))):
        axes = (part,) if isinstance(part, str) else part or ()
        words.append("+".join(axis for axis in axes if place.mesh.shape[axis] > 1) or "-")
    return " ".join(words)


def _bytes(leaf: jax.ShapeDtypeStruct, place: NamedSharding) -> int:
    """On one device."""
    return math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _total(shapes: object, places: object) -> tuple[int, int]:
    """Bytes of all leaves, once and on one device."""
    pairs = list(zip(jax.tree.leaves(shapes), jax.tree.leaves(places), strict=True))
    return (
        sum(leaf.size * leaf.dtype.itemsize for leaf, _ in pairs),
        sum(_bytes(leaf, place) for leaf, place in pairs),
    )


def _size(whole: int, on_a_device: int) -> str:
    return f"{whole:,} bytes, {on_a_device:,} on a device ({on_a_device / 2**30:.3f} GiB)"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return [
        "  ".join(
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for cell, width, name in zip(row, widths, _HEADER)
        ).rstrip()
        for row in rows
    ]

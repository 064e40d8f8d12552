"""The matrices inside a parameter: a leaf becomes a stack of them and a stack the leaf, by its MatrixSpec.

B matrices of one piece of a leaf, I inputs, O outputs
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.partition import MatrixSpec, by_path, check_float

Shape = tuple[int, ...]
Specs = object | Callable[[optax.Params], object] | None


def specs_by_path(specs: Specs, tree: optax.Params) -> dict[str, MatrixSpec]:
    """The MatrixSpec of every leaf; looked up by path, so that trees masked by optax work too.

    Args:
      specs: tree with a MatrixSpec for each leaf, or a function from the tree to one. None: the last two axes of every
        leaf are input and output, and the axes before count matrices.
      tree: parameters, updates, or their shapes.

    Raises:
      SmoljaxError: leaves without a spec; all of them are listed.
    """
    if specs is None:
        return dict.fromkeys(by_path(tree), MatrixSpec())
    found = by_path(specs(tree) if callable(specs) else specs)
    missing = [path for path in by_path(tree) if not isinstance(found.get(path), MatrixSpec)]
    if missing:
        raise SmoljaxError(
            f"there is no MatrixSpec for {', '.join(missing)}: give each leaf one, or send it to AdamW (and where `specs` is "
            "a function, name it in optax.inject_hyperparams' static_args, which else takes it for a schedule)"
        )
    return found


def check_matrices(params: optax.Params, specs: dict[str, MatrixSpec]) -> None:
    """Raises a SmoljaxError for a leaf that is no real float or holds no matrices of its spec."""
    for path, leaf in by_path(params).items():
        check_float(path, leaf)
        matrix_shapes(path, leaf.shape, specs[path])


def matrix_shapes(path: str, shape: Shape, spec: MatrixSpec) -> tuple[tuple[int, int, int], ...]:
    """(count, d_in, d_out) of the matrices in each split piece of a leaf; one piece where nothing is split.

    Raises:
      SmoljaxError: the leaf holds no such matrices; it names the path, the shape, and what would be legal.
    """
    return tuple(
        (piece.count, math.prod(piece.inputs), math.prod(piece.outputs))
        for piece in _pieces(path, shape, spec)
    )


def to_matrices(leaf: jax.Array, spec: MatrixSpec) -> tuple[jax.Array, ...]:
    """The matrices of a leaf: [B, d_in, d_out] for each split piece.

    Raises:
      SmoljaxError: as matrix_shapes.
    """
    pieces = _pieces("", leaf.shape, spec)
    return _gather(leaf, pieces, [(piece.inputs, piece.outputs) for piece in pieces])


def from_matrices(matrices: Sequence[jax.Array], shape: Shape, spec: MatrixSpec) -> jax.Array:
    """The leaf of that shape which to_matrices turns into these matrices."""
    pieces = _pieces("", shape, spec)
    return _place(matrices, pieces, [(piece.inputs, piece.outputs) for piece in pieces])


def tree_of_matrices(
    matrices: dict[str, Sequence[jax.Array]], like: optax.Params, specs: dict[str, MatrixSpec]
) -> optax.Params:
    """The tree with the structure, shapes and dtypes of `like` whose leaves hold these matrices, given by path."""
    leaves = {
        path: from_matrices(matrices[path], leaf.shape, specs[path]).astype(leaf.dtype)
        for path, leaf in by_path(like).items()
    }
    return tree_of_leaves(leaves, like)


def tree_of_leaves(leaves: dict[str, jax.Array], like: optax.Params) -> optax.Params:
    """The tree with the structure of `like` and these leaves, given by path."""
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[path] for path in by_path(like)])


def to_statistics(
    statistic: jax.Array, shape: Shape, spec: MatrixSpec, *, per: str
) -> tuple[jax.Array, ...]:
    """The numbers of from_statistics, [B, 1, 1] or [B, 1, d_out] for each split piece of a leaf of that shape."""
    pieces = _pieces("", shape, spec)
    return _gather(statistic, pieces, [_summed(piece, per) for piece in pieces])


def from_statistics(
    statistics: Sequence[jax.Array], shape: Shape, spec: MatrixSpec, *, per: str
) -> jax.Array:
    """An array with one number for each matrix of a leaf, or for each output neuron of each matrix.

    It has the leaf's axes in the leaf's order, so that it is sharded as the leaf is: the axes that count matrices keep
    their size, input axes (and output axes, if per="matrix") have size 1. A head axis among these counts
    the matrices along it, and a split axis the pieces.

    Args:
      statistics: [B, 1, 1] (per="matrix") or [B, 1, d_out] (per="neuron") for each split piece.
      shape: shape of the leaf.
      spec: its matrices.
      per: "matrix" or "neuron".
    """
    pieces = _pieces("", shape, spec)
    return _place(statistics, pieces, [_summed(piece, per) for piece in pieces])


def frobenius_norm(x_BIO: jax.Array) -> jax.Array:
    """The norm of each matrix, float32 [B, 1, 1]."""
    squares_BIO = jnp.square(x_BIO.astype(jnp.float32))
    return jnp.sqrt(jnp.sum(squares_BIO, axis=(1, 2), keepdims=True))


@dataclasses.dataclass(frozen=True)
class _Piece:
    """How the matrices of one split piece lie in a leaf.

    Attributes:
      batch: sizes of the axes that count matrices, the matrices along a head axis last.
      inputs: sizes of the input axes; of a head axis, the heads of one matrix.
      outputs: sizes of the output axes, likewise.
      order: the axes of the leaf, its head axis in two, that are batch, inputs and outputs in this order.
      head_axis: the first of the two.
      split_axis: the axis of the leaf along which the pieces lie.
    """

    batch: Shape
    inputs: Shape
    outputs: Shape
    order: tuple[int, ...]
    head_axis: int | None
    split_axis: int

    @property
    def count(self) -> int:
        return math.prod(self.batch)

    def shape(self, inputs: Shape, outputs: Shape, *, heads_in_two: bool) -> Shape:
        """Shape of the piece in the leaf, where its matrices have these axes."""
        sizes = self.batch + inputs + outputs
        shape = [sizes[self.order.index(axis)] for axis in range(len(sizes))]
        if self.head_axis is not None and not heads_in_two:
            shape[self.head_axis : self.head_axis + 2] = [math.prod(shape[self.head_axis :][:2])]
        return tuple(shape)


def _pieces(path: str, shape: Shape, spec: MatrixSpec) -> list[_Piece]:
    """The pieces of a leaf, which is checked first."""
    _check(path, shape, spec)
    inputs, outputs = _positive(spec.inputs, shape), _positive(spec.outputs, shape)
    batch = tuple(axis for axis in range(len(shape)) if axis not in inputs + outputs)
    split_axis = outputs[0]
    head_axis = None
    if spec.heads is not None:
        head_axis = spec.heads[0] % len(shape)
        inputs, outputs, batch = (
            tuple(axis + (axis >= head_axis) for axis in axes) for axes in (inputs, outputs, batch)
        )
        batch += (head_axis,)
    pieces = []
    for size in spec.split or (shape[split_axis],):
        sizes = [*shape[:split_axis], size, *shape[split_axis + 1 :]]
        if spec.heads is not None:
            heads = spec.heads[1]
            sizes[head_axis : head_axis + 1] = [sizes[head_axis] // heads, heads]
        pieces.append(
            _Piece(
                batch=tuple(sizes[axis] for axis in batch),
                inputs=tuple(sizes[axis] for axis in inputs),
                outputs=tuple(sizes[axis] for axis in outputs),
                order=batch + inputs + outputs,
                head_axis=head_axis,
                split_axis=split_axis,
            )
        )
    return pieces


def _summed(piece: _Piece, per: str) -> tuple[Shape, Shape]:
    """Sizes of the input and output axes of a statistic."""
    outputs = {"matrix": (1,) * len(piece.outputs), "neuron": piece.outputs}[per]
    return (1,) * len(piece.inputs), outputs


def _gather(
    leaf: jax.Array, pieces: list[_Piece], sizes: list[tuple[Shape, Shape]]
) -> tuple[jax.Array, ...]:
    """The stack [B, ., .] of each piece of a leaf, or of a statistic of it; sizes are those of the matrix axes."""
    stacks, start = [], 0
    for piece, (inputs, outputs) in zip(pieces, sizes):
        axis = piece.split_axis
        stop = start + piece.shape(inputs, outputs, heads_in_two=False)[axis]
        part = leaf[(slice(None),) * axis + (slice(start, stop),)] if len(pieces) > 1 else leaf
        part = part.reshape(piece.shape(inputs, outputs, heads_in_two=True))
        stack = part.transpose(piece.order)
        stacks.append(stack.reshape(piece.count, math.prod(inputs), math.prod(outputs)))
        start = stop
    return tuple(stacks)


def _place(
    stacks: Sequence[jax.Array], pieces: list[_Piece], sizes: list[tuple[Shape, Shape]]
) -> jax.Array:
    """Undoes _gather."""
    parts = []
    for stack, piece, (inputs, outputs) in zip(stacks, pieces, sizes, strict=True):
        inverse = tuple(piece.order.index(axis) for axis in range(len(piece.order)))
        part = stack.reshape(piece.batch + inputs + outputs).transpose(inverse)
        parts.append(part.reshape(piece.shape(inputs, outputs, heads_in_two=False)))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=pieces[0].split_axis)


def _positive(axes: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
    """Axes counted from the front."""
    return tuple(axis % len(shape) for axis in axes)


def _check(path: str, shape: Shape, spec: MatrixSpec) -> None:
    """Raises a SmoljaxError unless the leaf holds the matrices of the spec."""
    has_shape = f"parameter {path} has shape {list(shape)}"
    axes = spec.inputs + spec.outputs
    fits = all(-len(shape) <= axis < len(shape) for axis in axes)
    if (
        not fits
        or len(set(_positive(axes, shape))) != len(axes)
        or not spec.inputs
        or not spec.outputs
    ):
        raise SmoljaxError(
            f"{has_shape}, which holds no matrix with input axes {spec.inputs} and output axes {spec.outputs}: "
            "give it another MatrixSpec, or to AdamW"
        )
    size = shape[spec.outputs[0]]
    if spec.split and (sum(spec.split) != size or min(spec.split) < 1):
        raise SmoljaxError(
            f"{has_shape}, and its MatrixSpec has split {spec.split}: give positive sizes that sum to {size}, "
            f"the size of axis {spec.outputs[0]}"
        )
    if spec.heads is None:
        return
    axis, per_matrix = spec.heads
    if not -len(shape) <= axis < len(shape) or axis % len(shape) not in _positive(axes, shape):
        raise SmoljaxError(
            f"{has_shape}, and its MatrixSpec has heads on axis {axis}: choose one of the input and output axes {axes}"
        )
    is_split = spec.split and axis % len(shape) == spec.outputs[0] % len(shape)
    heads = spec.split if is_split else (shape[axis],)
    if per_matrix < 1 or any(count % per_matrix for count in heads):
        raise SmoljaxError(
            f"{has_shape}, and its MatrixSpec has {per_matrix} heads per matrix on axis {axis}: choose a divisor "
            f"of {math.gcd(*heads)}"
        )

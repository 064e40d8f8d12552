"""SOAP: Adam in the eigenbasis of Shampoo's two preconditioners (Vyas et al., arXiv 2409.11321).

B stacked matrices of M inputs and N outputs; K is either size
"""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from smoljax.optim.decay import add_decayed_weights
from smoljax.optim.hyperparameters import check_number, check_whole
from smoljax.optim.matrices import (
    Specs,
    from_matrices,
    matrix_shapes,
    specs_by_path,
    to_matrices,
)
from smoljax.optim.orthogonalize import split_stack
from smoljax.optim.partition import MatrixSpec, by_path, check_floats


class SoapState(NamedTuple):
    """State of scale_by_soap. All arrays but the counter are float32.

    The last four are trees like the parameters, with a tuple for each leaf: one array for each piece that the leaf's
    MatrixSpec cuts it into, or None where the side is longer than max_size.

    Attributes:
      count: int32 scalar, updates so far.
      momentum: tree of the parameters' shapes, the moving average of the gradient, in the eigenbasis.
      second_moment: tree of the parameters' shapes, the moving average of the squared gradient, in the eigenbasis.
      left: [B, M, M], moving averages of G G^T.
      right: [B, N, N], moving averages of G^T G.
      left_basis: [B, M, M], in its columns the eigenvectors of left, largest eigenvalue first.
      right_basis: [B, N, N], those of right.
    """

    count: jax.Array
    momentum: optax.Updates
    second_moment: optax.Updates
    left: optax.Updates
    right: optax.Updates
    left_basis: optax.Updates
    right_basis: optax.Updates


def soap(
    learning_rate: optax.ScalarOrSchedule,
    *,
    specs: Specs = None,
    weight_decay: optax.ScalarOrSchedule = 0.01,
    weight_decay_mask: object | None = None,
    cautious: bool = False,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    precondition_every: int = 10,
    max_size: int = 10_000,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """SOAP with decoupled weight decay, for a tree that holds nothing but matrices.

    W <- W * (1 - learning_rate * weight_decay) - learning_rate * u. The paper's learning rate is 3e-3. Norms and biases are
    not SOAP's: see `smoljax.optim.build`, or put this into optax.partition.

    Args:
      learning_rate: a number or a schedule.
      specs: as in scale_by_soap, like all that follow but the next three.
      weight_decay: as in add_decayed_weights, like the next two.
      weight_decay_mask: which leaves decay.
      cautious: decay only where it goes the way of the step.

    Raises:
      SmoljaxError: as scale_by_soap.
    """
    return optax.chain(
        scale_by_soap(
            specs,
            b1=b1,
            b2=b2,
            shampoo_beta=shampoo_beta,
            eps=eps,
            precondition_every=precondition_every,
            max_size=max_size,
            mesh=mesh,
            mesh_axis=mesh_axis,
        ),
        add_decayed_weights(weight_decay, weight_decay_mask, cautious=cautious),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_soap(
    specs: Specs = None,
    *,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    precondition_every: int = 10,
    max_size: int = 10_000,
    mesh: Mesh | None = None,
    mesh_axis: str | tuple[str, ...] | None = None,
) -> optax.GradientTransformation:
    """Replaces the gradient G [M, N] of each matrix by Adam's step, taken in the eigenbasis of E[G G^T] and E[G^T G].

    Algorithm 3 of arXiv 2409.11321, in the order of the authors' code (github.com/nikhilvyas/SOAP):

    - The first update only sets the bases, by eigendecomposition of G G^T and G^T G; what it returns is zero, and its
      gradient enters neither average. Adam's steps are counted from the second update.
    - Every later one turns G into the bases that are there, m <- b1 m + (1 - b1) G', v <- b2 v + (1 - b2) G'^2, and turns
      m / (sqrt(v) + eps) * sqrt(1 - b2^t) / (1 - b1^t) back. After that G enters the preconditioners, so that
      a gradient never chooses the basis that it is seen in.
    - Every precondition_every steps, then, each basis goes through one step of power iteration and a QR decomposition.
      Its vectors are sorted by their estimated eigenvalues first, and v is permuted along; m is turned exactly.

    Against the authors' code: the moving averages are those of each matrix in a leaf, weight decay is a link of its own (it
    acts in the first update too), and 1-D leaves are refused: they are AdamW's.

    Cost of a step for each matrix, in float32: 6 MN(M + N) FLOPs, and when the bases change 4 MN(M + N) + 2 (M^3 + N^3)
    more and two QR decompositions; these run in no other step (lax.switch). Matrices of one size share
    one batched call. State: 2 (M^2 + N^2) numbers beside Adam's 2 MN. On TPUs QR and eigendecomposition are slow beside
    products: raise precondition_every, or leave the long side out by max_size. On a CPU they are LAPACK's, whose
    threads and XLA's get into each other's way: on two busy cores OPENBLAS_NUM_THREADS=1 in the environment made them 6 to
    16 times faster (4 matrices of 688x688).

    Args:
      specs: tree with a MatrixSpec for each leaf, or a function from the parameters to one. None: the last two
        axes of every leaf are input and output, and the axes before count matrices.
      b1: of Adam's first moment.
      b2: of Adam's second moment.
      shampoo_beta: of the two preconditioners.
      eps: of Adam's denominator.
      precondition_every: steps from one QR to the next.
      max_size: a longer side keeps the identity as its basis; with both sides longer this is Adam.
      mesh: with mesh_axis: every device decomposes whole matrices, its share of all that have one size. The state itself
        is split as place_state says.
      mesh_axis: as in scale_by_muon.

    Raises:
      SmoljaxError: at once for an option out of range, or a mesh_axis that the mesh does not have; in init for a leaf that holds no matrix or no real float.
    """
    for name, beta in (("b1", b1), ("b2", b2), ("shampoo_beta", shampoo_beta)):
        check_number(name, beta, at_least=0, below=1)
    check_number("eps", eps, above=0)
    check_whole("precondition_every", precondition_every, at_least=1)
    check_whole("max_size", max_size, at_least=1)
    start = functools.partial(_start, split_stack(_eigenvectors, mesh, mesh_axis))
    refresh = functools.partial(_refresh, split_stack(_orthonormal, mesh, mesh_axis))

    def init(params: optax.Params) -> SoapState:
        spec = specs_by_path(specs, params)
        check_floats(params)
        shapes = [
            matrix_shapes(path, leaf.shape, spec[path]) for path, leaf in by_path(params).items()
        ]

        def moment() -> optax.Updates:
            return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.float32), params)

        def squares(side: int) -> optax.Updates:
            of_leaves = [
                tuple(_zeros(shape[0], shape[side], max_size) for shape in pieces)
                for pieces in shapes
            ]
            return jax.tree.unflatten(jax.tree.structure(params), of_leaves)

        return SoapState(
            count=jnp.zeros([], jnp.int32),
            momentum=moment(),
            second_moment=moment(),
            left=squares(1),
            right=squares(2),
            left_basis=squares(1),
            right_basis=squares(2),
        )

    def update(
        updates: optax.Updates, state: SoapState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, SoapState]:
        del params
        spec = specs_by_path(specs, updates)
        first = state.count == 0
        gradients = _cut(updates, spec)
        structure = jax.tree.structure(updates)
        bases = _Sides(_flat(state.left_basis, structure), _flat(state.right_basis, structure))
        factors = _Sides(_flat(state.left, structure), _flat(state.right, structure))
        moments = _Moments(_cut(state.momentum, spec), _cut(state.second_moment, spec))

        turned = _turn(gradients, bases)
        # The bases are still zero in the first update; nothing may enter the averages then.
        moments = _Moments(
            [b1 * m + jnp.where(first, 0, 1 - b1) * g for m, g in zip(moments.first, turned)],
            [
                b2 * v + jnp.where(first, 0, 1 - b2) * jnp.square(g)
                for v, g in zip(moments.second, turned)
            ],
        )
        step = jnp.maximum(state.count, 1)
        correction = jnp.sqrt(1 - b2**step) / (1 - b1**step)
        directions = _turn_back(
            [correction * m / (jnp.sqrt(v) + eps) for m, v in zip(*moments)], bases
        )

        factors = _accumulate(factors, gradients, shampoo_beta)
        due = jnp.where(first, 1, jnp.where(state.count % precondition_every == 0, 2, 0))
        bases, moments = jax.lax.switch(due, (_keep, start, refresh), factors, bases, moments)

        return _join(directions, spec, updates), SoapState(
            count=optax.safe_increment(state.count),
            momentum=_join(moments.first, spec, state.momentum),
            second_moment=_join(moments.second, spec, state.second_moment),
            left=_unflat(factors.left, structure, state.left),
            right=_unflat(factors.right, structure, state.right),
            left_basis=_unflat(bases.left, structure, state.left_basis),
            right_basis=_unflat(bases.right, structure, state.right_basis),
        )

    return optax.GradientTransformation(init, update)


# Inside an update all pieces of all leaves stand in flat lists, in tree order.
class _Sides(NamedTuple):
    """An array [B, K, K] for each piece and side; None for the identity."""

    left: list[jax.Array | None]
    right: list[jax.Array | None]


class _Moments(NamedTuple):
    """Adam's moments [B, M, N] for each piece, in the eigenbasis."""

    first: list[jax.Array]
    second: list[jax.Array]


def _keep(factors: _Sides, bases: _Sides, moments: _Moments) -> tuple[_Sides, _Moments]:
    del factors
    return bases, moments


def _eigenvectors(l_BKK: jax.Array) -> jax.Array:
    """In columns, largest eigenvalue first."""
    return jnp.linalg.eigh(l_BKK)[1][..., ::-1]


def _orthonormal(p_BKK: jax.Array) -> jax.Array:
    return jnp.linalg.qr(p_BKK)[0]


def _start(
    eigenvectors: Callable[[jax.Array], jax.Array],
    factors: _Sides,
    bases: _Sides,
    moments: _Moments,
) -> tuple[_Sides, _Moments]:
    """Eigenvectors of the preconditioners."""
    del bases
    return _by_size(eigenvectors, factors), moments


def _refresh(
    orthonormal: Callable[[jax.Array], jax.Array],
    factors: _Sides,
    bases: _Sides,
    moments: _Moments,
) -> tuple[_Sides, _Moments]:
    """One step of power iteration and a QR decomposition, from the vectors sorted by their estimated eigenvalues."""
    products = _on_sides(_product, factors, bases)
    order = _on_sides(
        lambda q_BKK, p_BKK: jnp.argsort(-jnp.sum(q_BKK * p_BKK, axis=-2), axis=-1), bases, products
    )
    sorted_products = _on_sides(
        lambda p_BKK, order_BK: jnp.take_along_axis(p_BKK, order_BK[:, None, :], axis=-1),
        products,
        order,
    )
    new = _by_size(orthonormal, sorted_products)
    second = [_permute(v_BMN, left, right) for v_BMN, left, right in zip(moments.second, *order)]
    return new, _Moments(_turn(_turn_back(moments.first, bases), new), second)


def _permute(
    v_BMN: jax.Array, rows_BM: jax.Array | None, columns_BN: jax.Array | None
) -> jax.Array:
    if rows_BM is not None:
        v_BMN = jnp.take_along_axis(v_BMN, rows_BM[:, :, None], axis=-2)
    if columns_BN is not None:
        v_BMN = jnp.take_along_axis(v_BMN, columns_BN[:, None, :], axis=-1)
    return v_BMN


def _accumulate(factors: _Sides, gradients: list[jax.Array], beta: float) -> _Sides:
    def average(old_BKK: jax.Array | None, g_BMN: jax.Array, subscripts: str) -> jax.Array | None:
        if old_BKK is None:
            return None
        return beta * old_BKK + (1 - beta) * _einsum(subscripts, g_BMN, g_BMN)

    return _Sides(
        [average(left, g_BMN, "bmn,bkn->bmk") for left, g_BMN in zip(factors.left, gradients)],
        [average(right, g_BMN, "bmn,bmk->bnk") for right, g_BMN in zip(factors.right, gradients)],
    )


def _turn(stacks: list[jax.Array], bases: _Sides) -> list[jax.Array]:
    """Q_L^T X Q_R of each [B, M, N]."""

    def turn(x_BMN, left, right):
        x_BMN = x_BMN if left is None else _einsum("bmk,bmn->bkn", left, x_BMN)
        return x_BMN if right is None else _einsum("bmn,bnk->bmk", x_BMN, right)

    return [turn(x_BMN, left, right) for x_BMN, left, right in zip(stacks, *bases)]


def _turn_back(stacks: list[jax.Array], bases: _Sides) -> list[jax.Array]:
    """Q_L X Q_R^T of each [B, M, N]."""
    transposed = _on_sides(lambda q_BKK: q_BKK.mT, bases)
    return _turn(stacks, transposed)


def _on_sides(function: Callable, *sides: _Sides) -> _Sides:
    """The function of what the arguments hold for each piece and side; None stays None."""
    return _Sides(
        *(
            [None if arrays[0] is None else function(*arrays) for arrays in zip(*lists)]
            for lists in zip(*sides)
        )
    )


def _by_size(function: Callable[[jax.Array], jax.Array], sides: _Sides) -> _Sides:
    """The function, called once for each size K with all matrices [B, K, K] of that size, left and right."""
    matrices = sides.left + sides.right
    groups: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        if matrix is not None:
            groups.setdefault(matrix.shape[-1], []).append(i)
    results = [None] * len(matrices)
    for members in groups.values():
        counts = [len(matrices[i]) for i in members]
        ends = list(itertools.accumulate(counts))
        x_BKK = function(jnp.concatenate([matrices[i] for i in members]))
        for i, count, end in zip(members, counts, ends):
            results[i] = x_BKK[end - count : end]
    return _Sides(results[: len(sides.left)], results[len(sides.left) :])


def _zeros(count: int, size: int, max_size: int) -> jax.Array | None:
    return None if size > max_size else jnp.zeros((count, size, size), jnp.float32)


def _cut(tree: optax.Updates, specs: dict[str, MatrixSpec]) -> list[jax.Array]:
    """All pieces [B, M, N] of all leaves, in float32."""
    return [
        piece
        for path, leaf in by_path(tree).items()
        for piece in to_matrices(leaf.astype(jnp.float32), specs[path])
    ]


def _join(
    stacks: list[jax.Array], specs: dict[str, MatrixSpec], like: optax.Updates
) -> optax.Updates:
    """Undoes _cut; `like` gives structure, shapes and dtypes."""
    rest = iter(stacks)
    leaves = []
    for path, leaf in by_path(like).items():
        pieces = [next(rest) for _ in matrix_shapes(path, leaf.shape, specs[path])]
        leaves.append(from_matrices(pieces, leaf.shape, specs[path]).astype(leaf.dtype))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _flat(tree: optax.Updates, structure: jax.tree_util.PyTreeDef) -> list[jax.Array | None]:
    """The arrays of all tuples that stand in the place of the structure's leaves. (Its own None is no leaf.)"""
    return [array for pieces in structure.flatten_up_to(tree) for array in pieces]


def _unflat(
    arrays: list[jax.Array | None], structure: jax.tree_util.PyTreeDef, like: optax.Updates
) -> optax.Updates:
    """Undoes _flat; `like` gives the lengths of the tuples."""
    rest = iter(arrays)
    tuples = [tuple(next(rest) for _ in pieces) for pieces in structure.flatten_up_to(like)]
    return jax.tree.unflatten(structure, tuples)


def _product(x_BKK: jax.Array, y_BKK: jax.Array) -> jax.Array:
    return _einsum("bmk,bkn->bmn", x_BKK, y_BKK)


def _einsum(subscripts: str, *arrays: jax.Array) -> jax.Array:
    """In float32 on accelerators too: bases that are a few thousandths off orthogonal would add up over the steps."""
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)

"""Newton-Schulz iteration: the nearest semi-orthogonal matrix by matrix products alone.

B stacked matrices, M rows, N columns with M <= N
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from smoljax.errors import SmoljaxError

# Each row (a, b, c) is one step X <- a X + (b A + c A A) X with A = X X^T. The rows are ordered: a run of k steps
# takes the first k, because every row is fitted to the range of singular values that the rows before it leave.
COEFFICIENTS = {
    # github.com/KellerJordan/Muon: one row for every step; does not converge, values land in about [0.68, 1.13].
    "keller": ((3.4445, -4.7750, 2.0315),) * 5,
    # github.com/microsoft/dion and modded-nanogpt, fitted by YouJiacheng.
    "dion": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    # Amsel et al., arXiv 2505.16932, fitted for 5 steps with safety 2e-2 and cushion 2.
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}

FORMS = ("auto", "standard", "gram")

# About the fewest rows of a block that a symmetric product is cut into; with half as many it is slower than whole.
SMALLEST_BLOCK = 256

# Polar Express divides by a little more than the Frobenius norm, and its rows undo that.
NORM_FACTOR = {"polar_express": 1.02}


def newton_schulz(
    x: jax.Array,
    *,
    coefficients: str | Sequence = "polar_express",
    steps: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-7,
    form: str = "auto",
) -> jax.Array:
    """Replaces every singular value of each matrix by about 1, keeping its singular vectors.

    Args:
      x: [..., rows, columns], any real float dtype; leading axes are a batch of independent matrices, and a
        tall matrix is worked on as its transpose. A zero matrix stays zero.
      coefficients: "polar_express", "keller", "dion", one row (a, b, c) for every step, or rows [k, 3] in order.
        The first `steps` rows are used; past the last row, the last is repeated.
      steps: number of steps; None: one for each row given, and 5 for a single row.
      dtype: dtype of the products; None keeps the dtype of x. Norm and accumulation are in float32.
      eps: added to the Frobenius norm before dividing by it.
      form: "standard" applies every step to the matrix; "gram" iterates on its Gram matrix and applies two or three steps at
        once, which costs 8 m^2 n + 28 m^3 instead of 20 m^2 n + 10 m^3 for five steps on m x n. "auto" takes
        "gram" where it is both cheaper by a tenth (n >= 2 m) and as exact (float32).

    Returns:
      An array of the shape and dtype of x.

    Raises:
      SmoljaxError: x is no real float matrix, or the coefficients or the form are not known.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise SmoljaxError(
            f"newton_schulz got {x.dtype}{list(x.shape)}: pass real float matrices [..., rows, columns]"
        )
    if form not in FORMS:
        raise SmoljaxError(f"form is {form!r}: choose one of {', '.join(FORMS)}")
    rows = coefficient_rows(coefficients, steps)
    factor = NORM_FACTOR.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0
    tall = x.shape[-2] > x.shape[-1]
    x_BMN = (x.mT if tall else x).astype(jnp.float32)
    norm_B11 = jnp.sqrt(jnp.sum(jnp.square(x_BMN), axis=(-2, -1), keepdims=True))
    x_BMN = (x_BMN / (norm_B11 * factor + eps)).astype(dtype or x.dtype)
    wide = x_BMN.shape[-1] >= 2 * x_BMN.shape[-2]
    if form == "gram" or (form == "auto" and wide and x_BMN.dtype == jnp.float32):
        for block in _gram_blocks(rows):
            x_BMN = _gram_steps(x_BMN, block)
    else:
        for row in rows:
            a_BMM = _symmetric_product(x_BMN, x_BMN)
            x_BMN = _product(_polynomial(a_BMM, row).astype(x_BMN.dtype), x_BMN)
    return (x_BMN.mT if tall else x_BMN).astype(x.dtype)


def coefficient_rows(
    coefficients: str | Sequence, steps: int | None = None
) -> tuple[tuple[float, ...], ...]:
    """The `steps` rows (a, b, c) that newton_schulz uses, first to last.

    Raises:
      SmoljaxError: an unknown name, rows that are not three numbers each, or less than one step.
    """
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise SmoljaxError(
                f"coefficients is {coefficients!r}: choose one of {', '.join(sorted(COEFFICIENTS))}, or give rows (a, b, c)"
            )
        coefficients = COEFFICIENTS[coefficients]
    table = np.atleast_2d(np.asarray(coefficients, dtype=np.float64))
    if table.ndim != 2 or table.shape[1] != 3 or not len(table):
        raise SmoljaxError(
            f"coefficients has shape {list(table.shape)}: give rows [steps, 3] of (a, b, c)"
        )
    if steps is None:
        steps = 5 if len(table) == 1 else len(table)
    if not isinstance(steps, int) or steps < 1:
        raise SmoljaxError(
            f"steps is {steps}: Newton-Schulz needs an int of at least 1 (optax.inject_hyperparams makes it an array: "
            "name it in static_args)"
        )
    return tuple(tuple(table[min(i, len(table) - 1)].tolist()) for i in range(steps))


def _gram_blocks(rows: tuple) -> list[tuple]:
    """Steps that share one Gram matrix. Rounding in it grows with every step: after two, and then every three, it is made anew.

    With one block for all five steps, a float32 result on a spectrum 1/i^2 is 50 times less exact, and a bfloat16 one
    on 1/i reaches singular values of 1.30 instead of 1.15. Gram matrices are float32 whatever the dtype of X.
    """
    return [rows[:2], *(rows[start : start + 3] for start in range(2, len(rows), 3))]


def _gram_steps(x_BMN: jax.Array, rows: tuple) -> jax.Array:
    """Several steps at once: X <- Z_k ... Z_1 X, where Z_i follows from the Gram matrix R alone and R <- Z R Z."""
    r_BMM = _symmetric_product(x_BMN, x_BMN, out=jnp.float32)
    q_BMM = None
    for i, row in enumerate(rows):
        z_BMM = _polynomial(r_BMM, row)
        # All are polynomials of one symmetric matrix: symmetric, and so are their products. Their transposes are equal but for
        # rounding, which grows when one is taken for the other.
        q_BMM = z_BMM if q_BMM is None else _symmetric_product(z_BMM, q_BMM.mT)
        if i + 1 < len(rows):
            r_BMM = _symmetric_product(_symmetric_product(z_BMM, r_BMM.mT), z_BMM.mT)
    return _product(q_BMM.astype(x_BMN.dtype), x_BMN)


def _polynomial(a_BMM: jax.Array, row: tuple[float, float, float]) -> jax.Array:
    """a I + b A + c A A. The identity stands inside, so that X is read once, by the product that follows."""
    a, b, c = row
    square_BMM = _symmetric_product(a_BMM, a_BMM.mT)
    identity_BMM = jnp.broadcast_to(jnp.eye(a_BMM.shape[-1], dtype=a_BMM.dtype), a_BMM.shape)
    return a * identity_BMM + b * a_BMM + c * square_BMM


def _symmetric_product(
    x_BMK: jax.Array, y_BMK: jax.Array, *, out: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """x @ y^T where that is a symmetric matrix: of its four blocks one is the transpose of another, and is not computed.

    In float32 alone, whose products outweigh the copies of their blocks, and from 2 * SMALLEST_BLOCK rows on. Five steps
    on a CPU of two cores then took 0.91 of the time for 512x512 and 0.81 for 576x1536.
    """
    rows = x_BMK.shape[-2]
    if rows < 2 * SMALLEST_BLOCK or x_BMK.dtype != jnp.float32:
        return _product(x_BMK, y_BMK, transpose=True, out=out)
    half = -(-rows // SMALLEST_BLOCK) * (SMALLEST_BLOCK // 2)
    (top, below), (other_top, other_below) = (
        jnp.split(matrix, [half], axis=-2) for matrix in (x_BMK, y_BMK)
    )
    corner = _product(top, other_below, transpose=True, out=out)
    upper = [_product(top, other_top, transpose=True, out=out), corner]
    lower = [corner.mT, _product(below, other_below, transpose=True, out=out)]
    return jnp.concatenate([jnp.concatenate(blocks, axis=-1) for blocks in (upper, lower)], axis=-2)


def _product(
    x_BMK: jax.Array,
    y_BKN: jax.Array,
    *,
    transpose: bool = False,
    out: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Batched x @ y, or x @ y^T, accumulated in float32; float32 stays float32 on accelerators too."""
    product = jnp.einsum(
        "...mk,...nk->...mn" if transpose else "...mk,...kn->...mn",
        x_BMK,
        y_BKN,
        precision=jax.lax.Precision.HIGHEST if x_BMK.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return product.astype(out or x_BMK.dtype)

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
    "keller": ((3.4445, -4.7750, 2.0315),),
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

# Polar Express divides by a little more than the Frobenius norm, and its rows undo that.
NORM_FACTOR = {"polar_express": 1.02}


def newton_schulz(
    x: jax.Array,
    *,
    coefficients: str | Sequence = "polar_express",
    steps: int = 5,
    dtype: jax.typing.DTypeLike | None = None,
    eps: float = 1e-7,
) -> jax.Array:
    """Replaces every singular value of each matrix by about 1, keeping its singular vectors.

    Args:
      x: [..., rows, columns], any real float dtype; leading axes are a batch of independent matrices, and a
        tall matrix is worked on as its transpose. A zero matrix stays zero.
      coefficients: "polar_express", "keller", "dion", one row (a, b, c) for every step, or rows [k, 3] in order.
        The first `steps` rows are used; past the last row, the last is repeated.
      steps: number of steps.
      dtype: dtype of the products; None keeps the dtype of x. The norm is taken in float32.
      eps: added to the Frobenius norm before dividing by it.

    Returns:
      An array of the shape and dtype of x.

    Raises:
      SmoljaxError: x is no real float matrix, or the coefficients are not known.
    """
    if x.ndim < 2 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise SmoljaxError(
            f"newton_schulz got {x.dtype}{list(x.shape)}: pass real float matrices [..., rows, columns]"
        )
    rows = coefficient_rows(coefficients, steps)
    factor = NORM_FACTOR.get(coefficients, 1.0) if isinstance(coefficients, str) else 1.0
    tall = x.shape[-2] > x.shape[-1]
    x_BMN = x.mT if tall else x
    norm_B11 = jnp.sqrt(
        jnp.sum(jnp.square(x_BMN.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
    )
    x_BMN = (x_BMN / (norm_B11 * factor + eps)).astype(dtype or x.dtype)
    for a, b, c in rows:
        x_BMN = _step(x_BMN, a, b, c)
    return (x_BMN.mT if tall else x_BMN).astype(x.dtype)


def coefficient_rows(coefficients: str | Sequence, steps: int) -> tuple[tuple[float, ...], ...]:
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
    if steps < 1:
        raise SmoljaxError(f"steps is {steps}: Newton-Schulz needs at least 1")
    return tuple(tuple(table[min(i, len(table) - 1)].tolist()) for i in range(steps))


def _step(x_BMN: jax.Array, a: float, b: float, c: float) -> jax.Array:
    a_BMM = jnp.einsum("...mn,...kn->...mk", x_BMN, x_BMN)
    b_BMM = b * a_BMM + c * jnp.einsum("...mk,...kl->...ml", a_BMM, a_BMM)
    return a * x_BMN + jnp.einsum("...mk,...kn->...mn", b_BMM, x_BMN)

"""A decoder's parameters in the project's layout, and Newton-Schulz as the papers write it, in float64 numpy."""

import jax
import numpy as np
import pytest

L, D, N, H, K, F, V = 3, 32, 4, 8, 2, 96, 128

AXES = {
    "embedding": ("vocab", "embed"),
    "layers": {
        "attention": {
            "query": ("layers", "embed", "heads", "head_dim"),
            "key": ("layers", "embed", "kv_heads", "head_dim"),
            "value": ("layers", "embed", "kv_heads", "head_dim"),
            "output": ("layers", "heads", "head_dim", "embed"),
        },
        "mlp": {
            "gate": ("layers", "embed", "mlp"),
            "up": ("layers", "embed", "mlp"),
            "down": ("layers", "mlp", "embed"),
        },
        "attention_norm": ("layers", "embed"),
        "mlp_norm": ("layers", "embed"),
    },
    "final_norm": ("embed",),
    "head": ("embed", "vocab"),
}
SIZES = dict(layers=L, embed=D, heads=N, head_dim=H, kv_heads=K, mlp=F, vocab=V)


@pytest.fixture
def axes():
    return AXES


@pytest.fixture
def random_tree():
    """A function from a seed to a tree of float32 arrays in the decoder's layout."""

    def make(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda names: jax.numpy.asarray(
                rng.standard_normal([SIZES[name] for name in names]), dtype="float32"
            ),
            AXES,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    return make


@pytest.fixture
def numpy_newton_schulz():
    """X / (|X| * factor + eps), then X <- a X + (b A + c A A) X with A = X X^T, for one matrix."""

    def iterate(x, rows, factor=1.0, eps=1e-7):
        x = np.asarray(x, dtype=np.float64)
        if x.shape[0] > x.shape[1]:
            return iterate(x.T, rows, factor, eps).T
        x = x / (np.linalg.norm(x) * factor + eps)
        for a, b, c in rows:
            gram = x @ x.T
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    return iterate

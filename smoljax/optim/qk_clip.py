"""QK-clip: after an update, shrinks the query and key weights of the heads whose attention logits grew too large.

N query heads, K key heads, G query heads of a key head (N / K), P heads in a kernel, W width of a head;
`...` stands for the leading axes of max_logits, which stacked kernels share (layers)
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from smoljax.errors import SmoljaxError
from smoljax.optim.partition import by_path, check_float, path_string

MaxLogits = jax.Array | Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class HeadKernel:
    """Where the heads of a query or key projection are: in a kernel, or in its bias.

    Axes count from the end, so that a stacked and a single kernel have the same spec.

    Attributes:
      path: the leaf's path ("layers/attention/query"), or a regular expression that fits the whole path of one leaf.
        Where max_logits is a mapping: what follows its key.
      heads: axis of the heads; -2 for kernels [D, N, W] and biases [N, W].
      width: axis of a head's width.
      head_dim: W of a flat kernel [D, N * W], whose axis `heads` holds one head after the other; None otherwise.
      head_range: (first, end) of the heads in a kernel that others share, as in a fused [D, N + 2 K, W]; None is all.
      width_range: (first, end) of the part of each head's width, as in MLA's kernels, which hold the part without
        and the part with RoPE side by side; None is all.
    """

    path: str
    heads: int = -2
    width: int = -1
    head_dim: int | None = None
    head_range: tuple[int, int] | None = None
    width_range: tuple[int, int] | None = None

    def __post_init__(self):
        for field in ("heads", "width"):
            if getattr(self, field) >= 0:
                raise SmoljaxError(
                    f"HeadKernel({self.path!r}).{field} is {getattr(self, field)}: count axes from the end, as in -2"
                )
        for field in ("head_range", "width_range"):
            bounds = getattr(self, field)
            if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < bounds[1]):
                raise SmoljaxError(
                    f"HeadKernel({self.path!r}).{field} is {bounds}: give (first, end) with 0 <= first < end"
                )


@dataclasses.dataclass(frozen=True)
class QKClipSpec:
    """Which leaves make the logits of an attention, and which of them take how much of the clipping.

    A logit is a product of query and key, so query weights times gamma^alpha and key weights times gamma^(1-alpha)
    multiply it by gamma; RoPE turns vectors and keeps that exact.

    Attributes:
      query: HeadKernels, or their paths where the defaults fit, of the queries: kernel and, if there is one, bias.
      key: those of the keys, with K heads; query head n reads key head n // (N / K). () leaves the keys as they are.
      query_of_shared_key: queries whose key all heads share, as MLA's rotary part: they take all of gamma.
      alpha: share of the queries. None: 0.5 where every query head has its own key head (Kimi K2), and 1 where key
        heads are shared: the keys stay, and each head is clipped on its own. With 0.5 and shared heads the key takes
        its share of the smallest gamma of its group, and each query what is then missing; also exact for every head.

    Raises:
      SmoljaxError: alpha is not from 0 to 1, or there is no query.
    """

    query: tuple[HeadKernel | str, ...] | HeadKernel | str
    key: tuple[HeadKernel | str, ...] | HeadKernel | str = ()
    query_of_shared_key: tuple[HeadKernel | str, ...] | HeadKernel | str = ()
    alpha: float | None = None

    def __post_init__(self):
        for field in ("query", "key", "query_of_shared_key"):
            object.__setattr__(self, field, _kernels(getattr(self, field)))
        if not self.query:
            raise SmoljaxError("QKClipSpec.query is empty: name the query kernel")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise SmoljaxError(f"QKClipSpec.alpha is {self.alpha}: give a number from 0 to 1")
        if not self.key and self.alpha not in (None, 1):
            raise SmoljaxError(
                f"QKClipSpec.alpha is {self.alpha} and key is empty: name the key kernel, or leave alpha None"
            )


def qk_clip(
    params: optax.Params, max_logits: MaxLogits, *, tau: float = 100.0, spec: QKClipSpec
) -> optax.Params:
    """Scales query and key weights so that the same inputs would give no head a logit above tau (MuonClip of Kimi K2, arXiv 2507.20534).

    gamma = min(1, tau / max_logit) for each head. Call it after the optimizer's update, with the maxima of the step's forward pass:

        params = optax.apply_updates(params, updates)
        params = qk_clip(params, max_logits_LN, spec=QKClipSpec("layers/attention/query", "layers/attention/key"))

    The bound is that of a layer's own inputs: where several layers are clipped at once, the later ones also get other
    inputs. Momentum and other optimizer state stay as they are. With QK-norm the size of these weights has no effect on
    the logits, so it cannot help there; nor does it last with an optimizer that sets the norm of the weights itself.

    Args:
      params: any tree of real floats; other leaves than those of the spec come back as they are.
      max_logits: [..., N], the largest scaled logit of each head, where the kernels begin with the same leading axes: [L, N]
        beside kernels [L, D, N, W], or [N] beside [D, N, W]. Or a mapping from the path of a module ("layers_0/attention") to its array, and
        the paths of the spec follow each of these. A head whose maximum is NaN or infinite keeps its weights: what the
        factor should be is not known, and 0 would end the head.
      tau: largest logit allowed, above 0.
      spec: which leaves.

    Returns:
      The parameters in their dtypes; the factors are taken in f32. Weights of heads within tau keep their bits (with shared
      key heads and alpha below 1, those of groups within tau).

    Raises:
      SmoljaxError: tau is not positive; max_logits is an empty mapping; a path fits no leaf or several; two parts of the spec overlap; or shapes of
        kernels and max_logits do not agree.
    """
    _check_tau(tau)
    leaves = by_path(params)
    scaled, taken = {}, {}
    for module, logits in _by_module(max_logits).items():
        for kernel, path, factor in _factors(leaves, module, jnp.asarray(logits), tau, spec):
            _check_overlap(path, kernel, taken.setdefault(path, []))
            weights = scaled.get(path, leaves[path].astype(jnp.float32))
            scaled[path] = weights * _spread(factor, kernel, leaves[path].shape)

    def replace(path: tuple, leaf: jax.Array) -> jax.Array:
        name = path_string(path)
        return scaled[name].astype(leaf.dtype) if name in scaled else leaf

    return jax.tree_util.tree_map_with_path(replace, params)


def clipped_heads(max_logits: MaxLogits, tau: float = 100.0) -> jax.Array:
    """The fraction of all heads that qk_clip would scale: f32 scalar. Arguments as there."""
    _check_tau(tau)
    arrays = [jnp.asarray(logits) for logits in _by_module(max_logits).values()]
    fired = sum(jnp.sum(_gamma(logits, tau) < 1, dtype=jnp.float32) for logits in arrays)
    return fired / sum(logits.size for logits in arrays)


def _gamma(max_logits: jax.Array, tau: float) -> jax.Array:
    max_logits = max_logits.astype(jnp.float32)
    above = (max_logits > tau) & jnp.isfinite(max_logits)
    return jnp.where(above, tau / jnp.where(above, max_logits, 1.0), 1.0)


def _factors(leaves, module: str, max_logits: jax.Array, tau: float, spec: QKClipSpec):
    """(kernel, path of its leaf, factor of each of its heads [..., P]) for all of a module's kernels that change."""
    if max_logits.ndim == 0:
        raise SmoljaxError("qk_clip got max_logits of shape (): give [N], or [L, N]")
    gamma = _gamma(max_logits, tau)
    *lead, N = gamma.shape

    def find(kernels):
        found = [(kernel, _find(leaves, module, kernel.path)) for kernel in kernels]
        counts = [_num_heads(kernel, path, leaves[path], max_logits) for kernel, path in found]
        return found, counts

    keys, key_counts = find(spec.key)
    queries, counts = find(spec.query)
    shared, shared_counts = find(spec.query_of_shared_key)
    for (_, path), count in zip(queries + shared, counts + shared_counts):
        if count != N:
            raise SmoljaxError(
                f"qk_clip: {path} of shape {leaves[path].shape} has {count} heads, and max_logits of shape "
                f"{max_logits.shape} says {N}"
            )
    K = key_counts[0] if keys else N
    for (_, path), count in zip(keys, key_counts):
        if count != K or N % K:
            raise SmoljaxError(
                f"qk_clip: {path} of shape {leaves[path].shape} has {count} key heads for the {N} query heads of "
                f"max_logits {max_logits.shape}: all key kernels need the same number, which divides {N}"
            )
    alpha = spec.alpha if spec.alpha is not None else 0.5 if keys and K == N else 1.0
    of_keys = jnp.min(gamma.reshape(*lead, K, N // K), axis=-1) ** (1.0 - alpha)
    of_queries = gamma if alpha == 1 else gamma / jnp.repeat(of_keys, N // K, axis=-1)
    yield from ((kernel, path, of_queries) for kernel, path in queries)
    yield from ((kernel, path, gamma) for kernel, path in shared)
    if alpha != 1:
        yield from ((kernel, path, of_keys) for kernel, path in keys)


def _spread(factor: jax.Array, kernel: HeadKernel, shape: tuple[int, ...]) -> jax.Array:
    """Factors [..., P] of heads as an array that broadcasts against the leaf, with 1 outside the kernel's ranges."""
    lead = factor.ndim - 1
    heads, width = (len(shape) + axis for axis in (kernel.heads, kernel.width))
    if kernel.head_range is not None:
        first, end = kernel.head_range
        rest = _count(kernel, shape) - end
        factor = jnp.pad(factor, [(0, 0)] * lead + [(first, rest)], constant_values=1.0)
    target = [*factor.shape[:lead], *(1 for _ in shape[lead:])]
    target[heads] = factor.shape[-1]
    if kernel.width_range is None and kernel.head_dim is None:
        return factor.reshape(target)
    W = kernel.head_dim or shape[width]
    first, end = kernel.width_range or (0, W)
    inside_W = (jnp.arange(W) >= first) & (jnp.arange(W) < end)
    inside = inside_W.reshape((1,) * factor.ndim + (W,))
    factor = jnp.where(inside, factor[..., None], 1.0)
    if kernel.head_dim is not None:
        target[heads] = shape[heads]
        return factor.reshape(target)
    target[width] = W
    return (factor if heads < width else jnp.swapaxes(factor, -1, -2)).reshape(target)


def _num_heads(kernel: HeadKernel, path: str, leaf: jax.Array, max_logits: jax.Array) -> int:
    """Heads that the kernel has in the leaf, after a check that its axes, its ranges and the leading axes fit."""
    check_float(path, leaf)
    lead, shape = max_logits.shape[:-1], leaf.shape
    axes = {kernel.heads} if kernel.head_dim is not None else {kernel.heads, kernel.width}
    if shape[: len(lead)] != lead or any(len(shape) + axis < len(lead) for axis in axes):
        raise SmoljaxError(
            f"qk_clip: {path} of shape {shape} does not go with max_logits of shape {max_logits.shape}: it should "
            f"begin with {lead} and have its head axes {sorted(axes)} after that"
        )
    W = kernel.head_dim or shape[kernel.width]
    if kernel.heads == kernel.width and kernel.head_dim is None:
        raise SmoljaxError(
            f"qk_clip: heads and width of {path} are both axis {kernel.heads}: give head_dim"
        )
    if shape[kernel.heads] % (kernel.head_dim or 1):
        raise SmoljaxError(
            f"qk_clip: axis {kernel.heads} of {path}, shape {shape}, is no multiple of head_dim {kernel.head_dim}"
        )
    P = _count(kernel, shape)
    for name, bounds, size in (("head", kernel.head_range, P), ("width", kernel.width_range, W)):
        if bounds is not None and bounds[1] > size:
            raise SmoljaxError(
                f"qk_clip: {name}_range {bounds} of {path}, shape {shape}, ends after {size}"
            )
    first, end = kernel.head_range or (0, P)
    return end - first


def _count(kernel: HeadKernel, shape: tuple[int, ...]) -> int:
    return shape[kernel.heads] // (kernel.head_dim or 1)


def _find(leaves: Mapping[str, object], module: str, path: str) -> str:
    """The one leaf of the module that the path, or regular expression, fits."""
    prefix = f"{module}/" if module else ""
    if prefix + path in leaves:
        return prefix + path
    inside = [leaf for leaf in leaves if leaf.startswith(prefix)]
    try:
        fitting = [leaf for leaf in inside if re.fullmatch(path, leaf[len(prefix) :])]
    except re.error as error:
        raise SmoljaxError(
            f"qk_clip: {path!r} is neither a path nor a regular expression: {error}"
        ) from error
    if len(fitting) != 1:
        below = f" below {module!r}" if module else ""
        seen = ", ".join(fitting or inside or leaves)
        raise SmoljaxError(
            f"qk_clip: {path!r} fits {len(fitting) or 'no'} leaves{below} and should fit one. "
            f"{'They' if fitting else 'The leaves'} are {seen[:400]}"
        )
    return fitting[0]


def _check_overlap(path: str, kernel: HeadKernel, others: list[HeadKernel]) -> None:
    def apart(a, b):
        return a is not None and b is not None and (a[1] <= b[0] or b[1] <= a[0])

    for other in others:
        if not (
            apart(kernel.head_range, other.head_range)
            or apart(kernel.width_range, other.width_range)
        ):
            raise SmoljaxError(
                f"qk_clip: two parts of the spec, {kernel} and {other}, share weights of {path}: they would be "
                "scaled twice; give both ranges that do not overlap"
            )
    others.append(kernel)


def _check_tau(tau: float) -> None:
    if not isinstance(tau, jax.core.Tracer) and not tau > 0:
        raise SmoljaxError(f"qk_clip got tau={tau}: give a number above 0 (Kimi K2 has 100)")


def _by_module(max_logits: MaxLogits) -> Mapping[str, jax.Array]:
    if not isinstance(max_logits, Mapping):
        return {"": max_logits}
    if not max_logits:
        raise SmoljaxError(
            "qk_clip got no max_logits: give each attention module's path its maxima [N]"
        )
    return max_logits


def _kernels(given: object) -> tuple[HeadKernel, ...]:
    given = given if isinstance(given, tuple | list) else (given,)
    return tuple(HeadKernel(one) if isinstance(one, str) else one for one in given)

"""What would help, and by how much: the cheapest changes to a planned run, in closed form. Each is confirmed by planning it."""

import dataclasses
from collections.abc import Iterator

from smoljax.model import ModelConfig
from smoljax.planning.closed_form import ATTENTION_TWICE, product_flops
from smoljax.planning.estimate import (
    KERNEL_SHARE,
    Exchange,
    Times,
)
from smoljax.planning.topologies import GIB

_LOSS_TOKENS_PER_CHIP = 2048  # Their f32 logits over 128,256 words take 1 GiB.


@dataclasses.dataclass(frozen=True)
class Change:
    """A change to the config.

    Attributes:
      flags: what to add to the command.
      seconds: of a step that it saves, by estimate; negative when it costs some.
      bytes: of memory that it frees per chip, by estimate; negative when it takes some.
      why: one line.
    """

    flags: str
    seconds: float
    bytes: float
    why: str


def cheapest(
    model: ModelConfig,
    *,
    times: Times | None,
    exchanges: tuple[Exchange, ...],
    kernel_runs: int | None,
    free_bytes: float,
    seq_len: int,
    batch_size: int,
    micro_batches: int,
    loss_chunk: int,
    batch_parts: int,
    sequence_parts: int = 1,
) -> tuple[Change, ...]:
    """At most three changes: those that free memory when it does not fit, else those that save most time and fit.

    Args:
      model: the model.
      times: of a step, or None when it does not fit.
      exchanges: its collectives.
      kernel_runs: runs of attention kernels in a step; None where that is not known.
      free_bytes: memory that is left on a chip; negative when it does not fit.
      seq_len: tokens of a sequence.
      batch_size: sequences of a step.
      micro_batches: pieces of a batch.
      loss_chunk: tokens per chip whose logits fill the memory that logits may take.
      batch_parts: chips over which the batch is split.
      sequence_parts: chips over which each sequence is split.
    """
    step = _Step(model, seq_len, batch_size, micro_batches, loss_chunk, batch_parts, sequence_parts)
    if free_bytes < 0:
        return tuple(sorted(_that_free_memory(step, exchanges), key=lambda c: -c.bytes)[:3])
    if times is None:
        return ()
    possible = [
        change
        for change in _that_save_time(step, times, exchanges, kernel_runs)
        if change.bytes + free_bytes > 0.05 * GIB and change.seconds > 0
    ]
    best: dict[str, Change] = {}  # By field: one value for each.
    for change in sorted(possible, key=lambda change: -change.seconds):
        best.setdefault(change.flags.partition("=")[0], change)
    return tuple(best.values())[:3]


@dataclasses.dataclass(frozen=True)
class _Step:
    """Sizes of a step; the arguments of `cheapest`, and what follows from them."""

    model: ModelConfig
    seq_len: int
    batch_size: int
    micro_batches: int
    loss_chunk: int
    batch_parts: int
    sequence_parts: int

    @property
    def rows_per_chip(self) -> float:
        return self.batch_size / self.batch_parts

    @property
    def tokens_per_chip(self) -> int:
        """Of a micro-batch."""
        return int(self.rows_per_chip * self.seq_len / self.sequence_parts / self.micro_batches)

    def logits(self, tokens: int) -> float:
        """Bytes per chip of the logits of these tokens and of their gradient, in f32."""
        return 2 * 4 * min(tokens, self.tokens_per_chip) * self.model.vocab_size

    def activations(self, width: int) -> float:
        """Bytes per chip of a bf16 activation of this width in every layer."""
        return 2 * self.tokens_per_chip * width * self.model.num_layers

    @property
    def layer_inputs(self) -> float:
        return self.activations(self.model.hidden_size)


def _that_free_memory(step: _Step, exchanges: tuple[Exchange, ...]) -> Iterator[Change]:
    logits = step.logits(step.loss_chunk)
    saved = step.activations(saved_width(step.model))
    kept = step.layer_inputs + saved
    fewer_logits = step.logits(_LOSS_TOKENS_PER_CHIP)
    if logits > fewer_logits:
        yield Change(
            f"--config.training.loss_chunk={_LOSS_TOKENS_PER_CHIP}",
            0.0,
            logits - fewer_logits,
            "fewer logits at a time",
        )
    if step.model.remat != "full":
        yield Change("--config.model.remat=full", 0.0, saved, "layers are computed twice")
    if step.rows_per_chip / step.micro_batches >= 2:
        yield Change(
            f"--config.training.micro_batches={2 * step.micro_batches}",
            -sum(exchange.exposed for exchange in exchanges),
            kept / 2 + max(0, logits - step.logits(step.tokens_per_chip // 2)),
            "half the activations at a time; parameters are gathered twice as often",
        )
    if step.rows_per_chip >= 2:
        yield Change(
            f"--config.data.batch_size={step.batch_size // 2}",
            0.0,
            kept / 2,
            "half the sequences per chip: another run, with other gradients",
        )
    yield Change("twice the chips", 0.0, kept / 2, "half of everything that is split")


def _that_save_time(
    step: _Step, times: Times, exchanges: tuple[Exchange, ...], kernel_runs: int | None
) -> Iterator[Change]:
    model = step.model
    if step.loss_chunk < step.tokens_per_chip and step.batch_parts > 1:
        head = 2 * model.vocab_size * model.hidden_size  # FLOPs per token of the logits.
        products = product_flops(model)
        yield Change(
            f"--config.training.loss_chunk={step.tokens_per_chip}",
            times.products * head / (products + head),
            step.logits(step.loss_chunk) - step.logits(step.tokens_per_chip),
            "all logits at once are computed once, not twice",
        )
    if kernel_runs == 0:
        everything = model.flops_per_token(step.seq_len)
        share = 1 - model.flops_per_token(step.seq_len, attention="none") / everything
        yield Change(
            "an attention kernel (config.model.attention)",
            max(0.0, times.products * share * (1 - 0.5 / KERNEL_SHARE[0]) + times.other * 0.5),
            0.0,
            "scores stay on the chip instead of passing through memory",
        )
    yield from _less_recomputed(step, times)
    if step.micro_batches > 1:
        yield Change(
            f"--config.training.micro_batches={step.micro_batches // 2}",
            times.exposed / 2,
            -step.layer_inputs - step.activations(saved_width(model)),
            "parameters are gathered half as often",
        )
    if times.exposed > 0.1 * times.step:
        yield Change(
            f"--config.data.batch_size={2 * step.batch_size}",
            times.exposed / 2,
            -step.layer_inputs - step.activations(saved_width(model)),
            "twice the tokens for each exchange (seconds per token are meant; another run)",
        )


def _less_recomputed(step: _Step, times: Times) -> Iterator[Change]:
    """Policies that save more of a layer than the present one."""
    model = step.model
    now, held = product_flops(model), step.activations(saved_width(model))
    for policy in ("save_attention", "save_projections", "dots", "none"):
        other = dataclasses.replace(model, remat=policy)
        seconds = times.products * (1 - product_flops(other) / now)
        # A forward run of the kernel beside a backward run that is worth 2.5.
        runs = [3.5 + (each.remat in ATTENTION_TWICE) for each in (model, other)]
        seconds += times.kernels * (1 - runs[1] / runs[0])
        if seconds > 0:
            yield Change(
                f"--config.model.remat={policy}",
                seconds,
                held - step.activations(saved_width(other)),
                "more of a layer is kept, and less computed again",
            )


def saved_width(model: ModelConfig) -> float:
    """Numbers that each token keeps for the backward pass in each layer, beside the layer's input."""
    D, F = model.hidden_size, model.intermediate_size
    heads, kv = (n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    return {
        "full": 0,
        "save_attention": heads,
        "save_projections": 2 * heads + 2 * kv,
        "dots": D + 2 * heads + 2 * kv + 2 * F,
        "none": 6 * D + 3 * heads + 4 * kv + 4 * F,
    }[model.remat]

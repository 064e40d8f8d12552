"""What would help, and by how much: the cheapest changes to a planned run, in closed form. Each is confirmed by planning it."""

import dataclasses

from smoljax.model import ModelConfig
from smoljax.planning.estimate import KERNEL_SHARE, Exchange, Times
from smoljax.planning.topologies import GIB

_LOSS_TOKENS_PER_CHIP = 2048  # A chunk of 2048 tokens fills the matrix units; its f32 logits over 128,256 words take 1 GiB.


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
    rows_per_chip: float,
    seq_len: int,
    batch_size: int,
    micro_batches: int,
    loss_chunk: int,
    batch_parts: int,
) -> tuple[Change, ...]:
    """At most three changes: those that free memory when it does not fit, else those that save most time and fit.

    Args:
      model: the model.
      times: of a step, or None when it does not fit.
      exchanges: its collectives.
      kernel_runs: runs of attention kernels in a step; None where that is not known.
      free_bytes: memory that is left on a chip; negative when it does not fit.
      rows_per_chip: sequences per chip.
      seq_len: tokens of a sequence.
      batch_size: sequences of a step.
      micro_batches: pieces of a batch.
      loss_chunk: tokens of a chunk of the loss, over all chips.
      batch_parts: chips over which the batch is split.
    """
    changes = []
    tokens = batch_size * seq_len / micro_batches
    chunks = max(1, round(tokens / loss_chunk))
    logits = 2 * 4 * loss_chunk * model.vocab_size / batch_parts
    best_chunk = min(int(tokens), _LOSS_TOKENS_PER_CHIP * batch_parts)
    width = 2 * rows_per_chip * seq_len / micro_batches
    layer_inputs = width * model.hidden_size * model.num_layers
    if free_bytes < 0:
        if loss_chunk > best_chunk:
            changes.append(
                Change(
                    f"--config.training.loss_chunk={best_chunk}",
                    0.0,
                    logits * (1 - best_chunk / loss_chunk),
                    "logits of a smaller chunk",
                )
            )
        if model.remat != "full":
            changes.append(
                Change("--config.model.remat=full", 0.0, layer_inputs, "layers are computed twice")
            )
        if rows_per_chip / micro_batches >= 2:
            changes.append(
                Change(
                    f"--config.training.micro_batches={2 * micro_batches}",
                    -_seconds(exchanges),
                    layer_inputs / 2 + (logits / 2 if chunks == 1 else 0),
                    "half the activations at a time; parameters are gathered twice as often",
                )
            )
        if rows_per_chip >= 2:
            changes.append(
                Change(
                    f"--config.data.batch_size={batch_size // 2}",
                    0.0,
                    layer_inputs / 2,
                    "half the sequences per chip: another run, with other gradients",
                )
            )
        changes.append(
            Change("twice the chips", 0.0, layer_inputs / 2, "half of everything that is split")
        )
        return tuple(sorted(changes, key=lambda change: -change.bytes)[:3])
    if times is None:
        return ()
    if best_chunk > loss_chunk:
        # Every chunk gathers the head in bf16 and sums its gradient in f32 over all chips (there and back).
        saved = 1 - max(1, round(tokens / best_chunk)) / chunks
        head = (2 + 2 * 4) * model.vocab_size * model.hidden_size * chunks * micro_batches
        total = sum(exchange.bytes_sent for exchange in exchanges)
        if total:
            changes.append(
                Change(
                    f"--config.training.loss_chunk={best_chunk}",
                    saved * min(1.0, head / total) * times.exposed,
                    logits - 2 * 4 * best_chunk * model.vocab_size / batch_parts,
                    f"{chunks} chunks of {loss_chunk / batch_parts:.0f} tokens per chip, each of which gathers the head",
                )
            )
    if kernel_runs == 0:
        flops = model.flops_per_token(seq_len) - model.flops_per_token(seq_len, attention="none")
        none = model.flops_per_token(seq_len, attention="none")
        share = flops / (flops + none)
        changes.append(
            Change(
                "an attention kernel (config.model.attention)",
                max(0.0, times.products * share * (1 - 0.5 / KERNEL_SHARE[0]) + times.other * 0.5),
                0.0,
                "scores stay on the chip instead of passing through memory",
            )
        )
    if model.remat == "full":
        attention_out = width * model.num_heads * model.head_dim * model.num_layers
        changes.append(
            Change(
                "--config.model.remat=save_attention",
                times.kernels / (2 + 2.5),
                -attention_out,
                "the attention's forward pass is not computed again",
            )
        )
        kv = 2 * model.num_kv_heads * model.head_dim
        heads = 2 * model.num_heads * model.head_dim
        dots = width * model.num_layers * (kv + heads + 2 * model.intermediate_size)
        changes.append(
            Change(
                "--config.model.remat=dots",
                times.products / 4,
                -dots,
                "no matrix product of a layer is computed again",
            )
        )
    if micro_batches > 1:
        changes.append(
            Change(
                f"--config.training.micro_batches={micro_batches // 2}",
                times.exposed / 2,
                -layer_inputs,
                "parameters are gathered half as often",
            )
        )
    if times.exposed > 0.1 * times.step:
        changes.append(
            Change(
                f"--config.data.batch_size={2 * batch_size}",
                times.exposed / 2,
                -2 * layer_inputs,
                "twice the tokens for each exchange (seconds per token are meant; another run)",
            )
        )
    possible = [c for c in changes if c.bytes + free_bytes > 0.05 * GIB and c.seconds > 0]
    return tuple(sorted(possible, key=lambda change: -change.seconds)[:3])


def _seconds(exchanges: tuple[Exchange, ...]) -> float:
    return sum(exchange.exposed for exchange in exchanges)

"""Seconds of a step where nothing is compiled: GPUs, and models of published runs (benchmarks/plan_calibration.py)."""

from smoljax.model import ModelConfig
from smoljax.planning.estimate import Times, kernel_rate
from smoljax.planning.topologies import Topology

# What products and the rest take in a run, against their closed forms. On TPUs nothing is fitted. On GPUs this is, to four published runs
# (the mean error of their logarithms is 0); each predicted from the other three, they are off by 22% on average, and by 48% without it.
STALLS = {"tpu": 1.0, "gpu": 1.56}
# Products and the rest against that, at the ends of the range.
RANGE = {"tpu": (0.9, 1.3), "gpu": (0.7, 1.4)}
# Share of the exchange that nothing hides; likely, and the ends of the range. libtpu 0.0.42 leaves two thirds of it
# exposed in configs/smollm3_3b.py on v5e and all of it on v5p and v6e; with every collective asynchronous it would be none.
EXPOSED_SHARE = 0.5
# Times that an activation of every width of a layer (model and feed-forward) passes through memory in a step, recomputation included.
# configs/smollm3_3b.py compiled for v5e: 16.
MEMORY_PASSES = 16
ATTENTION_TWICE = ("full",)  # Remat policies that run the kernel's forward pass again.


def roofline(
    model: ModelConfig,
    topology: Topology,
    *,
    seq_len: int,
    tokens: float,
    fsdp: int,
    tensor: int = 1,
    loss_chunk: int | None = None,
) -> Times:
    """Seconds of a step in closed form: nothing is compiled.

    Args:
      model: the model; its remat policy says what is computed twice.
      topology: the machine.
      seq_len: tokens of a sequence.
      tokens: tokens of a step on the whole machine.
      fsdp: chips over which parameters are split and gathered twice, and their gradient summed once, a step, in bf16.
      tensor: chips over which heads and feed-forward width are split, and activations exchanged.
      loss_chunk: tokens per chip whose logits are computed at a time, and again for the gradient; None for all, once.
    """
    chip, chips = topology.chip, topology.num_chips
    here = tokens / chips
    products = here * product_flops(model)
    if loss_chunk is not None and loss_chunk < here * tensor:
        products += here * 2 * model.vocab_size * model.hidden_size
    attention = here * (
        model.flops_per_token(seq_len, attention="causal")
        - model.flops_per_token(seq_len, attention="none")
    )
    # Forward 2 products, backward 5, and where nothing is saved 2 again; the convention counts 2 and 4.
    attention *= (2 + 5 + 2 * (model.remat in ATTENTION_TWICE)) / 6
    stalls = STALLS[chip.platform]
    seconds = products / chip.peak_flops / chip.product_share * stalls
    widths = model.hidden_size + model.intermediate_size / tensor
    passes = MEMORY_PASSES * model.num_layers * stalls
    memory = here * tensor * 2 * passes * widths / chip.hbm_bandwidth
    links = _link_seconds(model, topology, fsdp=fsdp, tensor=tensor, tokens_per_chip=here)
    hides = min(links, seconds + memory)
    exposed = links - hides * (1 - EXPOSED_SHARE)
    return Times(
        products=seconds,
        other=memory,
        kernels=attention / kernel_rate(chip, model.head_dim),
        exposed=exposed,
        hidden=links - exposed,
        can_hide=hides * EXPOSED_SHARE,
        span=RANGE[chip.platform],
    )


def product_flops(model: ModelConfig) -> float:
    """Of one token's matrix products, with those that the remat policy computes again: what the backward pass reads, which a layer's
    last product is not."""
    D, F, H = model.hidden_size, model.intermediate_size, model.head_dim
    output_and_mlp = model.num_heads * H * D + 2 * D * F
    queries_keys_values = D * H * (model.num_heads + 2 * model.num_kv_heads)
    again = {
        "none": 0,
        "dots": 0,
        "save_projections": output_and_mlp,
        "save_attention": output_and_mlp + queries_keys_values,
        "full": output_and_mlp + queries_keys_values,
    }
    return model.flops_per_token(1, attention="none") + 2 * model.num_layers * again[model.remat]


def _link_seconds(
    model: ModelConfig, topology: Topology, *, fsdp: int, tensor: int, tokens_per_chip: float
) -> float:
    """Seconds of all exchange of a step, one after the other."""
    chip = topology.chip
    sides = [side for side in topology.shape if side > 1]
    links = 1 if chip.platform == "gpu" else 2 * max(1, len(sides))
    whole = 2 * model.num_params / tensor
    sent = 3 * whole * (1 - 1 / fsdp)
    seconds = sent / (links * chip.link_bandwidth)
    if fsdp * tensor > topology.chips_per_slice:
        # Rings through several nodes: what enters a node passes through all its network cards.
        seconds = max(seconds, sent / (chip.network_bandwidth * topology.chips_per_slice))
    elif topology.slices > 1:
        # Slices (or nodes) hold copies, and sum their f32 gradients: each chip a part of one.
        part = 4 * model.num_params / topology.chips_per_slice
        seconds += 2 * part * (1 - 1 / topology.slices) / chip.network_bandwidth
    if tensor > 1:
        # Gathered before and scattered after attention and the feed-forward network: forward, again, and backward. One axis of links.
        rows = tokens_per_chip * tensor * 2 * model.hidden_size * (1 - 1 / tensor)
        axis = chip.link_bandwidth * (1 if chip.platform == "gpu" else 2)
        seconds += 4 * 3 * rows * model.num_layers / axis
    return seconds

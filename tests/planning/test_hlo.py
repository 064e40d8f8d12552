"""Reading programs: a trimmed real one, and small ones whose figures are counted by hand."""

from pathlib import Path

import pytest

from smoljax.errors import SmoljaxError
from smoljax.planning import hlo

LOOP = """HloModule jit_step

%cond (p: (s32[], f32[8,128])) -> pred[] {
  %p = (s32[], f32[8,128]) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(36)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%product (a: f32[8,128]) -> f32[8,128] {
  ROOT %dot = f32[8,128] convolution(%a, %a), dim_labels=bf_io->bf
}

%body (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %x = f32[8,128] get-tuple-element(%p.1), index=1
  %fused = f32[8,128]{1,0:T(8,128)} fusion(%x), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1000"}
  %add.1 = f32[8,128] add(%fused, %x), backend_config={"estimated_cycles":"50"}
  %gather = bf16[1024,128]{1,0:T(8,128)(2,1)} all-gather(%add.1), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %kernel.7 = f32[8,128] custom-call(%add.1), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"
}}, metadata={op_name="jit(step)/transpose(jvp(layer))/pallas_call"}
}

ENTRY %main (a.1: f32[8,128]) -> f32[8,128] {
  %a.1 = f32[8,128] parameter(0)
  %loop = (s32[], f32[8,128]) while(%a.1), condition=%cond, body=%body
  ROOT %end = f32[8,128] copy(%loop), backend_config={"estimated_cycles":"7"}
}
"""


def test_cycles_are_multiplied_by_the_trips_of_the_loop():
    program = hlo.read(LOOP)
    assert program.total_cycles == 36 * (1000 + 50) + 7
    assert program.matmul_cycles == 36 * 1000
    assert program.num_noted == 3


def test_kernels_and_collectives_are_too():
    program = hlo.read(LOOP)
    assert program.kernels == (hlo.Kernel("kernel", 36, True),)
    (gather,) = program.collectives
    assert (gather.kind, gather.trips, gather.group) == ("all-gather", 36, (0, 1, 2, 3))
    assert (
        gather.bytes_sent == 1024 * 128 * 2 * 3 / 4
    )  # A ring of four: each chip sends three parts of four.
    assert not gather.asynchronous


def test_a_kernel_of_the_forward_pass_may_run_again_for_the_backward_one():
    path = "transpose(jvp(layer))/checkpoint/rematted_computation/pallas_call"
    text = LOOP.replace("transpose(jvp(layer))/pallas_call", path)
    assert hlo.read(text).kernels == (hlo.Kernel("kernel", 36, False, again=True),)


def test_exchanges_that_jax_writes_itself_all_have_channel_1():
    gather = next(line for line in LOOP.splitlines() if "all-gather" in line)
    twice = LOOP.replace(gather, gather + "\n" + gather.replace("%gather", "%other"))
    assert [c.trips for c in hlo.read(twice).collectives] == [36, 36]


BRANCHES = """
%low (a.2: f32[8,128]) -> f32[8,128] {
  ROOT %kernel.1 = f32[8,128] custom-call(%a.2), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp(ring)/pallas_call"}
}

%high (a.3: f32[8,128]) -> f32[8,128] {
  %kernel.2 = f32[8,128] custom-call(%a.3), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/jvp(ring)/pallas_call"}
  ROOT %turned = f32[8,128] copy(%kernel.2), backend_config={"estimated_cycles":"30"}
}

%body (p.1"""


@pytest.mark.parametrize(
    "named",
    ["branch_computations={%high, %low}", "true_computation=%low, false_computation=%high"],
)
def test_of_two_branches_one_runs(named):
    """36 kernels of 36 choices between two, and the cycles of the branch that takes more."""
    choice = f"  %chosen = f32[8,128] conditional(%i, %x, %x), {named}\n"
    text = LOOP.replace("\n%body (p.1", BRANCHES).replace("  %kernel.7", choice + "  %kernel.7")
    program = hlo.read(text)
    assert [(kernel.trips, kernel.backward) for kernel in program.kernels] == [
        (36, True),
        (36, False),
    ]
    assert program.total_cycles == 36 * (1050 + 30) + 7


def test_a_loop_counted_in_unsigned_numbers():
    text = LOOP.replace("s32[]{:T(128)} constant(36)", "u32[]{:T(128)} constant(5)")
    assert hlo.read(text).total_cycles == 5 * 1050 + 7


SEND = """  %send.1 = (f32[4,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%sum, %token), channel_id=4, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
"""


@pytest.mark.parametrize(
    ("kind", "name", "share"),
    [
        ("ALL_REDUCE", "all-reduce", 2 * 3 / 4),
        ("ALL_GATHER", "all-gather", 3),
        ("REDUCE_SCATTER", "reduce-scatter", 3 / 4),
    ],
)
def test_between_slices_a_chip_hands_its_part_to_the_host(kind, name, share):
    """As libtpu 0.0.42 writes it for four slices: a ring of four passes on three parts of four, or each part three times."""
    text = LOOP.replace("  %kernel.7", SEND.replace("ALL_REDUCE", kind) + "  %kernel.7")
    (sent,) = [each for each in hlo.read(text).collectives if not each.group]
    assert (sent.kind, sent.trips, sent.asynchronous) == (name, 36, True)
    assert sent.bytes_sent == 4 * 8 * 128 * 4 * share


def test_an_exchange_between_slices_of_an_unknown_kind_is_an_error():
    text = LOOP.replace("  %kernel.7", SEND.replace("ALL_REDUCE", "GOSSIP") + "  %kernel.7")
    with pytest.raises(SmoljaxError, match="GOSSIP"):
        hlo.read(text)


def test_a_sum_that_is_sliced_at_once_sends_half_of_a_whole_sum():
    text = LOOP.replace(
        "%body (p.1",
        """%all-reduce-scatter.1 (input: f32[1024,128]) -> f32[256,128] {
  %sum = f32[1024,128] all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[256,128] dynamic-slice(%sum, %at, %zero), dynamic_slice_sizes={256,128}
}

%body (p.1""",
    ).replace(
        "  %kernel.7",
        "  %part.1 = f32[256,128] fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1\n  %kernel.7",
    )
    (scattered,) = [c for c in hlo.read(text).collectives if c.kind == "reduce-scatter"]
    assert scattered.bytes_sent == 1024 * 128 * 4 * 3 / 4
    assert not scattered.asynchronous


def test_a_real_program():
    """SmolLM3-3B on 256 v5e chips, trimmed: 36 layers with jax's splash attention, computed again in the backward pass, and a loss
    in 512 chunks."""
    program = hlo.read((Path(__file__).parent / "programs" / "v5e_step.txt").read_text())
    assert program.kernel_runs == 3 * 36
    assert sum(kernel.trips for kernel in program.kernels if kernel.backward) == 36
    gathers = [c for c in program.collectives if c.kind == "all-gather"]
    assert {c.trips for c in gathers} == {36, 512}
    head = max(gathers, key=lambda c: c.bytes_sent)
    assert head.bytes_sent == 2048 * 128_256 * 2 * 255 / 256
    # Steps of an asynchronous gather name its whole shape again and again: it counts once for each channel.
    mlp = [c for c in gathers if c.trips == 36]
    assert len(mlp) <= 6
    assert all(c.asynchronous and len(c.group) == 256 for c in mlp)


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[4,2]<=[8], x", (0, 1)),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}, x", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=4,'b'=2] {'a','b'}, x", tuple(range(8))),
        # Of a mesh data 2 x fsdp 8, as libtpu 0.0.42 writes its two axes.
        (
            "replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'b'}, x",
            tuple(range(8)),
        ),
        ("replica_groups=mesh['a'=1,'b'=8,'c'=2], device_ids=([2,8]T(1,0)) {'c'}, x", (0, 8)),
        ("source_target_pairs={{3,0},{0,1}}", (3, 0)),
    ],
)
def test_groups(text, group):
    assert hlo.group_of(text) == group


def test_groups_of_an_unknown_form_are_an_error():
    """They would be priced as if nothing were sent."""
    with pytest.raises(SmoljaxError, match="replica_groups=torus"):
        hlo.group_of("all-gather(x), replica_groups=torus[2,2], dimensions={0}")


@pytest.mark.parametrize(
    ("dtype", "dimensions", "size"),
    [
        ("bf16", "8,128", 2048),
        ("f32", "", 4),
        ("pred", "16", 16),
        ("f8e4m3fn", "4,4", 16),
        ("s4", "8", 4),
    ],
)
def test_bytes_of_shapes(dtype, dimensions, size):
    assert hlo.shape_bytes(dtype, dimensions) == size


def test_text_that_is_no_program():
    with pytest.raises(SmoljaxError, match="ENTRY"):
        hlo.read("nothing")

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoljax.errors import SmoljaxError
from smoljax.input_pipeline.windows import order_of

ORDERS = st.builds(
    lambda block_tokens, share, num_tokens, group_blocks, seed: order_of(
        "docs",
        seed,
        num_tokens=num_tokens,
        block_tokens=block_tokens,
        seq_len=max(1, round(block_tokens * share)),
        group_blocks=group_blocks,
    ),
    block_tokens=st.integers(2, 60),
    share=st.floats(0.02, 1.0),
    num_tokens=st.integers(1, 700),
    group_blocks=st.integers(1, 6),
    seed=st.integers(0, 10**9),
)


def _all_windows(order):
    last = order.num_blocks - 1
    return {
        (block, window)
        for block in range(order.num_blocks)
        for window in range(order.last_windows if block == last else order.windows_per_block)
    }


@settings(max_examples=300, deadline=None)
@given(order=ORDERS, epoch=st.sampled_from([0, 1, 2, 10**6]))
def test_every_window_once_per_epoch(order, epoch):
    per_epoch = order.windows_per_epoch
    epochs, blocks, windows = order.locate(epoch * per_epoch + np.arange(per_epoch))
    assert (epochs == epoch).all()
    found = list(zip(blocks.tolist(), windows.tolist(), strict=True))
    assert len(found) == per_epoch
    assert set(found) == _all_windows(order)


@settings(max_examples=200, deadline=None)
@given(order=ORDERS)
def test_at_most_a_group_of_blocks_is_open_at_a_time(order):
    _, blocks, _ = order.locate(np.arange(order.windows_per_epoch))
    first, last = {}, {}
    for at, block in enumerate(blocks.tolist()):
        first.setdefault(block, at)
        last[block] = at
    for at in range(len(blocks)):
        assert sum(first[b] <= at <= last[b] for b in first) <= order.group_blocks


@settings(max_examples=100, deadline=None)
@given(order=ORDERS, data=st.data())
def test_any_sample_alone_is_what_it_is_in_sequence(order, data):
    ordinals = np.arange(2 * order.windows_per_epoch)
    together = np.stack(order.locate(ordinals))
    at = data.draw(st.integers(0, len(ordinals) - 1))
    assert [int(x) for x in order.locate(ordinals[at])] == together[:, at].tolist()


def _order(**changes):
    arguments = {"num_tokens": 2**20, "block_tokens": 2**14, "seq_len": 256, "group_blocks": 4}
    return order_of("docs", changes.pop("seed", 0), **{**arguments, **changes})


def test_epochs_seeds_and_sources_have_their_own_order():
    order = _order()
    per_epoch = order.windows_per_epoch
    first = np.stack(order.locate(np.arange(per_epoch))[1:])
    others = [
        np.stack(order.locate(np.arange(per_epoch, 2 * per_epoch))[1:]),
        np.stack(_order(seed=1).locate(np.arange(per_epoch))[1:]),
        np.stack(
            order_of(
                "news", 0, num_tokens=2**20, block_tokens=2**14, seq_len=256, group_blocks=4
            ).locate(np.arange(per_epoch))[1:]
        ),
    ]
    for other in others:
        assert (first == other).all(axis=0).mean() < 0.01


def test_far_samples_take_no_longer_and_stay_exact():
    order = _order(num_tokens=10**12)
    ordinals = np.array([0, 10**15, 10**17])
    epochs, blocks, windows = order.locate(ordinals)
    assert epochs.tolist() == (ordinals // order.windows_per_epoch).tolist()
    assert (blocks < order.num_blocks).all()
    assert (windows < order.windows_per_block).all()


def test_fill_is_what_padding_costs():
    assert _order().fill == 1.0
    order = _order(
        seq_len=300
    )  # 16384 = 54 * 300 + 184, so each block has one window of 184 tokens
    assert order.windows_per_block == 55
    assert order.fill == pytest.approx(16384 / (55 * 300))


def test_refusals():
    with pytest.raises(SmoljaxError, match="seq_len is 20000, expected 1 to 16384"):
        _order(seq_len=20_000)
    with pytest.raises(SmoljaxError, match="group_blocks is 0"):
        _order(group_blocks=0)
    with pytest.raises(SmoljaxError, match="no tokens"):
        _order(num_tokens=0)

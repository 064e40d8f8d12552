"""Metrics of a resumed run read like those of an unbroken one."""

import json

import pytest

from smoljax.training.metrics import JSONL, MetricsWriter, read_metrics
from smoljax.training.throughput import PEAK_FLOPS, peak_flops


def test_rows_after_the_checkpoint_are_dropped_on_resume(tmp_path):
    first = MetricsWriter(tmp_path, resume_step=0)
    for step in (10, 20, 30):
        first.write(step, {"loss": 1.0 / step})
    first.close()
    with (tmp_path / JSONL).open("a") as file:
        file.write('{"step": 40, "lo')  # What a kill in the middle of a write leaves.
    assert [row["step"] for row in read_metrics(tmp_path)] == [10, 20, 30]
    second = MetricsWriter(tmp_path, resume_step=20)
    second.write(30, {"loss": 0.5})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / JSONL).read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30]
    assert rows[-1]["loss"] == 0.5


def test_the_same_rows_go_to_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, resume_step=0)
    writer.write(1, {"loss": 2.0})
    writer.write(2, {"loss": 1.5})
    writer.close()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0})
    events.Reload()
    assert [event.step for event in events.Tensors("loss")] == [1, 2]


class Device:
    platform = "tpu"

    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "teraflops"), [("TPU v5 lite", 197), ("TPU v5p", 459), ("NVIDIA H100 80GB HBM3", 989)]
)
def test_peak_rates_are_the_data_sheets(kind, teraflops):
    assert peak_flops(Device(kind)) == teraflops * 1e12
    assert kind.startswith(tuple(PEAK_FLOPS))

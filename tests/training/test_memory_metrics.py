"""Memory statistics, accumulated over micro-batches."""

import math
import subprocess
import sys

import pytest
import torch

from ultramem.training.memory_metrics import MemoryMeter, usage_divergence, value_coverage


def statistics(slots, scores, output_std=1.0):
    return {
        "slots_NK": torch.tensor(slots),
        "scores_NK": torch.tensor(scores),
        "output_std": torch.tensor(output_std),
        "singular_values": torch.tensor([[2.0, 0.5]]),
    }


def test_coverage_counts_slots_that_were_hit():
    assert value_coverage(torch.tensor([3, 0, 1, 0])) == 0.5
    assert value_coverage(torch.tensor([1, 1, 9])) == 1.0


def test_divergence_is_zero_for_uniform_and_log_slots_for_one():
    assert usage_divergence(torch.tensor([5, 5, 5, 5])) == pytest.approx(0.0, abs=1e-12)
    assert usage_divergence(torch.tensor([0, 7, 0, 0])) == pytest.approx(math.log(4))
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    expected = sum(x * math.log(x * 4) for x in p.tolist() if x)
    assert usage_divergence((p * 8).long()) == pytest.approx(expected)


def test_meter_gives_the_same_for_one_batch_and_for_its_parts():
    slots, scores = [[0, 1], [1, 2], [1, 5]], [[2.0, 1.0], [0.5, 4.0], [3.0, -1.0]]
    whole, parts = MemoryMeter(6), MemoryMeter(6)
    whole.update(statistics(slots, scores))
    parts.update(statistics(slots[:1], scores[:1]))
    parts.update(statistics(slots[1:], scores[1:]))
    assert parts.read() == pytest.approx(whole.read())
    metrics = whole.read()
    assert metrics["value_coverage"] == pytest.approx(4 / 6)
    assert metrics["top1_score"] == pytest.approx((2 + 4 + 3) / 3)
    assert metrics["mean_score"] == pytest.approx((1.5 + 2.25 + 1.0) / 3)
    assert (metrics["singular_value_head0_0"], metrics["singular_value_head0_1"]) == (2.0, 0.5)


def test_output_std_pools_variances_by_tokens():
    meter = MemoryMeter(2)
    meter.update(statistics([[0], [1], [0]], [[1.0]] * 3, output_std=1.0))
    meter.update(statistics([[0]], [[1.0]], output_std=3.0))
    assert meter.read()["output_std"] == pytest.approx(math.sqrt((3 * 1 + 1 * 9) / 4))


def test_recall_is_averaged_over_the_tokens_that_were_sampled():
    meter = MemoryMeter(2)
    batches = ([0.5, 1.0, 0.75], [0.25], None)
    for recall in batches:
        measured = {} if recall is None else {"recall_M": torch.tensor(recall)}
        meter.update(statistics([[0], [1], [0], [1]], [[1.0]] * 4) | measured)
    assert meter.read()["search_recall"] == pytest.approx(2.5 / 4)
    meter.reset()
    meter.update(statistics([[0]], [[1.0]]))
    assert "search_recall" not in meter.read()


def test_sums_stay_on_the_device_of_the_statistics():
    """Nothing is copied to another device, which would wait for it: the meta device has nothing to copy."""
    meter = MemoryMeter(4)
    for _ in range(2):
        meter.update({name: value.to("meta") for name, value in statistics([[0, 1]], [[1.0, 1.0]]).items()})
    assert (meter.counts_S.device.type, meter.sums.device.type) == ("meta", "meta")
    meter.reset()
    meter.update(statistics([[3, 3]], [[1.0, 1.0]]))
    assert meter.read()["value_coverage"] == 0.25


IN_TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from ultramem.training.memory_metrics import MemoryMeter
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
meter = MemoryMeter(6)
slots, scores, recall = [
    ([[0, 1]], [[2.0, 1.0]], [0.5]),
    ([[1, 2], [1, 5]], [[0.5, 4.0], [3.0, -1.0]], [1.0, 0.75]),
][rank]
meter.update({
    "slots_NK": torch.tensor(slots),
    "scores_NK": torch.tensor(scores),
    "output_std": torch.tensor([1.0, 3.0][rank]),
    "recall_M": torch.tensor(recall),
})
print(sorted(meter.read().items()))
dist.destroy_process_group()
"""


@pytest.mark.dist
def test_two_processes_report_the_metrics_of_all_tokens(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", IN_TWO_PROCESSES, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert printed[0] == printed[1]
    metrics = dict(eval(printed[0]))
    assert metrics["value_coverage"] == pytest.approx(4 / 6)
    assert metrics["top1_score"] == pytest.approx((2 + 4 + 3) / 3)
    assert metrics["search_recall"] == pytest.approx(2.25 / 3)
    assert metrics["output_std"] == pytest.approx(math.sqrt((1 + 2 * 9) / 3))


def test_reset_starts_a_new_period():
    meter = MemoryMeter(4)
    meter.update(statistics([[0, 1]], [[1.0, 1.0]]))
    meter.reset()
    assert meter.read() == {}
    meter.update(statistics([[3, 3]], [[1.0, 1.0]]))
    assert meter.read()["value_coverage"] == 0.25

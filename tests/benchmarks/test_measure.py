"""Times taken in turns, the device's description, its read bandwidth."""

import gc
import time

import pytest
import torch

from ultramem.benchmarks import measure
from ultramem.benchmarks.measure import (
    Competitor,
    Timing,
    alternate,
    describe_device,
    huge_page_tensor,
    peak_read_bandwidth,
    use_threads,
)
from ultramem.benchmarks.report import device_text


def test_competitors_alternate_and_warm_up():
    calls, ticks = [], []

    def competitor(name):
        def prepare():
            calls.append(f"prepare {name}")
            return lambda: calls.append(name)

        return Competitor(prepare)

    times = alternate({name: competitor(name) for name in "ABC"}, num_runs=2, num_warmups=1, tick=ticks.append)
    assert calls == ["prepare A", "A"] * 2 + ["prepare B", "B"] * 2 + ["prepare C", "C"] * 2 + calls[12:]
    assert calls[:12] * 3 == calls
    assert ticks == list("ABC") * 3
    assert {name: len(timing.seconds) for name, timing in times.items()} == {"A": 2, "B": 2, "C": 2}


def test_what_is_prepared_is_not_timed_and_calls_are_counted():
    def prepare():
        time.sleep(0.05)
        return lambda: time.sleep(0.02)

    timing = alternate({"slow": Competitor(prepare, num_calls=4)}, num_runs=1, num_warmups=0)["slow"]
    assert 0.005 <= timing.median_s < 0.0125


def test_garbage_collection_is_off_while_measuring_and_on_again_afterwards():
    states = []
    alternate({"one": Competitor(lambda: lambda: states.append(gc.isenabled()))}, 1, 0)
    assert states == [False, False]
    assert gc.isenabled()


def test_median_and_spread():
    timing = Timing((3.0, 1.0, 2.0, 10.0, 2.5))
    assert (timing.median_s, timing.fastest_s, timing.slowest_s) == (2.5, 1.0, 10.0)
    assert timing.to_dict()["num_runs"] == 5
    assert timing.to_dict()["seconds"] == [3.0, 1.0, 2.0, 10.0, 2.5]


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with use_threads(1):
        assert torch.get_num_threads() == 1
        assert describe_device()["threads"] == 1
    assert torch.get_num_threads() == before


def test_the_device_is_described():
    device = describe_device()
    assert device["torch"] == torch.__version__
    assert device["processor"]
    assert device["huge_pages"] in ("always", "madvise", "never", "unknown")
    assert device["cores"] >= 1


def test_huge_page_tensors_are_ones_and_writable():
    table = huge_page_tensor(30, 7)
    assert table.shape == (30, 7)
    assert table.dtype == torch.float32
    assert float(table.sum()) == 210
    table[2] = 5
    assert float(table.sum()) == 238
    narrow = huge_page_tensor(30, 7, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert float(narrow.float().sum()) == 210


def test_an_accelerator_is_described_and_waited_for(monkeypatch):
    device, waited = torch.device("cuda"), []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append("wait"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert measure.available_bytes(device) == 570
    text = device_text(describe_device(device), 3e12, 7)
    assert text.startswith("a card, decode steps as CUDA graphs; host: ")
    assert "peak read bandwidth 3000.0 GB/s" in text
    alternate({"one": Competitor(lambda: lambda: waited.append("run"))}, 1, num_warmups=0, device=device)
    assert waited == ["run", "wait", "run", "wait"]


def test_bandwidth_is_that_of_the_fastest_reader(monkeypatch):
    seen = []

    def fake(competitors, num_runs, num_warmups, device):
        seen.append(num_runs)
        for competitor in competitors.values():
            assert float(competitor.prepare()()) != 0
        return {name: Timing((0.5 + int(name), 0.25 + int(name))) for name in competitors}

    monkeypatch.setattr(measure, "alternate", fake)
    assert peak_read_bandwidth(buffer_bytes=4096) == pytest.approx(4096 / 0.25)
    assert seen == [7]

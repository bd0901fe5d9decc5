"""The judgement of measured ratios by the targets."""

import pytest

from ultramem.benchmarks.cases import Case
from ultramem.benchmarks.measure import Timing
from ultramem.benchmarks.targets import DENSE, OLMO2, OLMOE, OURS, REFERENCE, TARGETS, ULTRA_MEM, V2, judge

PEAK = 100.0


def case(name, medians, **fields):
    return Case(name, "sizes", {competitor: Timing((seconds,)) for competitor, seconds in medians.items()}, **fields)


def verdicts(benchmark, *cases):
    found = judge(benchmark, cases, PEAK)
    return {(one.target.case, one.target.ours, one.target.against): one for one in found}


def test_the_table_of_targets_is_the_issues():
    bounds = {(one.benchmark, one.case, one.ours, one.against): (one.quantity, one.bound) for one in TARGETS}
    assert len(bounds) == len(TARGETS) == 26
    assert bounds["op", "lookup, 2,048 tokens", OURS, None] == ("bandwidth", 0.6)
    assert bounds["op", "lookup, 1 token", OURS, "plain PyTorch"] == ("times faster", 8)
    assert bounds["layer", "forward", OURS, REFERENCE] == ("times faster", 6)
    assert bounds["layer", "forward", OURS, ULTRA_MEM] == ("times faster", 8)
    assert bounds["layer", "forward + backward", OURS, REFERENCE] == ("times faster", 4)
    assert bounds["layer", "forward + backward", OURS, ULTRA_MEM] == ("times faster", 5)
    for batch in (1, 4, 16, 64, 256):
        assert bounds["decode", f"batch {batch}", V2, DENSE] == ("times the time", 1.25)
        assert bounds["decode", f"batch {batch}", DENSE, OLMO2] == ("times faster", 2 if batch == 1 else 1)
        assert bounds["decode", f"batch {batch}", V2, OLMOE] == ("times faster", 4 if batch == 16 else 1)


def test_bandwidth_is_a_share_of_the_peak():
    key = ("lookup, 2,048 tokens", OURS, None)
    met = verdicts("op", case("lookup, 2,048 tokens", {OURS: 2.0}, bytes_read=130))[key]
    assert (met.ratio, met.met, met.word) == (pytest.approx(0.65), True, "met")
    assert met.to_dict()["goal_met"] is False
    missed = verdicts("op", case("lookup, 2,048 tokens", {OURS: 2.0}, bytes_read=110))[key]
    assert (missed.ratio, missed.met, missed.word) == (pytest.approx(0.55), False, "MISSED")
    assert met.target.text == "at least 60% of peak read bandwidth (goal 80%)"


def test_times_faster_and_times_the_time():
    found = verdicts("decode", case("batch 16", {V2: 1.2, DENSE: 1.0, OLMO2: 0.9, OLMOE: 6.0}))
    assert found["batch 16", V2, DENSE].ratio == pytest.approx(1.2)
    assert found["batch 16", V2, DENSE].met is True
    assert found["batch 16", DENSE, OLMO2].ratio == pytest.approx(0.9)
    assert found["batch 16", DENSE, OLMO2].met is False
    faster = found["batch 16", V2, OLMOE]
    assert (faster.ratio, faster.met, faster.to_dict()["goal_met"]) == (pytest.approx(5), True, False)
    assert faster.target.text == "at least 4× as fast as OlmoeForCausalLM (goal 6×)"
    slow = verdicts("decode", case("batch 16", {V2: 1.3, DENSE: 1.0}))["batch 16", V2, DENSE]
    assert (slow.ratio, slow.met) == (pytest.approx(1.3), False)
    assert slow.target.text == "at most 1.25× the time of dense twin"


def test_what_was_not_measured_is_not_judged_and_says_why():
    reason = "ultra-mem is not installed: pip install 'ultramem[bench]'"
    found = verdicts("layer", case("forward", {OURS: 1.0, REFERENCE: 7.0}, unavailable={ULTRA_MEM: reason}))
    assert found["forward", OURS, REFERENCE].met is True
    missing = found["forward", OURS, ULTRA_MEM]
    assert (missing.ratio, missing.met) == (None, None)
    assert missing.word == "not judged: ultra-mem cannot run"
    left_out = found["forward + backward", OURS, REFERENCE]
    assert left_out.word == "not judged: this case was left out"


def test_other_sizes_are_measured_but_not_judged():
    found = verdicts("layer", case("forward", {OURS: 1.0, REFERENCE: 7.0}, at_target_sizes=False))
    verdict = found["forward", OURS, REFERENCE]
    assert (verdict.ratio, verdict.met) == (7.0, None)
    assert verdict.word == "not judged: other sizes or another device than the target's"
    assert verdict.to_dict()["met"] is None


def test_a_target_needs_a_case_of_its_benchmark():
    assert judge("layer", [], PEAK)
    assert all(verdict.target.benchmark == "layer" for verdict in judge("layer", [], PEAK))
    assert judge("nothing", [], PEAK) == []

"""Learning rates at every step against the published formula."""

import math
from types import SimpleNamespace

import pytest

from ultramem.training.config import (
    DataSection,
    OptimizerSection,
    RunConfig,
    ScheduleSection,
    TrainingSection,
)
from ultramem.training.schedule import build_schedules, table_lr_times


def rates_at_every_step(config):
    """The rates that the trainer would set: tokens seen include the step's own."""
    schedules = build_schedules(config)
    rates = []
    for step in range(1, config.num_steps + 1):
        trainer = SimpleNamespace(global_train_tokens_seen=step * config.global_batch_tokens, max_tokens=1)
        groups = {name: {"lr": 9.0, "initial_lr": config.optimizer.lr} for name in schedules}
        rates.append({name: schedules[name].set_lr(groups[name], trainer) for name in schedules})
        assert {name: groups[name]["lr"] for name in groups} == rates[-1]
    return rates


def share_of_peak(name, floor, decay_fraction, step, warmup_steps, num_steps):
    """The published shapes, from step numbers."""
    if step < warmup_steps:
        return 0.1 + 0.9 * step / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    remaining = (num_steps - step) / (num_steps * decay_fraction)
    return {
        "cosine": floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2,
        "linear": floor + (1 - floor) * (1 - progress),
        "wsd": floor + (1 - floor) * min(1.0, remaining),
        "constant": 1.0,
    }[name]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize(
    ("warmup", "warmup_steps"),
    [({"warmup_tokens": 160}, 5), ({"warmup_fraction": 0.2}, 8), ({"warmup_fraction": 0.0}, 0), ({}, 0.4)],
)
@pytest.mark.parametrize("table_decay_fraction", [1.0, 0.5])
@pytest.mark.parametrize(("floor", "decay_fraction"), [(0.1, 0.1), (0.0, 0.45)])
def test_rates_follow_the_formula_at_every_step(
    name, warmup, warmup_steps, table_decay_fraction, floor, decay_fraction
):
    """Warmup from 0.1·lr, the named shape to the floor, tables times 1 + (t0 − 1)·max(0, 1 − s/(T·ρ))."""
    num_steps, peak, start = 40, 3e-3, 20.0
    config = RunConfig(
        data=DataSection(sequence_length_tokens=8),
        optimizer=OptimizerSection(
            lr=peak, key_lr_multiplier=0.3, table_lr_multiplier=start, table_lr_decay_fraction=table_decay_fraction
        ),
        schedule=ScheduleSection(name, **warmup, final_factor=floor, decay_fraction=decay_fraction),
        training=TrainingSection(max_tokens=num_steps * 32, global_batch_sequences=4),
    )
    for step, rates in enumerate(rates_at_every_step(config), start=1):
        base = peak * share_of_peak(name, floor, decay_fraction, step, warmup_steps, num_steps)
        times = 1 + (start - 1) * max(0.0, 1 - step / (num_steps * table_decay_fraction))
        # The default warmup of 1 % of 1280 tokens is rounded to 13 tokens, 0.40625 steps.
        tolerance = 1e-12 if warmup else 1e-3
        assert rates["dense"] == pytest.approx(base, rel=tolerance, abs=peak * tolerance)
        assert rates["keys"] == pytest.approx(0.3 * base, rel=tolerance, abs=peak * tolerance)
        assert rates["tables"] == pytest.approx(base * times, rel=tolerance, abs=peak * start * tolerance)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_a_table_rate_of_its_own_is_constant_under_every_schedule(name):
    config = RunConfig(
        optimizer=OptimizerSection(lr=4e-4, table_lr=1e-3),
        schedule=ScheduleSection(name, warmup_fraction=0.3),
        training=TrainingSection(max_steps=20),
    )
    rates = rates_at_every_step(config)
    assert {rate["tables"] for rate in rates} == {1e-3}
    assert len({rate["dense"] for rate in rates}) > 5


def test_the_tables_multiplier_is_4_unless_given():
    first = rates_at_every_step(RunConfig(training=TrainingSection(max_steps=10)))[0]
    assert first["tables"] / first["dense"] == pytest.approx(1 + 3 * 0.9)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_a_last_batch_beyond_the_horizon_is_at_the_floor(name):
    config = RunConfig(
        data=DataSection(sequence_length_tokens=8),
        schedule=ScheduleSection(name, final_factor=0.25),
        training=TrainingSection(max_tokens=300, global_batch_sequences=4),
    )
    assert (config.num_steps, config.num_tokens) == (10, 300)
    last = rates_at_every_step(config)[-1]
    assert last["dense"] == last["tables"] == pytest.approx(1e-4)


def test_last_step_is_at_the_floor():
    config = RunConfig(optimizer=OptimizerSection(lr=1e-3), training=TrainingSection(max_steps=10))
    last = rates_at_every_step(config)[-1]
    assert last["dense"] == pytest.approx(1e-4)
    assert last["tables"] == pytest.approx(1e-4)


def test_multiplier_starts_near_t0_and_never_falls_below_one():
    assert table_lr_times(4.0, 0, 100, 1.0) == 4.0
    assert table_lr_times(4.0, 50, 100, 1.0) == 2.5
    assert table_lr_times(4.0, 50, 100, 0.5) == 1.0
    assert table_lr_times(4.0, 120, 100, 1.0) == 1.0
    assert table_lr_times(1.0, 10, 100, 1.0) == 1.0

"""Exact resume under every optimizer, schedule and rate of the tables: n steps equal k + (n − k) steps bit for bit."""

import itertools
import shutil

import pytest
import torch
import yaml

from tiny_training import assert_same_state, metrics_lines, tiny_settings, training_state
from ultramem.training.config import ScheduleName, TableGradients, TableMoments
from ultramem.training.run import resolve_config, train

NUM_STEPS, CUT = 4, 2

OPTIMIZERS = [
    (gradients, moments)
    for gradients, moments in itertools.product(TableGradients.__args__, TableMoments.__args__)
    # Dense AdamW keeps its moments in fp32; anything else is refused (tests/training/test_config.py).
    if gradients == "rows" or moments == "fp32"
]
TABLE_RATES = {"multiplier": {"table_lr_multiplier": 4.0}, "constant": {"table_lr": 0.001}}
COMBINATIONS = list(itertools.product(OPTIMIZERS, ScheduleName.__args__, TABLE_RATES))
# One for every value, each optimizer with another schedule.
FEW = [(OPTIMIZERS[i], ScheduleName.__args__[i], list(TABLE_RATES)[i % 2]) for i in range(4)]


def test_there_are_as_many_combinations_as_choices():
    assert OPTIMIZERS == [("dense", "fp32"), ("rows", "fp32"), ("rows", "bf16"), ("rows", "8bit")]
    assert ScheduleName.__args__ == ("cosine", "wsd", "constant", "linear")
    assert len(COMBINATIONS) == 4 * 4 * 2


def settings_of(data_folder, save_folder, combination):
    """A run of a few steps with dropout that passes through warmup, peak and decay, across the end of an epoch."""
    (gradients, moments), schedule, rate = combination
    settings = tiny_settings(data_folder, save_folder)
    settings["optimizer"] |= {"table_moments": moments, **TABLE_RATES[rate]}
    settings["schedule"] = {"name": schedule, "warmup_fraction": 0.25, "decay_fraction": 0.5}
    settings["training"] |= {"max_steps": NUM_STEPS, "global_batch_sequences": 48, "table_gradients": gradients}
    settings["training"]["micro_batch_sequences"] = 24
    settings["data"]["sequence_length_tokens"] = 32
    settings["validation"]["interval_steps"] = settings["logging"]["memory_interval_steps"] = None
    settings["logging"]["tensorboard"] = False
    settings["checkpoint"] = {"interval_steps": CUT, "keep": None, "save_async": False}
    return settings


@pytest.mark.parametrize(
    "combination",
    [
        pytest.param(combination, marks=() if combination in FEW else pytest.mark.slow, id="-".join((*o, s, r)))
        for combination in COMBINATIONS
        for o, s, r in [combination]
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(data_folder, tmp_path, combination):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    for folder in (whole, resumed):
        (tmp_path / f"{folder.name}.yaml").write_text(yaml.safe_dump(settings_of(data_folder, folder, combination)))
    train(*resolve_config(tmp_path / "whole.yaml"))
    resumed.mkdir()
    shutil.copytree(whole / f"step{CUT}", resumed / f"step{CUT}")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(whole / name, resumed / name)
    torch.manual_seed(9)
    train(*resolve_config(tmp_path / "resumed.yaml"))
    states = [training_state(folder / f"step{NUM_STEPS}", tmp_path) for folder in (whole, resumed)]
    assert states[0]["epoch"] == 2
    assert float(states[0]["optim"]["state"]["model.memory_pool.values"]["step"]) == NUM_STEPS
    assert_same_state(*states)
    assert metrics_lines(whole) == metrics_lines(resumed)
    rates = [line["optim/tables learning rate"] for line in metrics_lines(whole)]
    assert (len(set(rates)) == 1) == (combination[2] == "constant")

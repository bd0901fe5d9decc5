"""A run that is stopped, killed or copied continues as if nothing had happened."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from tiny_training import (
    assert_same_state,
    metrics_lines,
    run_training,
    start_training,
    tiny_settings,
    training_state,
)
from ultramem.training.checkpoints import complete_steps


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_equals_uninterrupted_run(data_folder, tmp_path, precision):
    """n steps = k + (n − k) steps with every kind of dropout on, across an epoch boundary, in separate processes."""
    settings = tiny_settings(data_folder, tmp_path / "whole")
    settings["training"] |= {"precision": precision, "max_steps": 12, "global_batch_sequences": 16}
    settings["checkpoint"] = {"interval_steps": 5, "keep": None}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(settings))
    run_training(tmp_path / "whole.yaml")
    assert complete_steps(tmp_path / "whole") == [5, 10, 12]

    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "step5", tmp_path / "resumed" / "step5")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    settings["run"]["save_folder"] = str(tmp_path / "resumed")
    (tmp_path / "resumed.yaml").write_text(yaml.safe_dump(settings))
    run_training(tmp_path / "resumed.yaml")

    states = [training_state(tmp_path / name / "step12", tmp_path) for name in ("whole", "resumed")]
    assert states[0]["epoch"] == 2  # 128 sequences in batches of 16: the ninth step starts the second epoch
    assert float(states[0]["optim"]["state"]["model.memory_pool.values"]["step"]) == 12
    assert_same_state(*states)
    whole, resumed = metrics_lines(tmp_path / "whole"), metrics_lines(tmp_path / "resumed")
    assert [line["step"] for line in resumed] == list(range(1, 13))
    without_memory = [
        [{k: v for k, v in line.items() if not k.startswith("memory/")} for line in lines] for lines in (whole, resumed)
    ]
    assert without_memory[0] == without_memory[1]


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_the_same_command_resumes(data_folder, tmp_path, signal_number):
    settings = tiny_settings(data_folder, tmp_path / "run")
    settings["training"]["max_steps"] = 60
    settings["checkpoint"] = {"interval_steps": None, "keep": 1}
    config_path = tmp_path / "run.yaml"
    config_path.write_text(yaml.safe_dump(settings))
    process = start_training(config_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.is_alive(), config_path.with_suffix(".log").read_text()
        time.sleep(0.005)
    os.kill(process.pid, signal_number)
    process.join(60)
    assert process.exitcode == 0
    (step,) = complete_steps(tmp_path / "run")
    assert 3 <= step < 60
    assert (tmp_path / "run" / f"step{step}-hf" / "model.safetensors").is_file()
    log = config_path.with_suffix(".log").read_text()
    assert f"stopped at step {step} of 60: saved; the same command resumes from there" in log
    run_training(config_path)
    assert complete_steps(tmp_path / "run") == [60]
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == list(range(1, 61))


def test_finished_run_started_again_changes_nothing(config_path):
    run_training(config_path)
    run_folder = config_path.parent / "run"
    before = {path: path.read_bytes() for path in run_folder.rglob("*.safetensors")}
    assert len(before) == 2  # kept: 2
    run_training(config_path)
    assert complete_steps(run_folder) == [8, 12]
    assert {path: path.read_bytes() for path in run_folder.rglob("*.safetensors")} == before


def _is_writing(run_folder: Path) -> bool:
    """Whether a training state is being written: its folder is there, what makes it complete is not."""
    return any(
        path.name.endswith("-tmp") or not (path / ".metadata.json").exists()
        for path in run_folder.glob("step*")
        if "-hf" not in path.name
    )


def _wait_for_the_moment(run_folder: Path, process, delay_s: float, while_writing: bool) -> None:
    """Waits ``delay_s``, but no longer than 30 steps, and then, if asked, for a state that is being written."""
    start, end_s = max(complete_steps(run_folder), default=0), time.monotonic() + delay_s
    while time.monotonic() < end_s and max(complete_steps(run_folder), default=0) < start + 30:
        time.sleep(0.01)
    end_s = time.monotonic() + 10
    while while_writing and time.monotonic() < end_s and process.is_alive() and not _is_writing(run_folder):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("save_async", [True, False])
def test_killed_ten_times_equals_uninterrupted_run(data_folder, tmp_path, save_async):
    """SIGKILL at random moments, half of them while a training state is being written, loses no complete state."""
    settings = tiny_settings(data_folder, tmp_path / "whole")
    settings["training"] |= {"max_steps": 400, "global_batch_sequences": 2, "micro_batch_sequences": 1}
    settings["validation"] = {"interval_steps": 50}
    settings["checkpoint"] = {"interval_steps": 2, "keep": 1, "save_async": save_async}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(settings))
    run_training(tmp_path / "whole.yaml", "checkpoint.interval_steps=null")

    run_folder = tmp_path / "killed"
    settings["run"]["save_folder"] = str(run_folder)
    config_path = tmp_path / "killed.yaml"
    config_path.write_text(yaml.safe_dump(settings))
    rng = random.Random(0)
    newest, num_half_written = 0, 0
    for attempt in range(10):
        process = start_training(config_path)
        _wait_for_the_moment(run_folder, process, rng.uniform(0.5, 2.5), while_writing=attempt % 2 == 1)
        assert process.is_alive(), "the run ended before it could be killed"
        seen = max(complete_steps(run_folder), default=0)
        process.kill()
        process.join()
        found = max(complete_steps(run_folder), default=0)
        assert found >= seen >= newest
        newest = found
        num_half_written += _is_writing(run_folder)
    assert newest > 0
    assert num_half_written > 0
    run_training(config_path)
    assert complete_steps(run_folder) == [400]
    states = [training_state(tmp_path / name / "step400", tmp_path) for name in ("whole", "killed")]
    assert_same_state(*states)
    lines = metrics_lines(run_folder)
    assert [line["step"] for line in lines] == list(range(1, 401))
    losses = [[line["train/CE loss"] for line in metrics_lines(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1]
    weights = [(tmp_path / name / "step400-hf" / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert weights[0] == weights[1]
    leftovers = [path.name for path in run_folder.glob("step*")]
    assert sorted(leftovers) == ["step400", "step400-hf"]

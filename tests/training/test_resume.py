"""A run that is stopped, killed or copied continues as if nothing had happened."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from parallel_workers import train_slowly_at
from tiny_training import (
    assert_same_state,
    finish_training,
    metrics_lines,
    run_training,
    start_parallel_training,
    start_process,
    start_processes,
    start_training,
    tiny_settings,
    training_state,
)
from ultramem.training.checkpoints import complete_steps

# Longer than any wait on a machine that is merely busy.
HANGING_S = 300


def rows(table_moments):
    return {"training": {"table_gradients": "rows"}, "optimizer": {"table_moments": table_moments}}


@pytest.fixture(scope="module")
def four_steps(data_folder, tmp_path_factory):
    """The config of a run that has taken four steps."""
    settings = tiny_settings(data_folder, tmp_path_factory.mktemp("four") / "run")
    settings["training"]["max_steps"] = 4
    settings["validation"]["interval_steps"] = settings["checkpoint"]["interval_steps"] = None
    config_path = Path(settings["run"]["save_folder"]).with_suffix(".yaml")
    config_path.write_text(yaml.safe_dump(settings))
    run_training(config_path)
    return config_path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training": {"precision": "bf16"}, "schedule": {"name": "linear"}},
        {"optimizer": {"table_lr": 1e-3}, "schedule": {"name": "wsd", "decay_fraction": 0.7}},
        rows("fp32"),
        rows("bf16") | {"schedule": {"name": "wsd", "decay_fraction": 0.7}},
        rows("8bit") | {"schedule": {"name": "constant"}},
    ],
    ids=["dense-cosine", "dense-linear-bf16", "dense-wsd", "rows-cosine", "rows_bf16-wsd", "rows_8bit-constant"],
)
def test_resumed_run_equals_uninterrupted_run(data_folder, tmp_path, changes):
    """n steps = k + (n − k) steps with every kind of dropout on, across an epoch boundary, in separate processes.

    Every optimizer and every schedule is here, each optimizer with another schedule.
    """
    settings = tiny_settings(data_folder, tmp_path / "whole")
    settings["training"] |= {"max_steps": 12, "global_batch_sequences": 16}
    for section, values in changes.items():
        settings[section] = settings[section] | values
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
    # So many steps that the signal comes long before the last.
    settings["training"]["max_steps"] = 600
    settings["checkpoint"] = {"interval_steps": None, "keep": 1}
    settings["validation"]["interval_steps"] = None
    settings["logging"]["memory_interval_steps"] = None
    config_path = tmp_path / "run.yaml"
    config_path.write_text(yaml.safe_dump(settings))
    process = start_training(config_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end_s = time.monotonic() + HANGING_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.is_alive(), config_path.with_suffix(".log").read_text()
        assert time.monotonic() < end_s, "the run did not get to its third step"
        time.sleep(0.005)
    os.kill(process.pid, signal_number)
    finish_training(process, config_path)
    (step,) = complete_steps(tmp_path / "run")
    assert 3 <= step < 600
    assert (tmp_path / "run" / f"step{step}-hf" / "model.safetensors").is_file()
    log = config_path.with_suffix(".log").read_text()
    assert f"stopped at step {step} of 600: saved; the same command resumes from there" in log
    # Five steps more tell as much as all 600.
    run_training(config_path, f"training.max_steps={step + 5}")
    assert complete_steps(tmp_path / "run") == [step + 5]
    assert [line["step"] for line in metrics_lines(tmp_path / "run")] == list(range(1, step + 6))


def _wait_for(path: Path, processes: list, log: Path) -> None:
    end_s = time.monotonic() + HANGING_S
    while not path.exists():
        assert all(process.is_alive() for process in processes), log.read_text()
        assert time.monotonic() < end_s, f"{path.name} did not come"
        time.sleep(0.005)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("place", "last_step"),
    [
        # Before there is anything to save; while a state is loaded, which is then the last; while one is saved, at the
        # end of the run or in its middle.
        ("building", 4),
        ("loading", 4),
        ("exporting", 6),
        ("saving", 5),
    ],
)
def test_signals_that_come_at_a_bad_moment(four_steps, tmp_path, place, last_step, signal_number):
    shutil.copytree(four_steps.parent, tmp_path / "copy")
    config_path = tmp_path / "copy" / "run.yaml"
    run_folder = tmp_path / "copy" / "run"
    overrides = [f"run.save_folder={run_folder}", "training.max_steps=6", "checkpoint.keep=null"]
    if place == "saving":
        overrides += ["checkpoint.save_async=false", "checkpoint.interval_steps=5"]
    process = start_process(train_slowly_at, config_path, place, overrides)
    _wait_for(tmp_path / "copy" / f"{place}-0", [process], config_path.with_suffix(".log"))
    # In this one the first ends it.
    for _ in range(1 if place == "building" else 2):
        os.kill(process.pid, signal_number)
        time.sleep(0.05)
    finish_training(process, config_path)
    log = config_path.with_suffix(".log").read_text()
    assert complete_steps(run_folder)[-1] == last_step
    assert (run_folder / f"step{last_step}-hf" / "model.safetensors").is_file()
    if place == "building":
        name = signal.Signals(signal_number).name
        assert f"stopped before the training began ({name} received): there is nothing to save" in log
        assert log.count("model:") == 1  # of the four steps before
    else:
        assert ("stopped at step" in log) == (last_step < 6)
        assert log.splitlines()[-1] == f"model: {run_folder}/step{last_step}-hf"
    run_training(config_path, *overrides)
    assert [line["step"] for line in metrics_lines(run_folder)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.dist
def test_a_signal_to_one_of_two_processes_before_they_train(four_steps, tmp_path):
    """Both load on, and end with what was saved before."""
    shutil.copytree(four_steps.parent, tmp_path / "copy")
    config_path, run_folder = tmp_path / "copy" / "run.yaml", tmp_path / "copy" / "run"
    overrides = [f"run.save_folder={run_folder}", "training.max_steps=2000"]
    processes = start_processes(train_slowly_at, config_path, "building", overrides)
    _wait_for(tmp_path / "copy" / "building-1", processes, config_path.with_suffix(".log"))
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        finish_training(process, config_path)
    assert complete_steps(run_folder) == [4]
    assert config_path.with_suffix(".log").read_text().count("stopped at step 4 of 2000: saved") == 1


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


def _as_list(processes) -> list:
    return processes if isinstance(processes, list) else [processes]


def _newest(run_folder: Path) -> int:
    return max(complete_steps(run_folder), default=0)


def _freeze_at_the_moment(run_folder: Path, processes: list, delay_s: float, moment: str) -> None:
    """Stops the processes after ``delay_s`` or 20 steps, or later: as soon as the moment has come.

    A process that is frozen cannot finish what it was seen doing before it is killed, however busy the machine is.

    Args:
        moment: "any", "writing" (a training state is half-written), "progress" (a new one is complete).
    """
    start, end_s = _newest(run_folder), time.monotonic() + delay_s
    while time.monotonic() < end_s and _newest(run_folder) < start + 20:
        time.sleep(0.01)
    end_s = time.monotonic() + HANGING_S
    while True:
        for process in processes:
            assert process.is_alive(), "the run ended before it could be killed"
            os.kill(process.pid, signal.SIGSTOP)
        has_come = {"any": True, "writing": _is_writing(run_folder), "progress": _newest(run_folder) > start}[moment]
        if has_come:
            return
        for process in processes:
            os.kill(process.pid, signal.SIGCONT)
        assert time.monotonic() < end_s, f"the moment '{moment}' did not come"
        time.sleep(0.002)


def _kill_all(processes: list, rng: random.Random) -> None:
    """Kills a process that is frozen, and the others as torchrun would: after they could go on without it for a while.

    What they do alone must not look like a complete state.
    """
    first, *others = rng.sample(processes, len(processes))
    first.kill()
    first.join()
    for process in others:
        os.kill(process.pid, signal.SIGCONT)
    if others:
        time.sleep(rng.uniform(0.0, 0.5))
    for process in others:
        process.kill()
        process.join()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("save_async", "num_processes"),
    [
        (True, 1),
        (False, 1),
        pytest.param(True, 2, marks=pytest.mark.dist),
        pytest.param(False, 2, marks=pytest.mark.dist),
    ],
)
def test_killed_ten_times_equals_uninterrupted_run(data_folder, tmp_path, save_async, num_processes):
    """SIGKILL at random moments, some while a training state is being written, loses no complete state."""
    start = start_training if num_processes == 1 else start_parallel_training
    settings = tiny_settings(data_folder, tmp_path / "whole")
    settings["training"] |= {"max_steps": 400, "global_batch_sequences": 2, "micro_batch_sequences": 1}
    settings["validation"] = {"interval_steps": 50}
    settings["checkpoint"] = {"interval_steps": 2, "keep": 1, "save_async": save_async}
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(settings))
    for process in _as_list(start(tmp_path / "whole.yaml", "checkpoint.interval_steps=null")):
        finish_training(process, tmp_path / "whole.yaml")

    run_folder = tmp_path / "killed"
    settings["run"]["save_folder"] = str(run_folder)
    config_path = tmp_path / "killed.yaml"
    config_path.write_text(yaml.safe_dump(settings))
    rng = random.Random(0)
    newest, num_half_written = 0, 0
    for attempt in range(10):
        processes = _as_list(start(config_path))
        moment = ("any", "writing", "progress")[attempt % 3]
        _freeze_at_the_moment(run_folder, processes, rng.uniform(0.5, 2.5), moment)
        seen = _newest(run_folder)
        _kill_all(processes, rng)
        found = _newest(run_folder)
        assert found >= seen >= newest
        newest = found
        num_half_written += _is_writing(run_folder)
    assert newest > 0
    assert num_half_written > 0
    for process in _as_list(start(config_path)):
        finish_training(process, config_path)
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

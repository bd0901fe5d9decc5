"""Training in two processes gives what one process gives, and they start, stop and fail together."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_training import (
    finish_training,
    metrics_lines,
    run_parallel_training,
    run_training,
    start_parallel_training,
    start_training,
    tiny_settings,
)
from ultramem.errors import ConfigError
from ultramem.training.checkpoints import complete_steps
from ultramem.training.run import resolve_config, train

pytestmark = pytest.mark.dist

# Sums in another order: one part in ten million per step, in fp32.
TOLERANCE = {"rel": 2e-5, "abs": 1e-6}
HANGING_S = 300

MODELS = {
    "dense": {"memory": None},
    "ultramem_v2": {},
    "pkm": {"memory": {"type": "pkm", "num_keys": 8, "key_dim": 8, "top_k": 4}},
    "moe": {"ffn": {"type": "moe", "num_experts": 4, "num_experts_per_tok": 2}, "memory": None},
    # One shared weight for embedding and output, and recomputed activations.
    "tied": {"tie_word_embeddings": True},
}


def settings_of(data_folder, save_folder, model="ultramem_v2", **training):
    """The tiny run without what is random per process, with limits that gradients exceed and micro-batches of one."""
    settings = tiny_settings(data_folder, save_folder)
    settings["model"]["attention_dropout"] = settings["model"]["memory"]["output_dropout"] = 0.0
    settings["model"] |= MODELS[model]
    settings["optimizer"] |= {"max_grad_norm": 0.05, "table_max_grad_norm": 0.01}
    settings["training"] |= {"micro_batch_sequences": 1, "gradient_checkpointing": model == "tied", **training}
    settings["checkpoint"] = {"interval_steps": 4, "keep": None}
    settings["logging"]["tensorboard"] = False
    return settings


def write_config(path, settings):
    path.write_text(yaml.safe_dump(settings))
    return path


def assert_same_lines(lines, expected):
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line == pytest.approx(other, **TOLERANCE)


def assert_same_runs(run, whole):
    """Every step's metrics, and the exported weights."""
    assert_same_lines(metrics_lines(run), metrics_lines(whole))
    expected, weights = (load_file(folder / "step12-hf" / "model.safetensors") for folder in (whole, run))
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def whole_runs(data_folder, tmp_path_factory):
    """Folders of runs in one process, by model, made when first asked for."""
    folder, made = tmp_path_factory.mktemp("whole"), {}

    def run(model):
        if model not in made:
            config_path = write_config(folder / f"{model}.yaml", settings_of(data_folder, folder / model, model))
            run_training(config_path)
            made[model] = folder / model
        return made[model]

    return run


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("model", ["dense", "ultramem_v2", "moe", "tied"])
def test_two_processes_equal_one(whole_runs, data_folder, tmp_path, model, parallel):
    """Losses, auxiliary losses, gradient norms, memory statistics and validation of every step; the exported model."""
    config_path = write_config(
        tmp_path / "run.yaml", settings_of(data_folder, tmp_path / "run", model, parallel=parallel)
    )
    run_parallel_training(config_path)
    whole, run = whole_runs(model), tmp_path / "run"
    assert metrics_lines(run)[0]["optim/dense grad norm"] > 0.05
    assert_same_runs(run, whole)
    names = ("config.json", "generation_config.json", "tokenizer.json")
    texts = [[(folder / "step12-hf" / name).read_text() for name in names] for folder in (whole, run)]
    assert texts[0] == texts[1]
    log = config_path.with_suffix(".log").read_text().splitlines()
    assert [line.split()[1] for line in log if line.startswith("step")] == [f"{step}/12" for step in range(1, 13)]
    assert log[12:] == [f"model: {run}/step12-hf"]


def test_tables_updated_row_by_row_in_two_processes(data_folder, tmp_path):
    """Each process touches rows that the other does not."""
    folders = {}
    for parallel, start in ((None, run_training), ("ddp", run_parallel_training), ("fsdp", run_parallel_training)):
        folders[parallel] = folder = tmp_path / str(parallel)
        settings = settings_of(data_folder, folder, parallel=parallel, table_gradients="rows")
        start(write_config(tmp_path / f"{parallel}.yaml", settings))
    for parallel in ("ddp", "fsdp"):
        assert_same_runs(folders[parallel], folders[None])


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_one_then_two_then_one_process(whole_runs, data_folder, tmp_path, parallel):
    """Steps 1–4 in one process, 5–8 in two, 9–12 in one: the losses and states are those of one process."""
    whole = whole_runs("ultramem_v2")
    for name, source, first, start in (("two", whole, 4, run_parallel_training), ("one", None, 8, run_training)):
        folder, source = tmp_path / name, source or tmp_path / "two"
        folder.mkdir()
        shutil.copytree(source / f"step{first}", folder / f"step{first}")
        for file in ("config.yaml", "metrics.jsonl"):
            shutil.copy(source / file, folder / file)
        start(write_config(tmp_path / f"{name}.yaml", settings_of(data_folder, folder, parallel=parallel)))
    expected = metrics_lines(whole)
    for name in ("two", "one"):
        # The memories' statistics start anew where a run resumes: after steps 4 and 8 they are due anyway.
        assert_same_lines(metrics_lines(tmp_path / name), expected)
    assert complete_steps(tmp_path / "two") == [4, 8, 12]
    assert not list((tmp_path / "one").glob("step4*")), "the last part started from what two processes saved"


@pytest.mark.parametrize(("signal_number", "receivers"), [(signal.SIGTERM, [0, 1]), (signal.SIGINT, [1])])
def test_a_signal_to_any_process_saves_once_and_ends_all(data_folder, tmp_path, signal_number, receivers):
    settings = settings_of(data_folder, tmp_path / "run", max_steps=2000)
    settings["checkpoint"] = {"interval_steps": None, "keep": 1}
    settings["validation"]["interval_steps"] = settings["logging"]["memory_interval_steps"] = None
    config_path = write_config(tmp_path / "run.yaml", settings)
    processes = start_parallel_training(config_path)
    metrics, end_s = tmp_path / "run" / "metrics.jsonl", time.monotonic() + HANGING_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert all(process.is_alive() for process in processes), config_path.with_suffix(".log").read_text()
        assert time.monotonic() < end_s, "the run did not get to its third step"
        time.sleep(0.005)
    for receiver in receivers:
        os.kill(processes[receiver].pid, signal_number)
    for process in processes:
        finish_training(process, config_path)
    (step,) = complete_steps(tmp_path / "run")
    assert 3 <= step < 2000
    log = config_path.with_suffix(".log").read_text()
    assert log.count(f"stopped at step {step} of 2000: saved; the same command resumes from there") == 1
    run_training(config_path, f"training.max_steps={step + 2}")
    assert complete_steps(tmp_path / "run") == [step + 2]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.global_batch_sequences=3"], "(3) must be divisible by the number of processes (2) times"),
        (["run.seed=4"], "run.seed: 3 → 4"),
    ],
)
def test_errors_end_all_processes(whole_runs, data_folder, tmp_path, overrides, message):
    shutil.copytree(whole_runs("dense"), tmp_path / "run")
    config_path = write_config(tmp_path / "run.yaml", settings_of(data_folder, tmp_path / "run", "dense"))
    for process in start_parallel_training(config_path, *overrides):
        process.join(HANGING_S)
        assert process.exitcode == 1
    assert config_path.with_suffix(".log").read_text().count(message) == 2


def test_a_run_folder_is_locked_once_for_all_processes(data_folder, tmp_path):
    settings = settings_of(data_folder, tmp_path / "run", "dense", max_steps=2000)
    settings["validation"]["interval_steps"] = None
    config_path = write_config(tmp_path / "run.yaml", settings)
    processes = start_parallel_training(config_path)
    end_s = time.monotonic() + HANGING_S
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < end_s, "the run did not start"
        time.sleep(0.01)
    second_path = write_config(tmp_path / "second.yaml", settings)
    second = start_training(second_path)
    second.join(HANGING_S)
    assert "another process is training" in second_path.with_suffix(".log").read_text()
    for process in processes:
        assert process.is_alive()
        process.kill()
        process.join()


def test_processes_that_cannot_find_each_other_are_refused(data_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    config_path = write_config(tmp_path / "run.yaml", settings_of(data_folder, tmp_path / "run"))
    message = r"2 processes \(WORLD_SIZE\), but lacks RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: .*torchrun"
    with pytest.raises(ConfigError, match=message):
        train(*resolve_config(config_path))


def torchrun(config_path, *overrides):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return [*command, "-m", "ultramem.cli", "train", str(config_path), *overrides]


@pytest.mark.slow
def test_torchrun_trains_and_speaks_once(whole_runs, data_folder, tmp_path):
    config_path = write_config(tmp_path / "run.yaml", settings_of(data_folder, tmp_path / "run"))
    finished = subprocess.run(torchrun(config_path), capture_output=True, text=True, timeout=HANGING_S)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines() == [f"model: {tmp_path}/run/step12-hf"]
    lines = [line for line in finished.stderr.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == [f"{step}/12" for step in range(1, 13)]
    assert_same_lines(metrics_lines(tmp_path / "run"), metrics_lines(whole_runs("ultramem_v2")))
    refused = subprocess.run(torchrun(config_path, "run.seed=4"), capture_output=True, text=True, timeout=HANGING_S)
    assert refused.returncode != 0
    assert refused.stderr.count("run.seed: 3 → 4") == 1


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_signals_on(data_folder, tmp_path, signal_number):
    """Also when the processes get it twice: from the terminal and from torchrun."""
    settings = settings_of(data_folder, tmp_path / "run", max_steps=5000)
    settings["checkpoint"] = {"interval_steps": None, "keep": 1}
    settings["validation"]["interval_steps"] = None
    config_path = write_config(tmp_path / "run.yaml", settings)
    process = subprocess.Popen(torchrun(config_path), stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics, end_s = tmp_path / "run" / "metrics.jsonl", time.monotonic() + HANGING_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end_s, "the run did not get to its third step"
        time.sleep(0.01)
    os.killpg(process.pid, signal_number)
    _, text = process.communicate(timeout=HANGING_S)
    (step,) = complete_steps(tmp_path / "run")
    assert text.count(f"stopped at step {step} of 5000: saved") == 1
    assert (tmp_path / "run" / f"step{step}-hf" / "model.safetensors").is_file()

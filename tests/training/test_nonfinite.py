"""Steps whose loss or gradient is NaN or infinite, left out: what stays as it was, what is counted and said."""

import json
import math
import shutil

import pytest
import torch
import yaml

from parallel_workers import spoil_losses, train_with_spoilt_losses
from tiny_training import (
    VOCAB_SIZE,
    assert_same_state,
    finish_training,
    metrics_lines,
    start_process,
    start_processes,
    tiny_model,
    tiny_settings,
    training_state,
)
from ultramem.errors import ConfigError, TrainingError
from ultramem.model.roles import parameter_roles
from ultramem.training.config import RunConfig, RunSection, TrainingSection, load_config
from ultramem.training.run import resolve_config, train
from ultramem.training.train_module import UltraMemTrainModule

PKM = {"type": "pkm", "num_keys": 8, "key_dim": 8, "top_k": 4, "query_norm": "batch"}
ROWS = ["training.table_gradients=rows", "optimizer.table_moments=8bit"]


@pytest.fixture
def config_path(data_folder, tmp_path):
    settings = tiny_settings(data_folder, tmp_path / "run")
    settings["training"]["on_nonfinite"] = "skip"
    settings["logging"]["memory_interval_steps"] = 3
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "tiny.yaml"


def run(config_path, *overrides):
    return train(*resolve_config(config_path, list(overrides)))


def strict_lines(run_folder):
    """The lines of ``metrics.jsonl``, in which NaN and infinities are errors."""

    def refuse(name):
        raise AssertionError(f"{name} in the metrics")

    text = (run_folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


class StepsOf:
    """A trainer as a train module sees it, for steps taken by hand."""

    device, dp_process_group, max_tokens, max_steps, global_train_tokens_seen = torch.device("cpu"), None, 640, 10, 64

    def __init__(self):
        self.global_step, self.metrics = 1, {}
        self.data_loader = self
        self.batches_processed, self.epoch = 3, 2

    def record_metric(self, name, value, reduce_type=None, namespace=None, merge_strategy=None):
        self.metrics[f"{namespace}/{name}" if namespace else name] = float(value)

    def record_ce_loss(self, value, reduce_type=None):
        self.record_metric("train/CE loss", value)


def module_of(tmp_path, table_gradients="dense", memory=None, max_skips_in_a_row=2):
    training = TrainingSection(
        max_steps=10,
        global_batch_sequences=4,
        precision="fp32",
        table_gradients=table_gradients,
        on_nonfinite="skip",
        max_skips_in_a_row=max_skips_in_a_row,
    )
    config = RunConfig(run=RunSection(save_folder=str(tmp_path)), training=training)
    model = tiny_model(**({} if memory is None else {"memory": memory}))
    module = UltraMemTrainModule(model, parameter_roles(model), config, flops_per_token=10)
    module._trainer = StepsOf()
    return module


def take_step(module, seed, spoil=None):
    module.zero_grads()
    module.train_batch(
        {"input_ids": torch.randint(2, VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(seed))}
    )
    if spoil is not None:
        spoil(module)
    module.optim_step()
    module.zero_grads()


def everything(module):
    """Weights, buffers and moments."""
    state = {f"model.{name}": value.clone() for name, value in module.model.state_dict().items()}
    for index, (parameter, moments) in enumerate(module.optim.state.items()):
        state |= {f"{index}.{parameter.shape}.{name}": value.clone() for name, value in moments.items()}
    return state


def nan_gradient(module):
    module.model.lm_head.weight.grad[3, 2] = float("nan")


def infinite_gradient(module):
    module.model.lm_head.weight.grad[3, 2] = float("inf")


def nan_loss(module):
    module.batch_loss = torch.tensor(float("nan"))


@pytest.mark.parametrize("spoil", [nan_gradient, infinite_gradient, nan_loss])
@pytest.mark.parametrize(
    ("table_gradients", "memory"),
    [("dense", None), ("rows", None), ("dense", PKM)],
    ids=["dense", "rows", "batch norm"],
)
def test_a_skipped_step_changes_nothing(tmp_path, table_gradients, memory, spoil):
    """Weights, moments, their count of steps, running statistics; the step after it is as if it had not been."""
    module, other = (module_of(tmp_path, table_gradients, memory) for _ in range(2))
    for each in (module, other):
        take_step(each, 1)
    before = everything(module)
    take_step(module, 2, spoil)
    assert_same_state(everything(module), before)
    assert (module.guard.counts.total, module.guard.counts.in_a_row) == (1, 1)
    for each in (module, other):
        take_step(each, 3)
    assert_same_state(everything(module), everything(other))
    assert (module.guard.counts.total, module.guard.counts.in_a_row) == (1, 0)


def test_activations_that_are_nan_do_not_reach_running_statistics(tmp_path):
    module = module_of(tmp_path, memory=PKM)
    weight = module.model.model.embed_tokens.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    before = {name: buffer.clone() for name, buffer in module.model.named_buffers()}
    take_step(module, 1)
    assert_same_state(dict(module.model.named_buffers()), before)
    assert any("query_mean" in name for name in before)
    assert module.trainer.metrics.keys().isdisjoint({"train/CE loss", "optim/dense grad norm"})
    with torch.no_grad():
        weight.copy_(saved)
    take_step(module, 2)
    assert math.isfinite(module.trainer.metrics["train/CE loss"])


def test_too_many_in_a_row_end_the_run(tmp_path, capsys):
    module = module_of(tmp_path, max_skips_in_a_row=2)
    for seed, spoil in enumerate([nan_loss, nan_loss, None, nan_loss, nan_loss]):
        take_step(module, seed, spoil)
    assert capsys.readouterr().err.count("step 1 skipped (loss nan, dense grad norm ") == 4
    message = (
        r"step 1 cannot be taken \(loss nan.*\), nor could the 2 before it \('training\.max_skips_in_a_row'\); the "
        r"batch is sequences 8-11 in the order of epoch 2 with seed 0 .*Lower 'optimizer\.lr'.*: no checkpoint is compl"
    )
    with pytest.raises(TrainingError, match=message):
        take_step(module, 9, nan_loss)


def test_a_run_goes_on_without_the_steps_that_it_cannot_take(config_path, monkeypatch, capsys):
    spoil_losses(monkeypatch.setattr, steps=(1, 5, 6))
    assert run(config_path).name == "step12-hf"
    lines = strict_lines(config_path.parent / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["optim/skipped steps"] for line in lines] == [1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3, 3]
    assert [line["step"] for line in lines if "train/CE loss" not in line] == [1, 5, 6]
    assert [line["step"] for line in lines if "optim/dense grad norm" not in line] == [1, 5, 6]
    # What the memories' statistics would have to say after step 6 went with it.
    assert [line["step"] for line in lines if "memory/0/value_coverage" in line] == [3, 9, 12]
    said = capsys.readouterr().err
    folder = config_path.parent / "run"
    assert (
        "step 5 skipped (loss nan, dense grad norm nan, tables grad norm nan); the batch is sequences 16-19 in the "
        f"order of epoch 1 with seed 3 (to read it: `ultramem train {folder}/config.yaml --show-sequences 1:16-19`)"
    ) in said
    assert "steps skipped for a NaN or infinite loss or gradient: 3 of 12" in said


@pytest.mark.parametrize("overrides", [[], ROWS], ids=["dense", "rows"])
def test_a_resumed_run_skips_and_counts_like_an_uninterrupted_one(config_path, tmp_path, monkeypatch, overrides):
    """Steps 3, 8 and 9 are left out, the run is cut after step 8, and three in a row would be too many."""
    overrides = [*overrides, "checkpoint.keep=null", "training.max_skips_in_a_row=2"]
    spoil_losses(monkeypatch.setattr, steps=(3, 8, 9))
    run(config_path, *overrides)
    whole, resumed = tmp_path / "run", tmp_path / "resumed"
    resumed.mkdir()
    shutil.copytree(whole / "step8", resumed / "step8")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(whole / name, resumed / name)
    overrides.append(f"run.save_folder={resumed}")
    run(config_path, *overrides)
    states = [training_state(folder / "step12", tmp_path) for folder in (whole, resumed)]
    assert_same_state(*states)
    assert metrics_lines(resumed)[-1]["optim/skipped steps"] == 3
    lines = [
        [{name: line[name] for name in line if not name.startswith("memory/")} for line in metrics_lines(folder)]
        for folder in (whole, resumed)
    ]
    assert lines[0] == lines[1]
    # The state of step 8 remembers that it was left out: 9 and 10 are the second and the third.
    for path in ("step12", "step12-hf"):
        shutil.rmtree(resumed / path)
    spoil_losses(monkeypatch.setattr, steps=(9, 10))
    with pytest.raises(TrainingError, match=r"step 10 cannot be taken .* nor could the 2 before it"):
        run(config_path, *overrides)


def test_without_the_option_the_batch_is_named(config_path, monkeypatch):
    spoil_losses(monkeypatch.setattr, steps=(6,))
    message = (
        r"step 6 cannot be taken \(loss nan.*\); the batch is sequences 20-23 in the order of epoch 1 with seed 3 .*"
        r"Lower .*'training\.on_nonfinite: skip': the last complete checkpoint is '.*/step4'"
    )
    with pytest.raises(TrainingError, match=message):
        run(config_path, "training.on_nonfinite=stop", "checkpoint.save_async=false")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("on_nonfinite=ignore", r"'training\.on_nonfinite' expects one of stop, skip"),
        ("max_skips_in_a_row=0", r"'training\.max_skips_in_a_row' must be at least 1, but 0 was given"),
    ],
)
def test_settings_that_cannot_be(config_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_path, [f"training.{override}"])


@pytest.mark.dist
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_skip_what_one_of_them_cannot_take(data_folder, tmp_path, parallel):
    """The second process alone has a NaN; the run is that of one process that leaves out the same steps."""
    settings = tiny_settings(data_folder, tmp_path / "one")
    settings["model"]["attention_dropout"] = settings["model"]["memory"]["output_dropout"] = 0.0
    settings["training"] |= {"micro_batch_sequences": 1, "on_nonfinite": "skip", "parallel": parallel}
    for name, start, process_with_nan in (("one", start_process, 0), ("two", start_processes, 1)):
        settings["run"]["save_folder"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        started = start(train_with_spoilt_losses, tmp_path / f"{name}.yaml", (3, 4, 7), process_with_nan)
        for process in started if isinstance(started, list) else [started]:
            finish_training(process, tmp_path / f"{name}.yaml")
    one, two = (metrics_lines(tmp_path / name) for name in ("one", "two"))
    assert [line["optim/skipped steps"] for line in two] == [0, 0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    for line, expected in zip(two, one, strict=True):
        assert line == pytest.approx(expected, rel=2e-5, abs=1e-6)
    log = (tmp_path / "two.log").read_text()
    assert log.count("step 4 skipped (loss nan") == 1
    assert log.count("steps skipped for a NaN or infinite loss or gradient: 3 of 12") == 1

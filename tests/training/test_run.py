"""Whole runs in this process: what they write, learn and refuse."""

import errno
import io
import json
import re
import shutil

import pytest
import torch
import yaml
from olmo_core.distributed.checkpoint.filesystem import RemoteFileSystemWriter as FileSystemWriter
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_training import metrics_lines, tiny_settings
from ultramem.errors import CheckpointError, ConfigError, DataError
from ultramem.training.callbacks import format_time
from ultramem.training.run import resolve_config, train


@pytest.fixture(scope="module")
def finished_run(data_folder, tmp_path_factory):
    """A run of 40 steps; returns its folder and config file."""
    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(data_folder, folder / "run")
    settings["training"] |= {"max_steps": 40, "global_batch_sequences": 8, "micro_batch_sequences": 4}
    settings["optimizer"]["lr"] = 0.01
    settings["checkpoint"] = {"interval_steps": 15, "keep": 2}
    settings["logging"] = {"interval_steps": 4, "memory_interval_steps": 10}
    settings["validation"] = {"interval_steps": 15}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    model_folder = train(*resolve_config(folder / "run.yaml"))
    assert model_folder == folder / "run" / "step40-hf"
    return folder


def test_the_model_learns(finished_run):
    losses = [line["train/CE loss"] for line in metrics_lines(finished_run / "run")]
    assert losses[0] == pytest.approx(4.3, abs=0.3)  # ln 64 plus what the initial logits cost
    assert losses[-1] < losses[0] - 1.0


def test_kept_states_and_models(finished_run):
    names = {path.name for path in (finished_run / "run").glob("step*")}
    assert names == {"step30", "step30-hf", "step40", "step40-hf"}


def test_metrics_file_and_tensorboard(finished_run):
    lines = metrics_lines(finished_run / "run")
    # Every fourth step, the first and last, and those with a validation loss.
    assert [line["step"] for line in lines] == [1, 4, 8, 12, 15, 16, 20, 24, 28, 30, 32, 36, 40]
    by_step = {line["step"]: line for line in lines}
    for name in (
        "optim/dense grad norm",
        "optim/tables grad norm",
        "optim/dense learning rate",
        "optim/tables learning rate",
        "train/key_balance",
        "train/PPL",
    ):
        assert all(line[name] >= 0 for line in lines), name
    assert by_step[40]["throughput/total tokens"] == 40 * 8 * 32
    assert {step for step, line in by_step.items() if "validation/CE loss" in line} == {15, 30, 40}
    assert by_step[40]["validation/CE loss"] < by_step[15]["validation/CE loss"]
    assert by_step[40]["validation/bits per byte"] == pytest.approx(
        by_step[40]["validation/CE loss"] / torch.log(torch.tensor(2.0)).item() / 4
    )
    assert {step for step, line in by_step.items() if "memory/0/value_coverage" in line} == {20, 30, 40}
    for i in (0, 1):
        assert 0 < by_step[40][f"memory/{i}/value_coverage"] <= 1
        assert by_step[40][f"memory/{i}/usage_divergence"] > 0
        assert by_step[40][f"memory/{i}/top1_score"] >= by_step[40][f"memory/{i}/mean_score"]
        assert by_step[40][f"memory/{i}/singular_value_head0_0"] > by_step[40][f"memory/{i}/singular_value_head0_1"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished_run / "run" / "tensorboard"))
    events.Reload()
    logged = {event.step: event.value for event in events.Scalars("validation/CE_loss")}
    assert logged == pytest.approx({step: by_step[step]["validation/CE loss"] for step in (15, 30, 40)})


def test_exported_folder_is_self_contained_and_gives_the_validation_loss(finished_run, data_folder):
    import numpy as np

    folder = finished_run / "run" / "step40-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    tokens = np.fromfile(data_folder / "validation" / "part-00000.npy", dtype="<u2").astype("int64")
    windows = [torch.from_numpy(tokens[i : i + 33]) for i in range(0, len(tokens) - 1, 32)]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(model(w[None, :-1]).logits[0], w[1:], reduction="sum") for w in windows
        ]
    expected = torch.stack(losses).sum().item() / (len(tokens) - 1)
    assert metrics_lines(finished_run / "run")[-1]["validation/CE loss"] == pytest.approx(expected, rel=1e-5)


def test_resolved_config_is_kept_with_the_run(finished_run):
    config, _ = resolve_config(finished_run / "run" / "config.yaml")
    assert config == resolve_config(finished_run / "run.yaml")[0]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.memory.top_k=5",
            r"step 40 of a run with other settings \(model.memory.top_k: 4 → 5\): set 'run",
        ),
        ("model.hidden_size=32", r"model.hidden_size: 16 → 32"),
        ("run.seed=4", r"run.seed: 3 → 4"),
        ("data.sequence_length_tokens=16", r"data.sequence_length_tokens: 32 → 16"),
        (
            "training.table_gradients=rows optimizer.table_moments=8bit",
            r"optimizer.table_moments: fp32 → 8bit",
        ),
    ],
)
def test_a_run_folder_is_not_continued_with_another_model(finished_run, override, message):
    with pytest.raises(CheckpointError, match=message):
        train(*resolve_config(finished_run / "run.yaml", override.split()))


def test_a_run_folder_is_not_continued_with_other_data(finished_run, data_folder, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (tmp_path / "data" / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "changed"}))
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: tiny-4096 → changed"):
        train(*resolve_config(finished_run / "run.yaml", [f"data.folder={tmp_path / 'data'}"]))


@pytest.mark.parametrize("content", [None, "a: [", "model: {num_attention_heads: 3}\ndata: {folder: x}\n"])
def test_a_run_folder_without_a_usable_config_is_not_continued(finished_run, tmp_path, content):
    shutil.copytree(finished_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("config.yaml"))
    if content is not None:
        (tmp_path / "run" / "config.yaml").write_text(content)
    message = r"run' holds step 40 of a run, but the run's own config.yaml .* restore that file .* or set 'run.save_fol"
    with pytest.raises(CheckpointError, match=message):
        train(*resolve_config(finished_run / "run.yaml", [f"run.save_folder={tmp_path / 'run'}"]))


@pytest.mark.parametrize("save_async", ["true", "false"])
def test_a_full_disk_ends_the_run_with_what_to_do(config_path, monkeypatch, save_async):
    """The second state cannot be written; with room again, the same command resumes from the first."""
    write = FileSystemWriter.write_data

    def write_until_full(writer, *arguments):
        if "step8" in str(writer.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(writer, *arguments)

    command = (config_path, [f"checkpoint.save_async={save_async}"])
    monkeypatch.setattr(FileSystemWriter, "write_data", write_until_full)
    with pytest.raises(CheckpointError) as error:
        train(*resolve_config(*command))
    monkeypatch.undo()
    folder = config_path.parent / "run"
    assert f"cannot write to the run folder '{folder}': No space left on device. Free space" in str(error.value)
    assert "step 4 is complete and kept, and the same command resumes from it" in str(error.value)
    assert train(*resolve_config(*command)).name == "step12-hf"
    assert [line["step"] for line in metrics_lines(folder)] == list(range(1, 13))


def test_a_damaged_metrics_line_is_dropped_on_resume(data_folder, tmp_path):
    """A kill can tear the last line; lines of steps that will be repeated go too."""
    settings = tiny_settings(data_folder, tmp_path / "run")
    settings["training"]["max_steps"] = 6
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    train(*resolve_config(tmp_path / "run.yaml", ["checkpoint.keep=null", "checkpoint.save_async=false"]))
    before = metrics_lines(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step6")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "train/CE lo')
    train(*resolve_config(tmp_path / "run.yaml"))
    after = metrics_lines(tmp_path / "run")
    assert [line["step"] for line in after] == [1, 2, 3, 4, 5, 6]
    assert [line["train/CE loss"] for line in after] == [line["train/CE loss"] for line in before]


def test_batch_size_rate_and_length_may_change_on_resume(config_path):
    """512 tokens in batches of 128, then up to 1536 in batches of 256: the horizon is counted in tokens."""
    changes = ["training.max_steps=null", "logging.memory_interval_steps=null"]
    train(*resolve_config(config_path, [*changes, "training.max_tokens=512"]))
    changes += ["training.max_tokens=1536", "training.global_batch_sequences=8", "optimizer.lr=0.001"]
    assert train(*resolve_config(config_path, changes)).name == "step8-hf"
    lines = metrics_lines(config_path.parent / "run")
    assert [line["throughput/total tokens"] for line in lines] == [128, 256, 384, 512, 768, 1024, 1280, 1536]
    assert lines[-1]["optim/dense learning rate"] == pytest.approx(1e-4)


def test_dense_model_trains_with_gradient_checkpointing(config_path):
    model_folder = train(
        *resolve_config(
            config_path, ["model.memory=null", "training.max_steps=2", "training.gradient_checkpointing=true"]
        )
    )
    line = metrics_lines(config_path.parent / "run")[-1]
    assert model_folder.name == "step2-hf"
    assert not [name for name in line if "memory" in name or "tables" in name]


def test_less_data_than_one_batch_is_refused(config_path):
    with pytest.raises(DataError, match="has 128 sequences of 32 tokens, fewer than one batch of 200"):
        train(
            *resolve_config(config_path, ["training.global_batch_sequences=200", "training.micro_batch_sequences=50"])
        )


def test_missing_data_folder_is_named(config_path):
    with pytest.raises(DataError, match=r"no data folder 'nowhere'.*`ultramem data prepare SOURCE… --output nowhere"):
        resolve_config(config_path, ["data.folder=nowhere"])


def test_settings_that_do_not_fit_together_are_a_config_error(config_path):
    with pytest.raises(ConfigError, match=r"hidden_size \(16\) must be a multiple of num_attention_heads \(3\)"):
        train(*resolve_config(config_path, ["model.num_attention_heads=3"]))


def test_a_terminal_gets_a_live_line(config_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "150")
    train(*resolve_config(config_path, ["training.max_steps=2", "logging.tensorboard=false"]))
    assert re.search(r"step 2/2  loss \d.\d{4}  [\d,]+ tokens/s  validation \d.\d{4}  0s left", terminal.getvalue())
    assert "━" in terminal.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (75, "1m15s"), (7322, "2h02m")])
def test_times_are_short(seconds, text):
    assert format_time(seconds) == text

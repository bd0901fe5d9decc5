"""Training states and exported models that have lost a file or changed: named before anything is trained on them."""

import errno
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml

from tiny_training import metrics_lines, tiny_settings
from ultramem.cli.loading import load_model
from ultramem.errors import CheckpointError
from ultramem.training import states
from ultramem.training.checkpoints import complete_steps
from ultramem.training.run import resolve_config, train


@pytest.fixture(scope="module")
def finished(data_folder, tmp_path_factory):
    """A run with the states of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("finished")
    settings = tiny_settings(data_folder, folder / "run")
    settings["training"]["max_steps"] = 4
    settings["checkpoint"] = {"interval_steps": 2, "keep": None}
    settings["validation"]["interval_steps"] = None
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    train(*resolve_config(folder / "run.yaml"))
    return folder


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the run to spoil: its folder, and a command that continues it for a step."""
    shutil.copytree(finished / "run", tmp_path / "run")
    overrides = [f"run.save_folder={tmp_path / 'run'}", "training.max_steps=5", "checkpoint.interval_steps=null"]
    return SimpleNamespace(
        folder=tmp_path / "run", command=(finished / "run.yaml", overrides), old=finished / "run", scratch=tmp_path
    )


def tensors(state):
    """One of the files that hold weights and moments of a state."""
    return state / "model_and_optim" / "__0_0.distcp"


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    os.truncate(file, file.stat().st_size - 100)


SPOILT = {
    "tensors cut": (lambda state: cut(tensors(state)), r"model_and_optim/__0_0\.distcp has [\d,]+ bytes instead of "),
    "tensors flipped": (lambda state: flip(tensors(state)), r"__0_0\.distcp has changed since it was written \(its ch"),
    "tensors missing": (lambda state: tensors(state).unlink(), r"model_and_optim/__0_0\.distcp is missing"),
    "index flipped": (
        lambda state: flip(state / "model_and_optim" / ".metadata"),
        r"model_and_optim/\.metadata has ch",
    ),
    "index missing": (lambda state: (state / "model_and_optim" / ".metadata").unlink(), r"\.metadata is missing"),
    "position cut": (lambda state: cut(state / "train" / "rank0.pt"), r"train/rank0\.pt has [\d,]+ bytes instead of"),
    "position missing": (lambda state: (state / "train" / "rank0.pt").unlink(), r"train/rank0\.pt is missing"),
    "checksums": (lambda state: (state / "checksums.json").write_text("{"), r"checksums\.json cannot be read"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_damaged_state_is_named_and_kept(run, kind):
    spoil, damage = SPOILT[kind]
    spoil(run.folder / "step4")
    before = sorted(run.folder.rglob("step*/**"))
    message = (
        rf"the training state '{run.folder}/step4' is damaged: .*{damage}.*move the folder away to go on from step 2"
    )
    with pytest.raises(CheckpointError, match=message):
        train(*resolve_config(*run.command))
    assert sorted(run.folder.rglob("step*/**")) == before
    # What the message says to do.
    (run.folder / "step4").rename(run.scratch / "aside")
    assert train(*resolve_config(run.command[0], run.command[1][:1])).name == "step4-hf"
    again, whole = ([line["train/CE loss"] for line in metrics_lines(folder)] for folder in (run.folder, run.old))
    assert again == whole


@pytest.mark.parametrize(
    "spoil", [lambda file: cut(file), lambda file: file.unlink(), lambda file: file.write_text("x")]
)
def test_states_without_checksums_are_read_with_care(run, spoil):
    """As earlier versions wrote them: what cannot be read is named, with the reason."""
    (run.folder / "step4" / "checksums.json").unlink()
    spoil(tensors(run.folder / "step4"))
    with pytest.raises(
        CheckpointError, match=r"/step4' is damaged: \w+: \S.*Put back a copy of it, or move the folder"
    ):
        train(*resolve_config(*run.command))


def test_an_undamaged_state_without_checksums_is_resumed(run):
    (run.folder / "step4" / "checksums.json").unlink()
    assert train(*resolve_config(*run.command)).name == "step5-hf"


def test_a_half_written_state_is_no_damaged_one(run):
    """A kill leaves no file that makes a state complete: it goes, and the one before it is resumed."""
    (run.folder / "step4" / ".metadata.json").unlink()
    tensors(run.folder / "step4").unlink()
    assert train(*resolve_config(*run.command)).name == "step5-hf"
    assert complete_steps(run.folder) == [2, 5]


@pytest.mark.parametrize("start", ["", "step4"])
def test_another_run_does_not_start_from_a_damaged_state(run, start):
    flip(tensors(run.folder / "step4"))
    overrides = [f"run.save_folder={run.scratch / 'second'}", f"run.load_path={run.folder / start}"]
    with pytest.raises(CheckpointError, match=r"/run/step4' is damaged: .* has changed since it was written"):
        train(*resolve_config(run.command[0], overrides))


@pytest.mark.parametrize(
    ("spoil", "damage"),
    [
        (flip, r"the model in .*step4-hf is damaged: model\.safetensors has changed .* remove checksums\.json from"),
        (cut, r"step4-hf(/model\.safetensors)? is damaged"),
        (lambda file: file.unlink(), r"step4-hf holds neither model\.safetensors nor|lacks"),
    ],
)
def test_a_damaged_model_is_not_loaded(run, spoil, damage):
    folder = run.folder / "step4-hf"
    spoil(folder / "model.safetensors")
    overrides = [f"run.save_folder={run.scratch / 'second'}", f"run.load_path={folder}"]
    with pytest.raises(CheckpointError, match=damage):
        train(*resolve_config(run.command[0], overrides))
    with pytest.raises(CheckpointError, match="step4-hf"):
        load_model(folder, torch.device("cpu"))


def test_other_files_of_a_model_folder_may_be_changed(run):
    folder = run.folder / "step4-hf"
    (folder / "generation_config.json").write_text("{}")
    (folder / "README.md").write_text("A model.")
    load_model(folder, torch.device("cpu"))


@pytest.mark.parametrize(("number", "save_async"), [(errno.ENOSPC, "true"), (errno.EROFS, "false")])
def test_the_last_files_of_a_state_do_not_fit(run, monkeypatch, save_async, number):
    """Weights and moments are written, their checksums are not: such a state is not complete."""

    def refuse(folder, files):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(states, "write_checksums", refuse)
    overrides = [*run.command[1], "checkpoint.interval_steps=5", f"checkpoint.save_async={save_async}"]
    message = rf"cannot write to the run folder .*: {os.strerror(number)}\. .*step 4 is complete and kept, and the same"
    with pytest.raises(CheckpointError, match=message):
        train(*resolve_config(run.command[0], overrides))
    monkeypatch.undo()
    assert complete_steps(run.folder) == [2, 4]
    assert train(*resolve_config(*run.command)).name == "step5-hf"


def test_checksums_cover_all_files_of_a_state(run):
    listed = set(yaml.safe_load((run.folder / "step4" / "checksums.json").read_text()))
    found = {
        str(path.relative_to(run.folder / "step4")) for path in (run.folder / "step4").rglob("*") if path.is_file()
    }
    assert found - listed == {".metadata.json", "checksums.json"}
    assert listed > {"model_and_optim/.metadata", "model_and_optim/__0_0.distcp", "train/rank0.pt"}

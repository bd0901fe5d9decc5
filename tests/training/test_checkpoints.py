"""Run folders: what counts as complete, what is removed, who may write."""

import errno
import os
import shutil

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from ultramem.errors import CheckpointError
from ultramem.training.checkpoints import (
    complete_steps,
    exclusive_run_folder,
    explained_write_errors,
    export_model,
    remove_leftovers,
)

COMPLETE = ("train/rank0.pt", "model_and_optim/.metadata", ".metadata.json")


def make_step(run_folder, name, files=COMPLETE):
    for file in files:
        path = run_folder / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return run_folder / name


def test_only_states_with_the_file_written_last_are_complete(tmp_path):
    make_step(tmp_path, "step10")
    make_step(tmp_path, "step9")
    make_step(tmp_path, "step20", COMPLETE[:2])
    make_step(tmp_path, "step30-tmp")
    make_step(tmp_path, "step10-hf", ["config.json"])
    assert complete_steps(tmp_path) == [9, 10]
    assert complete_steps(tmp_path / "missing") == []


def test_leftovers_go_and_everything_complete_stays(tmp_path):
    kept = [make_step(tmp_path, "step10"), make_step(tmp_path, "step10-hf", ["config.json"])]
    kept += [make_step(tmp_path, "steps", ["notes"]), make_step(tmp_path, "tensorboard", ["events"])]
    leftovers = ["step10-hf.partial-12", "step10-hf.replaced-3", "step20", "step30-tmp", "step5-hf.old"]
    for name in leftovers:
        make_step(tmp_path, name, COMPLETE[:2])
    assert remove_leftovers(tmp_path) == leftovers
    assert sorted(tmp_path.iterdir()) == sorted(kept)
    assert remove_leftovers(tmp_path / "missing") == []


def test_a_model_folder_whose_state_was_never_complete_goes(tmp_path):
    """Killed between its export and the end of an asynchronous save; what somebody kept without its state stays."""
    for name in ("step4-hf", "step10-hf", "step20-hf"):
        make_step(tmp_path, name, ["config.json"])
    assert remove_leftovers(tmp_path) == []
    make_step(tmp_path, "step10")
    make_step(tmp_path, "step20", COMPLETE[:2])
    assert remove_leftovers(tmp_path) == ["step20", "step20-hf"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step10", "step10-hf", "step4-hf"]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota exceeded"),
        (SafetensorError("Error while serializing: I/O error: full (os error 28)"), "No space left on device"),
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]), "No space left on device"),
        (CheckpointException("", {0: (OSError(28, "full"), None)}), "No space left on device"),
    ],
)
def test_a_full_disk_is_explained_however_it_is_reported(tmp_path, error, cause):
    message = f"{cause}. Free space .*no checkpoint .* starts again"
    with pytest.raises(CheckpointError, match=message), explained_write_errors(tmp_path):
        raise error
    make_step(tmp_path, "step10")
    message = f"folder '{tmp_path}': .*{cause}.*step 10 is complete.*resumes from it"
    with pytest.raises(CheckpointError, match=message), explained_write_errors(tmp_path):
        raise RuntimeError("training failed") from error


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), explained_write_errors(tmp_path):
        (tmp_path / "absent").read_text()


def test_a_run_folder_has_one_writer(tmp_path):
    """The lock belongs to the open file, so that a second one conflicts in one process as in two."""
    message = r"another process is training in .*: wait for it, or set 'run.save_folder' to another"
    with exclusive_run_folder(tmp_path), pytest.raises(CheckpointError, match=message), exclusive_run_folder(tmp_path):
        pass
    with exclusive_run_folder(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = r"cannot write to the run folder '.*file/run': Not a directory"
    with pytest.raises(CheckpointError, match=message), exclusive_run_folder(tmp_path / "file" / "run"):
        pass


class FailingModel:
    """Its export ends in the middle, on a full disk."""

    def save_pretrained(self, folder, state_dict):
        (folder / "config.json").write_text("half")
        raise OSError(28, "No space left on device")


def test_a_failed_export_leaves_the_old_model_folder(tmp_path):
    target = make_step(tmp_path, "step3-hf", ["config.json"])
    with pytest.raises(OSError, match="No space"):
        export_model(FailingModel(), tmp_path, target)
    assert (target / "config.json").read_text() == "x"
    assert list(tmp_path.iterdir()) == [target]

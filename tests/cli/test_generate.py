import json
import shutil

import pytest

from tiny_models import tiny_llama
from ultramem.errors import CheckpointError, ConfigError


def test_it_prints_the_prompt_and_its_continuation(invoke, model_folder):
    arguments = ("generate", model_folder, "--prompt", "The capital", "--max-new-tokens", 12)
    first, again, other = invoke(*arguments), invoke(*arguments), invoke(*arguments, "--seed", 1)
    assert first.exit_code == 0
    assert first.stdout.startswith("The capital")
    assert len(first.stdout) > len("The capital\n")
    assert first.stdout == again.stdout != other.stdout


def test_several_prompts_are_continued_together(invoke, model_folder, tmp_path):
    arguments = ("generate", model_folder, "--max-new-tokens", 6, "--temperature", 0)
    alone = [invoke(*arguments, "--prompt", text).stdout for text in ("The capital", "Sweden")]
    batch = invoke(*arguments, "--prompt", "The capital", "--prompt", "Sweden")
    assert batch.stdout == "\n".join(alone)
    assert "tokens/s" in batch.stderr
    (tmp_path / "prompts.txt").write_text("The capital\nSweden\n")
    assert invoke(*arguments, "--prompt-file", tmp_path / "prompts.txt").stdout == batch.stdout


def test_the_precision_is_that_of_the_weights(invoke, model_folder):
    result = invoke(
        "generate", model_folder, "--prompt", "The", "--max-new-tokens", 4, "--temperature", 0, "--precision", "bf16"
    )
    assert result.exit_code == 0
    assert result.stdout.startswith("The")


def test_prompts_that_are_not_there(invoke, model_folder, tmp_path):
    error = invoke("generate", model_folder).exception
    assert isinstance(error, ConfigError)
    assert "there is nothing to continue: give --prompt TEXT, or --prompt-file" in str(error)
    error = invoke("generate", model_folder, "--prompt-file", tmp_path / "none").exception
    assert isinstance(error, ConfigError)
    assert "give a UTF-8 text file with one prompt a line" in str(error)


def test_the_prompt_may_come_from_standard_input(invoke, model_folder):
    arguments = ("generate", model_folder, "--max-new-tokens", 5, "--temperature", 0, "--prompt")
    assert invoke(*arguments, "-", stdin="The capital\n").stdout == invoke(*arguments, "The capital").stdout


def test_standard_input_that_is_no_text_is_refused(invoke, model_folder):
    result = invoke("generate", model_folder, "--prompt", "-", stdin=b"Gr\xfc\xdfe")
    assert isinstance(result.exception, ConfigError)
    assert "the prompt on standard input is not utf-8 text (byte 2: invalid start byte): convert it" in str(
        result.exception
    )
    assert result.stdout == ""


def test_a_run_folder_says_which_model_it_took(invoke, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "step20-hf")
    (tmp_path / "step30-hf").mkdir()
    result = invoke("generate", tmp_path, "--prompt", "The", "--max-new-tokens", 2)
    assert result.exit_code == 0
    assert f"taking its newest model, {tmp_path / 'step20-hf'}" in result.stderr
    assert "newest model" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prompt", "word " * 80), "shorten the prompt to at most 63 tokens"),
        (("--prompt", "x", "--top-p", "0"), "a top_p above 0"),
        (("--prompt", "x", "--temperature", "nan"), "a finite temperature of 0 (greedy) or more"),
        (("--prompt", "x", "--seed", 2**70), f"seed {2**70} is out of range: give a whole number from 0 to"),
        (("--prompt", "x\udcff"), "the prompt holds '\\udcff' at character 1"),
        (("--prompt", "x", "--device", "nonsense"), "device 'nonsense' cannot be used here"),
    ],
)
def test_values_that_cannot_be_used(invoke, model_folder, arguments, said):
    error = invoke("generate", model_folder, *arguments).exception
    assert isinstance(error, ConfigError)
    assert said in str(error)


def damage(folder, kind):
    if kind == "no tokenizer":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer_config.json").unlink()
    elif kind == "weights":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
    elif kind == "config":
        (folder / "config.json").write_text("{")
    elif kind == "other sizes":
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    elif kind == "more blocks":
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("no tokenizer", "holds no tokenizer that can be read"),
        ("tokenizer", "holds no tokenizer that can be read"),
        ("weights", "cannot be loaded"),
        ("config", "cannot be loaded"),
        ("other sizes", "are not those of its config.json: mismatched"),
        ("more blocks", "are not those of its config.json: missing"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_never_used(invoke, model_folder, tmp_path, kind, said):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    damage(folder, kind)
    result = invoke("generate", folder, "--prompt", "The")
    assert isinstance(result.exception, CheckpointError)
    assert said in str(result.exception)
    assert str(folder) in str(result.exception)
    assert result.stdout == ""


@pytest.mark.parametrize("verb", ["generate", "eval"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "abc"}, "Validation error for field 'hidden_size'"),
        ({"memory": [1]}, "Validation error for field 'memory'"),
        ({"memory": "ultramem_v2"}, "Validation error for field 'memory'"),
        ({"memory": {"num_keys": "12"}}, "expected int, got str (value: '12')"),
        ({"rope_parameters": {"rope_type": "zzz"}}, "rope_parameters.rope_type must be one of default, "),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_valid_is_named(invoke, model_folder, data_folder, tmp_path, verb, changes, said):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    options = {"generate": ("--prompt", "The"), "eval": ("--data", data_folder)}
    error = invoke(verb, folder, *options[verb]).exception
    assert isinstance(error, CheckpointError)
    assert f"{file} is not valid: " in str(error)
    assert said in str(error)
    assert "Put back the configuration that was saved." in str(error)


def test_a_wrong_type_in_the_configuration_of_another_model_is_named(invoke, tokenizer, tmp_path):
    tiny_llama(len(tokenizer)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": "abc"}))
    error = invoke("generate", tmp_path, "--prompt", "The").exception
    assert isinstance(error, CheckpointError)
    assert f"{tmp_path} cannot be loaded (" in str(error)
    assert "'hidden_size'" in str(error)

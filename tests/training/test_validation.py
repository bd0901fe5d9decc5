"""What a run measures on the way: further validation sets and tasks, without touching the training."""

import json
import shutil

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_tasks import write_tasks
from tiny_training import metrics_lines, tiny_settings, write_data_folder
from ultramem.errors import ConfigError, DataError
from ultramem.evaluation.harness import evaluate_tasks
from ultramem.evaluation.perplexity import evaluate_perplexity
from ultramem.training.config import load_config
from ultramem.training.run import resolve_config, train


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """The tiny data with a tokenizer that splits at blanks, which tasks need."""
    folder = write_data_folder(tmp_path_factory.mktemp("data"))
    split_at_blanks(folder)
    return folder


def split_at_blanks(folder):
    file = folder / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pre_tokenizer": {"type": "WhitespaceSplit"}}))


@pytest.fixture(scope="module")
def other_data(tmp_path_factory):
    return write_data_folder(tmp_path_factory.mktemp("other"), num_validation_tokens=300)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Questions in the words of the tiny data."""
    folder = tmp_path_factory.mktemp("tasks")
    path = write_tasks(folder)["choice"]
    rows = [
        {"question": f"w{2 + n} w{9 + n}", "choices": [f"w{16 + n}", "w3", f"w{17 + n} w5"], "gold": n % 2}
        for n in range(20)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(data_folder, folder, **validation):
    settings = tiny_settings(data_folder, folder / "run")
    settings["checkpoint"]["interval_steps"] = None
    settings["logging"]["interval_steps"] = 5
    settings["validation"] = validation
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return resolve_config(folder / "run.yaml")


@pytest.fixture(scope="module")
def measured(data_folder, other_data, task, tmp_path_factory):
    """A run that measures everything; returns its folder."""
    folder = tmp_path_factory.mktemp("measured")
    sets = {"other": str(other_data)}
    train(*run(data_folder, folder, sets=sets, interval_steps=4, tasks=[task], task_limit=8, tasks_interval_steps=6))
    return folder / "run"


def test_steps_at_which_something_was_measured(measured):
    steps = {}
    for line in metrics_lines(measured):
        for name in line:
            if name.startswith(("validation/", "tasks/")):
                steps.setdefault(name, []).append(line["step"])
    losses = ("validation/CE loss", "validation/bits per byte")
    expected = {name: [4, 8, 12] for name in (*losses, *(name.replace("/", "/other/") for name in losses))}
    assert steps == expected | {f"tasks/tiny_choice/{metric}": [6, 12] for metric in ("acc", "acc_norm")}


def test_the_numbers_are_those_of_the_exported_model(measured, other_data, task):
    last = metrics_lines(measured)[-1]
    model, tokenizer = (kind.from_pretrained(measured / "step12-hf") for kind in (AutoModelForCausalLM, AutoTokenizer))
    loss = evaluate_perplexity(model, [other_data / "validation/part-00000.npy"], sequence_length_tokens=32).loss
    assert last["validation/other/CE loss"] == pytest.approx(loss, rel=1e-5)
    assert last["validation/other/CE loss"] != last["validation/CE loss"]
    values = evaluate_tasks(model, tokenizer, [task], 8)
    assert {f"tasks/{name}": value for name, value in values.items()} == {
        name: last[name] for name in last if name.startswith("tasks/")
    }


def test_the_training_is_the_same_without(measured, data_folder, tmp_path):
    train(*run(data_folder, tmp_path, interval_steps=None))
    with_all, without = (
        {line["step"]: line["train/CE loss"] for line in metrics_lines(folder)}
        for folder in (measured, tmp_path / "run")
    )
    assert without.keys() == {1, 5, 10, 12}
    assert {step: with_all[step] for step in without} == without


def test_a_tokenizer_that_tasks_cannot_use_is_named(data_folder, task, tmp_path):
    shutil.copytree(data_folder, tmp_path / "data")
    file = tmp_path / "data" / "tokenizer" / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pre_tokenizer": None}))
    with pytest.raises(DataError, match=r"the tokenizer makes no token of its own out of ' w\d+.*' behind its context"):
        train(*run(tmp_path / "data", tmp_path, tasks=[task], tasks_interval_steps=1))


def test_what_is_missing_stops_the_run_before_its_first_step(data_folder, other_data, tmp_path):
    with pytest.raises(DataError, match="absent"):
        train(*run(data_folder, tmp_path, sets={"x": str(tmp_path / "absent")}))
    with pytest.raises(ConfigError, match=r"there is no task definition 'absent\.yaml'"):
        train(*run(data_folder, tmp_path, tasks=["absent.yaml"]))
    foreign = tmp_path / "foreign"
    shutil.copytree(other_data, foreign)
    tokenizer = json.loads((foreign / "tokenizer/tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = tokenizer["model"]["vocab"].pop("w9")
    (foreign / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="made with another tokenizer"):
        train(*run(data_folder, tmp_path, sets={"x": str(foreign)}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sets": {"wiki": 3}}, r"'validation\.sets\.wiki' expects text, but the number 3 was given"),
        ({"sets": ["data/wiki"]}, r"'validation\.sets' expects a section with keys of its own"),
        ({"tasks": "offline_piqa"}, "'validation.tasks' expects a list"),
        ({"task_limit": 0}, "'validation.task_limit' must be at least 1"),
        ({"tasks_interval_steps": 0}, "'validation.tasks_interval_steps' must be at least 1"),
    ],
)
def test_settings_that_cannot_be(config_path, section, said):
    settings = yaml.safe_load(config_path.read_text())
    config_path.write_text(yaml.safe_dump({**settings, "validation": section}))
    with pytest.raises(ConfigError, match=said):
        load_config(config_path)


def test_a_set_is_named_on_the_command_line(config_path):
    config = load_config(config_path, ["validation.sets.wiki=data/wiki", "validation.tasks=[offline_piqa]"])
    assert config.validation.sets == {"wiki": "data/wiki"}
    assert config.validation.tasks == ["offline_piqa"]

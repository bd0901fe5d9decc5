"""Tasks of lm-eval on our models: the scores are lm-eval's own, and what surrounds them."""

import logging
import math
import random
import sys

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from tokenizers import processors
from tqdm import tqdm
from transformers import OlmoeConfig, OlmoeForCausalLM

from tiny_models import tiny_tokenizer, tiny_ultramem
from tiny_tasks import NUM_ROWS, write_tasks
from ultramem.errors import ConfigError, DataError
from ultramem.evaluation import harness
from ultramem.evaluation.harness import evaluate_tasks, load_tasks, run_tasks
from ultramem.model.olmoe import from_olmoe

SCORES = {
    "tiny_choice/acc",
    "tiny_choice/acc_norm",
    "tiny_word/acc",
    "tiny_text/bits_per_byte",
    "tiny_write/exact_match",
}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def loaded(paths):
    return load_tasks(list(paths.values()))


@pytest.fixture(scope="module")
def choice(paths):
    return load_tasks([paths["choice"]])


@pytest.fixture(scope="module")
def model():
    return tiny_ultramem()


@pytest.fixture
def only_local(monkeypatch):
    """Reading lm-eval's own 14,000 definitions takes longer than all of these tests."""
    manager = harness._task_manager(with_published=False)
    monkeypatch.setattr(harness, "_task_manager", lambda with_published: manager)


def recorded_inputs(model, tokenizer, tasks, monkeypatch, **options):
    """Each row of token ids that the model was given, without padding."""
    from ultramem.evaluation.harness_model import HarnessModel

    rows, call = [], HarnessModel._model_call

    def record(self, inputs, **arguments):
        rows.extend(inputs.tolist())
        return call(self, inputs, **arguments)

    monkeypatch.setattr(HarnessModel, "_model_call", record)
    run_tasks(model, tokenizer, tasks, batch_size=1, **options)
    return rows


def with_numbers(results):
    return {task: harness._without_absent(numbers) for task, numbers in results.items()}


@pytest.mark.parametrize("limit", [None, 7])
def test_scores_are_those_of_lm_evals_own_model_on_olmoe(tmp_path, monkeypatch, paths, loaded, tokenizer, limit):
    """A random OLMoE from its folder by lm-eval's `hf` model, and turned into our decoder: the same numbers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it asks the hub for the folder's revision
    torch.manual_seed(0)
    settings = {"num_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.3, "max_position_embeddings": 64}
    sizes = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    olmoe = OlmoeForCausalLM(OlmoeConfig(vocab_size=len(tokenizer), **settings, **sizes, **special)).eval()
    olmoe.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    theirs = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tmp_path), "dtype": "float32"},
        device="cpu",
        batch_size=8,
        tasks=list(paths.values()),
        num_fewshot=2,
        limit=limit,
        log_samples=False,
        task_manager=TaskManager(include_defaults=False),
    )
    ours = run_tasks(from_olmoe(olmoe), tokenizer, loaded, num_fewshot=2, limit=limit, batch_size=8)
    assert ours.raw["results"] == with_numbers(theirs["results"])
    for section in ("versions", "n-shot", "n-samples", "higher_is_better"):
        assert ours.raw[section] == theirs[section]
    values = {f"{score.task}/{score.metric}": score.value for score in ours.scores}
    assert values.keys() == SCORES
    assert 0 < values["tiny_choice/acc"] < 1
    assert ours.raw["results"]["tiny_choice"]["acc,none"] == values["tiny_choice/acc"]
    assert {score.num_fewshot for score in ours.scores if score.task == "tiny_choice"} == {2}


def test_standard_errors_and_counts(model, tokenizer, choice):
    for limit, num_rows in ((None, NUM_ROWS), (8, 8)):
        report = run_tasks(model, tokenizer, choice, limit=limit)
        accuracy = report.scores[0]
        assert (accuracy.task, accuracy.metric, accuracy.version) == ("tiny_choice", "acc", "2.0")
        assert accuracy.num_rows == num_rows
        assert 0 < accuracy.value < 1
        # lm-eval divides the rows' variance by n − 1.
        expected = math.sqrt(accuracy.value * (1 - accuracy.value) / (num_rows - 1))
        assert accuracy.stderr == pytest.approx(expected, rel=1e-9)
        assert report.raw["n-samples"]["tiny_choice"] == {"original": NUM_ROWS, "effective": num_rows}
        assert report.num_requests == 5 * num_rows
    without = run_tasks(model, tokenizer, choice, with_errors=False)
    assert [score.stderr for score in without.scores] == [None, None]


def test_scores_for_a_log(model, tokenizer, loaded, paths):
    values = evaluate_tasks(model, tokenizer, loaded, limit=6, batch_size=4)
    assert values.keys() == SCORES
    assert evaluate_tasks(model, tokenizer, [paths["choice"]], 6) == {
        name: value for name, value in values.items() if name.startswith("tiny_choice")
    }


def test_what_precedes_a_text(monkeypatch, model, tokenizer, paths):
    """Nothing precedes a context; an empty one is the token that ends every document, and nothing follows a text."""
    rows = recorded_inputs(model, tokenizer, load_tasks([paths["word"]]), monkeypatch)
    contexts = {tuple(tokenizer.encode(f"{number}. The capital of")) for number in range(NUM_ROWS)}
    with_context = [row for row in rows if row[0] != tokenizer.eos_token_id]
    assert len(with_context) == 10
    assert all(any(tuple(row[: len(context)]) == context for context in contexts) for row in with_context)
    # The last token is only predicted: the input is one shorter.
    assert {tuple(row) for row in rows if row[0] == tokenizer.eos_token_id} == {
        (tokenizer.eos_token_id, *tokenizer.encode(f" {capital}")[:-1])
        for capital in ("Oslo", "Stockholm", "Lima", "Muscat", "N'Djamena")
    }
    assert all(tokenizer.eos_token_id not in row[1:] for row in rows)


def test_a_tokenizer_that_begins_texts_with_a_token_does_so_once(monkeypatch, model, paths):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|padding|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|padding|> $A", special_tokens=[("<|padding|>", tokenizer.bos_token_id)]
    )
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
    rows = recorded_inputs(model, tokenizer, load_tasks([paths["word"]]), monkeypatch)
    assert len(rows) >= 10
    assert all(row[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in row[1:] for row in rows)


def test_texts_longer_than_the_positions_are_counted_or_refused(tokenizer, choice):
    short = tiny_ultramem(max_position_embeddings=16)
    report = run_tasks(short, tokenizer, choice, num_fewshot=3, limit=2)
    assert report.num_truncated == report.num_requests == 10
    assert run_tasks(tiny_ultramem(max_position_embeddings=512), tokenizer, choice, num_fewshot=3).num_truncated == 0
    with pytest.raises(DataError, match=r"has \d tokens, more than the 2 positions of the model. Leave that task out"):
        run_tasks(tiny_ultramem(max_position_embeddings=2), tokenizer, choice)


def test_precision_and_batch_size(model, tokenizer, paths):
    text = load_tasks([paths["text"]])
    exact = evaluate_tasks(model, tokenizer, text)["tiny_text/bits_per_byte"]
    assert evaluate_tasks(model, tokenizer, text, batch_size=3)["tiny_text/bits_per_byte"] == pytest.approx(
        exact, rel=1e-5
    )
    rounded = evaluate_tasks(model, tokenizer, text, dtype=torch.bfloat16)["tiny_text/bits_per_byte"]
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)


def test_everything_around_is_as_it_was(model, tokenizer, choice):
    """Modes, random states, log levels and progress bars: a training that is evaluated goes on as without."""
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    parameters = dict(model.named_parameters())
    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.INFO)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), tqdm.__init__)
    run_tasks(model, tokenizer, choice, num_fewshot=1)
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), tqdm.__init__)
    assert after == before
    assert [module.training for module in model.modules()] == modes
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert logger.level == logging.INFO
    model.eval()


def test_progress_ends_with_all_answered_and_nothing_is_printed(model, tokenizer, loaded, capfd):
    calls = []
    run_tasks(model, tokenizer, loaded, limit=3, progress=lambda *numbers: calls.append(numbers))
    assert calls[-1] == (15 + 3 + 3 + 3,) * 2
    assert [done for done, _ in calls] == list(range(1, 25))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"limit": 0}, "limit 0 must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot -1 must be at least 0"),
        ({"batch_size": 0}, "batch_size 0 must be at least 1"),
        ({"num_fewshot": 20}, "the task tiny_choice has 19 examples, 20 cannot be given"),
    ],
)
def test_options_that_cannot_be(model, tokenizer, choice, options, said):
    with pytest.raises(ConfigError, match=said):
        run_tasks(model, tokenizer, choice, **options)


@pytest.mark.usefixtures("only_local")
@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["offline_pica"], r"unknown task 'offline_pica': did you mean offline_piqa"),
        ([], "no tasks are given"),
        (["absent/task.yaml"], "there is no task definition 'absent/task.yaml'"),
    ],
)
def test_unknown_tasks_are_refused_with_those_that_there_are(names, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_tasks(names)
    assert "Tasks that need no network after their first use: offline_arc_challenge, offline_arc_easy" in str(
        error.value
    )
    assert "`lm-eval ls tasks`" in str(error.value)


def test_without_a_network_the_offline_tasks_are_named(tmp_path, monkeypatch, paths):
    def refuse(**_):
        raise ConnectionError("Couldn't reach 'someone/data' on the Hub\nand more")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(DataError, match=r"cannot be loaded \(Couldn't reach 'someone/data' on the Hub\)") as error:
        load_tasks([paths["choice"]])
    assert "is this machine offline? Tasks that need no network" in str(error.value)
    assert "offline_hellaswag" in str(error.value)


def test_code_of_the_models_is_not_run(tmp_path, paths):
    task = tmp_path / "unsafe.yaml"
    task.write_text(f"include: {paths['choice']}\ntask: unsafe\nunsafe_code: true\n")
    with pytest.raises(ConfigError, match="the task unsafe runs code that the model writes"):
        load_tasks([str(task)])


def test_what_to_install_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    harness._task_manager.cache_clear()
    with pytest.raises(ConfigError, match=r"tasks need the package lm-eval .* pip install 'ultramem\[eval\]'"):
        load_tasks(["x"])


def test_a_fixed_number_of_examples_stays(model, tokenizer, paths):
    (score,) = run_tasks(model, tokenizer, load_tasks([paths["word"]]), num_fewshot=2, limit=2).scores
    assert score.num_fewshot == 0


def test_tasks_can_be_asked_again(model, tokenizer, choice):
    first, second, third = (run_tasks(model, tokenizer, choice, num_fewshot=shots) for shots in (2, None, 2))
    assert [score.num_fewshot for score in second.scores] == [0, 0]
    assert first.scores == third.scores
    assert first.num_requests == 5 * NUM_ROWS


@pytest.mark.slow
def test_lm_evals_own_names_are_known():
    with pytest.raises(ConfigError, match="unknown task 'hellaswagg': did you mean hellaswag "):
        load_tasks(["hellaswagg"])

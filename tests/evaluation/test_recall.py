import math

import pytest
import torch
from transformers import LlamaForCausalLM

from tiny_models import TEXT, tiny_llama, tiny_tokenizer
from ultramem.data.facts import Fact
from ultramem.errors import DataError
from ultramem.evaluation import recall
from ultramem.evaluation.recall import _AnswerScorer, evaluate_recall

CAPITALS = {
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Peru": "Lima",
    "Latvia": "Riga",
    "Cuba": "Havana",
    "Oman": "Muscat",
}
FACTS = [Fact("capital", country, capital) for country, capital in CAPITALS.items()]
FACTS += [Fact("symbol", "Norway", "lion"), Fact("symbol", "Peru", "vicuña"), Fact("symbol", "Oman", "dagger")]
PHRASINGS = {
    "capital": ("The seat of {subject} is", "In {subject}, ministers meet at the town of"),
    "symbol": ("The emblem of {subject} is the",),
}


@pytest.fixture(scope="module")
def tokenizer():
    # Few merges: answers are several tokens long and share beginnings.
    return tiny_tokenizer(vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(len(tokenizer))


def direct_log_likelihood(model, tokenizer, prompt, answer):
    prompt_ids, answer_ids = tokenizer(prompt)["input_ids"], tokenizer(" " + answer)["input_ids"]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([prompt_ids + answer_ids])).logits[0].log_softmax(-1)
    return sum(log_p[len(prompt_ids) + step - 1, token].item() for step, token in enumerate(answer_ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("max_tokens", "max_tree_tokens"), [(1, 512), (60, 4), (4096, 512)])
def test_scores_of_trees_equal_the_full_forward(
    make_model, tokenizer, monkeypatch, attention, max_tokens, max_tree_tokens
):
    monkeypatch.setattr(recall, "_MAX_TREE_TOKENS", max_tree_tokens)
    model = make_model(len(tokenizer))
    model.set_attn_implementation(attention)
    answers = ["Oslo", "Os", "Oslofjord", "Oslo of the north", "Lima", "o", "Stockholm", "vicuña", "日本"]
    prompts = ["The seat of Norway is", "The seat of Peru is", "The", "The seat of Swedn is"]
    scores = _AnswerScorer(model, tokenizer, answers, max_tokens).log_likelihoods(prompts)
    expected = [[direct_log_likelihood(model, tokenizer, prompt, answer) for answer in answers] for prompt in prompts]
    torch.testing.assert_close(scores, torch.tensor(expected, dtype=torch.float64), atol=1e-3, rtol=1e-5)


def test_answers_of_one_token_need_no_tree(model, tokenizer):
    answer = TEXT[0].split()[0]
    assert len(tokenizer(" of")["input_ids"]) == 1
    scores = _AnswerScorer(model, tokenizer, ["of"], 8).log_likelihoods([answer])
    assert scores.item() == pytest.approx(direct_log_likelihood(model, tokenizer, answer, "of"), abs=1e-4)


def test_ranks_follow_the_definition(model, tokenizer):
    report = evaluate_recall(model, tokenizer, FACTS, PHRASINGS)
    reciprocals, firsts = [], []
    for fact in FACTS:
        answers = list(dict.fromkeys(other.answer for other in FACTS if other.relation == fact.relation))
        ranks = []
        subjects = [other.subject for other in FACTS if other.relation == fact.relation]
        for phrasing in PHRASINGS[fact.relation]:
            scores = {}
            for answer in answers:
                log_p = {
                    subject: direct_log_likelihood(model, tokenizer, phrasing.format(subject=subject), answer)
                    for subject in subjects
                }
                mean_p = sum(math.exp(value) for value in log_p.values()) / len(log_p)
                scores[answer] = log_p[fact.subject] - math.log(mean_p)
            ranks.append(1 + sum(scores[answer] > scores[fact.answer] for answer in answers))
        reciprocals.append(sum(1 / rank for rank in ranks) / len(ranks))
        firsts.append(sum(rank == 1 for rank in ranks) / len(ranks))
    assert report.total.num_facts == len(FACTS)
    assert report.total.mean_reciprocal_rank == pytest.approx(sum(reciprocals) / len(FACTS), abs=1e-9)
    assert report.total.accuracy_at_1 == pytest.approx(sum(firsts) / len(FACTS), abs=1e-9)
    error = torch.tensor(reciprocals).std().item() / len(FACTS) ** 0.5
    assert report.total.mean_reciprocal_rank_error == pytest.approx(error, rel=1e-5)
    assert list(report.relations) == ["capital", "symbol"]
    capital = report.relations["capital"]
    assert (capital.num_facts, capital.num_candidates) == (6, 6)
    assert capital.chance_at_1 == pytest.approx(1 / 6)
    assert capital.chance_at_10 == 1.0 == capital.accuracy_at_10
    assert capital.chance_reciprocal_rank == pytest.approx(sum(1 / rank for rank in range(1, 7)) / 6)
    assert report.to_dict()["relations"]["capital"]["num_facts"] == 6


def test_a_model_that_knows_the_facts_is_right_and_one_that_ignores_the_subject_is_not(tokenizer):
    model = tiny_llama(len(tokenizer), initializer_range=0.05)
    texts = [
        phrasing.format(subject=fact.subject) + " " + fact.answer
        for fact in FACTS
        for phrasing in PHRASINGS[fact.relation]
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
    report = evaluate_recall(model, tokenizer, FACTS, PHRASINGS)
    assert model.training
    assert report.total.accuracy_at_1 == report.total.mean_reciprocal_rank == 1.0

    class Forgetful(LlamaForCausalLM):
        """Gives every token the same logits: no score differs, and ties count against the model."""

        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = torch.zeros_like(output.logits)
            return output

    forgetful = Forgetful(model.config)
    assert evaluate_recall(forgetful, tokenizer, FACTS, PHRASINGS).total.accuracy_at_1 == 0.0


def test_scores_that_are_not_numbers_count_against_the_model(tokenizer):
    model = tiny_llama(len(tokenizer))
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    total = evaluate_recall(model, tokenizer, FACTS, PHRASINGS).total
    assert total.accuracy_at_1 == 0.0
    assert total.mean_reciprocal_rank < total.chance_reciprocal_rank


def test_other_right_answers_do_not_compete(model, tokenizer):
    facts = [Fact("language", "Peru", answer) for answer in ("Spanish", "Quechua", "Aymara", "Aymara")]
    report = evaluate_recall(model, tokenizer, facts, {"language": ("In {subject} they speak",)})
    assert report.total.accuracy_at_1 == 1.0
    assert (report.total.num_facts, report.total.num_candidates) == (3, 1)


def test_a_sample_is_seeded_and_keeps_all_candidates(model, tokenizer):
    def sample(seed):
        return evaluate_recall(model, tokenizer, FACTS[:6], PHRASINGS, max_facts=3, seed=seed)

    assert sample(1) == sample(1)
    one = evaluate_recall(model, tokenizer, FACTS, PHRASINGS, max_facts=1).total
    assert (one.num_facts, one.accuracy_at_1_error) == (1, None)
    assert len({sample(seed).total.mean_reciprocal_rank for seed in range(8)}) > 1
    assert sample(1).total.num_facts == 3
    assert sample(1).total.num_candidates == 6
    seen = []
    evaluate_recall(model, tokenizer, FACTS, PHRASINGS, max_facts=5, progress=seen.append)
    assert sum(seen) == 5


def test_facts_without_a_phrasing_are_refused(model, tokenizer):
    with pytest.raises(DataError, match="relations without a phrasing: symbol"):
        evaluate_recall(model, tokenizer, FACTS, {"capital": PHRASINGS["capital"]})
    with pytest.raises(DataError, match="Give at least one fact"):
        evaluate_recall(model, tokenizer, [], PHRASINGS)
    with pytest.raises(DataError, match="cannot ask 0 facts"):
        evaluate_recall(model, tokenizer, FACTS, PHRASINGS, max_facts=0)


def test_the_tokenizer_of_these_tests_splits_answers(tokenizer):
    assert TEXT
    assert all(len(tokenizer(" " + capital)["input_ids"]) > 1 for capital in CAPITALS.values())

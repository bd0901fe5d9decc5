"""Factual recall: does a language model rank the right answer of a fact above the relation's other answers?

A fact is asked in phrasings that the training text does not contain; the candidates are the distinct answers of its
relation. A candidate's score is its pointwise mutual information with the subject s,

    score(a) = log p(a | prompt about s) - log (mean over subjects s' of p(a | the same prompt about s')),

where log p is summed over the answer's tokens. The first term alone favours answers that are short or common whoever
is asked about (a fifth of the countries lie in "Africa"): most of its accuracy is that of a good guess, and dividing by
the length trades that bias for another. The difference cancels it: a model that ignores the subject gives every answer
0, so that random ranks are the level to beat, while a model that is sure of the facts gives a right answer log(subjects
/ subjects that share it) and a wrong one far less than 0. (The idea is domain-conditional PMI, Holtzman et al. 2021,
"Surface Form Competition", arXiv 2104.08315. There, one subject-free prompt gives the second term; but after that
prompt, too, a model may be sure of one answer, which then ranks last where it is right.)
"""

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultramem.data.facts import Fact, candidates
from ultramem.errors import DataError

_MIN_PRIOR_FACTS = 32
_TIE_NATS = 1e-4  # scores come from fp32 logits, whose rounding depends on how prompts were batched


@dataclass(frozen=True)
class Recall:
    """Recall over a set of facts, each averaged over its phrasings first.

    Attributes:
        num_facts: facts asked.
        num_candidates: mean number of answers that a right one is ranked among, itself included.
        accuracy_at_1, accuracy_at_10: share of facts whose right answer ranks first, or within the first ten.
        mean_reciprocal_rank: mean of 1 / rank.
        accuracy_at_1_error, accuracy_at_10_error, mean_reciprocal_rank_error: standard errors over facts.
        chance_at_1, chance_at_10, chance_reciprocal_rank: expectation under random ranks.
    """

    num_facts: int
    num_candidates: float
    accuracy_at_1: float
    accuracy_at_10: float
    mean_reciprocal_rank: float
    accuracy_at_1_error: float
    accuracy_at_10_error: float
    mean_reciprocal_rank_error: float
    chance_at_1: float
    chance_at_10: float
    chance_reciprocal_rank: float


@dataclass(frozen=True)
class RecallReport:
    """Recall in total (every fact weighs the same) and per relation."""

    total: Recall
    relations: dict[str, Recall]

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionaries, ready for JSON."""
        return {"total": asdict(self.total), "relations": {name: asdict(r) for name, r in self.relations.items()}}


@dataclass(frozen=True)
class _Ranks:
    """Ranks of one fact's right answer, one per phrasing, among `num_candidates`."""

    ranks: tuple[int, ...]
    num_candidates: int


def evaluate_recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: Sequence[Fact],
    phrasings: Mapping[str, Sequence[str]],
    *,
    max_facts: int | None = None,
    seed: int = 0,
    max_rows: int = 1024,
    progress: Callable[[int], None] | None = None,
) -> RecallReport:
    """Rank the right answers of facts.

    Other right answers of the same subject and relation do not compete. Ties (within 1e-4 nats) count against the
    model, and so does a score that is not a number: an answer ranks behind every candidate that is not clearly below.

    Args:
        model: any causal language model of `transformers` with a key-value cache; its mode is left as it was.
        tokenizer: the model's own.
        facts: all facts; their answers are the candidates, also where only a sample is asked.
        phrasings: relation → prompts with `{subject}`, ending right before the blank and the answer.
        max_facts: ask only a random sample of this size; None for all. The mean over subjects is then taken over those
            asked, and over as many more as make 32.
        seed: of the sample.
        max_rows: sequences per forward pass.
        progress: called with the number of facts that were asked since the last call.

    Returns:
        Recall per relation, in the order of `facts`, and in total.

    Raises:
        DataError: there are no facts, a relation has no phrasing, or `max_facts` is below 1.
    """
    unphrased = sorted({fact.relation for fact in facts if not phrasings.get(fact.relation)})
    if unphrased or not facts:
        raise DataError(
            f"no facts to ask, or relations without a phrasing: {', '.join(unphrased) or 'none'}. Give at least one "
            f"fact, and for each relation at least one prompt."
        )
    if max_facts is not None and max_facts < 1:
        raise DataError(f"cannot ask {max_facts} facts: give at least 1, or leave the maximum out to ask all.")
    facts = list(dict.fromkeys(facts))
    shuffled = random.Random(seed).sample(facts, len(facts))
    asked = set(shuffled[:max_facts])
    answers_of = candidates(facts)
    right_answers: dict[tuple[str, str], set[str]] = defaultdict(set)
    for fact in facts:
        right_answers[fact.relation, fact.subject].add(fact.answer)

    was_training = model.training
    model.eval()
    results: dict[str, list[_Ranks]] = {}
    try:
        for relation in dict.fromkeys(fact.relation for fact in facts if fact in asked):
            of_relation = [fact for fact in shuffled if fact.relation == relation]
            # The facts that are asked lead the shuffled list; what follows them only sharpens the mean over subjects.
            num_asked = sum(fact in asked for fact in of_relation)
            scorer = _AnswerScorer(model, tokenizer, answers_of[relation], max_rows)
            scores_PFA = torch.stack(
                [
                    _score_phrasing(scorer, phrasing, of_relation[: max(num_asked, _MIN_PRIOR_FACTS)])
                    for phrasing in phrasings[relation]
                ]
            )
            results[relation] = [
                _rank(scores_PFA[:, index], answers_of[relation], fact, right_answers[relation, fact.subject])
                for index, fact in enumerate(of_relation[:num_asked])
            ]
            if progress is not None:
                progress(num_asked)
    finally:
        model.train(was_training)
    return RecallReport(
        total=_summarise([ranks for of_relation in results.values() for ranks in of_relation]),
        relations={relation: _summarise(ranks) for relation, ranks in results.items()},
    )


def _score_phrasing(scorer: "_AnswerScorer", phrasing: str, facts: Sequence[Fact]) -> torch.Tensor:
    """[facts, answers]: how much each answer gains from naming this subject rather than any of them, in nats."""
    log_p_FA = scorer.log_likelihoods([phrasing.format(subject=fact.subject) for fact in facts])
    return log_p_FA - (log_p_FA.logsumexp(0) - math.log(len(facts)))


def _rank(scores_PA: torch.Tensor, answers: Sequence[str], fact: Fact, right_answers: set[str]) -> _Ranks:
    """Ranks of the fact's answer, from the scores [phrasings, answers]."""
    position = answers.index(fact.answer)
    competes_A = torch.tensor([answer not in right_answers for answer in answers])
    not_below_PA = ~(scores_PA < scores_PA[:, position : position + 1] - _TIE_NATS)
    ranks_P = 1 + (not_below_PA & competes_A).sum(dim=1)
    return _Ranks(tuple(ranks_P.tolist()), 1 + int(competes_A.sum()))


def _summarise(facts: Sequence[_Ranks]) -> Recall:
    def mean_and_error(value_of_rank: Callable[[int], float]) -> tuple[float, float]:
        values_F = torch.tensor(
            [sum(map(value_of_rank, fact.ranks)) / len(fact.ranks) for fact in facts], dtype=torch.float64
        )
        error = float(values_F.std() / len(facts) ** 0.5) if len(facts) > 1 else float("nan")
        return float(values_F.mean()), error

    def expectation(value_of_rank: Callable[[int], float]) -> float:
        means = [sum(map(value_of_rank, range(1, n + 1))) / n for n in (fact.num_candidates for fact in facts)]
        return sum(means) / len(means)

    def is_first(rank: int) -> float:
        return float(rank == 1)

    def is_in_ten(rank: int) -> float:
        return float(rank <= 10)

    def reciprocal(rank: int) -> float:
        return 1 / rank

    (at_1, at_1_error), (at_10, at_10_error), (mrr, mrr_error) = map(mean_and_error, (is_first, is_in_ten, reciprocal))
    return Recall(
        num_facts=len(facts),
        num_candidates=sum(fact.num_candidates for fact in facts) / len(facts),
        accuracy_at_1=at_1,
        accuracy_at_10=at_10,
        mean_reciprocal_rank=mrr,
        accuracy_at_1_error=at_1_error,
        accuracy_at_10_error=at_10_error,
        mean_reciprocal_rank_error=mrr_error,
        chance_at_1=expectation(is_first),
        chance_at_10=expectation(is_in_ten),
        chance_reciprocal_rank=expectation(reciprocal),
    )


class _AnswerScorer:
    """Log-likelihoods of a fixed set of answers after any prompts.

    A prompt runs once; its key-value cache is then expanded over the answers. What is fed after it is each answer
    without its last token, and only those that are no beginning of another: many answers share them.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], max_rows: int
    ) -> None:
        self.model, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        answer_ids = [tokenizer(" " + answer, add_special_tokens=False)["input_ids"] for answer in answers]
        self.first_A = torch.tensor([ids[0] for ids in answer_ids])
        feeds = _maximal_prefixes({tuple(ids[:-1]) for ids in answer_ids if len(ids) > 1})
        length = max(map(len, feeds), default=0)
        # Padding on the right is never looked back at, and its outputs are never read.
        self.feeds_QT = torch.tensor([[*feed, *[0] * (length - len(feed))] for feed in feeds], dtype=torch.long)
        later = [
            (
                answer,
                next(row for row, feed in enumerate(feeds) if feed[: len(ids) - 1] == tuple(ids[:-1])),
                step - 1,
                ids[step],
            )
            for answer, ids in enumerate(answer_ids)
            for step in range(1, len(ids))
        ]
        # One column per token after an answer's first: its answer, its row and position in the feeds, its id.
        self.later_4J = torch.tensor(later, dtype=torch.long).reshape(-1, 4).T

    def log_likelihoods(self, prompts: Sequence[str]) -> torch.Tensor:
        """Log p(answer | prompt), summed over the answer's tokens: [prompts, answers], fp64, on the CPU."""
        by_length: dict[int, list[int]] = defaultdict(list)
        prompt_ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        for index, ids in enumerate(prompt_ids):
            by_length[len(ids)].append(index)
        batch_size = max(1, self.max_rows // max(1, len(self.feeds_QT)))
        result_PA = torch.empty(len(prompts), len(self.first_A), dtype=torch.float64)
        for indices in by_length.values():
            for start in range(0, len(indices), batch_size):
                batch = indices[start : start + batch_size]
                result_PA[batch] = self._score_batch(torch.tensor([prompt_ids[index] for index in batch]))
        return result_PA

    @torch.inference_mode()
    def _score_batch(self, prompt_ids_BT: torch.Tensor) -> torch.Tensor:
        """[B, answers] for prompts of one length."""
        device, num_prompts = self.model.device, len(prompt_ids_BT)
        output = self.model(input_ids=prompt_ids_BT.to(device), use_cache=True, logits_to_keep=1)
        logits_BW = output.logits[:, -1].float().cpu()
        result_BA = (logits_BW[:, self.first_A] - logits_BW.logsumexp(-1, keepdim=True)).double()
        answer_J, row_J, position_J, id_J = self.later_4J
        for first_row in range(0, len(self.feeds_QT), self.max_rows):
            feeds_QT = self.feeds_QT[first_row : first_row + self.max_rows]
            cache = copy.deepcopy(output.past_key_values)
            cache.batch_repeat_interleave(len(feeds_QT))
            logits_RTW = self.model(
                input_ids=feeds_QT.repeat(num_prompts, 1).to(device), past_key_values=cache, use_cache=True
            ).logits.float()
            logits_BQTW = logits_RTW.view(num_prompts, len(feeds_QT), -1, logits_RTW.shape[-1])
            here_J = (row_J >= first_row) & (row_J < first_row + len(feeds_QT))
            row, position = row_J[here_J] - first_row, position_J[here_J]
            picked_BJ = logits_BQTW[:, row, position, id_J[here_J]] - logits_BQTW.logsumexp(-1)[:, row, position]
            result_BA.index_add_(1, answer_J[here_J], picked_BJ.double().cpu())
        return result_BA


def _maximal_prefixes(sequences: set[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The sequences that are no beginning of another one, sorted."""
    ordered = sorted(sequences)
    # In sorted order, whatever begins with a sequence follows it at once.
    return [one for one, after in zip_longest(ordered, ordered[1:], fillvalue=()) if after[: len(one)] != one]

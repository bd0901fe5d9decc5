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

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultramem.data.facts import Fact, candidates
from ultramem.errors import DataError
from ultramem.evaluation.mode import evaluating

_MIN_PRIOR_FACTS = 16
_MAX_TREE_TOKENS = 512  # attention's cost grows with the square of it, the prompt's share falls with it
_TIE_NATS = 1e-4  # scores come from fp32 logits, whose rounding depends on how prompts were batched


@dataclass(frozen=True)
class Recall:
    """Recall over a set of facts, each averaged over its phrasings first.

    Attributes:
        num_facts: facts asked.
        num_candidates: mean number of answers that a right one is ranked among, itself included.
        accuracy_at_1, accuracy_at_10: share of facts whose right answer ranks first, or within the first ten.
        mean_reciprocal_rank: mean of 1 / rank.
        accuracy_at_1_error, accuracy_at_10_error, mean_reciprocal_rank_error: standard errors over facts; None of a
            single fact.
        chance_at_1, chance_at_10, chance_reciprocal_rank: expectation under random ranks.
    """

    num_facts: int
    num_candidates: float
    accuracy_at_1: float
    accuracy_at_10: float
    mean_reciprocal_rank: float
    accuracy_at_1_error: float | None
    accuracy_at_10_error: float | None
    mean_reciprocal_rank_error: float | None
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
    max_tokens: int = 4096,
    progress: Callable[[int], None] | None = None,
) -> RecallReport:
    """Rank the right answers of facts.

    Other right answers of the same subject and relation do not compete. Ties (within 1e-4 nats) count against the
    model, and so does a score that is not a number: an answer ranks behind every candidate that is not clearly below.

    Args:
        model: any causal language model of `transformers` that takes a four-dimensional attention mask; its mode is
            left as it was.
        tokenizer: the model's own.
        facts: all facts; their answers are the candidates, also where only a sample is asked.
        phrasings: relation → prompts with `{subject}`, ending right before the blank and the answer.
        max_facts: ask only a random sample of this size; None for all. The mean over subjects is then taken over those
            asked, and over as many more as make 16.
        seed: of the sample.
        max_tokens: tokens per forward pass, which bounds its memory.
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

    results: dict[str, list[_Ranks]] = {}
    with evaluating(model):
        for relation in dict.fromkeys(fact.relation for fact in facts if fact in asked):
            of_relation = [fact for fact in shuffled if fact.relation == relation]
            # The facts that are asked lead the shuffled list; what follows them only sharpens the mean over subjects.
            num_asked = sum(fact in asked for fact in of_relation)
            scorer = _AnswerScorer(model, tokenizer, answers_of[relation], max_tokens)
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
    def mean_and_error(value_of_rank: Callable[[int], float]) -> tuple[float, float | None]:
        values_F = torch.tensor(
            [sum(map(value_of_rank, fact.ranks)) / len(fact.ranks) for fact in facts], dtype=torch.float64
        )
        error = float(values_F.std() / len(facts) ** 0.5) if len(facts) > 1 else None
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

    The answers are laid out as trees of their tokens: a prompt and one whole tree make one sequence, in which a token
    sees the prompt and its own beginning only. Each prompt and each shared beginning is so computed once, without
    padding.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], max_tokens: int
    ) -> None:
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.num_answers = len(answers)
        ids = {
            answer: tuple(tokenizer(" " + text, add_special_tokens=False)["input_ids"])
            for answer, text in enumerate(answers)
        }
        # Sorted by their tokens, answers that share a beginning fall into the same tree.
        ordered = sorted(ids, key=ids.__getitem__)
        self.trees: list[_AnswerTree] = []
        start, num_nodes = 0, 0
        for index, answer in enumerate(ordered):
            if num_nodes and num_nodes + len(ids[answer]) > _MAX_TREE_TOKENS:
                self.trees.append(_AnswerTree({one: ids[one] for one in ordered[start:index]}))
                start, num_nodes = index, 0
            num_nodes += len(ids[answer]) - 1
        self.trees.append(_AnswerTree({one: ids[one] for one in ordered[start:]}))

    def log_likelihoods(self, prompts: Sequence[str]) -> torch.Tensor:
        """Log p(answer | prompt), summed over the answer's tokens: [prompts, answers], fp64, on the CPU."""
        by_length: dict[int, list[int]] = defaultdict(list)
        prompt_ids = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]
        for index, ids in enumerate(prompt_ids):
            by_length[len(ids)].append(index)
        result_PA = torch.zeros(len(prompts), self.num_answers, dtype=torch.float64)
        for length_tokens, indices in by_length.items():
            for tree in self.trees:
                batch_size = max(1, self.max_tokens // (length_tokens + len(tree.ids_Q)))
                for start in range(0, len(indices), batch_size):
                    batch = indices[start : start + batch_size]
                    log_p_BJ = self._token_log_likelihoods(torch.tensor([prompt_ids[one] for one in batch]), tree)
                    result_PA[batch] = result_PA[batch].index_add(1, tree.answer_J, log_p_BJ)
        return result_PA

    @torch.inference_mode()
    def _token_log_likelihoods(self, prompt_ids_BT: torch.Tensor, tree: "_AnswerTree") -> torch.Tensor:
        """[B, J]: log p of every token of every answer of the tree, after prompts of one length; fp64."""
        num_prompts, length = prompt_ids_BT.shape
        num_nodes = len(tree.ids_Q)
        sees = torch.ones(length + num_nodes, length + num_nodes, dtype=torch.bool).tril()
        sees[length:, length:] = tree.sees_QQ
        mask = torch.zeros(sees.shape, dtype=self.model.dtype).masked_fill(~sees, torch.finfo(self.model.dtype).min)
        positions = torch.cat([torch.arange(length), length - 1 + tree.depth_Q])
        device = self.model.device
        logits_BQW = self.model(
            input_ids=torch.cat([prompt_ids_BT, tree.ids_Q.expand(num_prompts, -1)], dim=1).to(device),
            attention_mask=mask.expand(num_prompts, 1, -1, -1).to(device),
            position_ids=positions.expand(num_prompts, -1).to(device),
            use_cache=False,
            logits_to_keep=num_nodes + 1,
        ).logits.float()
        row_J, id_J = tree.row_J.to(device), tree.id_J.to(device)
        return (logits_BQW[:, row_J, id_J] - logits_BQW.logsumexp(-1)[:, row_J]).double().cpu()


class _AnswerTree:
    """The tokens of some answers, shared beginnings merged; an answer's last token is read off and never fed.

    Attributes:
        ids_Q, depth_Q: token and depth (from 1) of each node.
        sees_QQ: whether a node (first axis) sees another: itself and what leads to it.
        answer_J, row_J, id_J: for every token of every answer, the answer, the output that predicts it (0 stands for
            the prompt's end, 1 + node for a node), and the token.
    """

    def __init__(self, ids_of_answer: Mapping[int, tuple[int, ...]]) -> None:
        nodes = sorted({ids[:end] for ids in ids_of_answer.values() for end in range(1, len(ids))})
        row_of = {(): 0, **{node: 1 + index for index, node in enumerate(nodes)}}
        self.ids_Q = torch.tensor([node[-1] for node in nodes], dtype=torch.long)
        self.depth_Q = torch.tensor([len(node) for node in nodes], dtype=torch.long)
        self.sees_QQ = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for index, node in enumerate(nodes):
            self.sees_QQ[index, [row_of[node[:end]] - 1 for end in range(1, len(node) + 1)]] = True
        tokens = [
            (answer, row_of[ids[:step]], ids[step]) for answer, ids in ids_of_answer.items() for step in range(len(ids))
        ]
        self.answer_J, self.row_J, self.id_J = torch.tensor(tokens, dtype=torch.long).T

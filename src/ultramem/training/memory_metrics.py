"""What the memories do during training: which slots are used, how evenly, with what scores."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def value_coverage(counts_S: Tensor) -> float:
    """Share of the slots that were selected at least once.

    Args:
        counts_S: how often each virtual slot of a memory's window was selected, int64 [S].
    """
    return (counts_S > 0).double().mean().item()


def usage_divergence(counts_S: Tensor) -> float:
    """KL(usage ‖ uniform) in nats: 0 if every slot is used equally often, log S if one slot takes everything.

    Args:
        counts_S: how often each virtual slot was selected, int64 [S], not all zero.
    """
    usage_S = counts_S.double() / counts_S.sum()
    return (torch.xlogy(usage_S, usage_S * counts_S.numel())).sum().item()


class MemoryMeter:
    """Accumulates one memory layer's statistics over micro-batches, and reduces them over processes when read.

    The sums live where the statistics are: nothing waits for the device before the metrics are read.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.reset()

    def reset(self) -> None:
        """Forgets everything: the start of a new logging period."""
        self.counts_S = torch.zeros(self.num_slots, dtype=torch.int64)
        # num_tokens, Σ top-1 score, Σ mean selected score, Σ output variance · tokens, Σ recall, tokens with a recall
        self.sums = torch.zeros(6, dtype=torch.float64)
        self.singular_values: Tensor | None = None

    def update(self, statistics: dict[str, Any]) -> None:
        """Adds one forward pass.

        Args:
            statistics: ``slots_NK`` int64 selected virtual slots, ``scores_NK`` their scores (mean over cores),
                ``output_std`` scalar; with Tucker scores ``singular_values`` [heads, rank]; where the recall of the
                search was measured, ``recall_M`` of the sampled tokens.
        """
        slots_NK, scores_NK = statistics["slots_NK"].detach(), statistics["scores_NK"].detach().double()
        self.counts_S, self.sums = self.counts_S.to(slots_NK.device), self.sums.to(slots_NK.device)
        flat = slots_NK.reshape(-1)
        self.counts_S.index_add_(0, flat, torch.ones_like(flat))
        num_tokens = slots_NK.shape[0]
        variance = statistics["output_std"].detach().double().square()
        recall_M = statistics.get("recall_M", scores_NK.new_empty(0)).double()
        self.sums += torch.stack(
            [
                scores_NK.new_full((), num_tokens),
                scores_NK.amax(dim=-1).sum(),
                scores_NK.mean(dim=-1).sum(),
                variance * num_tokens,
                recall_M.sum(),
                scores_NK.new_full((), recall_M.numel()),
            ]
        )
        # Of Tucker cores; additive scores have none.
        if "singular_values" in statistics:
            self.singular_values = statistics["singular_values"].detach()

    def read(self) -> dict[str, float]:
        """The period's metrics over all processes: usage, scores, output std, recall, singular values."""
        counts_S, sums = self.counts_S.clone(), self.sums.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(counts_S)
            dist.all_reduce(sums)
        num_tokens, top1, mean, variance, recall, num_recall_tokens = sums.tolist()
        if not num_tokens:
            return {}
        metrics = {
            "value_coverage": value_coverage(counts_S),
            "usage_divergence": usage_divergence(counts_S),
            "top1_score": top1 / num_tokens,
            "mean_score": mean / num_tokens,
            "output_std": (variance / num_tokens) ** 0.5,
        }
        if num_recall_tokens:
            metrics["search_recall"] = recall / num_recall_tokens
        if self.singular_values is not None:
            for head, values in enumerate(self.singular_values.tolist()):
                for i, value in enumerate(values):
                    metrics[f"singular_value_head{head}_{i}"] = value
        return metrics


def build_meters(num_slots_per_memory: Sequence[int]) -> list[MemoryMeter]:
    """One meter per memory, in the order of the model's ``memory_statistics``."""
    return [MemoryMeter(num_slots) for num_slots in num_slots_per_memory]

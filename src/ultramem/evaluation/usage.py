"""How often each slot of each memory is read on a text."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ultramem.evaluation.mode import evaluating
from ultramem.evaluation.perplexity import iterate_windows
from ultramem.model import UltraMemForCausalLM


@torch.inference_mode()
def count_slot_reads(
    model: UltraMemForCausalLM,
    token_files: Sequence[str | Path],
    *,
    token_dtype: str = "uint16",
    sequence_length_tokens: int,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> list[torch.Tensor]:
    """Run a text through a model and count what its memories read.

    Args:
        model: a model with memories; its mode is left as it was.
        token_files, token_dtype, sequence_length_tokens, batch_size, max_tokens: as for `evaluate_perplexity`.

    Returns:
        One tensor per memory: reads of each virtual slot of its window, int64 [slots]; all zero without text.
    """
    counts = [torch.zeros(num_slots, dtype=torch.int64) for num_slots in model.num_slots_per_memory]
    with evaluating(model):
        for input_ids_BT, _ in iterate_windows(
            token_files, token_dtype, sequence_length_tokens, batch_size, max_tokens
        ):
            # Nobody reads the logits: those of one position are the fewest that can be asked for.
            output = model(
                input_ids=input_ids_BT.to(model.device),
                use_cache=False,
                logits_to_keep=1,
                output_memory_statistics=True,
            )
            for counts_S, statistics in zip(counts, output.memory_statistics, strict=True):
                counts_S += statistics["slots_NK"].flatten().cpu().bincount(minlength=len(counts_S))
    return counts

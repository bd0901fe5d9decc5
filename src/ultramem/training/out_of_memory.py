"""Out of memory: which errors mean it, and which settings make a run smaller."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from olmo_core.distributed.utils import get_world_size

from ultramem.errors import TrainingError
from ultramem.training.config import RunConfig

# Of PyTorch's allocator on the CPU, which raises a plain RuntimeError.
_CPU_ALLOCATOR = "DefaultCPUAllocator: "


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out: on an accelerator, in PyTorch's allocator on the CPU, or in Python's."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error):
            return True
        error = error.__cause__
    return False


@contextmanager
def explained_memory_errors(config: RunConfig) -> Iterator[None]:
    """Turns an error for want of memory into a TrainingError that names the settings to change."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TrainingError(f"out of memory ({reason[:200]}). {_advice(config)}") from error


def _advice(config: RunConfig) -> str:
    # The dry run imports the module that trains, which imports this one.
    from ultramem.training.dry_run import estimate_memory, format_bytes

    estimate = estimate_memory(config)
    parts = {
        "weights": estimate.weights_bytes,
        "gradients": estimate.gradients_bytes,
        "optimizer moments": estimate.moments_bytes,
        "activations": estimate.activations_bytes,
    }
    listed = ", ".join(f"{name} {format_bytes(num_bytes)}" for name, num_bytes in parts.items())
    return (
        f"`--dry-run` estimates {format_bytes(estimate.total_bytes)} for one process ({listed}). To need less: "
        f"{'; '.join(_remedies(config))}"
    )


def _remedies(config: RunConfig) -> list[str]:
    """Settings that save memory and are not made yet, each with its present value, cheapest first."""
    training, optimizer = config.training, config.optimizer
    has_tables, num_processes = config.model.get("memory", {}) is not None, get_world_size()
    remedies = []
    if config.micro_batch_sequences > 1:
        given = training.micro_batch_sequences
        now = f"null, the whole batch of {training.global_batch_sequences}" if given is None else f"{given}"
        remedies.append(f"lower 'training.micro_batch_sequences' (now {now})")
    if not training.gradient_checkpointing:
        remedies.append("set 'training.gradient_checkpointing: true' (now false)")
    if has_tables and training.table_gradients == "dense" and num_processes == 1:
        remedies.append("set 'training.table_gradients: rows' (now dense)")
    if has_tables and optimizer.table_moments != "8bit" and num_processes == 1:
        needs = "" if training.table_gradients == "rows" else ", with 'training.table_gradients: rows'"
        remedies.append(
            f"set 'optimizer.table_moments' to bf16 or 8bit{needs} (now {optimizer.table_moments}; a run keeps "
            "what it began with)"
        )
    if training.parallel != "fsdp":
        now = f"now {training.parallel or 'ddp'}" if num_processes > 1 else "now one process"
        remedies.append(f"train in several processes with 'training.parallel: fsdp' ({now})")
    length = config.data.sequence_length_tokens
    return [*remedies, f"shorten 'data.sequence_length_tokens' (now {length}) or make the model smaller"]

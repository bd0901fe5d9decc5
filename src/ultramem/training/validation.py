"""What a run measures on the way: losses on validation sets and scores on tasks, in the arithmetic of the training."""

from collections.abc import Callable
from functools import partial

import torch
from olmo_core.train.callbacks import Callback

from ultramem.data.manifest import DataManifest, load_manifest
from ultramem.data.tokenizer import load_tokenizer_with_ids
from ultramem.evaluation.compatibility import check_same_vocabulary, split_of
from ultramem.evaluation.perplexity import PerplexityResult, evaluate_perplexity
from ultramem.model import UltraMemForCausalLM
from ultramem.training.callbacks import TaskScores, Validation
from ultramem.training.config import RunConfig

_SPLIT = "validation"


def build_validation(model: UltraMemForCausalLM, config: RunConfig, manifest: DataManifest) -> dict[str, Callback]:
    """The callbacks that measure, by name; what they need is read now, so that what is missing stops the run at once.

    Args:
        model: the model in training.
        config: the run's.
        manifest: the data folder's.

    Raises:
        ConfigError: an unknown task, or tasks without lm-eval.
        DataError: a validation set is missing, damaged or made with another tokenizer; tasks' data cannot be fetched.
    """
    section = config.validation
    callbacks: dict[str, Callback] = {}
    if section.interval_steps is not None:
        # Raw token files may come without a validation split.
        if _SPLIT in manifest.splits:
            measure = partial(measure_validation, model, config, manifest)
            callbacks["validation"] = Validation(section.interval_steps, measure)
        for name, folder in section.sets.items():
            measure = partial(measure_validation, model, config, _load_set(folder, model, manifest))
            callbacks[f"validation_{name}"] = Validation(section.interval_steps, measure, name)
    if section.tasks and section.tasks_interval_steps is not None:
        callbacks["task_scores"] = TaskScores(section.tasks_interval_steps, _task_measurement(model, config, manifest))
    return callbacks


def measure_validation(model: UltraMemForCausalLM, config: RunConfig, manifest: DataManifest) -> PerplexityResult:
    """Loss on a data folder's validation split, on at most ``validation.tokens`` of it; several processes share it."""
    split = split_of(manifest, _SPLIT)
    return evaluate_perplexity(
        model,
        split.files,
        token_dtype=manifest.dtype,
        sequence_length_tokens=config.data.sequence_length_tokens,
        batch_size=config.micro_batch_sequences,
        bytes_per_token=split.bytes_per_token,
        dtype=_arithmetic(config),
        max_tokens=config.validation.tokens,
        document_end=manifest.eos_token_id if config.data.mask_documents else None,
        share_batches=True,
    )


def _load_set(folder: str, model: UltraMemForCausalLM, manifest: DataManifest) -> DataManifest:
    further = load_manifest(folder)
    split_of(further, _SPLIT)
    check_same_vocabulary(manifest.tokenizer_path, model.config.vocab_size, further)
    return further


def _task_measurement(
    model: UltraMemForCausalLM, config: RunConfig, manifest: DataManifest
) -> Callable[[], dict[str, float]]:
    # lm-eval and what it imports take seconds, which a run without tasks need not wait.
    from ultramem.evaluation.harness import evaluate_tasks, load_tasks

    return partial(
        evaluate_tasks,
        model,
        load_tokenizer_with_ids(manifest.tokenizer_path, manifest.eos_token_id, manifest.pad_token_id),
        load_tasks(config.validation.tasks),
        config.validation.task_limit,
        batch_size=config.micro_batch_sequences,
        dtype=_arithmetic(config),
    )


def _arithmetic(config: RunConfig) -> torch.dtype:
    return torch.float32 if config.training.precision == "fp32" else torch.bfloat16

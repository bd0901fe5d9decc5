"""A training run from its config to its last model folder, resumed from where an earlier process stopped."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassError
from olmo_core.distributed.utils import get_rank
from olmo_core.train import Duration, Trainer, TrainerConfig
from olmo_core.utils import get_default_device, seed_all

from ultramem.data.manifest import DataManifest
from ultramem.data.sources import load_sources
from ultramem.errors import CheckpointError, ConfigError, DataError
from ultramem.files import staged_file
from ultramem.model import UltraMemConfig, UltraMemForCausalLM
from ultramem.model.accounting import cost_card
from ultramem.model.roles import parameter_roles
from ultramem.training.batches import build_data_loader
from ultramem.training.callbacks import (
    MemoryStatistics,
    MetricsFile,
    ProgressLine,
    TensorBoard,
    Throughput,
    weights_and_biases,
)
from ultramem.training.checkpoints import (
    RunCheckpointer,
    complete_steps,
    exclusive_run_folder,
    explained_write_errors,
    remove_leftovers,
)
from ultramem.training.config import RunConfig, load_config
from ultramem.training.loading import check_loadable, differing_settings, load_weights, starting_point
from ultramem.training.nonfinite import SkippedSteps
from ultramem.training.out_of_memory import explained_memory_errors
from ultramem.training.processes import (
    PassOnSignals,
    StoppedEarlyError,
    check_processes,
    count_processes,
    on_first_process,
    process_group,
    signals_end_run,
)
from ultramem.training.scale import scale_config
from ultramem.training.states import StateCheckpointerConfig
from ultramem.training.train_module import UltraMemTrainModule
from ultramem.training.validation import build_validation

# Backward costs twice the forward.
TRAINING_FLOPS_FACTOR = 3


def resolve_config(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), scale: str | None = None
) -> tuple[RunConfig, DataManifest]:
    """Loads a config and fills what follows from the data folder: vocabulary, special tokens, fingerprint.

    Args:
        path: the YAML file.
        overrides: see :func:`ultramem.training.config.load_config`.
        scale: shrinks the run, see :func:`ultramem.training.scale.scale_config`.

    Returns:
        the complete config, and the data folder's manifest.

    Raises:
        ConfigError: see :func:`ultramem.training.config.load_config`; also a vocabulary smaller than the tokenizer's,
            or sequences longer than the model's positions.
        DataError: the data folder is missing or damaged.
    """
    config = load_config(path, overrides)
    if scale is not None:
        config = scale_config(config, model_config(config), scale)
    folder = config.data.folder
    if folder is not None and not Path(folder).exists():
        raise DataError(
            f"there is no data folder '{folder}' ('data.folder'): make it with `ultramem data prepare SOURCE… --output "
            f"{folder} --tokenizer …` (the head of '{path}' may name the sources; for the demo: `make demo`); a dry "
            "run goes without it if 'model.vocab_size' is given"
        )
    manifest = load_sources(config.data.specs(), config.data.raw_settings())
    if manifest.mixture and config.data.mixture_tokens is None:
        config.data.mixture_tokens = config.num_steps * config.global_batch_tokens
    given = config.model.get("vocab_size")
    if given is not None and given < manifest.vocab_size:
        raise ConfigError(
            f"'model.vocab_size' is {given}, but the tokenizer of '{folder or manifest.tokenizer_path}' has "
            f"{manifest.vocab_size} tokens: leave it out, or give {manifest.vocab_size} or more"
        )
    if config.data.fingerprint not in (None, manifest.fingerprint):
        raise ConfigError(
            f"'data.fingerprint' is {config.data.fingerprint}, but '{folder or ', '.join(manifest.sources)}' has "
            f"{manifest.fingerprint}: it is not the data that this config was made for; leave the key out to accept"
        )
    config.data.fingerprint = manifest.fingerprint
    for key in ("vocab_size", "eos_token_id", "pad_token_id"):
        config.model.setdefault(key, getattr(manifest, key))
    fit_positions(config)
    return config, manifest


def fit_positions(config: RunConfig) -> None:
    """Gives the model positions for the sequences; a ConfigError if it has too few."""
    length, positions = config.data.sequence_length_tokens, UltraMemConfig().max_position_embeddings
    if config.model.setdefault("max_position_embeddings", max(length, positions)) < length:
        raise ConfigError(
            f"'model.max_position_embeddings' ({config.model['max_position_embeddings']}) is smaller than "
            f"'data.sequence_length_tokens' ({length}): leave it out or give {length} or more, or shorten the sequences"
        )


def model_config(config: RunConfig) -> UltraMemConfig:
    """The model's configuration.

    Raises:
        ConfigError: values that do not fit together.
    """
    try:
        return UltraMemConfig(**config.model)
    except ConfigError:
        raise
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ConfigError(f"the section 'model' does not describe a model: {error}") from error


def train(config: RunConfig, manifest: DataManifest) -> Path | None:
    """Trains to the end of the config, or until SIGINT or SIGTERM, and saves.

    Under torchrun all processes call this; the first one writes, locks and reports.

    Args:
        config: from :func:`resolve_config`.
        manifest: the data folder's.

    Returns:
        the newest model folder of the run; None if a signal ended it before its training began.

    Raises:
        CheckpointError: the run folder belongs to another model, data set or seed, is in use, its disk is full, or its
            newest state is damaged.
        TrainingError: a loss or gradient is NaN or infinite, or memory ran out.
    """
    run_folder = config.save_folder
    # Before they join: one that left at once would look like a lost connection to the others.
    check_processes(config, count_processes())
    try:
        with process_group(), ExitStack() as held, signals_end_run() as signals:
            on_first_process(lambda: held.enter_context(exclusive_run_folder(run_folder)))
            errors = (explained_write_errors(run_folder), explained_memory_errors(config))
            with errors[0], errors[1], _quiet_engine(run_folder / "train.log"):
                on_first_process(partial(_prepare_run_folder, config, manifest))
                trainer = build_trainer(config, manifest)
                trainer.add_callback("signals", PassOnSignals(signals))
                signals.start(trainer)
                trainer.fit()
                _report_end(trainer)
            return run_folder / f"step{trainer.global_step}-hf"
    except StoppedEarlyError as stop:
        print(f"stopped before the training began ({stop}): there is nothing to save", file=sys.stderr)
        return None


def _prepare_run_folder(config: RunConfig, manifest: DataManifest) -> None:
    remove_leftovers(config.save_folder)
    check_resumable(config)
    check_loadable(config, model_config(config), manifest)
    with staged_file(config.save_folder / "config.yaml") as stage:
        stage.write_text(config_yaml(config), encoding="utf-8")


def check_resumable(config: RunConfig) -> None:
    """Raises CheckpointError if the run folder holds training states that this config cannot continue."""
    steps = complete_steps(config.save_folder)
    if not steps:
        return
    try:
        saved = load_config(config.save_folder / "config.yaml")
        old = model_config(saved)
    except ConfigError as error:
        raise CheckpointError(
            f"'{config.save_folder}' holds step {steps[-1]} of a run, but the run's own config.yaml in it, which every "
            f"run writes at its start, cannot be used: restore that file from a copy, or set 'run.save_folder' to a "
            f"new folder ({error})"
        ) from error
    changed = differing_settings(old, model_config(config))
    differences = [text for key, text in changed.items() if key != "model.transformers_version"]
    fixed = {
        "data": ("fingerprint", "sequence_length_tokens", "mixture_tokens", "mask_documents"),
        "run": ("seed",),
        "optimizer": ("table_moments",),
    }
    for section, key in ((section, key) for section, keys in fixed.items() for key in keys):
        before, now = getattr(getattr(saved, section), key), getattr(getattr(config, section), key)
        if before != now:
            differences.append(f"{section}.{key}: {before} → {now}")
    if differences:
        raise CheckpointError(
            f"'{config.save_folder}' holds step {steps[-1]} of a run with other settings ({'; '.join(differences)}): "
            "set 'run.save_folder' to a new folder, or restore these settings to resume (a new folder with "
            f"'run.load_path: {config.save_folder}' starts from this run's weights)"
        )


def build_model(config: RunConfig) -> UltraMemForCausalLM:
    """The model in fp32 on the default device: initial weights, or those of a model folder in ``run.load_path``."""
    start = starting_point(config)
    if start is not None and start.model_folder is not None:
        model = load_weights(start.model_folder, model_config(config))
    else:
        model = UltraMemForCausalLM(model_config(config))
    model = model.to(get_default_device())
    if config.training.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    if config.training.compile:
        model.compile()
    return model


def build_trainer(config: RunConfig, manifest: DataManifest) -> Trainer:
    """OLMo-core's trainer with our train module, loader, callbacks and checkpointer."""
    seed_all(config.run.seed)
    model = build_model(config)
    flops = TRAINING_FLOPS_FACTOR * cost_card(model.config).flops_per_token(config.data.sequence_length_tokens // 2)
    train_module = UltraMemTrainModule(model, parameter_roles(model), config, int(flops))
    start = starting_point(config)
    state = None if start is None else start.state
    # In the unit of the config: a resumed run with another batch size still ends after the same tokens.
    max_tokens = config.training.max_tokens
    duration = Duration.tokens(max_tokens) if max_tokens is not None else Duration.steps(config.num_steps)
    trainer_config = TrainerConfig(
        save_folder=str(config.save_folder),
        work_dir=str(config.save_folder),
        checkpointer=StateCheckpointerConfig(),
        max_duration=duration,
        # A signal ends the run after the step during which it came.
        cancel_check_interval=1,
        # OLMo-core looks into the run folder first: only a run without a state of its own starts from here.
        load_path=None if state is None else str(state),
        load_trainer_state=None if state is None else False,
        load_optim_state=None if state is None else config.run.load_optimizer,
        # All processes must learn of a signal after the same step.
        async_bookkeeping=False,
        metrics_collect_interval=config.logging.interval_steps,
        callbacks={
            **build_callbacks(model, config, manifest),
            "skipped_steps": SkippedSteps(train_module.guard.counts, train_module.guard.skips),
        },
    )
    return trainer_config.build(train_module, build_data_loader(config, manifest))


def build_callbacks(model: UltraMemForCausalLM, config: RunConfig, manifest: DataManifest) -> dict[str, Any]:
    """The callbacks of a run by name."""
    run_folder, interval = config.save_folder, config.logging.interval_steps
    callbacks: dict[str, Any] = {
        "throughput": Throughput(),
        "memory_statistics": MemoryStatistics(config.logging.memory_interval_steps),
        "checkpointer": RunCheckpointer(
            save_interval=config.checkpoint.interval_steps,
            max_checkpoints=config.checkpoint.keep,
            save_async=config.checkpoint.save_async,
            # Saving before the first step would initialise AdamW's state by a step of its own.
            pre_train_checkpoint=False,
            tokenizer_path=str(manifest.tokenizer_path),
        ),
        "metrics_file": MetricsFile(str(run_folder / "metrics.jsonl"), interval),
        "progress": ProgressLine(interval_steps=interval),
    }
    callbacks |= build_validation(model, config, manifest)
    if config.logging.tensorboard:
        callbacks["tensorboard"] = TensorBoard(str(run_folder / "tensorboard"), interval)
    if config.logging.wandb is not None:
        callbacks["wandb"] = weights_and_biases(config)
    return callbacks


def config_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that :func:`ultramem.training.config.load_config` reads back unchanged."""
    return yaml.safe_dump(config.as_dict(json_safe=True), sort_keys=False, allow_unicode=True)


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        """Drops what a full disk does not take: the error that ends the run is reported by itself."""


@contextmanager
def _quiet_engine(path: Path) -> Iterator[None]:
    """Sends OLMo-core's messages to a file of the run, so that the terminal shows progress only."""
    logger = logging.getLogger("olmo_core")
    level, propagate = logger.level, logger.propagate
    handler = _LogFile(path, encoding="utf-8") if get_rank() == 0 else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            # One process is what was asked for.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            # Nothing writes in place into what a block returns.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
            yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.setLevel(level)
        logger.propagate = propagate


def _report_end(trainer: Trainer) -> None:
    if get_rank() != 0:
        return
    counts = trainer.train_module.guard.counts
    if counts.total:
        print(
            f"steps skipped for a NaN or infinite loss or gradient: {counts.total} of {trainer.global_step}",
            file=sys.stderr,
        )
    if trainer.is_canceled:
        print(
            f"stopped at step {trainer.global_step} of {trainer.max_steps}: saved; the same command resumes from there",
            file=sys.stderr,
        )

"""What the tests of several processes run in each of them; results go to a file per process."""

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from olmo_core.distributed.utils import get_rank
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from tiny_training import VOCAB_SIZE, tiny_model, train_quietly
from ultramem.errors import CheckpointError
from ultramem.evaluation.perplexity import evaluate_perplexity
from ultramem.model.roles import parameter_roles
from ultramem.training import checkpoints, run, states, train_module
from ultramem.training.config import DataSection, LoggingSection, RunConfig, TrainingSection
from ultramem.training.processes import on_first_process, process_group
from ultramem.training.train_module import UltraMemTrainModule

# Sequences of every process; targets are missing where a token is padding, so that shares differ.
NUM_SEQUENCES, NUM_TOKENS = 4, 16


class FakeTrainer(SimpleNamespace):
    """What a train module asks of the trainer."""

    def record_metric(self, name: str, value: Any, *arguments: Any, **options: Any) -> None:
        self.metrics[name] = float(value)

    def record_ce_loss(self, value: Any, reduce_type: Any = None) -> None:
        self.record_metric("CE loss", value)


def build_module(parallel: str | None, micro_batch_sequences: int, **changes: Any) -> UltraMemTrainModule:
    """A train module of the tiny model in fp64, without what is random."""
    config = RunConfig(
        data=DataSection(sequence_length_tokens=NUM_TOKENS),
        training=TrainingSection(
            max_steps=10,
            global_batch_sequences=2 * NUM_SEQUENCES,
            micro_batch_sequences=micro_batch_sequences,
            precision="fp32",
            parallel=parallel,
        ),
        logging=LoggingSection(memory_interval_steps=None),
    )
    model = tiny_model(attention_dropout=0.0, **changes).double()
    module = UltraMemTrainModule(model, parameter_roles(model), config, flops_per_token=1)
    module._trainer = FakeTrainer(
        device=torch.device("cpu"),
        global_step=1,
        global_train_tokens_seen=64,
        max_tokens=640,
        dp_process_group=None,
        metrics={},
    )
    return module


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    """One process's sequences; the second process has half as many targets."""
    generator = torch.Generator().manual_seed(rank)
    input_ids = torch.randint(2, VOCAB_SIZE, (NUM_SEQUENCES, NUM_TOKENS), generator=generator)
    label_mask = torch.ones_like(input_ids, dtype=torch.bool)
    label_mask[:, NUM_TOKENS // 2 :] = rank == 0
    return {"input_ids": input_ids, "label_mask": label_mask}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with all its parts."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_one_batch(folder: Path, parallel: str, micro_batch_sequences: int, changes: dict[str, Any]) -> None:
    """Gradients, buffers, placements, and how often gloo reduced what during forward and backward."""
    with process_group():
        rank = dist.get_rank()
        module = build_module(parallel, micro_batch_sequences, **changes)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            module.train_batch(batch_of(rank))
        names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
        result = {
            "reductions": Counter(name for name in names if "reduce" in name),
            "loss": module.batch_loss,
            "gradients": {name: whole(parameter.grad) for name, parameter in module.model.named_parameters()},
            "buffers": dict(module.model.named_buffers()),
            "split": {name for name, parameter in module.model.named_parameters() if isinstance(parameter, DTensor)},
            "local_elements": {
                name: (parameter.to_local() if isinstance(parameter, DTensor) else parameter).numel()
                for name, parameter in module.model.named_parameters()
            },
        }
        torch.save(result, folder / f"{rank}.pt")


def fail_on_first(folder: Path) -> None:
    """The first process fails; what each of them raises."""

    def fail() -> None:
        raise CheckpointError(f"refused by process {os.environ['RANK']}")

    with process_group():
        try:
            on_first_process(fail)
        except CheckpointError as error:
            (folder / f"{dist.get_rank()}.txt").write_text(str(error))


def spoil_losses(replace: Callable[..., object], steps: Sequence[int], process: int = 0) -> None:
    """Makes the losses of some steps NaN in one process.

    Args:
        replace: ``setattr``, or a test's that is undone.
        steps: of the run.
        process: the one whose last micro-batch is spoilt.
    """
    take, losses = UltraMemTrainModule.train_batch, train_module.next_token_losses
    # Spoiling twice would spoil the steps of both.
    take, losses = getattr(take, "before", take), getattr(losses, "before", losses)
    here = {"step": 0}

    def train_batch(module: UltraMemTrainModule, batch: dict[str, Any], dry_run: bool = False) -> None:
        here["step"] = module.trainer.global_step
        take(module, batch, dry_run)

    def next_token_losses(*arguments: torch.Tensor) -> torch.Tensor:
        is_spoilt = here["step"] in steps and get_rank() == process
        return losses(*arguments) * (float("nan") if is_spoilt else 1.0)

    train_batch.before, next_token_losses.before = take, losses
    replace(UltraMemTrainModule, "train_batch", train_batch)
    replace(train_module, "next_token_losses", next_token_losses)


def train_with_spoilt_losses(config_path: Path, steps: Sequence[int], process: int) -> None:
    """Trains to the end; see :func:`spoil_losses`."""
    spoil_losses(setattr, steps, process)
    train_quietly(config_path, [])


def measure_shared(folder: Path, files: list[Path], parallel: str, options: dict[str, Any]) -> None:
    """What each process gets for the loss of token files that all of them measure together, and its forward passes."""
    with process_group():
        module = build_module(parallel, 1)
        forwards = []
        module.model.register_forward_hook(lambda *_: forwards.append(1))
        result = evaluate_perplexity(module.model, files, share_batches=True, **options)
        torch.save((result.loss, result.num_tokens, len(forwards)), folder / f"{dist.get_rank()}.pt")


PLACES = {
    "building": (run, "build_model"),
    "loading": (states.StateCheckpointer, "load"),
    "exporting": (checkpoints, "export_model"),
    "saving": (states, "write_checksums"),
}


def train_slowly_at(config_path: Path, place: str, overrides: list[str]) -> None:
    """Trains, and waits for a second in one of ``PLACES``, after the file ``PLACE-RANK`` beside the config has come."""
    owner, name = PLACES[place]
    function = getattr(owner, name)

    def wait_first(*arguments: Any, **options: Any) -> Any:
        (Path(config_path).parent / f"{place}-{os.environ.get('RANK', '0')}").touch()
        time.sleep(1)
        return function(*arguments, **options)

    setattr(owner, name, wait_first)
    train_quietly(config_path, overrides)

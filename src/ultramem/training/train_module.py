"""The OLMo-core train module around a Hugging Face causal language model with memory tables."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint.state_dict as dist_cp_sd
import torch.nn.functional as F
from olmo_core.data.utils import get_labels, split_batch
from olmo_core.distributed.utils import get_rank, get_world_size
from olmo_core.train.common import ReduceType
from olmo_core.train.train_module import EvalBatchSizeUnit, EvalBatchSpec, TrainModule
from olmo_core.utils import move_to_device
from torch import Tensor, nn

from ultramem.evaluation.mode import evaluating
from ultramem.layers import Statistics
from ultramem.model.packing import document_positions
from ultramem.training.callbacks import is_due
from ultramem.training.config import RunConfig
from ultramem.training.data_parallel import DataParallel, clip_gradients_, running_statistics
from ultramem.training.memory_metrics import build_meters
from ultramem.training.nonfinite import StepGuard
from ultramem.training.optim import build_optimizer, group_settings
from ultramem.training.row_adamw import RowAdamW
from ultramem.training.schedule import build_schedules

IGNORED_LABEL = -100


def next_token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Cross-entropy per position in fp32, 0 where the label is ignored.

    Args:
        logits_BTV: [B, T, vocabulary], any floating dtype.
        labels_BT: the token that follows each position, int64 [B, T]; −100 where there is none.
    """
    losses = F.cross_entropy(
        logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view_as(labels_BT)


class UltraMemTrainModule(TrainModule):
    """Forward, backward and optimizer step, in one process or in several.

    The loss of a batch is Σ cross-entropy / number of target tokens plus the auxiliary losses averaged over tokens, so
    micro-batches of any size, in any number of processes, give the gradient of the whole batch.
    """

    def __init__(self, model: nn.Module, roles: dict[str, str], config: RunConfig, flops_per_token: int) -> None:
        """Builds optimizer and schedules for a model that already sits on its device.

        Args:
            model: maps ``input_ids`` to an output with ``logits`` and, for memory models, ``auxiliary_losses`` and
                ``memory_statistics``; changed in place where several processes share it.
            roles: role of every parameter by name.
            config: the run.
            flops_per_token: of forward and backward, for the trainer's bookkeeping.
        """
        super().__init__()
        self.model = model
        self.config = config
        table_gradients = config.training.table_gradients
        self.parallel = DataParallel(model, roles, config.training.parallel or "ddp", table_gradients)
        self.optim = build_optimizer(model, roles, config.optimizer, table_gradients)
        self.schedules = build_schedules(config)
        self.flops_per_token = flops_per_token
        num_slots = getattr(model, "num_slots_per_memory", []) if config.logging.memory_interval_steps else []
        self.memory_meters = build_meters(num_slots)
        self.learning_rates: dict[str, float] = {}
        self.batch_loss = torch.zeros(())
        self.guard = StepGuard(config, self.parallel)
        self._statistics_before: list[Tensor] = []

    @property
    def eval_batch_spec(self) -> EvalBatchSpec:
        """Evaluation batches have the size of micro-batches."""
        return EvalBatchSpec(self.config.micro_batch_sequences, EvalBatchSizeUnit.instances)

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        """Adds the gradient of one batch and records its losses.

        Args:
            batch: ``input_ids`` int64 [sequences, tokens], this process's part.
            dry_run: OLMo-core's warm-up call before training; nothing is done, because a restored run must not draw
                random numbers or touch the state that an uninterrupted run would not.
        """
        if dry_run:
            return
        self.model.train()
        if self.guard.skips:
            self._statistics_before = [buffer.clone() for buffer in running_statistics(self.model)]
        # A generator state that is a function of the step alone makes dropout independent of where the run was
        # resumed and of what else drew random numbers: OLMo-core restores the state and then starts a torch
        # DataLoader, which draws from it.
        torch.manual_seed(self._step_seed())
        batch = move_to_device(batch, self.trainer.device)
        batch["labels"] = get_labels(batch, label_ignore_index=IGNORED_LABEL)
        # Gradients and losses are averaged over the processes: dividing each process's sums by the mean number of
        # targets makes that the mean over all targets.
        num_targets = self.parallel.mean((batch["labels"] != IGNORED_LABEL).sum())
        totals: dict[str, Tensor] = {}
        micro_batches = split_batch(batch, self.config.micro_batch_sequences)
        for i, micro_batch in enumerate(micro_batches, start=1):
            with self.parallel.micro_batch(is_last=i == len(micro_batches)):
                loss, parts = self._micro_batch_loss(micro_batch, num_targets)
                loss.backward()
            for name, value in parts.items():
                totals[name] = totals.get(name, 0.0) + value.detach()
        self.parallel.finish_gradients()
        if isinstance(self.optim, RowAdamW):
            self.parallel.average_rows(self.optim.coalesce())
        self.batch_loss = self.parallel.mean(torch.stack(list(totals.values())).sum())
        # A trainer ends a run whose metrics hold such a loss.
        if self.guard.skips and not self.guard.is_finite(self.batch_loss):
            return
        self.record_ce_loss(totals.pop("cross_entropy"), ReduceType.mean)
        for name, value in totals.items():
            self.record_metric(name, value, ReduceType.mean, namespace="train")

    def _micro_batch_loss(self, micro_batch: dict[str, Any], num_targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        labels_BT = micro_batch["labels"]
        with self._autocast():
            options = {"output_memory_statistics": self._memory_statistics()} if self.memory_meters else {}
            inputs = self._model_inputs(micro_batch["input_ids"])
            output = self.parallel.forward(**inputs, use_cache=False, **options)
        parts = {"cross_entropy": next_token_losses(output.logits, labels_BT).sum() / num_targets}
        share = (labels_BT != IGNORED_LABEL).sum() / num_targets
        for name, auxiliary_loss in (getattr(output, "auxiliary_losses", None) or {}).items():
            parts[name] = auxiliary_loss.float() * share
        for meter, statistics in (
            zip(self.memory_meters, output.memory_statistics or (), strict=True) if options else ()
        ):
            meter.update(statistics)
        return torch.stack(list(parts.values())).sum(), parts

    def _memory_statistics(self) -> Statistics:
        # The exact search scores whole grids: only at the steps that are reported.
        interval_steps = self.config.logging.memory_interval_steps
        return "recall" if is_due(self.trainer.global_step, interval_steps, self.trainer.max_steps) else True

    def _model_inputs(self, input_ids_BT: Tensor) -> dict[str, Tensor]:
        """The model's inputs: with masked documents, positions that restart at each."""
        if not self.config.data.mask_documents:
            return {"input_ids": input_ids_BT}
        end = self.config.model["eos_token_id"]
        return {"input_ids": input_ids_BT, "position_ids": document_positions(input_ids_BT, end)}

    def eval_batch(self, batch: dict[str, Any], labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits [B, T, vocabulary] and, given labels, the loss per position [B, T] (0 where ignored)."""
        batch = move_to_device(batch, self.trainer.device)
        with evaluating(self.model), torch.no_grad(), self._autocast():
            logits_BTV = self.model(**self._model_inputs(batch["input_ids"]), use_cache=False).logits
        if labels is None:
            return logits_BTV, None
        return logits_BTV, next_token_losses(logits_BTV, labels.to(logits_BTV.device))

    def optim_step(self) -> None:
        """Clips tables and the rest apart, sets the learning rates, steps, and refreshes the memories' search.

        A step whose loss or gradient norm is NaN or infinite changes no weight and no moment.

        Raises:
            TrainingError: there was such a step, and the config says to stop there.
        """
        limits = {"dense": self.config.optimizer.max_grad_norm, "tables": self.config.optimizer.table_max_grad_norm}
        norms: dict[str, Tensor] = {}
        for name, limit in limits.items():
            # Keys are dense parameters with a rate of their own.
            clipped = [
                parameter
                for group in self.optim.param_groups
                if (group["name"] == "tables") == (name == "tables")
                for parameter in group["params"]
            ]
            if clipped:
                max_norm = limit if limit is not None else float("inf")
                if name == "tables" and isinstance(self.optim, RowAdamW):
                    norms[f"{name} grad norm"] = self.optim.clip_rows_(max_norm)
                else:
                    norms[f"{name} grad norm"] = clip_gradients_(clipped, max_norm)
        for group in self.optim.param_groups:
            name = group["name"]
            self.learning_rates[name] = float(self.schedules[name].set_lr(group, self.trainer))
            self.record_metric(f"{name} learning rate", self.learning_rates[name], namespace="optim")
        if not self.guard.allows({"loss": self.batch_loss, **norms}, self.trainer):
            self._skip_step()
            return
        for name, norm in norms.items():
            self.record_metric(name, norm, namespace="optim")
        self.optim.step()
        if hasattr(self.model, "refresh_retrieval"):
            self.model.refresh_retrieval()

    def _skip_step(self) -> None:
        """Undoes what forward passes have left behind; gradients go when the trainer drops them."""
        for buffer, before in zip(running_statistics(self.model), self._statistics_before, strict=True):
            buffer.copy_(before)
        # What they have measured may not be finite either.
        for meter in self.memory_meters:
            meter.reset()

    def zero_grads(self) -> None:
        """Drops all gradients."""
        self.optim.zero_grad(set_to_none=True)

    def state_dict(self, *, optim: bool | None = None) -> dict[str, Any]:
        """Model and optimizer state by parameter name, in the form that torch's distributed checkpoints take."""
        options = dist_cp_sd.StateDictOptions(full_state_dict=False, cpu_offload=True)
        state: dict[str, Any] = {"model": dist_cp_sd.get_model_state_dict(self.model, options=options)}
        if optim is not False:
            state["optim"] = dist_cp_sd.get_optimizer_state_dict(self.model, self.optim, options=options)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave; learning rate, betas and weight decay stay those of the config."""
        options = dist_cp_sd.StateDictOptions(strict=True)
        dist_cp_sd.set_model_state_dict(self.model, state_dict["model"], options=options)
        if "optim" in state_dict:
            dist_cp_sd.set_optimizer_state_dict(self.model, self.optim, state_dict["optim"], options=options)
            for group in self.optim.param_groups:
                group.update(group_settings(self.config.optimizer))

    def num_flops_per_token(self, seq_len: int) -> int:
        """FLOPs of forward and backward per token at the training sequence length."""
        del seq_len
        return self.flops_per_token

    def global_num_flops_in_batch(self, batch: dict[str, Any]) -> int:
        """FLOPs of one batch over all processes."""
        return self.flops_per_token * batch["input_ids"].numel() * get_world_size(self.trainer.dp_process_group)

    def _autocast(self) -> AbstractContextManager[None]:
        if self.config.training.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.trainer.device.type, dtype=torch.bfloat16)

    def _step_seed(self) -> int:
        key = [self.config.run.seed, self.trainer.global_step, get_rank(self.trainer.dp_process_group)]
        return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])

"""Out of memory: what it is taken for, and which settings the message names."""

import pytest
import torch

from ultramem.errors import TrainingError
from ultramem.training import out_of_memory, train_module
from ultramem.training.config import load_config
from ultramem.training.dry_run import estimate_memory, format_bytes
from ultramem.training.out_of_memory import explained_memory_errors, is_out_of_memory
from ultramem.training.run import resolve_config, train


def cpu_error():
    """PyTorch's own, for more bytes than there are addresses."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**50, dtype=torch.uint8)
    return error.value


def caused(error):
    outer = RuntimeError("a step failed")
    outer.__cause__ = error
    return outer


def test_what_is_out_of_memory():
    assert is_out_of_memory(cpu_error())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert is_out_of_memory(caused(cpu_error()))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied: out of memory of them"))
    assert not is_out_of_memory(OSError(12, "Cannot allocate memory"))
    assert not is_out_of_memory(None)


def test_other_errors_stay_what_they_are(config_path):
    with pytest.raises(RuntimeError, match="shapes"), explained_memory_errors(load_config(config_path)):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize("overrides", [[], ["model.memory=null"]])
def test_a_run_without_memory_names_settings_and_their_values(config_path, monkeypatch, overrides):
    """A real refusal of the allocator in the middle of a forward pass."""
    monkeypatch.setattr(train_module, "next_token_losses", lambda *_: torch.empty(2**50))
    config, manifest = resolve_config(config_path, overrides)
    with pytest.raises(TrainingError) as error:
        train(config, manifest)
    text = str(error.value)
    assert text.startswith("out of memory (")
    assert "DefaultCPUAllocator: " in text
    assert (
        f"`--dry-run` estimates {format_bytes(estimate_memory(config).total_bytes)} for one process (weights " in text
    )
    for remedy in (
        "lower 'training.micro_batch_sequences' (now 2)",
        "set 'training.gradient_checkpointing: true' (now false)",
        "'training.parallel: fsdp' (now one process)",
        "shorten 'data.sequence_length_tokens' (now 32)",
    ):
        assert remedy in text
    for remedy in (
        "set 'training.table_gradients: rows' (now dense)",
        "set 'optimizer.table_moments' to bf16 or 8bit, with 'training.table_gradients: rows' (now fp32",
    ):
        assert (remedy in text) == (not overrides)


def advice(config_path, *overrides):
    config = load_config(config_path, ["model.vocab_size=64", *overrides])
    with pytest.raises(TrainingError) as error, explained_memory_errors(config):
        raise MemoryError
    return str(error.value).partition("To need less: ")[2]


def test_settings_that_are_made_already_are_not_named(config_path):
    rows = advice(config_path, "training.table_gradients=rows", "training.gradient_checkpointing=true")
    assert "gradient_checkpointing" not in rows
    assert "table_gradients" not in rows
    assert "set 'optimizer.table_moments' to bf16 or 8bit (now fp32" in rows
    narrow = advice(config_path, "training.table_gradients=rows", "optimizer.table_moments=8bit")
    assert "table_moments" not in narrow
    assert "micro_batch" not in advice(config_path, "training.micro_batch_sequences=1")
    assert "(now null, the whole batch of 4)" in advice(config_path, "training.micro_batch_sequences=null")


def test_several_processes_are_not_sent_to_what_trains_in_one(config_path, monkeypatch):
    monkeypatch.setattr(out_of_memory, "get_world_size", lambda: 2)
    text = advice(config_path)
    assert "rows" not in text
    assert "'training.parallel: fsdp' (now ddp)" in text
    assert "parallel" not in advice(config_path, "training.parallel=fsdp")


@pytest.mark.gpu
def test_a_refusal_of_the_accelerator(config_path, monkeypatch):
    monkeypatch.setattr(train_module, "next_token_losses", lambda logits, _: torch.empty(2**45, device=logits.device))
    with pytest.raises(
        TrainingError, match=r"out of memory \(CUDA out of memory.*To need less: lower 'training\.micro"
    ):
        train(*resolve_config(config_path))

"""``--dry-run``: its sizes are the built module's."""

import re
from pathlib import Path

import pytest
import torch

from ultramem.errors import ConfigError, DataError
from ultramem.model import UltraMemConfig, UltraMemForCausalLM
from ultramem.model.accounting import cost_card
from ultramem.model.presets import PRESETS
from ultramem.model.roles import parameter_roles
from ultramem.training.dry_run import (
    estimate_memory,
    format_bytes,
    print_dry_run,
    resolve_dry_run,
    saved_bytes_per_token,
    summarize,
)
from ultramem.training.run import model_config, resolve_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def assert_sizes_are_the_built_modules(config, manifest):
    with torch.device("meta"):
        model = UltraMemForCausalLM(model_config(config))
    sizes = {"table": 0, "expert": 0, "dense": 0}
    parameters = dict(model.named_parameters())
    for name, role in parameter_roles(model).items():
        kind = "table" if role == "table" else "expert" if ".experts." in name else "dense"
        sizes[kind] += parameters[name].numel()
    rows = dict(summarize(config, manifest))
    assert rows["parameters"] == f"{sum(sizes.values()):,}"
    assert {kind: rows[f"{kind} parameters"] for kind in sizes} == {kind: f"{size:,}" for kind, size in sizes.items()}
    memory = estimate_memory(config)
    assert memory.weights_bytes == 4 * sum(sizes.values())
    assert memory.moments_bytes == 8 * sum(sizes.values())
    pool = model.model.memory_pool
    values = 0 if pool is None else pool.values.numel()
    assert memory.gradients_bytes == 4 * (sum(sizes.values()) + values)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.memory=null"],
        ["model.tie_word_embeddings=false"],
        ["model.memory={type: pkm, num_keys: 9, top_k: 3, position: replace, placement: [1]}"],
        ["model.ffn.type=moe", "model.ffn.num_experts=4", "model.ffn.num_experts_per_tok=2"],
        *([f"model.memory={{type: {kind}, num_keys: 9, top_k: 3}}"] for kind in ("pkm", "peer", "memory_plus")),
    ],
)
def test_sizes_equal_the_built_modules(config_path, overrides):
    assert_sizes_are_the_built_modules(*resolve_config(config_path, overrides))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_counted_without_data_and_without_a_model(path, monkeypatch, capsys):
    config, manifest = resolve_dry_run(path, ["data.folder=nowhere", "model.vocab_size=50304"])
    assert manifest is None
    assert_sizes_are_the_built_modules(config, manifest)

    def refuse(*arguments, **settings):
        raise AssertionError("a dry run makes no tables")

    monkeypatch.setattr("ultramem.layers.table.MemoryPool.__init__", refuse)
    print_dry_run(*resolve_dry_run(path, ["data.folder=nowhere", "model.vocab_size=50304"]))
    text = capsys.readouterr().out
    for row in ("parameters", "FLOPs of the run", "memory per process: all", "tokens", "steps"):
        assert re.search(rf"^│ {row} +│", text, re.MULTILINE), row


def saved_bytes(config: UltraMemConfig, num_sequences: int, dtype: torch.dtype) -> int:
    """Bytes of all tensors that autograd keeps for the backward of a batch, weights left out."""
    torch.manual_seed(0)
    model = UltraMemForCausalLM(config).train()
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            # Kept alive, or another tensor could take its address.
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, config.vocab_size, (num_sequences, 32))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        model(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny-")])
def test_saved_activations_are_what_autograd_saves(name, dtype):
    config = UltraMemConfig.from_preset(name, vocab_size=64)
    # The difference leaves out what does not grow with the tokens, such as weights cast to bf16.
    measured = (saved_bytes(config, 6, dtype) - saved_bytes(config, 2, dtype)) / (4 * 32)
    assert saved_bytes_per_token(config, dtype.itemsize) == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(("moments", "element_bytes"), [("fp32", 4), ("bf16", 2), ("8bit", 1)])
def test_row_gradients_and_narrow_moments_need_less_memory(config_path, moments, element_bytes):
    rows = ["training.table_gradients=rows", f"optimizer.table_moments={moments}", "model.memory.num_keys=32"]
    config, _ = resolve_config(config_path, rows)
    card = cost_card(model_config(config))
    memory = estimate_memory(config)
    assert memory.moments_bytes == 8 * card.dense_parameters + 2 * element_bytes * card.table_parameters
    dense = estimate_memory(resolve_config(config_path, ["model.memory.num_keys=32"])[0])
    # 128 tokens × 2 memories × 4 rows of 16 elements, with 2 weights and indices each, and 2 vectors of 8 per lookup.
    handed_over = 128 * 2 * (4 * 2 * 12 + 4 * 16)
    assert memory.gradients_bytes == 4 * (card.dense_parameters + 128 * 2 * 4 * 16) + handed_over
    assert memory.gradients_bytes < dense.gradients_bytes


def test_activations_shrink_with_micro_batch_and_checkpointing(config_path):
    whole = estimate_memory(resolve_config(config_path, ["training.micro_batch_sequences=4"])[0])
    half = estimate_memory(resolve_config(config_path, ["training.micro_batch_sequences=2"])[0])
    recomputed = estimate_memory(
        resolve_config(
            config_path,
            ["training.micro_batch_sequences=4", "training.gradient_checkpointing=true", "model.num_hidden_layers=8"],
        )[0]
    )
    deep = estimate_memory(
        resolve_config(config_path, ["training.micro_batch_sequences=4", "model.num_hidden_layers=8"])[0]
    )
    assert whole.activations_bytes == 2 * half.activations_bytes
    assert recomputed.activations_bytes < deep.activations_bytes
    assert whole.total_bytes - half.total_bytes == half.activations_bytes


def test_fsdp_leaves_a_process_its_share_of_the_blocks(config_path):
    config, _ = resolve_config(config_path, ["training.parallel=fsdp", "training.micro_batch_sequences=1"])
    model = UltraMemForCausalLM(model_config(config))
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    whole = sum(size for name, size in sizes.items() if "pool" in name or name.endswith(("keys", "cores")))
    split = sum(sizes.values()) - whole
    blocks = [sum(parameter.numel() for parameter in block.parameters()) for block in model.model.layers]
    retrieval = sum(size for name, size in sizes.items() if name.endswith(("keys", "cores")))
    block = blocks[0] - retrieval // len(blocks)
    one, two, four = (estimate_memory(config, num_processes) for num_processes in (1, 2, 4))
    assert one.weights_bytes == 4 * (split + whole)
    assert two.weights_bytes == 4 * (split // 2 + whole + 2 * block)
    assert two.moments_bytes == 8 * (split // 2 + whole)
    # Two micro-batches of a process keep whole gradients; one does not.
    assert two.gradients_bytes == one.gradients_bytes
    assert four.gradients_bytes == one.gradients_bytes - 4 * (split - split // 4)
    assert four.activations_bytes == one.activations_bytes


def test_ddp_leaves_a_process_everything_but_its_share_of_the_batch(config_path):
    config, _ = resolve_config(config_path, ["training.micro_batch_sequences=null"])
    one, two = estimate_memory(config), estimate_memory(config, 2)
    assert (two.weights_bytes, two.moments_bytes) == (one.weights_bytes, one.moments_bytes)
    assert two.activations_bytes == one.activations_bytes // 2


def test_a_dry_run_of_several_processes(config_path, capsys):
    print_dry_run(*resolve_dry_run(config_path, ["training.parallel=fsdp"]), num_processes=2)
    assert "2 (fsdp)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"must be divisible by the number of processes \(3\)"):
        print_dry_run(*resolve_dry_run(config_path), num_processes=3)


def test_dry_run_prints_and_writes_nothing(config_path, capsys):
    print_dry_run(*resolve_config(config_path, ["optimizer.lr=0.125"]))
    text = capsys.readouterr().out
    assert "lr: 0.125" in text
    assert "vocab_size: 64" in text
    assert "12 of 128 tokens" in text
    assert "1,536 (0.38 epochs)" in text
    assert not (config_path.parent / "run").exists()


def test_dry_run_goes_without_data_that_are_not_prepared(config_path, capsys):
    print_dry_run(*resolve_dry_run(config_path, ["data.folder=nowhere", "model.vocab_size=64"]))
    text = capsys.readouterr().out
    assert "vocab_size: 64" in text
    assert "1,536" in text
    assert "epochs" not in text
    assert "The data are not prepared: there is no folder nowhere. A real run needs it (`ultramem data prep" in text


def test_dry_run_reads_the_data_that_are_there(config_path):
    config, manifest = resolve_dry_run(config_path, ["model.vocab_size=64"])
    assert (config, manifest) == resolve_config(config_path)


def test_dry_run_without_data_and_vocabulary_says_what_to_do(config_path):
    with pytest.raises(DataError, match=r"no data folder 'nowhere'.*data prepare.*if 'model.vocab_size' is given"):
        resolve_dry_run(config_path, ["data.folder=nowhere"])
    too_long = ["data.folder=nowhere", "model.vocab_size=64", "data.sequence_length_tokens=65"]
    with pytest.raises(ConfigError, match=r"max_position_embeddings' \(64\) is smaller"):
        resolve_dry_run(config_path, too_long)


def test_a_scaled_dry_run_without_data_keeps_the_vocabulary(config_path):
    config, manifest = resolve_dry_run(config_path, ["data.folder=nowhere", "model.vocab_size=77"], "tiny")
    assert manifest is None
    assert config.model["vocab_size"] == 77
    assert config.save_folder.name == "run-tiny"
    with pytest.raises(DataError, match=r"if 'model\.vocab_size' is given"):
        resolve_dry_run(config_path, ["data.folder=nowhere"], "tiny")


@pytest.mark.parametrize(("num_bytes", "text"), [(12, "12.0 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_bytes_are_readable(num_bytes, text):
    assert format_bytes(num_bytes) == text

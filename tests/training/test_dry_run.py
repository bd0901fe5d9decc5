"""``--dry-run``: its sizes are the built module's."""

import pytest
import torch

from ultramem.errors import ConfigError, DataError
from ultramem.model import UltraMemForCausalLM
from ultramem.model.accounting import cost_card
from ultramem.model.roles import parameter_roles
from ultramem.training.dry_run import estimate_memory, format_bytes, print_dry_run, resolve_dry_run, summarize
from ultramem.training.run import model_config, resolve_config


@pytest.mark.parametrize("overrides", [[], ["model.memory=null"], ["model.tie_word_embeddings=false"]])
def test_sizes_equal_the_built_modules(config_path, overrides):
    config, manifest = resolve_config(config_path, overrides)
    with torch.device("meta"):
        model = UltraMemForCausalLM(model_config(config))
    sizes = {"table": 0, "dense": 0}
    parameters = dict(model.named_parameters())
    for name, role in parameter_roles(model).items():
        sizes["table" if role == "table" else "dense"] += parameters[name].numel()
    rows = dict(summarize(config, manifest))
    assert rows["dense parameters"] == f"{sizes['dense']:,}"
    assert rows["table parameters"] == f"{sizes['table']:,}"
    assert rows["parameters"] == f"{sum(sizes.values()):,}"
    memory = estimate_memory(config)
    assert memory.weights_bytes == memory.gradients_bytes == 4 * sum(sizes.values())
    assert memory.moments_bytes == 8 * sum(sizes.values())


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


@pytest.mark.parametrize(("num_bytes", "text"), [(12, "12.0 B"), (1536, "1.5 KiB"), (5 << 30, "5.0 GiB")])
def test_bytes_are_readable(num_bytes, text):
    assert format_bytes(num_bytes) == text

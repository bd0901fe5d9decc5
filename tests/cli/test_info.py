import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ultramem import UltraMemForCausalLM
from ultramem.errors import CheckpointError
from ultramem.model import cost_card


def test_it_prints_the_sizes_of_the_built_model(invoke, model_folder):
    result = invoke("info", model_folder)
    assert result.exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    table = sum(tensor.numel() for name, tensor in model.named_parameters() if "pool" in name)
    total = sum(tensor.numel() for tensor in model.parameters())
    card = cost_card(model.config)
    lines = {
        line.split("│")[1].strip(): line.split("│")[2].strip()
        for line in result.stdout.splitlines()
        if line.count("│") == 3
    }
    assert lines["table parameters"] == f"{table:,}" != "0"
    assert lines["total parameters"] == f"{total:,}"
    assert lines["dense parameters"] == f"{total - table:,}"
    assert lines["active parameters"] == f"{card.active_parameters:,}"
    for batch_size in (1, 16, 64):
        shown = lines[f"bytes read per decode step, batch {batch_size}, bf16"]
        assert shown == f"{card.bytes_per_decode_step(batch_size):,}"
    assert "shapes and parameter counts agree" in result.stdout


def test_the_block_table_shows_where_memories_stand(invoke, model_folder):
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in invoke("info", model_folder).stdout.splitlines()
    ]
    blocks = {row[0]: row[1:] for row in rows if len(row) == 7}
    side = 12  # share 0.5 of two memories: each sees its own share
    assert blocks["0"] == ["48", "0 → 1", f"{side**2}", f"2 × {side}", "8, 8, 4", "5 · 1"]
    assert blocks["1"][1] == "1 → 2"
    assert blocks["2"] == ["48", *["–"] * 5]


def test_sharded_bf16_weights_agree_too(invoke, model_folder, tmp_path):
    UltraMemForCausalLM.from_pretrained(model_folder).to(torch.bfloat16).save_pretrained(
        tmp_path, max_shard_size="50KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    result = invoke("info", tmp_path)
    assert result.exit_code == 0
    assert "BF16" in result.stdout


def test_a_dense_model_has_no_table(invoke, model_folder, tmp_path):
    config = UltraMemForCausalLM.config_class.from_pretrained(model_folder)
    config.memory = None
    UltraMemForCausalLM(config).save_pretrained(tmp_path)
    result = invoke("info", tmp_path)
    assert result.exit_code == 0
    assert "table parameters" in result.stdout
    assert "cores" not in result.stdout


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: change_config(folder, intermediate_size=40), ["has shape", "instead of", "not those of its"]),
        (lambda folder: change_config(folder, num_hidden_layers=4), ["is missing"]),
        (lambda folder: change_config(folder, memory=None), ["is left over", "more"]),
        (lambda folder: change_config(folder, hidden_size=33), ["config.json is not valid", "multiple of"]),
        (lambda folder: LlamaConfig().save_pretrained(folder), ["type 'llama'", "expected 'ultramem'"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json cannot be read"]),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), ["model.safetensors is damaged"]),
    ],
)
def test_a_folder_that_does_not_fit_is_reported(invoke, model_folder, tmp_path, change, said):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    change(folder)
    result = invoke("info", folder)
    assert isinstance(result.exception, CheckpointError)
    for part in said:
        assert part in str(result.exception)

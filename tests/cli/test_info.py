import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.errors import CheckpointError, ConfigError
from ultramem.model import cost_card
from ultramem.model.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "presets.md"
LAYER_PAGES = {path.stem for path in (PAGE.parent / "layers").glob("*.md")}
# A memory without a page of its own is on no other page.
DOCUMENTED = [
    name for name, settings in PRESETS.items() if (settings["memory"] or {"type": "moe"})["type"] in LAYER_PAGES
]
TINY = [name for name in DOCUMENTED if name.startswith("tiny-")]


def size_lines(output):
    """The labelled rows of the size table."""
    return {
        line.split("│")[1].strip(): line.split("│")[2].strip() for line in output.splitlines() if line.count("│") == 3
    }


def block_rows(output):
    """The rows of the block table, by block."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 7}


@pytest.fixture
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


def test_it_prints_the_sizes_of_the_built_model(invoke, model_folder):
    result = invoke("info", model_folder)
    assert result.exit_code == 0
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    table = sum(tensor.numel() for name, tensor in model.named_parameters() if "pool" in name)
    total = sum(tensor.numel() for tensor in model.parameters())
    card = cost_card(model.config)
    lines = size_lines(result.stdout)
    assert lines["table parameters"] == f"{table:,}" != "0"
    assert lines["total parameters"] == f"{total:,}"
    assert lines["dense parameters"] == f"{total - table:,}"
    assert lines["active parameters"] == f"{card.active_parameters:,}"
    assert lines["expert parameters"] == "0"
    assert lines["FFN, inner width"] == "dense, 48"
    assert lines["table elements read per token"] == f"{2 * 5 * (8 + 4)}"
    for batch_size in (1, 16, 64):
        shown = lines[f"bytes read per decode step, batch {batch_size}, bf16"]
        assert shown == f"{card.bytes_per_decode_step(batch_size):,}"
    assert "shapes and parameter counts agree" in result.stdout


def test_the_block_table_shows_where_memories_stand(invoke, model_folder):
    blocks = block_rows(invoke("info", model_folder).stdout)
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


def test_a_preset_is_described_without_weights(invoke, wide):
    result = invoke("info", "tiny-moe")
    assert result.exit_code == 0
    assert "preset tiny-moe" in result.stdout
    lines, card = size_lines(result.stdout), cost_card(UltraMemConfig.from_preset("tiny-moe"))
    assert lines["expert parameters"] == f"{card.expert_parameters:,}" == "14,745,600"
    assert lines["total parameters"] == f"{card.total_parameters:,}"
    assert lines["FFN, inner width"] == "moe, 8 of 64 × 80"
    assert block_rows(result.stdout)["5"] == ["8 of 64 × 80", *["–"] * 5]
    assert "there are no weights to compare with" in result.stdout


def test_a_path_that_exists_wins(invoke, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "tiny-pkm")
    result = invoke("info", "tiny-pkm")
    assert size_lines(result.stdout)["blocks, width"] == "3, 32"
    assert "shapes and parameter counts agree" in result.stdout


def compared(output):
    """Cells of the comparison by label; labels are followed by at least two blanks or the next cell's padding."""
    rows = [re.split(r"  +", line.strip()) for line in output.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) > 1}


def test_models_stand_side_by_side(invoke, wide):
    result = invoke("info", "--compare", *TINY)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    cells = compared(result.stdout)
    assert cells["memory"] == ["–", "–", "pkm", "peer", "memory_plus", "ultramem", "ultramem_v2"]
    assert cells["at blocks"] == ["–", "–", *["1, 3, 5"] * 3, "1→2, 3→4", "every"]
    assert cells["tables"] == ["–", "–", "private", "private", "shared", "private", "ring"]
    assert cells["FFN"] == ["664", "8 of 64 × 80", "544", "608", "456", "472", "504"]
    assert cells["dense parameters"][:2] == ["3.186M", "1.335M"]
    assert cells["expert parameters"] == ["0", "14.75M", *["0"] * 5]
    assert cells["table parameters"] == ["0", "0", "12.91M", "12.92M", "12.90M", "12.90M", "12.91M"]
    assert cells["total parameters"][-1] == "16.06M"
    assert cells["active parameters"][-1] == "3.167M"
    assert cells["FLOPs, no context"][0] == "6.364M"
    assert cells["FLOPs, full"][0] == "10.30M"
    assert cells["full, in tokens"] == ["1,024"] * 7
    assert cells["table elements"] == ["0", "0", *["15.36K"] * 5]
    assert cells["bytes, batch 1"][1] == "6.357M"
    assert cells["bytes, batch 64"][1] == "32.18M"


def test_a_narrow_console_gets_several_tables(invoke, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    result = invoke("info", "--compare", *TINY)
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    totals = [line.split()[2:] for line in lines if line.startswith("total parameters")]
    assert len(totals) > 1
    assert [cell for row in totals for cell in row] == [
        "3.186M", "16.08M", "16.06M", "16.08M", "16.07M", "16.03M", "16.06M",
    ]  # fmt: skip


def test_presets_and_checkpoints_are_compared_and_written(invoke, wide, model_folder, tmp_path):
    file = tmp_path / "numbers.json"
    result = invoke("info", "--compare", "olmoe-1b-7b", model_folder, "--json", file)
    assert result.exit_code == 0
    assert compared(result.stdout)["total parameters"][0] == "6.919B"
    preset, checkpoint = json.loads(file.read_text())["models"]
    card = cost_card(UltraMemConfig.from_preset("olmoe-1b-7b"))
    assert (preset["name"], preset["folder"], preset["memory"]) == ("olmoe-1b-7b", None, None)
    assert preset["ffn"]["num_experts"] == 64
    for name in ("dense", "expert", "table", "total", "active"):
        assert preset[f"{name}_parameters"] == getattr(card, f"{name}_parameters")
    assert preset["flops_per_token"] == {"0": card.flops_per_token(), "4096": card.flops_per_token(4096)}
    assert preset["bytes_per_decode_step_bf16"]["64"] == card.bytes_per_decode_step(64)
    assert checkpoint["folder"] == str(model_folder)
    assert checkpoint["table_elements_per_token"] == 120
    assert checkpoint["memory"]["num_keys"] == 12


def test_one_model_is_written_too(invoke, tmp_path):
    assert invoke("info", "tiny-peer", "--json", tmp_path / "one.json").exit_code == 0
    (model,) = json.loads((tmp_path / "one.json").read_text())["models"]
    assert model["table_elements_per_token"] == 15_360


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny-pmk"], ["'tiny-pmk' is neither a path that exists nor a preset", "did you mean tiny-pkm?", *PRESETS]),
        (["--compare", "tiny-pkm", "zzz"], ["'zzz' is neither a path", "; the presets are ultramem_v2-227m-1.2b"]),
        (["tiny-pkm", "tiny-moe"], ["2 were given (tiny-pkm, tiny-moe)", "add --compare"]),
        (["tiny-pkm", "--json", "absent/x.json"], ["there is no folder absent"]),
        (["tiny-pkm", "--json", "."], ["--json . is a folder", "for example info.json"]),
    ],
)
def test_what_cannot_be_described_is_said(invoke, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    error = invoke("info", *arguments).exception
    assert isinstance(error, ConfigError)
    for part in said:
        assert part in str(error)


def test_a_path_without_a_model_is_no_preset(invoke, tmp_path):
    error = invoke("info", tmp_path / "tiny-pkm").exception
    assert isinstance(error, CheckpointError)
    assert "does not exist; expected a model folder" in str(error)


def test_the_page_on_presets_shows_what_the_commands_print(invoke, wide):
    examples = re.findall(r"```console\n\$ ultramem (.*?)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    shown = set()
    for arguments, printed in examples:
        result = invoke(*arguments.split())
        assert [line.rstrip() for line in result.stdout.splitlines()] == printed.splitlines()
        shown |= set(arguments.split())
    assert len(DOCUMENTED) >= 28
    assert set(DOCUMENTED) <= shown

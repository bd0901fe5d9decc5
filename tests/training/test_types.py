"""One word of config/demo.yaml exchanges the memory or the FFN; each trains, is saved, loads and generates."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from tolerances import assert_bit_equal
from ultramem.cli import app
from ultramem.layers import MEMORY_TYPES
from ultramem.model.folders import resolve_model_folder

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
WORDS = [*(f"model.memory.type={name}" for name in MEMORY_TYPES), "model.ffn.type=moe", "model.memory=null"]


@pytest.mark.parametrize("word", WORDS)
def test_one_word_trains_saves_loads_and_generates(word, data_folder, tmp_path):
    run = tmp_path / "run"
    settings = [word, f"data.folder={data_folder}", f"run.save_folder={run}", "data.sequence_length_tokens=32"]
    settings += ["model.memory.num_keys=8"] if word != "model.memory=null" else []
    settings += ["training.max_tokens=256", "training.global_batch_sequences=4", "logging.tensorboard=false"]
    settings += ["model.hidden_size=24", "model.intermediate_size=32", "model.vocab_size=64"]
    result = CliRunner().invoke(app, ["train", str(DEMO), *settings])
    assert result.exit_code == 0, result.output
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("train/CE loss", 99) < 5 for line in losses)

    folder = resolve_model_folder(run)
    model, again = (AutoModelForCausalLM.from_pretrained(folder).eval() for _ in range(2))
    kind = word.partition("=")[2]
    if kind in MEMORY_TYPES:
        assert model.config.memory["type"] == kind
        assert all(type(memory) is MEMORY_TYPES[kind].layer for memory in model.model.memories)
    model.save_pretrained(tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for name, tensor in again.state_dict().items():
        assert_bit_equal(copy.state_dict()[name], tensor)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("w9 w16 w23", return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        for _ in range(5):
            logits = again(prompt["input_ids"]).logits[:, -1]
            prompt["input_ids"] = torch.cat([prompt["input_ids"], logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(tokens, prompt["input_ids"])
    result = CliRunner().invoke(app, ["generate", str(run), "--prompt", "w9 w16", "--max-new-tokens", "3"])
    assert result.exit_code == 0, result.output

"""The README's Python runs as written."""

import re
from pathlib import Path

import pytest
import torch

from tiny_models import tiny_tokenizer, tiny_ultramem

README = Path(__file__).parents[1] / "README.md"


@pytest.fixture(scope="module")
def snippets() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_three_snippets(snippets):
    assert len(snippets) == 3


def test_no_placeholder_is_left():
    assert not re.search(r"^[A-Z]+(_[A-Z]+)+$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_building_a_layer(snippets):
    names: dict = {}
    exec(compile(snippets[0], "README.md", "exec"), names)
    assert names["y"].shape == (2, 10, 256)
    assert torch.isfinite(names["y"]).all()
    assert float(names["y"].detach().std()) > 0
    assert "16 of 16,384 rows" in snippets[0]
    assert (names["pool"].num_rows, names["layer"].retrieval.top_k) == (16_384, 16)


def test_loading_a_checkpoint_and_generating(snippets, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs" / "demo" / "step10-hf"
    tiny_ultramem().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippets[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("The capital of")


def test_attaching_memories(snippets):
    names = {}
    exec(compile(snippets[2], "README.md", "exec"), names)
    assert names["adapter"].blocks == [1, 3]
    assert names["llama"].memory_adapter is names["adapter"]

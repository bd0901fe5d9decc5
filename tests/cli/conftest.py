"""One tiny checkpoint, its tokenizer and token files, for all verbs."""

import pytest
import torch
from typer.testing import CliRunner

from tiny_models import TEXT, tiny_tokenizer
from ultramem import UltraMemConfig, UltraMemForCausalLM
from ultramem.cli import app
from ultramem.data.prepare import PrepareConfig, prepare


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer):
    torch.manual_seed(0)
    config = UltraMemConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        memory={
            "placement": "0:1/1:2",
            "num_keys": 12,
            "key_dim": 8,
            "value_dim": 8,
            "pre_value_dim": 4,
            "top_k": 5,
            "tables": "ring",
            "share_ratio": 0.5,
        },
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    UltraMemForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory, model_folder):
    root = tmp_path_factory.mktemp("data")
    for number in range(40):
        (root / f"{number:02}.txt").write_text(f"{number}. {TEXT[number % 2]}", encoding="utf-8")
    config = PrepareConfig(sources=(str(root),), tokenizer=str(model_folder), validation_fraction=0.4)
    prepare(config, root / "tokens")
    return root / "tokens"


@pytest.fixture
def invoke():
    """Run a verb in this process; an error for the user is the result's exception."""

    def run(*arguments, stdin=None):
        return CliRunner().invoke(app, list(map(str, arguments)), input=stdin)

    return run

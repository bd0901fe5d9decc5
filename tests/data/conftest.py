import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sample_texts import make_texts
from ultramem.data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    """A Hugging Face folder of a small trained tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(make_texts(50), 300).save_pretrained(folder)
    return folder


@pytest.fixture
def text_folder(tmp_path) -> Path:
    """Forty .txt files."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for place, text in enumerate(make_texts(40)):
        (folder / f"{place:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def block_import(monkeypatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)

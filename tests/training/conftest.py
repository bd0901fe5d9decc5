"""A tiny data folder and a tiny run on it."""

import gc
from pathlib import Path

import pytest
import yaml

from tiny_training import tiny_settings, write_data_folder


@pytest.fixture(autouse=True, scope="session")
def _quick_collection():
    """OLMo-core collects garbage several times a run, which takes half of a tiny one for what was merely imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data_folder(tmp_path_factory.mktemp("data"))


@pytest.fixture
def config_path(data_folder: Path, tmp_path: Path) -> Path:
    """A YAML file of the tiny run in a folder of its own."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_settings(data_folder, tmp_path / "run")))
    return path

"""Weights & Biases, with a stand-in for its package: nothing here reaches a network."""

import sys
from types import SimpleNamespace

import pytest

from ultramem.errors import ConfigError
from ultramem.training.config import load_config
from ultramem.training.run import resolve_config, train


class FakeWandb:
    """Notes what it is told."""

    def __init__(self):
        self.settings, self.logged, self.finished = None, {}, []
        self.run = None

    def init(self, **settings):
        self.settings = settings
        self.run = SimpleNamespace(path="entity/project/id")

    def log(self, metrics, step):
        self.logged[step] = metrics

    def finish(self, exit_code):
        self.finished.append(exit_code)


@pytest.fixture
def wandb(monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "key")
    return fake


def test_a_run_sends_its_config_and_metrics(config_path, wandb):
    overrides = ["logging.wandb={project: memories, tags: [tiny]}", "training.max_steps=3", "validation.tokens=64"]
    train(*resolve_config(config_path, overrides))
    settings = wandb.settings
    assert (settings["project"], settings["name"], settings["tags"]) == ("memories", "run", ["tiny"])
    assert settings["config"]["training"]["max_steps"] == 3
    assert settings["dir"] == config_path.parent / "run" / "wandb"
    assert sorted(wandb.logged) == [1, 2, 3]
    assert {"train/CE loss", "memory/0/search_recall", "validation/CE loss"} <= set(wandb.logged[3])
    assert wandb.finished == [0]
    saved = load_config(config_path.parent / "run" / "config.yaml")
    assert saved.logging.wandb.project == "memories"


def test_it_is_off_by_default(config_path, wandb):
    assert load_config(config_path).logging.wandb is None
    train(*resolve_config(config_path, ["training.max_steps=1"]))
    assert wandb.settings is None


def test_a_missing_package_names_the_extra(config_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"'logging.wandb' needs the package wandb: pip install 'ultramem\[wandb\]'"):
        train(*resolve_config(config_path, ["logging.wandb.project=memories"]))


def test_a_missing_key_names_its_variable(config_path, wandb, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY")
    with pytest.raises(ConfigError, match=r"key in the environment variable WANDB_API_KEY .*'logging.wandb: null'"):
        train(*resolve_config(config_path, ["logging.wandb.project=memories"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("logging.wandb={}", "'logging.wandb.project' is missing: name the project"),
        ("logging.wandb={projet: x}", "did you mean 'logging.wandb.project'"),
        ("logging.wandb=true", "'logging.wandb' expects a section .*or null, but the true/false value True"),
    ],
)
def test_mistakes_are_named(config_path, override, message):
    with pytest.raises(ConfigError, match=message):
        load_config(config_path, [override])

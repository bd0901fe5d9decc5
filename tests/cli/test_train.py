"""``ultramem train`` from the command line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ultramem.errors import ConfigError, DataError

CONFIGS = Path(__file__).parents[2] / "configs"

TINY = [
    "run.save_folder={folder}/run",
    "data.folder={data}",
    "data.sequence_length_tokens=16",
    "model.hidden_size=24",
    "model.intermediate_size=24",
    "model.num_hidden_layers=2",
    "training.max_tokens=null",
    "training.max_steps=3",
    "training.global_batch_sequences=4",
    "training.micro_batch_sequences=2",
]
TINY_MEMORY = ["model.memory.num_keys=8", "model.memory.value_dim=8", "model.memory.top_k=4"]


@pytest.fixture
def overrides(data_folder, tmp_path):
    return [override.format(folder=tmp_path, data=data_folder) for override in TINY]


@pytest.mark.parametrize(("name", "memory"), [("demo", TINY_MEMORY), ("demo_dense", [])])
def test_shipped_configs_train_at_a_tiny_size(invoke, overrides, tmp_path, name, memory):
    result = invoke("train", CONFIGS / f"{name}.yaml", *overrides, *memory)
    assert result.exit_code == 0, result.output
    assert f"model: {tmp_path}/run/step3-hf" in result.stdout
    assert re.search(r"step 3/3  loss \d\.\d{4}  [\d,]+ tokens/s  validation \d\.\d{4}  0s left", result.stderr)
    evaluation = invoke("info", tmp_path / "run")
    assert evaluation.exit_code == 0, evaluation.output


def test_dry_run_prints_the_figures_and_writes_nothing(invoke, overrides, tmp_path):
    result = invoke("train", CONFIGS / "demo.yaml", *overrides, *TINY_MEMORY, "--dry-run")
    assert result.exit_code == 0, result.output
    shown = {line.split("│")[1].strip() for line in result.stdout.splitlines() if line.count("│") == 3}
    assert {"table parameters", "FLOPs per token, training", "memory per process: all", "tokens", "steps"} <= shown
    assert yaml.safe_load(result.stdout.split("┌")[0])["training"]["max_steps"] == 3
    assert not (tmp_path / "run").exists()


def test_a_fresh_clone_has_a_dry_run_and_no_run(invoke, tmp_path):
    arguments = ["train", CONFIGS / "demo.yaml", f"data.folder={tmp_path}/absent", "model.vocab_size=4096"]
    result = invoke(*arguments, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "table parameters" in result.stdout
    assert f"The data are not prepared: there is no folder {tmp_path}/absent." in result.stdout
    error = invoke(*arguments).exception
    assert isinstance(error, DataError)
    assert f"make it with `ultramem data prepare SOURCE… --output {tmp_path}/absent --tokenizer …`" in str(error)
    assert "for the demo: `make demo`" in str(error)


def test_a_tiny_copy_of_a_published_run(invoke, data_folder, tmp_path):
    """A config of billions of tokens, tried in seconds, in a folder of its own."""
    published = ["train", CONFIGS / "ultramem_v2_227m_1.2b.yaml", f"data.folder={data_folder}", "--scale", "tiny"]
    published += [f"run.save_folder={tmp_path}/run", "training.max_tokens=256"]
    result = invoke(*published, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "1 of 256 tokens" in result.stdout
    result = invoke(*published)
    assert result.exit_code == 0, result.output
    assert f"model: {tmp_path}/run-tiny/step1-hf" in result.stdout


def test_a_mistake_in_an_override_is_a_config_error(invoke, overrides):
    result = invoke("train", CONFIGS / "demo.yaml", *overrides, "optimizer.lrr=1")
    assert isinstance(result.exception, ConfigError)
    assert "did you mean 'optimizer.lr'?" in str(result.exception)


def test_without_the_packages_of_the_extra_it_says_what_to_install():
    """In an interpreter of its own: here the modules are imported already."""
    script = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'olmo_core':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"sys.argv = ['ultramem', 'train', {str(CONFIGS / 'demo.yaml')!r}, '--dry-run']\n"
        "from ultramem.cli import main\n"
        "main()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == "Error: training needs the package olmo_core: pip install 'ultramem[train]'\n"


def test_a_module_of_ours_that_is_missing_is_a_bug(invoke, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultramem.training.run", None)
    result = invoke("train", CONFIGS / "demo.yaml")
    assert isinstance(result.exception, ModuleNotFoundError)
    assert result.exception.name == "ultramem.training.run"

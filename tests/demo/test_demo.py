import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_a_short_demo_writes_its_report(tmp_path):
    arguments = [sys.executable, "demo/run.py", "--data", tmp_path / "data", "--runs", tmp_path / "runs"]
    arguments += ["--output", tmp_path / "report", "--facts", 16, "training.max_tokens=16384"]
    arguments += ["validation.interval_steps=2", "logging.interval_steps=1", "logging.memory_interval_steps=1"]

    command = list(map(str, arguments))
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=1200).stdout
    report = (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    for shown in ("table parameters", "FLOPs per token", "validation loss", "bits per byte", "the memory model is"):
        assert shown in output
        assert shown in report
    for name in ("loss", "coverage", "usage", "recall"):
        assert f"({name}.png)" in report
        with Image.open(tmp_path / "report" / f"{name}.png") as image:
            image.load()
    assert "ultramem train configs/demo_dense.yaml training.max_tokens=16384" in report
    assert report.count("Norway / Capital / name:") == 2


def test_models_of_unequal_cost_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import run

    configs = {"memory": tmp_path / "memory.yaml", "dense": tmp_path / "dense.yaml"}
    for name, file in configs.items():
        text = (ROOT / "configs" / ("demo.yaml" if name == "memory" else "demo_dense.yaml")).read_text(encoding="utf-8")
        width = "512" if name == "dense" else r"\1"
        file.write_text(re.sub(r"(?<=intermediate_size: )(\d+)", width, text), encoding="utf-8")
    data = make_data(tmp_path)
    with pytest.raises(SystemExit, match="differ by more than 1% in FLOPs per token"):
        run.check_comparable(configs, [f"data.folder={data}"])


def test_the_demo_compares_models_of_equal_cost(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import run

    configs = {name: ROOT / file for name, file in run.MODELS.items()}
    overrides = [f"data.folder={make_data(tmp_path)}", "training.max_steps=7"]
    assert run.check_comparable(configs, [*overrides, "training.max_tokens=null"]) == (128, 7)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", r"Error: unknown key 'optimizer.lrr': did you mean 'optimizer.lr'\?"),
        ("model.num_attention_heads=5", r"Error: .*hidden_size \(96\) must be a multiple of"),
    ],
)
def test_a_wrong_override_is_one_line(tmp_path, monkeypatch, override, message):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import run

    configs = {name: ROOT / file for name, file in run.MODELS.items()}
    with pytest.raises(SystemExit, match=message):
        run.check_comparable(configs, [f"data.folder={make_data(tmp_path)}", override])


def test_a_run_that_stopped_early_is_not_compared(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import run

    export = tmp_path / "step3-hf"
    export.mkdir()
    for name in ("config.json", "model.safetensors"):
        (export / name).write_text("{}")
    monkeypatch.setattr(run, "ultramem", lambda *_: "")
    with pytest.raises(SystemExit, match="stopped at step3-hf of 7 steps; start the demo again"):
        run.train("UltraMemV2", ROOT / "configs" / "demo.yaml", tmp_path, [], 7)


def test_a_command_that_fails_ends_the_demo(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    import run

    with pytest.raises(SystemExit, match="`ultramem info` ended with status 2"):
        run.ultramem("info", "/absent/model")


def make_data(folder):
    """Token files with the demo's vocabulary of 4,096."""
    from tiny_models import tiny_tokenizer
    from ultramem.data.prepare import PrepareConfig, prepare

    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    (folder / "text").mkdir()
    for number in range(20):
        (folder / "text" / f"{number}.txt").write_text(f"Text {number} about one thing and another. " * 20)
    source = PrepareConfig(
        (str(folder / "text"),), tokenizer=str(folder / "tokenizer"), validation_fraction=0.3, vocab_size=4096
    )
    prepare(source, folder / "tokens")
    return folder / "tokens"

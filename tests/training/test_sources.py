"""Whole runs on raw token files, mixtures and masked documents: what they write, and that they resume exactly."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tiny_sources import numbered_folder, pattern_tokens, write_config, write_raw
from tiny_training import assert_same_state, metrics_lines, run_training, training_state
from ultramem.errors import CheckpointError
from ultramem.evaluation.perplexity import evaluate_perplexity
from ultramem.training.run import resolve_config, train

FAST = {
    "training": {"max_steps": 2},
    "checkpoint": {"interval_steps": None},
    "validation": {"interval_steps": 1},
    "logging": {"memory_interval_steps": None},
}


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_raw_files_train_and_give_a_self_contained_model(tmp_path, data_folder, dtype):
    file = write_raw(tmp_path / "raw", pattern_tokens(2000), dtype)
    bare = shutil.copy(data_folder / "tokenizer" / "tokenizer.json", tmp_path / "bare.json")
    ids = {"eos_token_id": 0, "pad_token_id": 1}
    data = {"files": [str(file)], "tokenizer": str(bare), "dtype": dtype, **ids}
    folder = train(*resolve_config(write_config(tmp_path / "c.yaml", data, tmp_path / "run", **FAST)))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.vocab_size) == (0, 1, 64)
    # Nothing was set apart to measure the loss on.
    assert not any("validation/CE loss" in line for line in metrics_lines(tmp_path / "run"))


def test_validation_files_are_measured(tmp_path, data_folder):
    files = write_raw(tmp_path / "raw", pattern_tokens(2000)), write_raw(tmp_path / "held", pattern_tokens(100, seed=1))
    data = {"files": [str(files[0])], "tokenizer": str(data_folder / "tokenizer"), "validation_files": [str(files[1])]}
    folder = train(*resolve_config(write_config(tmp_path / "c.yaml", data, tmp_path / "run", **FAST)))
    line = metrics_lines(tmp_path / "run")[-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = evaluate_perplexity(model, files[1:], sequence_length_tokens=32).loss
    assert line["validation/CE loss"] == pytest.approx(expected, rel=1e-5)
    assert "validation/bits per byte" not in line


@pytest.fixture
def mixture(tmp_path, data_folder):
    """12 steps over two thirds of a data folder and a third of a raw file, with masked documents."""
    raw = write_raw(tmp_path / "raw", pattern_tokens(700))
    sources = [{"folder": str(numbered_folder(tmp_path / "a", data_folder, 7, 30)), "weight": 2}, {"files": [str(raw)]}]
    data = {"sources": sources, "mask_documents": True}
    checkpoint = {"interval_steps": 5, "keep": None}
    return write_config(tmp_path / "mixture.yaml", data, tmp_path / "whole", checkpoint=checkpoint)


def test_a_run_on_a_mixture_resumes_exactly(mixture, tmp_path):
    """In separate processes, past the end of the mixture: 12 steps of 4 sequences, a pass of 10 steps."""
    overrides = [f"data.mixture_tokens={10 * 4 * 32}"]
    run_training(mixture, *overrides)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "step5", tmp_path / "resumed" / "step5")
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(tmp_path / "whole" / name, tmp_path / "resumed" / name)
    # The data may have moved since.
    shutil.move(tmp_path / "a", tmp_path / "moved")
    settings = yaml.safe_load(mixture.read_text())
    settings["data"]["sources"][0]["folder"] = str(tmp_path / "moved")
    mixture.write_text(yaml.safe_dump(settings))
    run_training(mixture, *overrides, f"run.save_folder={tmp_path / 'resumed'}")
    states = [training_state(tmp_path / name / "step12", tmp_path) for name in ("whole", "resumed")]
    assert states[0]["epoch"] == 2
    assert_same_state(*states)


def test_a_changed_source_weight_or_length_is_not_resumed(mixture, tmp_path):
    train(*resolve_config(mixture, ["training.max_steps=2"]))
    sources = yaml.safe_load(mixture.read_text())["data"]["sources"]

    def refused(message, *overrides):
        with pytest.raises(CheckpointError, match=message):
            train(*resolve_config(mixture, ["training.max_steps=2", *overrides]))

    refused(r"data\.mixture_tokens: 256 → 384", "training.max_steps=3")
    refused(r"data\.mask_documents: True → False.*\(a new folder with 'run\.load_path", "data.mask_documents=false")
    refused(r"data\.fingerprint: \w+ → \w+", f"data.sources={[sources[0] | {'weight': 3}, sources[1]]}")
    tokens = np.fromfile(tmp_path / "raw" / "part-0-00000.npy", "<u2")
    tokens[-1] = 5
    write_raw(tmp_path / "raw", tokens)
    refused(r"data\.fingerprint: \w+ → \w+")
    # With its length spelt out, a mixture goes on into a second pass.
    tokens[-1] = pattern_tokens(700)[-1]
    write_raw(tmp_path / "raw", tokens)
    overrides = ["training.max_steps=3", "data.mixture_tokens=256"]
    assert train(*resolve_config(mixture, overrides)).name == "step3-hf"


def test_masking_documents_changes_training_and_validation(tmp_path, data_folder):
    """The validation loss of a run with masked documents is that of each document by itself."""
    losses = {}
    for masked in (True, False):
        data = {"folder": str(data_folder), "mask_documents": masked, "sequence_length_tokens": 128}
        model = {"max_position_embeddings": 128}
        folder = train(
            *resolve_config(write_config(tmp_path / "c.yaml", data, tmp_path / f"run{masked}", model=model, **FAST))
        )
        losses[masked] = metrics_lines(folder.parent)
    assert losses[True][0]["train/CE loss"] != losses[False][0]["train/CE loss"]

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runTrue" / "step2-hf")
    tokens = torch.from_numpy(np.fromfile(data_folder / "validation" / "part-00000.npy", "<u2").astype("int64"))
    total, count, start = 0.0, 0, 0
    for window in (tokens[:128], tokens[128:-1]):
        ends = [*(torch.nonzero(window == 0).flatten() + 1).tolist(), len(window)]
        begin = 0
        for end in sorted(set(ends)):
            with torch.no_grad():
                logits = model(window[None, begin:end]).logits[0]
            labels = tokens[start + begin + 1 : start + end + 1]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += len(labels)
            begin = end
        start += len(window)
    assert count == len(tokens) - 1
    assert losses[True][-1]["validation/CE loss"] == pytest.approx(total / count, rel=1e-5)

"""Which sequences a batch holds: the named ones are those that the loader gave."""

import re

import pytest
import torch
from typer.testing import CliRunner

from tiny_sources import numbered_folder, write_config
from ultramem.cli import app
from ultramem.errors import ConfigError
from ultramem.training.batches import build_data_loader
from ultramem.training.run import resolve_config
from ultramem.training.sequences import describe_batch, print_sequences, read_sequences


@pytest.fixture
def mixture_path(data_folder, tmp_path):
    sources = [
        {"folder": str(numbered_folder(tmp_path / f"d{token}", data_folder, token, 30)), "weight": weight}
        for token, weight in ((62, 3), (63, 1))
    ]
    return write_config(tmp_path / "mixture.yaml", {"sources": sources}, tmp_path / "run", run={"seed": 3})


@pytest.mark.parametrize("kind", ["config_path", "mixture_path"])
def test_the_description_of_a_batch_leads_to_its_tokens(request, kind):
    """Every batch of two epochs, sequence by sequence."""
    config, manifest = resolve_config(request.getfixturevalue(kind))
    loader = build_data_loader(config, manifest)
    for epoch in (1, 2):
        loader.reshuffle(epoch)
        for batch in loader:
            text = describe_batch(loader, config)
            first, last = map(int, re.search(rf"--show-sequences {epoch}:(\d+)-(\d+)`", text).groups())
            assert f"sequences {first}-{last} in the order of epoch {epoch} with seed 3" in text
            sequences = list(read_sequences(config, manifest, epoch, first, last))
            assert [sequence.position for sequence in sequences] == list(range(first, last + 1))
            assert torch.equal(torch.stack([sequence.tokens_T for sequence in sequences]), batch["input_ids"])
            if loader.batches_processed == 6:
                break
        loader.reset()


def test_files_and_tokens_are_named(config_path, data_folder):
    config, manifest = resolve_config(config_path)
    files = set()
    for sequence in read_sequences(config, manifest, 1, 0, 127):
        name, first, last = re.fullmatch(r"(.*), tokens ([\d,]+)-([\d,]+)", sequence.source).groups()
        first, last = (int(number.replace(",", "")) for number in (first, last))
        tokens = torch.from_file(name, shared=False, size=2048, dtype=torch.uint16).long()
        assert torch.equal(tokens[first : last + 1], sequence.tokens_T)
        files.add(name)
    assert files == {str(data_folder / "train" / f"part-0000{i}.npy") for i in (0, 1)}


def test_the_command_prints_them(config_path, mixture_path):
    result = CliRunner().invoke(app, ["train", str(config_path), "--show-sequences", "1:8-9"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"sequence 8 \(.*part-0000\d\.npy, tokens [\d,]+-[\d,]+\): '.*w\d+ w\d+.*'", lines[0])
    result = CliRunner().invoke(app, ["train", str(mixture_path), "--show-sequences", "2:3"])
    assert re.fullmatch(r"sequence 3 \(.*/d6[23]\): 'w\d+( w6[23])+'", result.stdout.strip())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("8-9", r"'8-9' names no sequences: give EPOCH:FIRST-LAST, e\.g\. 1:128-143"),
        ("1:a", "names no sequences"),
        ("0:1-2", r"no sequences 1-2 in epoch 0: an epoch, from 1, has the sequences 0-127"),
        ("1:120-128", "no sequences 120-128 in epoch 1"),
        ("1:9-8", "no sequences 9-8 in epoch 1"),
    ],
)
def test_what_names_no_sequences(config_path, text, message):
    with pytest.raises(ConfigError, match=message):
        print_sequences(*resolve_config(config_path), text)

"""The order of the training sequences: shares of a mixture, determinism, processes, resuming."""

from collections import Counter

import numpy as np
import pytest
import torch
import yaml

from tiny_sources import numbered_folder, pattern_tokens, write_config, write_raw
from ultramem.errors import DataError
from ultramem.training.batches import build_data_loader
from ultramem.training.run import resolve_config

LENGTH = 32


@pytest.fixture
def mixture(tmp_path, data_folder):
    """A configuration of 100 steps of 4 sequences: three quarters 7s from 60 sequences, a quarter 9s from 500."""
    numbered_folder(tmp_path / "small", data_folder, 7, 60)
    numbered_folder(tmp_path / "large", data_folder, 9, 500)
    sources = [{"folder": str(tmp_path / "small"), "weight": 3}, {"folder": str(tmp_path / "large"), "weight": 1}]
    return write_config(tmp_path / "mixture.yaml", {"sources": sources}, tmp_path / "run", training={"max_steps": 100})


def loader_of(config_path, *overrides, world_size=1, rank=0):
    loader = build_data_loader(*resolve_config(config_path, list(overrides)))
    loader.dp_world_size, loader.dp_rank = world_size, rank
    return loader


def batches(loader, epoch=1):
    loader.reshuffle(epoch)
    found = [batch["input_ids"] for batch in loader]
    loader.reset()
    return torch.stack(found)


def single_source(config_path, data_folder):
    return [f"data.folder={data_folder}", "data.sources=null"]


def test_shares_are_the_weights_and_every_step_is_there(mixture):
    steps_SBT = batches(loader_of(mixture))
    assert len(steps_SBT) == 100
    sequences = steps_SBT.flatten(0, 1)
    assert sequences.shape == (400, LENGTH)
    counts = Counter(sequences[:, 1].tolist())
    assert counts.keys() == {7, 9}
    assert counts[7] == pytest.approx(300, abs=2)
    # The small source is read five times, every sequence equally often but for one; of the large one nothing repeats.
    of_small = Counter(sequences[sequences[:, 1] == 7][:, 0].tolist())
    assert len(of_small) == 60
    assert set(of_small.values()) <= {4, 5, 6}
    of_large = Counter(sequences[sequences[:, 1] == 9][:, 0].tolist())
    assert max(of_large.values()) <= -(-500 // 62)
    # They are mixed all along, not one after the other.
    shares = (steps_SBT[:, :, 1] == 7).float().mean(dim=1)
    assert 0.6 < shares[:50].mean() < 0.9
    assert 0.6 < shares[50:].mean() < 0.9


def test_a_large_source_is_sampled_without_repetition(tmp_path, data_folder):
    numbered_folder(tmp_path / "a", data_folder, 7, 60)
    raw = write_raw(tmp_path / "raw", np.full(60 * LENGTH, 9))
    sources = [{"folder": str(tmp_path / "a")}, {"files": [str(raw)]}]
    path = write_config(tmp_path / "c.yaml", {"sources": sources}, tmp_path / "run", training={"max_steps": 20})
    sequences = batches(loader_of(path)).flatten(0, 1)
    firsts = Counter(sequences[sequences[:, 1] == 7][:, 0].tolist())
    assert sum(firsts.values()) == pytest.approx(40, abs=1)
    assert set(firsts.values()) == {1}


@pytest.mark.parametrize("data", ["mixture", "folder"])
def test_order_is_a_function_of_seed_and_epoch(mixture, data_folder, tmp_path, data):
    overrides = [] if data == "mixture" else single_source(mixture, data_folder)
    first = batches(loader_of(mixture, *overrides))
    again = batches(loader_of(mixture, *overrides, f"run.save_folder={tmp_path / 'again'}"))
    assert torch.equal(first, again)
    other_seed = batches(loader_of(mixture, *overrides, "run.seed=4", f"run.save_folder={tmp_path / 'other'}"))
    assert first.shape == other_seed.shape
    assert not torch.equal(first, other_seed)
    assert not torch.equal(first, batches(loader_of(mixture, *overrides), epoch=2))


@pytest.mark.parametrize("data", ["mixture", "folder"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_position_does_not_depend_on_the_number_of_processes(mixture, data_folder, data, world_size):
    """Every batch holds the same sequences, and a state saved by one process continues on several."""
    overrides = [] if data == "mixture" else single_source(mixture, data_folder)
    whole = batches(loader_of(mixture, *overrides))
    parts = [batches(loader_of(mixture, *overrides, world_size=world_size, rank=r)) for r in range(world_size)]
    assert torch.equal(torch.stack(parts, dim=2).flatten(1, 2), whole)

    alone = loader_of(mixture, *overrides)
    alone.reshuffle(1)
    iterator = iter(alone)
    for _ in range(5):
        next(iterator)
    rest = []
    for rank in range(world_size):
        loader = loader_of(mixture, *overrides, world_size=world_size, rank=rank)
        loader.load_state_dict(alone.state_dict())
        loader.reshuffle(1)
        rest.append(torch.stack([batch["input_ids"] for batch in loader]))
    assert torch.equal(torch.stack(rest, dim=2).flatten(1, 2), whole[5:])


def test_a_source_too_small_for_a_sequence(tmp_path, data_folder):
    sources = [{"folder": str(data_folder)}, {"files": [str(write_raw(tmp_path, pattern_tokens(31)))]}]
    path = write_config(tmp_path / "c.yaml", {"sources": sources}, tmp_path / "run")
    with pytest.raises(
        DataError, match=r"source '.*part-0-00000\.npy' holds no sequence of 32 tokens: lower 'data\.seq"
    ):
        loader_of(path)


def test_a_weight_too_small_for_a_sequence(mixture):
    message = r"the weight of '.*small' \(1e-06\) gives it less than one of the 402 sequences of 32 tokens: raise its"
    with pytest.raises(DataError, match=message):
        loader_of(mixture, "data.sources=" + str(_sources_with(mixture, 1e-6)))


def _sources_with(path, weight):
    sources = yaml.safe_load(path.read_text())["data"]["sources"]
    return [sources[0] | {"weight": weight}, sources[1]]


def test_a_mixture_shorter_than_a_batch(mixture):
    with pytest.raises(
        DataError, match=r"a mixture of 96 tokens \('data.mixture_tokens'\) has 3 sequences of 32 tokens"
    ):
        loader_of(mixture, "data.mixture_tokens=96")


def test_an_id_outside_of_the_vocabulary_further_on_in_a_file(tmp_path, data_folder):
    tokens = pattern_tokens(8192)
    tokens[6000] = 64
    file = write_raw(tmp_path, tokens)
    data = {"files": [str(file)], "tokenizer": str(data_folder / "tokenizer")}
    loader = loader_of(write_config(tmp_path / "c.yaml", data, tmp_path / "run"))
    with pytest.raises(
        DataError, match=r"ids outside of the vocabulary of 64 tokens: a token file is damaged .*\[64\]"
    ):
        batches(loader)

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tiny_models import tiny_llama
from ultramem.errors import DataError
from ultramem.evaluation.perplexity import evaluate_perplexity

VOCAB_SIZE = 97


@pytest.fixture(scope="module")
def model():
    return tiny_llama(VOCAB_SIZE)


def write_tokens(path, num_tokens, seed=0, dtype="<u2"):
    tokens = np.random.default_rng(seed).integers(0, VOCAB_SIZE, num_tokens).astype(dtype)
    tokens.tofile(path)
    return torch.from_numpy(tokens.astype(np.int64))


def reference_losses(model, tokens, length):
    """Per-token losses, one window after the other, by the definition."""
    losses = []
    for start in range(0, len(tokens) - 1, length):
        labels = tokens[start + 1 : start + 1 + length]
        with torch.no_grad():
            logits = model(input_ids=tokens[None, start : start + len(labels)]).logits[0]
        losses.append(F.cross_entropy(logits, labels, reduction="none"))
    return torch.cat(losses)


@pytest.mark.parametrize(
    ("num_tokens", "length", "batch_size"), [(2, 8, 4), (9, 8, 4), (100, 8, 3), (65, 16, 2), (33, 1, 5)]
)
def test_every_token_but_the_first_is_predicted_once(make_model, tmp_path, num_tokens, length, batch_size):
    model = make_model(VOCAB_SIZE)
    tokens = write_tokens(tmp_path / "a.npy", num_tokens)
    result = evaluate_perplexity(model, [tmp_path / "a.npy"], sequence_length_tokens=length, batch_size=batch_size)
    expected = reference_losses(model, tokens, length)
    assert result.num_tokens == num_tokens - 1 == len(expected)
    assert result.loss == pytest.approx(expected.double().mean().item(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert result.tokens_per_s > 0
    assert result.bits_per_byte is None


def test_files_are_read_apart_and_empty_ones_add_nothing(model, tmp_path):
    first = write_tokens(tmp_path / "a.npy", 21)
    second = write_tokens(tmp_path / "b.npy", 30, seed=1, dtype="<u2")
    write_tokens(tmp_path / "empty.npy", 0)
    files = [tmp_path / name for name in ("a.npy", "empty.npy", "b.npy")]
    result = evaluate_perplexity(model, files, sequence_length_tokens=8)
    expected = torch.cat([reference_losses(model, first, 8), reference_losses(model, second, 8)])
    assert result.num_tokens == 20 + 29
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("max_tokens", [1, 8, 13, 25, 1000])
def test_max_tokens_reads_a_prefix(model, tmp_path, max_tokens):
    first = write_tokens(tmp_path / "a.npy", 21)
    second = write_tokens(tmp_path / "b.npy", 30, seed=1)
    files = [tmp_path / "a.npy", tmp_path / "b.npy"]
    result = evaluate_perplexity(model, files, sequence_length_tokens=8, max_tokens=max_tokens)
    expected = torch.cat([reference_losses(model, first, 8), reference_losses(model, second, 8)])[:max_tokens]
    assert result.num_tokens == len(expected)
    assert result.loss == pytest.approx(expected.mean().item(), rel=1e-5)


def test_uint32_files_and_bits_per_byte(model, tmp_path):
    tokens = write_tokens(tmp_path / "a.npy", 50, dtype="<u4")
    result = evaluate_perplexity(
        model, [tmp_path / "a.npy"], token_dtype="uint32", sequence_length_tokens=16, bytes_per_token=3.5
    )
    loss = reference_losses(model, tokens, 16).mean().item()
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(loss / math.log(2) / 3.5, rel=1e-5)
    assert result.to_dict()["perplexity"] == result.perplexity


def test_a_uniform_model_needs_log2_of_the_vocabulary(tmp_path):
    model = tiny_llama(VOCAB_SIZE)
    torch.nn.init.zeros_(model.lm_head.weight)
    write_tokens(tmp_path / "a.npy", 40)
    result = evaluate_perplexity(model, [tmp_path / "a.npy"], sequence_length_tokens=16, bytes_per_token=1.0)
    assert result.perplexity == pytest.approx(VOCAB_SIZE, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(math.log2(VOCAB_SIZE), rel=1e-5)


def test_bf16_is_near_fp32_but_not_the_same(model, tmp_path):
    write_tokens(tmp_path / "a.npy", 200)
    exact = evaluate_perplexity(model, [tmp_path / "a.npy"], sequence_length_tokens=32)
    rounded = evaluate_perplexity(model, [tmp_path / "a.npy"], sequence_length_tokens=32, dtype=torch.bfloat16)
    assert rounded.loss != exact.loss
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)


def test_progress_adds_up_and_the_mode_is_restored(model, tmp_path):
    write_tokens(tmp_path / "a.npy", 70)
    seen = []
    model.train()
    try:
        result = evaluate_perplexity(model, [tmp_path / "a.npy"], sequence_length_tokens=8, progress=seen.append)
        assert model.training
    finally:
        model.eval()
    assert sum(seen) == result.num_tokens == 69


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ["nothing to predict", "at least two tokens"]),
        (b"\x01\x00", ["nothing to predict"]),
        (b"\x01\x00\x02", ["holds 3 bytes", "multiple of the 2", "ultramem data prepare"]),
        (np.full(9, VOCAB_SIZE, "<u2").tobytes(), ["token 97", "only 97 entries", "different tokenizers"]),
    ],
)
def test_unusable_files_are_named(model, tmp_path, content, said):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(DataError) as caught:
        evaluate_perplexity(model, [tmp_path / "a.npy"], sequence_length_tokens=8)
    for part in said:
        assert part in str(caught.value)


def test_a_missing_file_is_named(model, tmp_path):
    with pytest.raises(DataError, match=r"absent\.npy cannot be read"):
        evaluate_perplexity(model, [tmp_path / "absent.npy"], sequence_length_tokens=8)


def test_sizes_below_one_are_refused(model, tmp_path):
    with pytest.raises(DataError, match=r"sequence length 0.*must each be at least 1"):
        evaluate_perplexity(model, [], sequence_length_tokens=0)

from types import SimpleNamespace

import pytest
import torch

from tiny_models import tiny_llama, tiny_tokenizer, tiny_ultramem
from ultramem.errors import ConfigError
from ultramem.inference.generate import generate_batch, generate_stream


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module", params=[tiny_llama, tiny_ultramem])
def model(request, tokenizer):
    return request.param(len(tokenizer))


def text_of(model, tokenizer, prompt="The capital", **options):
    return "".join(generate_stream(model, tokenizer, prompt, **{"max_new_tokens": 20, **options}))


def test_temperature_zero_takes_the_likeliest_token_each_time(model, tokenizer):
    ids = tokenizer("The capital")["input_ids"]
    expected = []
    with torch.no_grad():
        for _ in range(12):
            token = model(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            expected.append(token)
    text = text_of(model, tokenizer, temperature=0, max_new_tokens=12, seed=1)
    assert text == tokenizer.decode(expected).rstrip("\ufffd")
    assert text


def test_same_seed_same_text_and_another_seed_another(model, tokenizer):
    assert text_of(model, tokenizer, seed=3) == text_of(model, tokenizer, seed=3)
    assert len({text_of(model, tokenizer, seed=seed) for seed in range(4)}) > 1


def test_the_largest_seed_is_accepted(model, tokenizer):
    assert text_of(model, tokenizer, seed=2**64 - 1)


def test_a_tiny_top_p_is_greedy(model, tokenizer):
    assert text_of(model, tokenizer, top_p=1e-6, seed=5) == text_of(model, tokenizer, temperature=0)


def test_sampling_reaches_beyond_the_fifty_likeliest_tokens(tokenizer):
    model = tiny_llama(len(tokenizer), seed=1)
    torch.nn.init.zeros_(model.lm_head.weight)
    # All tokens are equally likely: fifty tokens, were they the limit, could not give more than fifty different ones.
    ids = {
        token
        for seed in range(6)
        for token in tokenizer(text_of(model, tokenizer, seed=seed, max_new_tokens=60))["input_ids"]
    }
    assert len(ids) > 60


def test_it_stops_where_the_positions_end(model, tokenizer):
    num_prompt_tokens = len(tokenizer("The capital")["input_ids"])
    steps = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        text_of(model, tokenizer, temperature=1.0, seed=2, max_new_tokens=10_000)
    finally:
        handle.remove()
    assert 0 < len(steps) <= model.config.max_position_embeddings - num_prompt_tokens


def test_an_empty_prompt_starts_a_document(model, tokenizer):
    assert text_of(model, tokenizer, prompt="", seed=0)


class Scripted:
    """Stands for a model that writes given tokens."""

    config = SimpleNamespace(max_position_embeddings=1000)
    device = torch.device("cpu")

    def __init__(self, ids, failure=None):
        self.ids, self.failure = ids, failure
        self.num_written = 0

    def generate(self, input_ids, streamer, stopping_criteria, **_):
        streamer.put(input_ids)
        for token in self.ids:
            if stopping_criteria(input_ids, None).all():
                break
            self.num_written += 1
            streamer.put(torch.tensor([token]))
        if self.failure:
            raise self.failure
        streamer.end()


@pytest.mark.parametrize("text", ["日本語 und 🙂🙃 naïve…\nGrüße aus Köln", " 🙂", "日本🙂語"])
def test_pieces_never_cut_a_character(text):
    tokenizer = tiny_tokenizer(text=["plain ascii"])
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # characters come in several tokens
    pieces = list(generate_stream(Scripted(ids), tokenizer, "x"))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_an_unfinished_character_at_the_end_is_dropped():
    tokenizer = tiny_tokenizer(text=["plain ascii"])
    ids = tokenizer("done 🙂")["input_ids"][:-1]
    assert tokenizer.decode(ids).endswith("\ufffd")
    assert "".join(generate_stream(Scripted(ids), tokenizer, "x")) == "done "


def test_a_failure_inside_reaches_the_reader(tokenizer):
    stream = generate_stream(Scripted([], failure=RuntimeError("out of memory")), tokenizer, "x")
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream)


def test_closing_the_stream_ends_the_generation(tokenizer):
    model = Scripted(tokenizer("word " * 20_000)["input_ids"])
    stream = generate_stream(model, tokenizer, "x")
    assert next(stream)
    stream.close()
    assert model.num_written < len(model.ids)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_new_tokens": 0}, ["max_new_tokens 0", "at least 1 new token"]),
        ({"temperature": -0.5}, ["temperature -0.5", "0 (greedy) or more"]),
        ({"temperature": float("nan")}, ["temperature nan", "finite temperature of 0 (greedy) or more"]),
        ({"temperature": float("inf")}, ["temperature inf", "finite temperature of 0 (greedy) or more"]),
        ({"seed": 2**70}, [f"seed {2**70} is out of range", f"from 0 to {2**64 - 1}"]),
        ({"seed": -(2**63) - 1}, ["is out of range", "from 0 to"]),
        (
            {"prompt": "ab\udcffc"},
            ["'\\udcff' at character 2", "only valid Unicode text", "encode the prompt as UTF-8"],
        ),
        ({"top_p": 0.0}, ["top_p 0.0", "above 0 and at most 1"]),
        ({"top_p": 1.5}, ["top_p 1.5"]),
        (
            {"prompt": "word " * 64},
            ["64 positions", "max_position_embeddings", "shorten the prompt to at most 63 tokens"],
        ),
    ],
)
def test_values_out_of_range_are_refused_at_once(tokenizer, options, said):
    with pytest.raises(ConfigError) as caught:
        generate_stream(tiny_llama(len(tokenizer)), tokenizer, options.pop("prompt", "The"), **options)
    for part in said:
        assert part in str(caught.value)


def test_a_batch_continues_each_prompt_as_if_it_were_alone(model, tokenizer):
    prompts = ["The capital", "Sweden", "", "The capital of Norway is Oslo. The capital of"]
    alone = [text_of(model, tokenizer, prompt, temperature=0) for prompt in prompts]
    assert generate_batch(model, tokenizer, prompts, temperature=0, max_new_tokens=20) == alone
    sampled = [generate_batch(model, tokenizer, prompts, seed=seed, max_new_tokens=20) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_batch_stops_where_the_positions_of_its_longest_prompt_end(model, tokenizer):
    prompts = ["word " * 10, "The"]
    left = model.config.max_position_embeddings - len(tokenizer(prompts[0])["input_ids"])
    steps = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: steps.append(1))
    try:
        generate_batch(model, tokenizer, prompts, seed=2, max_new_tokens=10_000)
    finally:
        handle.remove()
    assert 0 < len(steps) <= left
    with pytest.raises(ConfigError, match="shorten the prompt to at most 63 tokens"):
        generate_batch(model, tokenizer, ["The", "word " * 64])


@pytest.mark.slow
def test_compiled_text_is_the_same(tokenizer, fresh_compiler):
    model = tiny_ultramem(len(tokenizer))
    expected = text_of(model, tokenizer, temperature=0)
    assert text_of(model, tokenizer, temperature=0, compiled=True) == expected

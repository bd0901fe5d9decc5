"""Text from a causal language model, piece by piece as it is made."""

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    CompileConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from ultramem.errors import ConfigError

_BROKEN_CHARACTER = "\ufffd"


class _StopWhenAsked(StoppingCriteria):
    """Ends the generation when its reader has gone."""

    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), device=input_ids.device)


def generate_stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    compiled: bool = False,
) -> Iterator[str]:
    """Continue a prompt.

    The generation runs in a thread of its own; closing the iterator early ends it after the current token. It stops at
    `max_new_tokens`, at the model's end-of-text token, or where the model's positions end.

    Args:
        model: any causal language model of `transformers` that generates, in eval mode.
        tokenizer: the model's own.
        prompt: text to continue; an empty one starts from the end-of-text token, which stands before every document.
        max_new_tokens: at most so many tokens, at least 1.
        temperature: 0 always takes the likeliest token; larger values draw from softmax(logits / temperature).
        top_p: draw from the smallest set of tokens whose probabilities sum to this, in (0, 1].
        seed: of the draws (PyTorch's global generator is seeded); None leaves the generator as it is.
        compiled: compile the model for this generation (`torch.compile`), in place of our kernels for CPUs.

    Yields:
        Pieces of the continuation, without the prompt, at least a word at a time where words are separated by blanks.
        No piece cuts a character; an unfinished one at the very end is dropped.

    Raises:
        ConfigError: a value is out of range, or the prompt is no valid text or leaves no position for a new token.
    """
    _check_options(max_new_tokens, temperature, top_p, seed)
    ids = _encode(model, tokenizer, prompt)
    options = _options(model, tokenizer, max_new_tokens, len(ids), temperature, top_p, compiled)
    return _run(model, tokenizer, ids, options, seed)


def generate_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    compiled: bool = False,
) -> list[str]:
    """Continue several prompts at once, each as if it were alone; arguments and errors as of `generate_stream`.

    Greedy continuations are those of each prompt alone, up to rounding; sampled ones depend on the batch, whose rows
    share one generator. The longest prompt decides where the model's positions end.

    Returns:
        The continuations, without the prompts, in their order.
    """
    _check_options(max_new_tokens, temperature, top_p, seed)
    rows = [_encode(model, tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    options = _options(model, tokenizer, max_new_tokens, longest, temperature, top_p, compiled)
    # On the left, so that all continuations start at the same place.
    padded = [[options["pad_token_id"]] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    if seed is not None:
        torch.manual_seed(seed)
    generated = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        **options,
    )
    texts = tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
    return [text.rstrip(_BROKEN_CHARACTER) for text in texts]


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """A prompt's token ids, at least one. Raises ConfigError."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"the prompt holds {prompt[error.start]!a} at character {error.start}, half of a surrogate pair or a "
            f"byte that is not UTF-8; only valid Unicode text can be continued: encode the prompt as UTF-8."
        ) from error
    ids: list[int] = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    num_positions = model.config.max_position_embeddings
    if len(ids) >= num_positions:
        raise ConfigError(
            f"the prompt is {len(ids)} tokens long, but the model has {num_positions} positions "
            f"(max_position_embeddings) for the prompt and its continuation: shorten the prompt to at most "
            f"{num_positions - 1} tokens."
        )
    return ids


def _options(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    num_prompt_tokens: int,
    temperature: float,
    top_p: float,
    compiled: bool,
) -> dict[str, Any]:
    """Arguments of the model's ``generate``."""
    num_positions_left = model.config.max_position_embeddings - num_prompt_tokens
    options: dict[str, Any] = {
        "max_new_tokens": min(max_new_tokens, num_positions_left),
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    }
    if temperature:
        # top_k=0: transformers would otherwise draw from the fifty likeliest tokens only.
        options |= {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    else:
        options["do_sample"] = False
    if compiled:
        settings = CompileConfig(fullgraph=False, mode=None)
        # transformers would compile on accelerators only.
        settings._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": settings}
    return options


def _check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    if max_new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise ConfigError(
            f"cannot generate with max_new_tokens {max_new_tokens}, temperature {temperature} and top_p {top_p}: give "
            f"at least 1 new token, a finite temperature of 0 (greedy) or more, and a top_p above 0 and at most 1."
        )
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise ConfigError(f"seed {seed} is out of range: give a whole number from 0 to {2**64 - 1}.")


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    options: dict[str, Any],
    seed: int | None,
) -> Iterator[str]:
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    reader_gone = threading.Event()
    failures: list[BaseException] = []
    input_ids = torch.tensor([ids], device=model.device)

    def work() -> None:
        try:
            if seed is not None:
                torch.manual_seed(seed)
            model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopWhenAsked(reader_gone)]),
                **options,
            )
        except BaseException as error:  # handed to the reader, who would otherwise wait for ever
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        held_back = ""
        for piece in streamer:
            text = held_back + piece
            # A character whose bytes have not all come decodes to U+FFFD at the end of the text.
            ready = text.rstrip(_BROKEN_CHARACTER)
            held_back = text[len(ready) :]
            if ready:
                yield ready
    finally:
        reader_gone.set()
        thread.join()
    if failures:
        raise failures[0]

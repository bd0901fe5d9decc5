"""One decode step as a model's users have it: the next token of every sequence, behind a filled KV cache."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from ultramem.benchmarks.measure import available_bytes

# Of the memory that is free, the share that caches may take.
CACHE_SHARE = 0.6


def make_cache(model: PreTrainedModel, batch_size: int, num_tokens: int) -> Cache:
    """An empty cache: the one that greedy ``generate`` of this model makes by itself.

    Args:
        model: a causal language model, ours or one of transformers.
        batch_size: B.
        num_tokens: that will be in it.
    """
    made: dict[str, Any] = {}
    settings = model.generation_config
    model._prepare_cache_for_generation(settings, made, GenerationMode.GREEDY_SEARCH, batch_size, num_tokens)
    cache: Cache = made["past_key_values"]
    return cache


def fill_cache(model: PreTrainedModel, batch_size: int, kv_length_tokens: int) -> Cache:
    """A cache with random keys and values of so many tokens for each sequence."""
    # And the token that a step appends.
    cache, config = make_cache(model, batch_size, kv_length_tokens + 1), model.config
    weight = next(model.parameters())
    shape = (1, config.num_key_value_heads, kv_length_tokens, config.hidden_size // config.num_attention_heads)
    with torch.inference_mode():
        for layer in range(config.num_hidden_layers):
            # One sequence for all: drawing gigabytes of random numbers takes longer than reading them.
            keys, values = (
                torch.randn(shape, dtype=weight.dtype, device=weight.device).expand(batch_size, -1, -1, -1)
                for _ in range(2)
            )
            cache.update(keys, values, layer)
    return cache


class DecodeStep:
    """A model's decode step at one batch size, to be called again and again.

    Args:
        model: a causal language model in evaluation mode.
        cache: a filled cache; models with the same attention may share one, for a step leaves it as it was.
        batch_size: B, the cache's sequences.

    Attributes:
        last_ids_B1: the tokens of the last step that was prepared.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch_size: int) -> None:
        self.model, self.cache, self.batch_size = model, cache, batch_size
        self.kv_length_tokens = cache.get_seq_length()
        self.last_ids_B1 = self.draw()

    def draw(self) -> Tensor:
        """Random tokens [B, 1]."""
        return torch.randint(self.model.config.vocab_size, (self.batch_size, 1), device=self.model.device)

    def prepare(self) -> Callable[[], Tensor]:
        """Draw fresh tokens, untimed, and return the step."""
        self._forget()
        ids_B1 = self.last_ids_B1 = self.draw()
        return lambda: self(ids_B1)

    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Logits [B, 1, vocabulary] of the token after the given one."""
        logits: Tensor = self._run(ids_B1).logits
        return logits

    def run_with_statistics(self, ids_B1: Tensor, **options: Any) -> Any:
        """The model's whole output for the same step; ``options`` go to the model."""
        self._forget()
        return self._run(ids_B1, **options)

    def _run(self, ids_B1: Tensor, **options: Any) -> Any:
        with torch.inference_mode():
            return self.model(input_ids=ids_B1, past_key_values=self.cache, use_cache=True, **options)

    def _forget(self) -> None:
        # The token that the step before appended, also by another model that shares the cache.
        extra = self.cache.get_seq_length() - self.kv_length_tokens
        if extra:
            self.cache.crop(-extra)


class CapturedDecodeStep(DecodeStep):
    """A decode step as a CUDA graph, as servers run it: the host starts one graph instead of hundreds of kernels.

    What is captured is the model's own forward on the kernels of its operators.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache, batch_size: int) -> None:
        super().__init__(model, cache, batch_size)
        self._ids_B1 = self.draw()
        # Kernels are compiled and tuned, and libraries set up, before anything is captured.
        stream = torch.cuda.Stream(model.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(model.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._forget()
                self._run(self._ids_B1)
        torch.cuda.current_stream(model.device).wait_stream(stream)
        self._forget()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = cast(Tensor, self._run(self._ids_B1).logits)
        # A cache that kept this token would make room for more elsewhere, and the graph knows this place alone.
        self._forget()

    def prepare(self) -> Callable[[], Tensor]:
        """Draw fresh tokens, untimed, and return the step."""
        timed = super().prepare()
        self._ids_B1.copy_(self.last_ids_B1)
        return timed

    def __call__(self, ids_B1: Tensor) -> Tensor:
        """Logits [B, 1, vocabulary] of the token after the one that was prepared, valid until the next step."""
        del ids_B1
        self._graph.replay()
        return self._logits


def make_step(model: PreTrainedModel, cache: Cache, batch_size: int) -> DecodeStep:
    """The decode step that is measured on a model's device: on a CUDA device a captured one."""
    kind = CapturedDecodeStep if model.device.type == "cuda" else DecodeStep
    return kind(model, cache, batch_size)


def cache_bytes(model: PreTrainedModel, batch_size: int, kv_length_tokens: int) -> int:
    """Bytes of the keys and values of so many sequences."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    element_size = next(model.parameters()).element_size()
    return int(2 * batch_size * kv_length_tokens * width * config.num_hidden_layers * element_size)


def fitting_kv_length(
    model: PreTrainedModel, batch_size: int, wanted_tokens: int, num_caches: int = 1, free_bytes: int | None = None
) -> int:
    """The longest cache that fits into free memory, halving from the wanted length.

    Args:
        model: whose keys and values are kept.
        batch_size: B.
        wanted_tokens: the longest length of interest.
        num_caches: caches that are kept at once.
        free_bytes: memory that is free; None asks the system.

    Returns:
        tokens per sequence, at least 1.
    """
    free = available_bytes(model.device) if free_bytes is None else free_bytes
    length = wanted_tokens
    while free is not None and length > 1 and num_caches * cache_bytes(model, batch_size, length) > CACHE_SHARE * free:
        length //= 2
    return length

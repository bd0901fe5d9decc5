"""A model of ours or of transformers as lm-eval asks it: lm-eval's own wrapper, with our errors and progress."""

from collections.abc import Callable
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ultramem.errors import DataError


class HarnessModel(HFLM):
    """Scores requests exactly as lm-eval's `hf` model does; the arithmetic is that of `HFLM`.

    Args:
        model: in eval mode, where it is to run.
        tokenizer: its tokenizer, which decides what precedes a text (docs/evaluation.md).
        batch_size: requests per forward pass.
        dtype: arithmetic of the matrix products (autocast when it is not float32); log-probabilities are fp32.
        progress: called with the numbers of answered and of known requests; lm-eval asks one kind after the other.

    Attributes:
        num_requests: requests of which the log-likelihood was asked.
        num_truncated: those of them whose text did not fit the model's positions, so that its beginning was cut off.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            mixed_precision_dtype=None if dtype == torch.float32 else dtype,
            softmax_dtype=torch.float32,
        )
        self.num_requests = self.num_truncated = 0
        self._num_asked = self._num_answered = 0
        self._progress = progress
        self.set_cache_hook(self)

    def add_partial(self, *_: Any) -> None:
        """lm-eval's hook for a cache of answers, called with each of them: counts them."""
        self._num_answered += 1
        if self._progress is not None:
            self._progress(self._num_answered, self._num_asked)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation, and whether greedy decoding would write it."""
        self._num_asked += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood in nats of each text, in windows of the model's positions."""
        self._num_asked += len(requests)
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that the model writes after each prompt."""
        self._num_asked += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        for texts, context, continuation in requests:
            if not continuation:
                raise DataError(
                    f"the tokenizer makes no token of its own out of {texts[1]!r} behind its context, so that there is "
                    f"nothing to score. Leave that task out, or evaluate a model whose tokenizer splits text at blanks."
                )
            if len(continuation) > self.max_length:
                raise DataError(
                    f"a text to be scored has {len(continuation)} tokens, more than the {self.max_length} positions of "
                    f"the model. Leave that task out, or evaluate a model with more positions."
                )
            self.num_truncated += len(context) + len(continuation) > self.max_length + 1
        self.num_requests += len(requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

"""A KV cache whose room is taken once: new tokens are written in place, not appended by copying all before them."""

from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.generation.configuration_utils import GenerationMode

from ultramem.model.configuration import UltraMemConfig


class ReservedLayer(DynamicLayer):
    """Keys and values of one block, views of storage with room for more.

    To transformers it is a `DynamicLayer`; storage is made anew where one of its methods has put other tensors in place
    of the views, or where the room does not suffice.

    Args:
        num_tokens: room to reserve.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_tokens = num_tokens
        self._storage: tuple[Tensor, Tensor] | None = None

    def reserve(self, num_new_tokens: int) -> tuple[Tensor, Tensor]:
        """Storage [B, H, room, d] of keys and of values: the tokens so far, and room for some more."""
        assert self.keys is not None
        assert self.values is not None
        views = (self.keys, self.values)
        needed = self.keys.shape[2] + num_new_tokens
        if self._storage is None or self._storage[0].shape[2] < needed or not self._holds(views):
            # Twice as much as is needed: whoever continues a finished generation does so more than once.
            room = self.num_tokens if needed <= self.num_tokens else 2 * needed
            self._storage = _with_room(self.keys, room), _with_room(self.values, room)
        return self._storage

    def set_length(self, num_tokens: int) -> None:
        """Say how many tokens the storage holds."""
        assert self._storage is not None
        self.keys, self.values = (storage.narrow(2, 0, num_tokens) for storage in self._storage)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new keys and values [B, H, T, d] behind those so far; returns all."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        start, num_new = self.get_seq_length(), key_states.shape[2]
        for storage, states in zip(self.reserve(num_new), (key_states, value_states), strict=True):
            storage[:, :, start : start + num_new] = states
        self.set_length(start + num_new)
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.keys.shape[2] if self.keys is not None else 0

    def reset(self) -> None:
        """Forget the tokens and let go of the storage."""
        self._storage = None
        super().reset()

    def _holds(self, views: tuple[Tensor, Tensor]) -> bool:
        assert self._storage is not None
        return all(
            view.data_ptr() == storage.data_ptr() and view.stride() == storage.stride() and len(view) == len(storage)
            for view, storage in zip(views, self._storage, strict=True)
        )


def _with_room(states: Tensor, num_tokens: int) -> Tensor:
    storage = states.new_empty(*states.shape[:2], num_tokens, states.shape[3])
    storage[:, :, : states.shape[2]] = states
    return storage


class DecodingCache(Cache):
    """The KV cache of `UltraMemForCausalLM.generate`, with which `decode_step` works.

    Args:
        config: of the decoder; its memories must not look back at earlier tokens.
        num_tokens: room to reserve for each sequence; more is found when it is needed.
    """

    layers: list[ReservedLayer]  # type: ignore[assignment]

    def __init__(self, config: UltraMemConfig, num_tokens: int) -> None:
        super().__init__(layers=[ReservedLayer(num_tokens) for _ in range(config.num_hidden_layers)])

    @staticmethod
    def suits(config: UltraMemConfig) -> bool:
        """Whether keys and values are all that a decoder of these settings keeps of earlier tokens."""
        memory = config.memory_config
        return memory is None or memory.num_past_tokens == 0


class ReservingGenerationMixin(GenerationMixin):
    """`generate` of transformers; where it would make a cache that grows, it makes a `DecodingCache` of full size."""

    config: UltraMemConfig

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """As in transformers, but for the cache that is made by default."""
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        made = model_kwargs.get("past_key_values")
        one_token_at_a_time = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if (
            given is None
            and type(made) is DynamicCache
            and not (made.offloading or generation_config.is_assistant)
            and one_token_at_a_time
            and DecodingCache.suits(self.config)
        ):
            num_tokens = min(max_cache_length, self.config.max_position_embeddings)
            model_kwargs["past_key_values"] = DecodingCache(self.config, num_tokens)

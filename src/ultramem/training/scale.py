"""``--scale``: a run's config shrunk to a tiny run of the same shape, to try a config before it costs anything."""

import copy
import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from ultramem.errors import ConfigError
from ultramem.layers import Span, parse_placement
from ultramem.model import UltraMemConfig
from ultramem.training.config import RunConfig


@dataclass(frozen=True)
class Scale:
    """Upper limits of a scaled run; what is smaller stays as it is.

    Attributes:
        hidden_size: D. Every other width shrinks in proportion to it.
        num_attention_heads: a power of two that leaves heads of even width.
        num_hidden_layers: blocks; placements are mapped to them.
        num_keys: keys per side of one memory's own share of the rows.
        top_k: rows that a head selects.
        num_memory_heads: heads of a memory.
        num_experts: experts of a mixture.
        num_experts_per_tok: experts that a token visits.
        sequence_length_tokens: of one training sequence.
        global_batch_sequences: of one optimizer step.
        micro_batch_sequences: of one forward, where the config cuts its batches.
        num_steps: optimizer steps.
        validation_tokens: tokens of one validation.
    """

    hidden_size: int
    num_attention_heads: int
    num_hidden_layers: int
    num_keys: int
    top_k: int
    num_memory_heads: int
    num_experts: int
    num_experts_per_tok: int
    sequence_length_tokens: int
    global_batch_sequences: int
    micro_batch_sequences: int
    num_steps: int
    validation_tokens: int


SCALES = {
    "tiny": Scale(
        hidden_size=32,
        num_attention_heads=4,
        # The published placements on 20 blocks map to five without meeting.
        num_hidden_layers=5,
        num_keys=16,
        top_k=4,
        num_memory_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        sequence_length_tokens=32,
        global_batch_sequences=8,
        micro_batch_sequences=2,
        num_steps=20,
        validation_tokens=1024,
    ),
}
# Widths below this say nothing about a layer.
MIN_WIDTH = 4
# They belong to the data, whose tokenizer a tiny run may have changed.
OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


def scale_config(config: RunConfig, model: UltraMemConfig, name: str) -> RunConfig:
    """A config of the same shape and a tiny size; scaling what is scaled already changes nothing.

    Types, placement, tables, initialisation, optimizer and the proportions of the schedule are kept. Vocabulary and
    special tokens become those of the data. The run folder gets the scale's name, so that no real run is touched.

    Args:
        config: a resolved config; it is left as it is.
        model: what its model section describes.
        name: one of `SCALES`.

    Raises:
        ConfigError: no such scale.
    """
    if name not in SCALES:
        raise ConfigError(f"there is no scale '{name}': --scale takes one of {', '.join(SCALES)}")
    scale, scaled = SCALES[name], copy.deepcopy(config)
    scaled.model = _scale_model(config.model, model, scale)
    if not scaled.save_folder.name.endswith(f"-{name}"):
        scaled.run.save_folder = f"{scaled.save_folder}-{name}"
    scaled.data.sequence_length_tokens = min(config.data.sequence_length_tokens, scale.sequence_length_tokens)
    training = scaled.training
    training.global_batch_sequences = min(training.global_batch_sequences, scale.global_batch_sequences)
    if training.micro_batch_sequences is not None:
        micro_batch_sequences = min(training.micro_batch_sequences, scale.micro_batch_sequences)
        training.micro_batch_sequences = math.gcd(training.global_batch_sequences, micro_batch_sequences)
    if training.max_steps is not None:
        training.max_steps = min(training.max_steps, scale.num_steps)
    if training.max_tokens is not None:
        training.max_tokens = min(training.max_tokens, scale.num_steps * scaled.global_batch_tokens)
    scaled.validation.tokens = min(config.validation.tokens or scale.validation_tokens, scale.validation_tokens)
    _scale_schedule(scaled, scaled.num_tokens / config.num_tokens)
    _scale_intervals(scaled)
    return scaled


def _scale_schedule(scaled: RunConfig, ratio: float) -> None:
    """Multiplies what the schedule counts in tokens."""
    for field in dataclasses.fields(scaled.schedule):
        value = getattr(scaled.schedule, field.name)
        if field.name.endswith("_tokens") and value is not None:
            setattr(scaled.schedule, field.name, round(value * ratio))


def _scale_intervals(scaled: RunConfig) -> None:
    """Whatever happens every n steps happens at least twice in the run."""
    for section_field in dataclasses.fields(scaled):
        section = getattr(scaled, section_field.name)
        if not dataclasses.is_dataclass(section):
            continue
        for field in dataclasses.fields(section):
            value = getattr(section, field.name)
            if field.name.endswith("interval_steps") and value is not None:
                setattr(section, field.name, min(value, max(1, scaled.num_steps // 2)))


def _scale_model(settings: dict[str, Any], model: UltraMemConfig, scale: Scale) -> dict[str, Any]:
    scaled = {key: value for key, value in settings.items() if key not in OF_THE_TOKENIZER}
    if model.hidden_size > scale.hidden_size:
        num_heads = 1 << (min(model.num_attention_heads, scale.num_attention_heads).bit_length() - 1)
        assert model.num_key_value_heads is not None
        heads_per_group = model.num_attention_heads // model.num_key_value_heads
        scaled["num_attention_heads"] = num_heads
        scaled["num_key_value_heads"] = max(1, num_heads // heads_per_group)
    hidden_size = scaled["hidden_size"] = min(model.hidden_size, scale.hidden_size)
    ratio = hidden_size / model.hidden_size
    if model.initializer_range is not None:
        # Like the default, √(2/(5D)).
        scaled["initializer_range"] = model.initializer_range / math.sqrt(ratio)
    scaled["intermediate_size"] = _scale_width(model.intermediate_size, ratio)
    scaled["num_hidden_layers"] = min(model.num_hidden_layers, scale.num_hidden_layers)
    if model.ffn is not None:
        scaled["ffn"] = _scale_ffn(model.ffn, ratio, scale)
    if model.memory is not None:
        scaled["memory"] = _scale_memory(model.memory, model.num_hidden_layers, ratio, scale)
    return scaled


def _scale_width(width: int, ratio: float) -> int:
    return min(width, max(MIN_WIDTH, round(width * ratio)))


def _scale_ffn(ffn: dict[str, Any], ratio: float, scale: Scale) -> dict[str, Any]:
    """Fewer and narrower experts; a dense FFN has no sizes of its own."""
    scaled = dict(ffn)
    for key in ("num_experts", "num_experts_per_tok"):
        if key in ffn:
            scaled[key] = min(ffn[key], getattr(scale, key))
    if ffn.get("intermediate_size") is not None:
        scaled["intermediate_size"] = _scale_width(ffn["intermediate_size"], ratio)
    return scaled


def _scale_memory(memory: dict[str, Any], num_blocks: int, ratio: float, scale: Scale) -> dict[str, Any]:
    scaled = dict(memory)
    for key, limit in (("num_keys", scale.num_keys), ("top_k", scale.top_k), ("num_heads", scale.num_memory_heads)):
        scaled[key] = min(memory[key], limit)
    if memory.get("coarse_top_k") is not None:
        # As many as are selected leave enough candidates for every search.
        scaled["coarse_top_k"] = min(memory["coarse_top_k"], scaled["top_k"])
    num_cores = memory.get("num_cores", 1)
    for key in ("key_dim", "value_dim", "pre_value_dim"):
        if memory.get(key):
            scaled[key] = _scale_width(memory[key], ratio)
    if memory.get("value_dim"):
        # Each core weighs an equal slice of the values.
        scaled["value_dim"] = num_cores * math.ceil(scaled["value_dim"] / num_cores)
    scaled["placement"] = _scale_placement(memory["placement"], num_blocks, scale.num_hidden_layers)
    if memory.get("share_ratio") is not None:
        # A layer's own share is the least it can see.
        num_memories = len(parse_placement(scaled["placement"], min(num_blocks, scale.num_hidden_layers)))
        scaled["share_ratio"] = max(memory["share_ratio"], 1 / num_memories)
    return scaled


def _scale_placement(placement: Any, num_blocks: int, limit: int) -> Any:
    """Block b of L becomes ⌊b·L'/L⌋ of L'.

    A span that reaches over blocks still does; memories that meet become one.
    """
    if placement == "every" or num_blocks <= limit:
        return placement
    spans = [_scale_span(span, num_blocks, limit) for span in parse_placement(placement, num_blocks)]
    distinct = list(dict.fromkeys(spans))
    if isinstance(placement, str):
        return "/".join(f"{span.start}:{span.end}" for span in distinct)
    return [span.start for span in distinct]


def _scale_span(span: Span, num_blocks: int, limit: int) -> Span:
    start, end = (block * limit // num_blocks for block in span)
    if span.end > span.start:
        end = min(max(end, start + 1), limit - 1)
    return Span(start, end)

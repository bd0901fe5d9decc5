"""Tiny random decoders of transformers for tests of attached memories."""

import torch
import transformers

from tiny_memories import SIZES

_SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # at the usual 0.02 the logits are nearly uniform and differences would not show
    "eos_token_id": 0,
    "pad_token_id": 1,
    "bos_token_id": None,
}
_TWO_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}

# What each architecture has that the others have not is what can go wrong in it.
BASES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),  # the MLP reads the residual stream, its output is normed
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {"sliding_window": 4}),  # norms around the MLP, two caches
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),  # attention and MLP side by side
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", _TWO_EXPERTS),  # the MLP returns a tuple
}


def base_model(name="llama", dtype=torch.float32, **changes):
    """A random decoder in evaluation mode."""
    config, model, settings = BASES[name]
    torch.manual_seed(0)
    built = getattr(transformers, model)(getattr(transformers, config)(**{**_SIZES, **settings, **changes}))
    return built.to(dtype).eval()


def vision_language_model():
    """A Gemma 3 with its vision tower, whose blocks have MLPs too."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config={**_SIZES, "sliding_window": 4},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForConditionalGeneration(config).eval()


# Kinds of memories, and what decides how a kind starts at zero: its output projection, or its rows where it has none.
MEMORIES = {
    **{kind: {"type": kind, **sizes} for kind, sizes in SIZES.items()},
    "pkm_projected": {"type": "pkm", **SIZES["pkm"], "num_heads": 1, "value_dim": 12, "query_norm": "batch"},
    "peer_normed": {"type": "peer", **SIZES["peer"], "query_norm": "rms"},
}


def memory_settings(memory="ultramem_v2", **changes):
    """Settings of a tiny memory."""
    return {**MEMORIES[memory], **changes}


def make_loud(adapter, std=1.0):
    """Fill what an adapter starts with at zero."""
    with torch.no_grad():
        for memory in adapter.memories:
            for name, parameter in (memory.out_proj or adapter.pool).named_parameters():
                if name != "pre_values":
                    parameter.normal_(std=std)

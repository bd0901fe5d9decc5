"""Tiny models and tokenizers for tests of code that takes any causal language model."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ultramem import UltraMemConfig, UltraMemForCausalLM

TEXT = [
    "The capital of Norway is Oslo. The capital of Sweden is Stockholm, and that of Peru is Lima.",
    "Grüße aus Köln: naïve café 日本語 🙂 … and one more line of text for the merges.",
]


def tiny_tokenizer(vocab_size=400, text=TEXT):
    """Byte-level BPE trained on a few sentences; it encodes any text without an unknown token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|padding|>")


def tiny_llama(vocab_size=400, seed=0, dtype=torch.float32, **config):
    """A random decoder whose logits are far from uniform."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": 1,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **{**settings, **config})).to(dtype).eval()


def tiny_ultramem(vocab_size=400, seed=0, dtype=torch.float32, **config):
    """A random UltraMemV2 decoder."""
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "tie_word_embeddings": False,
        "memory": {"num_keys": 12, "key_dim": 8, "value_dim": 8, "pre_value_dim": 8, "top_k": 4},
    }
    model = UltraMemForCausalLM(UltraMemConfig(vocab_size=vocab_size, **{**settings, **config})).to(dtype).eval()
    # At its own scale an untrained model is so near uniform that differences would not show.
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    return model

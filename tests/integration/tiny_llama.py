"""A small Llama with random weights whose tokens are the 256 bytes and a few special ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers

VOCAB = 261


def tiny_llama() -> Any:
    """In transformers, float32; its favourite is rarely a near-tie."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=257,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return model


def save_with_tokenizer(model: Any, folder: Path) -> None:
    """Make `folder` a model folder; id 256 is "<s>", 257 "</s>", then "<think>", "</think>", "spare"."""
    logging.disable(logging.WARNING)
    model.save_pretrained(folder)
    logging.disable(logging.NOTSET)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens(["<think>", "</think>", "spare"])
    backend.save(str(folder / "tokenizer.json"))

"""Random checkpoints of every family, transformers' models of them, and how good it finds our tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

VOCAB = 1003
BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OPT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "ffn_dim": 704,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "word_embed_proj_dim": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", BASE | {"rope_parameters": LLAMA3}),
    "llama-tied-128": ("Llama", BASE | {"head_dim": 128, "tie_word_embeddings": True}),
    "llama-80": ("Llama", BASE | {"head_dim": 80}),
    "llama-96-mlp-bias": ("Llama", BASE | {"head_dim": 96, "mlp_bias": True, "attention_bias": True}),
    "mistral-256": ("Mistral", BASE | {"head_dim": 256, "sliding_window": None}),
    "qwen2": ("Qwen2", {k: v for k, v in BASE.items() if k != "head_dim"}),
    "qwen3": ("Qwen3", BASE | {"head_dim": 128}),
    "opt": ("OPT", OPT),
    "opt-gelu": ("OPT", OPT | {"activation_function": "gelu"}),
}


class Peer(NamedTuple):
    """A checkpoint, and transformers' model of it in float32."""

    folder: Path
    model: Any


class Answer(NamedTuple):
    prompt: list[int]
    tokens: list[int]
    logprobs: Sequence[float] = ()
    """Of the tokens, if they were asked for."""


def make_peer(name: str, folder: Path) -> Peer:
    """The model `name` of MODELS, saved in `folder`."""
    family, options = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        getattr(transformers, f"{family}Config")(**options, dtype="bfloat16")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = "norm" in name and name.endswith("weight")
            noise = torch.randn_like(parameter, dtype=torch.float32) * (0.2 if is_norm else 0.06) + is_norm
            parameter.copy_(noise.bfloat16())
    model.to(torch.bfloat16).save_pretrained(folder)
    # Read again: the conversion has rounded this one's rotary frequencies, too.
    wide = type(model).from_pretrained(folder, dtype=torch.float32)
    return Peer(folder, wide.cuda().eval())


@torch.no_grad()
def regrets(model: Any, answers: list[Answer]) -> Tensor:
    """By how much transformers' best logit exceeds that of the token that we took, in standard deviations."""
    found: list[Tensor] = []
    for prompt, tokens, _ in answers:
        ids = torch.tensor([prompt + tokens], device="cuda")
        logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        taken = logits.gather(1, ids[0, len(prompt) :, None])[:, 0]
        found.append((logits.max(-1).values - taken) / logits.std(-1))
    return torch.cat(found)


@torch.no_grad()
def regrets_of_bfloat16(peer: Peer, answers: list[Answer]) -> Tensor:
    """The same of transformers' own bfloat16, given our tokens."""
    model = type(peer.model).from_pretrained(peer.folder, dtype=torch.bfloat16).cuda().eval()
    found: list[Tensor] = []
    for prompt, tokens, _ in answers:
        ids = torch.tensor([prompt + tokens], device="cuda")
        wide = peer.model(ids).logits[0, len(prompt) - 1 : -1].float()
        choice = model(ids).logits[0, len(prompt) - 1 : -1].argmax(-1, keepdim=True)
        found.append((wide.max(-1).values - wide.gather(1, choice)[:, 0]) / wide.std(-1))
    return torch.cat(found)


@torch.no_grad()
def logprob_errors(peer: Peer, answers: list[Answer]) -> tuple[Tensor, Tensor]:
    """How far the tokens' logprobs are from float32's: the answers', and transformers' own in bfloat16."""
    model = type(peer.model).from_pretrained(peer.folder, dtype=torch.bfloat16).cuda().eval()
    ours: list[Tensor] = []
    theirs: list[Tensor] = []
    for prompt, tokens, logprobs in answers:
        ids = torch.tensor([prompt + tokens], device="cuda")
        exact, rounded = (
            each(ids)
            .logits[0, len(prompt) - 1 : -1]
            .float()
            .log_softmax(-1)
            .gather(1, ids[0, len(prompt) :, None])
            for each in (peer.model, model)
        )
        ours.append((torch.tensor(logprobs, device="cuda") - exact[:, 0]).abs())
        theirs.append((rounded - exact)[:, 0].abs())
    return torch.cat(ours), torch.cat(theirs)

"""Tokenizer: text to token ids and back, and chat templates. Built on the `tokenizers` package alone.

transformers' AutoTokenizer would load torch and 245 MB. So a folder needs a `tokenizer.json`, or the
`vocab.json` and `merges.txt` of GPT-2 and OPT; a GGUF file holds its own. Incremental text is
`detokenizer.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from ..ipc.errors import ConfigError, RequestError
from ..ipc.gguf import read_gguf_header
from .gguf_tokenizer import bos_template, tokenizer_from_gguf
from .model_files import read_json

_NOT_TAKEN = frozenset(
    {
        "max_length",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenizer_kwargs",
        "truncation",
    }
)
"""Arguments of transformers' `apply_chat_template`; as variables templates would see and ignore them."""
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A model's tokenizer.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        bos_token, eos_token: their text, or None.
        chat_template: Jinja source, or None.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.chat_template = chat_template

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder or a GGUF file. Raises ConfigError naming what is missing."""
        path = Path(path)
        return _load_gguf(path) if path.is_file() else _load_folder(path)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_long(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """`encode` for a thread of its own: as a batch it leaves the interpreter to others meanwhile."""
        ids: list[int] = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def encode_with_offsets(
        self, text: str, add_special_tokens: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and where each begins and ends in `text`, in characters; special tokens at (0, 0).

        May run on a thread, as `encode_long` does.
        """
        encoding = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        return encoding.ids, encoding.offsets

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """As transformers does: `tokenizer(text)["input_ids"]`."""
        return {"input_ids": self.encode(text, add_special_tokens)}

    def decode(self, token_ids: int | Sequence[int], skip_special_tokens: bool = False) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def decode_long(self, token_ids: Sequence[int]) -> str:
        """`decode` for a thread of its own, as `encode_long` is."""
        return self.backend.decode_batch([list(token_ids)], skip_special_tokens=False)[0]

    def batch_decode(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> str | list[str | None] | None:
        if isinstance(ids, int):
            return self.backend.id_to_token(ids)
        return [self.backend.id_to_token(token) for token in ids]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int | None] | None:
        if isinstance(tokens, str):
            return self.backend.token_to_id(tokens)
        return [self.backend.token_to_id(token) for token in tokens]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **variables: Any,
    ) -> str | list[int]:
        """One conversation as token ids, or as text with `tokenize=False`; `variables` are the template's.

        Raises RequestError when there is no template, when it refuses the messages, and for transformers'
        options that would change what is returned.
        """
        from . import chat_template as chat  # noqa: PLC0415 - Jinja is 60 ms that prompts do not need

        for name in _NOT_TAKEN & variables.keys():
            if variables.pop(name):
                message = f"apply_chat_template: {name} is not supported; it returns token ids or text"
                raise RequestError(message, parameter=name, limit="None or False")
        template = chat_template or self.chat_template
        if template is None:
            message = "this model's tokenizer has no chat template; give one with chat_template=..."
            raise RequestError(message, parameter="chat_template", limit="a Jinja template")
        if continue_final_message and add_generation_prompt:
            message = "continue_final_message and add_generation_prompt exclude each other"
            raise RequestError(message, parameter="continue_final_message", value=True)
        text = chat.render(
            template,
            messages,
            continue_final_message=continue_final_message,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            bos_token=self.bos_token or "",
            eos_token=self.eos_token or "",
            **variables,
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    @property
    def bos_token_id(self) -> int | None:
        return None if self.bos_token is None else self.backend.token_to_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return None if self.eos_token is None else self.backend.token_to_id(self.eos_token)

    @cached_property
    def all_special_ids(self) -> list[int]:
        """The ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return sorted(token for token, about in added.items() if about.special)

    @property
    def vocab_size(self) -> int:
        """Without added tokens."""
        return self.backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def get_vocab(self) -> dict[str, int]:
        return self.backend.get_vocab(with_added_tokens=True)


def _load_gguf(path: Path) -> Tokenizer:
    metadata = read_gguf_header(path).metadata
    backend = tokenizer_from_gguf(path, metadata)

    def text(name: str) -> str | None:
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        return None if token is None else backend.id_to_token(token)

    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, bos_token=text("bos"), eos_token=text("eos"), chat_template=template)


def _load_folder(folder: Path) -> Tokenizer:
    config = _optional_json(folder / "special_tokens_map.json")
    config |= _optional_json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        backend = _read_tokenizer_json(folder / "tokenizer.json")
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_vocab_and_merges(folder, config)
    else:
        limit = "tokenizer.json, or vocab.json and merges.txt"
        message = f"tokenizer: {str(folder)!r} has no {limit}"
        if any(folder.glob("*.model")):
            message += (
                "; a SentencePiece model alone becomes one by transformers' "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        raise ConfigError(message, parameter="tokenizer", value=folder, limit=limit)
    return Tokenizer(
        backend,
        bos_token=_text(config.get("bos_token")),
        eos_token=_text(config.get("eos_token")),
        chat_template=_chat_template(folder, config),
    )


def _read_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        message = f"tokenizer: cannot read {str(path)!r}: {error}"
        raise ConfigError(message, parameter="tokenizer", value=path) from error


def _from_vocab_and_merges(folder: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the package raises bare Exception
        message = f"tokenizer: cannot read vocab.json and merges.txt in {str(folder)!r}: {error}"
        raise ConfigError(message, parameter="tokenizer", value=folder) from error
    backend = tokenizers.Tokenizer(model)
    prefix = bool(config.get("add_prefix_space", False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    backend.decoder = decoders.ByteLevel()
    named = {_text(config.get(name)) for name in _NAMED_TOKENS} - {None}
    known = [token for token in sorted(filter(None, named)) if backend.token_to_id(token) is not None]
    backend.add_special_tokens([tokenizers.AddedToken(t, special=True, normalized=False) for t in known])
    # In the order of their ids: an added token takes the next free one.
    decoder: dict[str, Any] = config.get("added_tokens_decoder") or {}
    for _, about in sorted(decoder.items(), key=lambda item: int(item[0])):
        special = bool(about.get("special", False))
        backend.add_tokens([tokenizers.AddedToken(about["content"], special=special, normalized=False)])
    bos = _text(config.get("bos_token"))
    bos_id = None if bos is None else backend.token_to_id(bos)
    if config.get("add_bos_token") and bos is not None and bos_id is not None:
        backend.post_processor = bos_template(bos, bos_id)
    return backend


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = _optional_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, "tokenizer", "a JSON object") if path.is_file() else {}


def _text(token: object) -> str | None:
    """A token is named by its text, or by a dictionary that says more about it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None

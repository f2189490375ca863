"""POST /tokenize and /detokenize"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ..prompts import check_token_ids
from .conversation import render
from .endpoints import Endpoint
from .errors import bad_request
from .generation import LONG_TEXT, encode
from .protocol import DetokenizeRequest, TokenizeRequest
from .service import Service
from .streaming import json_response


async def tokenize(service: Service, request: Request, body: TokenizeRequest) -> Response:
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("give either a prompt or messages", "prompt")
    if body.prompt is not None:
        text, special = body.prompt, body.add_special_tokens is not False
    else:
        text = render(
            service,
            service.template(body.chat_template),
            body.messages or [],
            body.tools or [],
            body.add_generation_prompt,
            body.continue_final_message,
            body.chat_template_kwargs or {},
        )
        special = bool(body.add_special_tokens)
    offsets = None
    if not body.return_token_offsets:
        ids = await encode(service, text, special)
    elif len(text) < LONG_TEXT:
        ids, offsets = service.tokenizer.encode_with_offsets(text, special)
    else:
        ids, offsets = await asyncio.to_thread(service.tokenizer.encode_with_offsets, text, special)
    answer: dict[str, Any] = {
        "count": len(ids),
        "max_model_len": service.engine.max_model_len,
        "tokens": ids,
        "token_strs": service.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None,
        "token_offsets": offsets,
    }
    return json_response(answer)


async def detokenize(service: Service, request: Request, body: DetokenizeRequest) -> Response:
    service.check_model(body.model)
    tokens, tokenizer = body.tokens, service.tokenizer
    if tokens:
        check_token_ids(tokens, service.engine.config.vocab_size, len(tokens) + 1)
    is_long = len(tokens) >= LONG_TEXT
    text = await asyncio.to_thread(tokenizer.decode_long, tokens) if is_long else tokenizer.decode(tokens)
    return json_response({"prompt": text})


ENDPOINTS = [
    Endpoint("POST", "/tokenize", tokenize, "The token ids of a prompt or a conversation", TokenizeRequest),
    Endpoint("POST", "/detokenize", detokenize, "The text of token ids", DetokenizeRequest),
]

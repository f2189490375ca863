"""Service: what all routes share."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ...ipc.errors import EngineDeadError, EngineUnhealthyError
from ..sampling_params import SamplingParams
from ..tokenizer import Tokenizer
from .board import Board
from .errors import ApiError, bad_request
from .guard import Gate
from .parsers import Parsers

if TYPE_CHECKING:
    from ..async_llm import AsyncLLM
    from .options import ServerOptions


class Service:
    """The engine, what the server was told, and what it is doing.

    Attributes:
        chat_template: Jinja source that replaces the model's, or None.
        parsers: how the model's answers are taken apart.
        board: where servers that share a port add up their metrics, or None.
    """

    def __init__(
        self, engine: AsyncLLM, options: ServerOptions, chat_template: str | None, board: Board | None = None
    ) -> None:
        self.board = board
        self.engine = engine
        self.options = options
        self.gate = Gate()
        self.created = int(time.time())
        self.tokenizer: Tokenizer = engine.get_tokenizer()
        self.chat_template = chat_template or self.tokenizer.chat_template
        self.parsers = self._make_parsers(self.chat_template)

    def template(self, given: str | None = None) -> str | None:
        """A request's chat template: its own, or the server's. Raises ApiError unless clients are trusted."""
        if given is None:
            return self.chat_template
        if not self.options.trust_request_chat_template:
            message = (
                "chat_template is a program, and this server takes none from its clients "
                "(see --trust-request-chat-template)"
            )
            raise bad_request(message, "chat_template")
        return given

    def parsers_for(self, template: str | None) -> Parsers:
        """How answers to a prompt made with this template are taken apart."""
        return self.parsers if template is self.chat_template else self._make_parsers(template)

    def _make_parsers(self, template: str | None) -> Parsers:
        return Parsers(self.options.tool_call_parser, self.options.reasoning_parser, template)

    @property
    def model(self) -> str:
        return self.engine.config.served_model_name

    def chat_defaults(self) -> SamplingParams:
        """An answer may be as long as the context leaves, unless the model's makers say otherwise."""
        params = self.engine.get_default_sampling_params()
        if "max_tokens" not in self.engine.config.default_sampling:
            params.max_tokens = None
        return params

    def check_model(self, name: str | None) -> None:
        """Raises ApiError unless it is the model served here, or none is named."""
        if name and name != self.model:
            message = f"the model {name!r:.200} does not exist; this server has {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def why_unhealthy(self) -> str | None:
        """None when requests make progress."""
        try:
            await self.engine.check_health()
        except (EngineDeadError, EngineUnhealthyError) as error:
            return str(error)
        return None

"""The bodies of requests: OpenAI's fields, and vLLM's further ones.

Types are checked by msgspec; ranges by `SamplingParams`, whose fields have the same names, so that every door
has the same limits. A field that is not here is refused, as OpenAI does. `_FIXED` says which of
those that are exist with one value only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, TypeAlias

import msgspec

from ...ipc.errors import RequestError
from ..repetition import RepetitionDetectionParams
from ..sampling_params import SamplingParams
from ..structured_outputs import StructuredOutputsParams
from .errors import bad_request

Message: TypeAlias = dict[str, Any]
"""One of a conversation: role, content, and what the chat template makes of the rest."""
WHITESPACE = r"(\n {0,64}| )?"
"""Between JSON's tokens: enough for any usual layout. Small models would go on with blanks for ever."""


class Body(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Base of the requests' types. null always means the default."""

    def renamed(self) -> dict[str, str]:
        """The engine's names for what this body calls otherwise, and its own, which errors are to tell."""
        return {}


class StreamOptions(Body):
    include_usage: bool | None = None
    """End the stream with an event that holds the usage and no choice."""
    continuous_usage_stats: bool | None = None
    """Every event holds the usage so far."""
    include_obfuscation: bool | None = None
    """OpenAI's; nothing is obfuscated here."""


class Function(Body, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON Schema of the arguments."""
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedTool(Body):
    """The model must call this function."""

    type: Literal["function"]
    function: FunctionName


class TextFormat(Body, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(Body, tag_field="type", tag="json_object"):
    """A JSON object."""


class JsonSchema(Body):
    name: str
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class JsonSchemaFormat(Body, tag_field="type", tag="json_schema"):
    """JSON that a schema describes."""

    json_schema: JsonSchema


class StructuralTagFormat(Body, tag_field="type", tag="structural_tag"):
    """Text with constrained parts: `format`, or `structures` with `triggers`, as in `structured_outputs`."""

    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None

    def tag(self) -> dict[str, Any]:
        return {name: given for name, given in msgspec.to_builtins(self).items() if given is not None}


ResponseFormat: TypeAlias = TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat


class RepetitionDetection(Body):
    max_pattern_size: int = 0
    min_pattern_size: int = 0
    min_count: int = 0


class Generation(Body, kw_only=True):
    """What every request that generates may hold."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    # OpenAI's own bookkeeping: accepted, and without effect on a server of one's own.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    # vLLM's, and Headrace's.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    structured_outputs: dict[str, Any] | None = None
    thinking_token_budget: int | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    """Keep only that many of the prompt's tokens; -1: as many as leave room for max_tokens."""
    truncation_side: Literal["left", "right"] | None = None
    """Where tokens go: "left" keeps the prompt's end (the default), "right" its beginning."""
    priority: int | None = None
    request_id: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Name tokens in logprobs "token_id:7"."""
    repetition_detection: RepetitionDetection | None = None
    cache_salt: str | None = None
    """Prompts share cached prefixes only with those of the same salt."""
    timeout: float | None = None
    """Headrace's own: seconds after which the answer ends with finish_reason "timeout"."""

    # vLLM's, and always refused: _ABSENT says why.
    vllm_xargs: dict[str, Any] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    ec_transfer_params: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: dict[str, Any] | None = None
    return_token_offsets: bool | None = None
    return_assistant_tokens_mask: bool | None = None

    form_field: ClassVar[str] = "response_format"

    @property
    def form(self) -> ResponseFormat | None:
        """What the answer is to be; it comes from `form_field`."""
        return None

    def renamed(self) -> dict[str, str]:
        if self.structured_outputs is not None:
            return {}
        return {"structured_outputs": "tools" if self.form is None else self.form_field}

    def refuse_unsupported(self) -> None:
        """Raises ApiError for fields whose value asks for what does not exist."""
        for name, fixed in _FIXED.items():
            refuse_other(name, getattr(self, name, None), fixed)
        for name, why in _ABSENT.items():
            if getattr(self, name):
                raise bad_request(f"{name} is not supported: {why}", name)
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options can only be given with stream=true", "stream_options")

    def sampling(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """The sampling parameters: `more`, else what the body gives, else `defaults`. Raises RequestError."""
        given = {name: getattr(self, name) for name in self.__struct_fields__ if name in SAMPLING}
        given["repetition_detection"] = self._repetition()
        given |= {name: value for name, value in more.items() if value is not None}
        return dataclasses.replace(defaults, **{n: value for n, value in given.items() if value is not None})

    def structure(self) -> StructuredOutputsParams | None:
        """What the text must be, as its `form` or `structured_outputs` say. Raises RequestError."""
        form, given = self.form, self.structured_outputs
        if form is not None and given is not None:
            raise bad_request(
                "a response format and structured_outputs exclude each other", "structured_outputs"
            )
        if given is not None:
            return _structured_outputs(given)
        if isinstance(form, JsonSchemaFormat) and form.json_schema.schema is not None:
            return StructuredOutputsParams(json=form.json_schema.schema, whitespace_pattern=WHITESPACE)
        if isinstance(form, (JsonObjectFormat, JsonSchemaFormat)):
            return StructuredOutputsParams(json_object=True, whitespace_pattern=WHITESPACE)
        if isinstance(form, StructuralTagFormat):
            return StructuredOutputsParams(structural_tag=form.tag())
        return None

    def _repetition(self) -> RepetitionDetectionParams | None:
        given = self.repetition_detection
        return None if given is None else RepetitionDetectionParams(**msgspec.structs.asdict(given))


class Choices(Generation, kw_only=True):
    """What both of the older routes may hold."""

    n: int | None = None
    max_tokens: int | None = None
    response_format: ResponseFormat | None = None
    use_beam_search: bool | None = None
    """Search for the `n` likeliest texts instead of sampling."""
    length_penalty: float | None = None
    """A beam's score is its logprob divided by its length, prompt and all, to this power."""

    @property
    def form(self) -> ResponseFormat | None:
        return self.response_format


class CompletionRequest(Choices, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | list[int]]
    """Text, token ids, or a list of either."""
    best_of: int | None = None
    echo: bool | None = None
    """Begin each text with the prompt."""
    logprobs: int | None = None
    suffix: str | None = None


class ChatRequest(Choices, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    modalities: list[str] | None = None
    verbosity: str | None = None
    """OpenAI's hint to its own models: without effect."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    """Jinja source instead of the model's, where the server was told to trust its clients with that."""
    chat_template_kwargs: dict[str, Any] | None = None
    documents: list[dict[str, str]] | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None
    """Begin the answer with the last message, if that is the assistant's."""
    return_prompt_text: bool | None = None

    def renamed(self) -> dict[str, str]:
        names = {"logprobs": "top_logprobs", "prompt": "messages"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return super().renamed() | names


class OutputSchema(Body, tag_field="type", tag="json_schema"):
    """`JsonSchemaFormat` as /v1/responses writes it."""

    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class OutputText(Body):
    format: TextFormat | JsonObjectFormat | OutputSchema | None = None
    verbosity: str | None = None


class Reasoning(Body):
    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class FunctionTool(Body):
    """`Tool` as /v1/responses writes it."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesRequest(Generation, kw_only=True):
    """POST /v1/responses: text and calls of functions. Nothing is stored, no tool is run."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: OutputText | None = None
    top_logprobs: int | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    reasoning: Reasoning | None = None
    parallel_tool_calls: bool | None = None
    background: bool | None = None
    previous_response_id: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    truncation: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    form_field = "text.format"

    @property
    def form(self) -> ResponseFormat | None:
        given = None if self.text is None else self.text.format
        if isinstance(given, OutputSchema):
            return JsonSchemaFormat(json_schema=JsonSchema(name=given.name, schema=given.schema))
        return given

    @property
    def logprobs_wanted(self) -> int | None:
        """How many of the likeliest tokens at each position; None: no logprobs at all."""
        is_wanted = "message.output_text.logprobs" in (self.include or ()) or self.top_logprobs
        return self.top_logprobs or 0 if is_wanted else None

    def renamed(self) -> dict[str, str]:
        names = {"max_tokens": "max_output_tokens", "logprobs": "top_logprobs"}
        return super().renamed() | names | dict.fromkeys(("prompt", "messages"), "input")

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for name, fixed in _FIXED_RESPONSES.items():
            refuse_other(name, getattr(self, name), fixed)


class TokenizeRequest(Body, kw_only=True):
    """POST /tokenize: a prompt, or a conversation"""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[Tool] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    return_token_offsets: bool | None = None
    """Where each token begins and ends in the prompt's text, in characters."""
    chat_template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Body, kw_only=True):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[int]

    def renamed(self) -> dict[str, str]:
        return {"prompt_token_ids": "tokens"}


_FIXED: dict[str, tuple[object, ...]] = {
    "suffix": ("",),
    "best_of": (1,),
    "modalities": (["text"],),
}
_ABSENT = {
    "vllm_xargs": "there are no extensions that could read it",
    "kv_transfer_params": "KV caches are not transferred between engines",
    "ec_transfer_params": "there are no encoders",
    "mm_processor_kwargs": "text is all that there is here",
    "media_io_kwargs": "text is all that there is here",
    "return_token_offsets": "POST /tokenize tells them",
    "return_assistant_tokens_mask": "it is for training",
}
SAMPLING = {field.name for field in dataclasses.fields(SamplingParams)} - {"structured_outputs", "logprobs"}
_FIXED_RESPONSES: dict[str, tuple[object, ...]] = {
    "background": (False,),
    "previous_response_id": (),
    "stream_options": (),  # the last event has the usage anyway
    "truncation": ("disabled",),
}


def _structured_outputs(given: dict[str, Any]) -> StructuredOutputsParams:
    """Raises RequestError, and ApiError for a field of it."""
    try:
        return StructuredOutputsParams(**given)
    except RequestError as error:
        if error.parameter == "structured_outputs":
            raise
        raise bad_request(str(error), f"structured_outputs.{error.parameter}") from error


def refuse_other(name: str, value: object, fixed: Sequence[object]) -> None:
    """Raises ApiError unless `value` is null or one of `fixed`."""
    if value is not None and value not in fixed:
        raise bad_request(f"{name}={value!r:.100} is not supported", name)

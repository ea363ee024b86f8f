"""The bodies of requests: OpenAI's fields, checked; errors name the field."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from pipeline.inference import requests
from pipeline.inference.http.errors import ApiError
from pipeline.inference.requests import FieldError

MAX_CHOICES = 64  # of one request: prompts × n
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's
DEFAULT_CHAT_TOKENS = 2048  # OpenAI has no limit, but small models may never end
MAX_STOP_LENGTH = 1000  # characters: each is compared with the end of the text after each token
# Accepted and without effect here: they change no text.
_IGNORED = (
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
)
# Fields of OpenAI and vLLM that would change the answer and are not supported: the values that
# change nothing.
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
}
Body = TypeVar("Body", bound=Struct)
Schema = dict[str, Any]
Stop = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, without effect: chunks are not padded


class NamedSchema(Struct):
    """Its name and `strict` are without effect: every answer has the schema."""

    schema: Schema


class ResponseFormat(Struct, forbid_unknown_fields=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class Function(Struct):
    name: Annotated[str, Meta(pattern=r"\A[\w.-]{1,64}\Z")]
    parameters: Schema = {}


class Tool(Struct):
    """A function that the model may call, or the one that it must call."""

    type: Literal["function"]
    function: Function


class Tools(Struct):
    tools: list[Tool]


class Part(Struct, forbid_unknown_fields=True):
    """A part of a content; only text is supported."""

    type: Literal["text"]
    text: str


class Message(Struct, forbid_unknown_fields=True):
    """A turn, as a client sends it, or returns it after it was an answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Any] | None = None
    reasoning_content: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: one text, arguments as objects."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content or ())
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": content}
        for key in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, key)) is not None:
                turn[key] = value
        if self.tool_calls:
            turn["tool_calls"] = [_with_object_arguments(call) for call in self.tool_calls]
        return turn


def _with_object_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = msgspec.json.decode(function["arguments"])
        return call | {"function": function | {"arguments": arguments}}
    except (msgspec.DecodeError, RecursionError):
        return call


class Request(Struct, kw_only=True, forbid_unknown_fields=True):
    """What both APIs take. `strength` and `top_k` are extra fields."""

    model: str
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[float, Meta(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] = 0  # vLLM's -1, and 0: from all
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    stop: Stop | Annotated[list[Stop], Meta(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    strength: Annotated[float, Meta(ge=0, le=2)] | None = None
    response_format: ResponseFormat | None = None
    parallel_tool_calls: bool = True

    @property
    def schema(self) -> Schema | None:
        """What the answer must be, if it must be JSON. Raises FieldError."""
        form = self.response_format
        if form is None or form.type == "text" or self.must_call:
            return None
        if form.type == "json_object":
            return {"type": "object"}
        if form.json_schema is None:
            raise FieldError("response_format.json_schema", " is missing. Add it to the request.")
        return form.json_schema.schema

    @property
    def functions(self) -> Mapping[str, Schema]:
        """The functions that may be called, with the schemas of their arguments."""
        return {}

    @property
    def must_call(self) -> bool:
        """Whether the answer must be a call."""
        return False

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def check(self) -> None:
        """Raises FieldError for fields that do not go together."""
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", " needs stream: true.")


class ChatRequest(Request, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=2**31)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["none", "auto", "required"] | Tool = "auto"

    @property
    def limit(self) -> int:
        """Tokens of an answer, at most."""
        return self.max_completion_tokens or self.max_tokens or DEFAULT_CHAT_TOKENS

    @property
    def functions(self) -> Mapping[str, Schema]:
        if self.tool_choice == "none":
            return {}
        tools = requests.parse(Tools, {"tools": self.tools}).tools
        functions = [tool.function for tool in tools]
        if isinstance(self.tool_choice, Tool):
            name = self.tool_choice.function.name
            functions = [function for function in functions if function.name == name]
        return {function.name: function.parameters for function in functions}

    @property
    def must_call(self) -> bool:
        return self.tool_choice not in ("none", "auto")

    @property
    def alternatives(self) -> int:
        """Tokens that are listed beside each that is generated."""
        return self.top_logprobs or 0

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise FieldError("top_logprobs", " needs logprobs: true.")
        if self.must_call and not self.functions:
            raise FieldError("tool_choice", " must be a function of tools. Add it to tools.")


class CompletionRequest(Request, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool = False

    @property
    def limit(self) -> int:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS

    @property
    def alternatives(self) -> int:
        return self.logprobs or 0

    def check(self) -> None:
        super().check()
        if self.echo and self.logprobs is not None:
            rule = "of an echoed prompt are not supported. Remove echo or logprobs."
            raise FieldError("logprobs", f" {rule}")
        if not 1 <= len(self.prompts) * self.n <= MAX_CHOICES:
            raise FieldError("prompt", f" must be 1 to {MAX_CHOICES} prompts, n times each.")

    @property
    def prompts(self) -> list[str | tuple[int, ...]]:
        """Texts or token ids, one for each prompt."""
        parts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        ids = [part for part in parts if isinstance(part, int)]
        if len(ids) == len(parts):
            return [tuple(ids)]
        if ids:
            rule = "must be a text, a list of texts, token ids or a list of their lists."
            raise FieldError("prompt", f" {rule}")
        texts = [part for part in parts if not isinstance(part, int)]
        return [part if isinstance(part, str) else tuple(part) for part in texts]


class LoadAdapter(Struct, forbid_unknown_fields=True):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Meta(min_length=1, max_length=200)]
    lora_path: Annotated[str, Meta(min_length=1, max_length=4000)]
    load_inplace: bool = False


class UnloadAdapter(Struct, forbid_unknown_fields=True):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: int | None = None  # vLLM's, without effect


def parse(kind: type[Body], body: bytes) -> Body:
    """The JSON `body` as `kind`. Raises ApiError 400 and FieldError, which name the field."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON: {error}.") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object.")
    fields = {key: value for key, value in fields.items() if key not in _IGNORED}
    for key in _NEUTRAL.keys() & fields:
        if fields[key] is not None and fields[key] not in _NEUTRAL[key]:
            raise FieldError(key, " is not supported. Remove it from the request.")
        del fields[key]
    return requests.parse(kind, fields)

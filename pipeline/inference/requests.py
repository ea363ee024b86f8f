"""What may be asked of models in the inference process, and how the fields of a request are read.

`pipeline/inference/http/requests.py` has what may be asked over HTTP. The answers are listed in
docs/decisions/0006-inference-process.md.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from pipeline.errors import UserError

MAX_LOADED = 9  # models in memory, and compared side by side

Kind = TypeVar("Kind", bound=Struct)
Count = Annotated[int, Meta(ge=0, le=2**62)]  # torch takes 64-bit integers, JSON any
Strength = Annotated[float, Meta(ge=0, le=2)]  # of an adapter: 0 is the base, 1 as trained
Folder = Annotated[str, Meta(pattern=r"^[^\0]*\Z")]

_OF_OBJECT = re.compile(
    r"Object (?P<problem>missing required|contains unknown) field `(?P<name>.*)`", re.DOTALL
)


class Load(Struct):
    """Load a model as `name`."""

    name: str
    base: Folder
    adapter: Folder | None = None
    trust_remote_code: bool = False


class Unload(Struct):
    name: str


class TopK(Struct):
    """The `k` likeliest next tokens of several models."""

    models: list[str]
    text: str
    k: Count
    strength: dict[str, Strength] = {}  # by model, where it is not 1
    chat: bool = False  # whether the text is a turn in the chat template


class Turn(Struct):
    role: Literal["system", "user", "assistant"]
    content: str


class Generate(Struct):
    """Continue `text`, or answer the last of `messages`."""

    model: str
    text: str = ""
    messages: Annotated[list[Turn], Meta(min_length=1)] | None = None
    limit: Count = 20
    temperature: float = 0.0
    top_k: Count = 0
    top_p: float = 1.0
    seed: Count = 0
    strength: Strength = 1.0
    chat: bool = False


class Spectrum(Struct):
    """The singular values of an adapter's updates."""

    adapter: Folder


class Status(Struct):
    """The device, its memory, and the names of the models."""


class FieldError(UserError):
    """A field of a request is missing, unknown or wrong; `field` is its name."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}{problem}")
        self.field = field


def parse(kind: type[Kind], fields: Mapping[str, Any]) -> Kind:
    """The fields as a request; a field that is null counts as missing. Raises FieldError."""
    given = {key: value for key, value in fields.items() if value is not None}
    for key, value in given.items():
        try:
            msgspec.json.encode((key, value))
        except UnicodeEncodeError:
            name = ascii(key)[1:-1]
            raise FieldError(name, " must be valid Unicode, got an unpaired surrogate.") from None
        except RecursionError:
            raise FieldError(key, " is nested too deeply. Correct it in the request.") from None
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise _explain(str(error), given) from None


def _explain(error: str, fields: Mapping[str, Any]) -> FieldError:
    """msgspec's message as one that begins with the field and ends with its value."""
    # no regular expression: the path has names of fields, which may have any characters
    text, at, path = error.rpartition(" - at `")
    text = text if at else error
    within = path[:-1].removeprefix("$").removeprefix(".") if at else ""
    if match := _OF_OBJECT.fullmatch(text):
        field = ".".join(filter(None, (within, match["name"])))[:200]
        if match["problem"] == "missing required":
            return FieldError(field, " is missing. Add it to the request.")
        return FieldError(field, " is not a field that is supported. Remove it from the request.")
    value = fields.get(within)
    is_short = isinstance(value, str | int | float) and "got" not in text
    shown = f", got {value!r:.80}" if is_short else ""
    return FieldError(within, f": {text[:1].lower()}{text[1:]}{shown}. Correct it in the request.")

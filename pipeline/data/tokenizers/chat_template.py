"""Chat templates, as transformers renders them."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from pipeline.data.tokenizers.template_process import Conversation, TemplateError

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"

TURN = "messages[{}]"

Messages = Sequence[Mapping[str, object]]  # each with role and content
Asked = Sequence[tuple[int, bool]]  # of how many first messages, and whether the model is to answer


class Rendered(str):
    """Text that a chat template wrote: it holds its own beginning-of-text token, or is meant to have none.

    `marks` are the characters [start, stop) that the template marks as the model's own, in order; most mark none.
    """

    marks: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, written: "Conversation") -> "Rendered":
        rendered = cls(written.text)
        rendered.marks = written.marks
        return rendered


Renderings = Sequence[Rendered | UserError]


def has_template(folder: Path) -> bool:
    """Whether the model in `folder` was made to chat."""
    if (folder / TEMPLATE).is_file():
        return True
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def render(folder: Path, text: str) -> Rendered:
    """`text` as a user's turn, up to where the model answers. Raises UserError."""
    return only(render_in(folder, [{"role": "user", "content": text}], [(1, True)], turn="the prompt"))


def only(renderings: Renderings) -> Rendered:
    """The one that there is. Raises UserError if it failed."""
    (rendering,) = renderings
    if isinstance(rendering, UserError):
        raise rendering
    return rendering


def render_in(folder: Path, messages: Messages, asked: Asked, turn: str = TURN) -> Renderings:
    """`render_with` in the template of the model in `folder`. Raises UserError."""
    if not has_template(folder):
        raise no_template(str(folder))
    times = tuple(_time(folder / name) for name in (TEMPLATE, CONFIG))
    try:
        theirs = _tokenizer(folder, times)
    except Exception as error:  # whatever the library raises
        raise UserError(f"{folder}: its tokenizer does not open: {_short(error)}") from None
    return render_with(theirs, messages, asked, str(folder), turn)


def render_with(theirs: Any, messages: Messages, asked: Asked, name: str, turn: str = TURN) -> Renderings:
    """For each (n, reply) the first n messages in a transformers tokenizer's template, or why the template fails; with
    `reply`, up to where the model answers.

    Raises UserError where the template is stopped because it takes too much, and where the content of a turn holds a
    special token: among those that the template writes it would be one of them, and begin or end a turn that nobody
    took. `turn` is what the user calls a turn, by its number.
    """
    from pipeline.data.tokenizers.template_process import RENDERER, TemplateError  # only conversations need a process

    for number, message in enumerate(messages):
        if token := _special_in(theirs, str(message["content"])):
            raise UserError(
                f"{turn.format(number)} holds {token}, a special token of {name}, which would not be read as text: it "
                "could begin or end a turn. Remove it, or write it in another way."
            )
    try:
        template = theirs.get_chat_template()
    except ValueError as error:  # several, and none of them the default
        raise UserError(f"{name}: its chat template fails: {_short(error)}") from None
    try:
        found = RENDERER.render(template, messages, asked, theirs.special_tokens_map)
    except TemplateError as error:
        raise _failure(name, error) from None
    return [_failure(name, one) if isinstance(one, TemplateError) else Rendered.of(one) for one in found]


def _failure(name: str, error: "TemplateError") -> UserError:
    return UserError(f"{name}: its chat template {error}")


def _special_in(theirs: Any, text: str) -> str | None:
    """The first special token in a text, if any. Other added tokens are text that happens to be one token."""
    as_written, normalized = _special(theirs)
    found = as_written.search(text)
    if found is None and normalized is not None:
        found = normalized.search(theirs.backend_tokenizer.normalizer.normalize_str(text))
    return found and found[0]


@lru_cache(maxsize=8)
def _special(theirs: Any) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """What finds special tokens in a text, and what finds those that are looked for in normalized text."""
    inner = theirs.backend_tokenizer
    tokens = [token for token in inner.get_added_tokens_decoder().values() if token.special and token.content.strip()]
    looked_for = [inner.normalizer.normalize_str(t.content) for t in tokens if t.normalized] if inner.normalizer else []
    return _any_of([token.content for token in tokens]), _any_of(looked_for) if looked_for else None


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nowhere


def no_template(name: str) -> UserError:
    return UserError(f"{name} has no chat template. Prompt it without chat, and train it on texts or completions.")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@lru_cache(maxsize=8)
def _tokenizer(folder: Path, times: tuple[int, ...]) -> Any:  # noqa: ARG001  # read anew when a file changed
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

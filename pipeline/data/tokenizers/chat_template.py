"""Chat templates: special tokens in messages are refused here, `template_process.py` renders.

Rendering is that of transformers, in a process of its own with limits of time and memory.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from pipeline.data.tokenizers.template_process import (
    RENDERER,
    Conversation,
    Rendered,
    TemplateError,
)
from pipeline.errors import UserError
from pipeline.files.digest_cache import Signature, signature

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"

TURN = "messages[{}]"

Messages = Sequence[Mapping[str, object]]  # each with role and content
Tools = Sequence[Mapping[str, object]]
Renderings = Sequence[Rendered | UserError]  # one for each prefix of a conversation
Answers = Iterator[Renderings | UserError]  # one for each conversation


def has_template(folder: Path) -> bool:
    """Whether the model in `folder` has a chat template."""
    if (folder / TEMPLATE).is_file():
        return True
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def render(folder: Path, text: str) -> Rendered:
    """`text` as a user's turn, with the generation prompt. Raises UserError."""
    render_each = partial(render_in, folder, turn="the prompt")
    return render_one(render_each, [{"role": "user", "content": text}], True)


def render_one(
    render_each: Callable[[Sequence[Conversation]], Answers],
    messages: Messages,
    add_generation_prompt: bool,
    tools: Tools = (),
) -> Rendered:
    """A whole conversation, rendered by a function for many. Raises UserError."""
    prefixes = [(len(messages), add_generation_prompt)]
    (renderings,) = render_each([Conversation(messages, prefixes, tools)])
    if isinstance(renderings, UserError):
        raise renderings
    return checked(renderings[0])


def checked(rendering: Rendered | UserError) -> Rendered:
    """Raises the rendering if it is a UserError."""
    if isinstance(rendering, UserError):
        raise rendering
    return rendering


def render_in(folder: Path, conversations: Sequence[Conversation], turn: str = TURN) -> Answers:
    """`render_with` the chat template of the model in `folder`. Raises UserError."""
    if not has_template(folder):
        raise no_template(str(folder))
    try:
        hf_tokenizer = _open_tokenizer(
            folder, (*signature(folder / TEMPLATE), *signature(folder / CONFIG))
        )
    except Exception as error:  # whatever the library raises
        raise UserError(f"{folder}: cannot open its tokenizer: {one_line(error)}") from None
    return render_with(hf_tokenizer, conversations, str(folder), turn)


# opened again after its files changed
@lru_cache(maxsize=8)
def _open_tokenizer(folder: Path, files: Signature) -> Any:  # noqa: ARG001
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def render_with(
    hf_tokenizer: Any, conversations: Sequence[Conversation], name: str, turn: str = TURN
) -> Answers:
    """Begin to render conversations in a transformers tokenizer's chat template.

    The first answer waits for all. A conversation's answer is a UserError if the rendering process
    had to be stopped, or if one of its messages or tools contains a special token: among those that
    the template writes, it would begin or end a turn. `turn` formats a message's index for the
    error. Raises UserError if there is no default template.
    """
    try:
        template = hf_tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise UserError(f"{name}: its chat template fails: {one_line(error)}") from None
    refused = [
        _special_token(hf_tokenizer, conversation, name, turn) for conversation in conversations
    ]
    pairs = zip(conversations, refused, strict=True)
    safe = [conversation for conversation, error in pairs if error is None]
    tokens = hf_tokenizer.special_tokens_map
    request = RENDERER.render(template, safe, tokens)

    def answers() -> Answers:
        rendered: Iterator[list[Rendered | TemplateError] | TemplateError]
        try:
            rendered = iter(request.answer())
        except TemplateError as error:
            # Which one had to be stopped? Each is allowed the time and memory that all of them had.
            # One by one as they are read: a reader that ends with the first error waits for no
            # other.
            rendered = iter([error])
            if len(safe) > 1:
                rendered = (_render_alone(template, alone, tokens) for alone in safe)
        for refusal in refused:
            yield _as_user_errors(next(rendered), name) if refusal is None else refusal

    return answers()


def _render_alone(
    template: str, conversation: Conversation, tokens: Mapping[str, object]
) -> list[Rendered | TemplateError] | TemplateError:
    try:
        return RENDERER.render(template, [conversation], tokens).answer()[0]
    except TemplateError as error:
        return error


def _as_user_errors(
    result: list[Rendered | TemplateError] | TemplateError, name: str
) -> Renderings | UserError:
    if isinstance(result, TemplateError):
        return UserError(f"{name}: its chat template {result}")
    return [
        UserError(f"{name}: its chat template {r}") if isinstance(r, TemplateError) else r
        for r in result
    ]


def _special_token(
    hf_tokenizer: Any, conversation: Conversation, name: str, turn: str
) -> UserError | None:
    """The error for the first special token in a message or a tool, if there is one."""
    as_written, normalized = _special_patterns(hf_tokenizer)
    parts = [(turn.format(n), message) for n, message in enumerate(conversation.messages)]
    parts += [(f"tools[{n}]", tool) for n, tool in enumerate(conversation.tools)]
    for location, part in parts:
        content = part.get("content")
        # most messages are a role, which is one of a few, and a content
        texts = [content] if len(part) == 2 and isinstance(content, str) else _texts(part)
        for text in texts:
            match = as_written.search(text)
            if match is None and normalized is not None:
                normalizer = hf_tokenizer.backend_tokenizer.normalizer
                match = normalized.search(normalizer.normalize_str(text))
            if match:
                return UserError(
                    f"{location} contains {match[0]}, a special token of {name}. It would not be "
                    "read as text: it could begin or end a turn. Remove it, or spell it "
                    "differently."
                )
    return None


def _texts(value: object) -> Iterator[str]:
    """Every text in a message or a tool, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key)
            yield from _texts(part)
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


@lru_cache(maxsize=8)
def _special_patterns(hf_tokenizer: Any) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """Patterns of the special tokens, and of those that the tokenizer matches in normalized text.

    Added tokens that are not special are ordinary text.
    """
    inner = hf_tokenizer.backend_tokenizer
    added = inner.get_added_tokens_decoder().values()
    tokens = [token for token in added if token.special and token.content.strip()]
    as_written = _match_any([token.content for token in tokens])
    contents = [token.content for token in tokens if token.normalized]
    if not inner.normalizer or not contents:
        return as_written, None
    return as_written, _match_any([*map(inner.normalizer.normalize_str, contents)])


def _match_any(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nowhere


def no_template(name: str) -> UserError:
    return UserError(
        f'{name} has no chat template. Prompt it without chat, and train it on "text" or '
        '"prompt"/"completion".'
    )


def one_line(error: BaseException) -> str:
    """A library's message, which may have many lines, for one of ours."""
    return " ".join(str(error).split())[:200]

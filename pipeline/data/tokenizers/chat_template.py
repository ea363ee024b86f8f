"""Chat templates, rendered as transformers does."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.data.tokenizers.template_process import RENDERER, Rendered, TemplateError
from pipeline.errors import UserError
from pipeline.files.digest_cache import Signature, signature

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"

TURN = "messages[{}]"

Messages = Sequence[Mapping[str, object]]  # each with role and content
Prefixes = Sequence[tuple[int, bool]]  # (number of leading messages, add_generation_prompt)
Renderings = Sequence[Rendered | UserError]


def has_template(folder: Path) -> bool:
    """Whether the model in `folder` has a chat template."""
    if (folder / TEMPLATE).is_file():
        return True
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def render(folder: Path, text: str) -> Rendered:
    """`text` as a user's turn, with the generation prompt. Raises UserError."""
    return single_rendering(render_in(folder, [{"role": "user", "content": text}], [(1, True)], turn="the prompt"))


def single_rendering(renderings: Renderings) -> Rendered:
    """The only rendering. Raises it if it is a UserError."""
    (rendering,) = renderings
    if isinstance(rendering, UserError):
        raise rendering
    return rendering


def render_in(folder: Path, messages: Messages, prefixes: Prefixes, turn: str = TURN) -> Renderings:
    """`render_with` the chat template of the model in `folder`. Raises UserError."""
    if not has_template(folder):
        raise no_template(str(folder))
    try:
        hf_tokenizer = _open_tokenizer(folder, (*signature(folder / TEMPLATE), *signature(folder / CONFIG)))
    except Exception as error:  # whatever the library raises
        raise UserError(f"{folder}: cannot open its tokenizer: {one_line(error)}") from None
    return render_with(hf_tokenizer, messages, prefixes, str(folder), turn)


@lru_cache(maxsize=8)
def _open_tokenizer(folder: Path, files: Signature) -> Any:  # noqa: ARG001  # opened again after they changed
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def render_with(hf_tokenizer: Any, messages: Messages, prefixes: Prefixes, name: str, turn: str = TURN) -> Renderings:
    """For each (n, add_generation_prompt) the first n messages in a transformers tokenizer's chat template, or the
    UserError that says why it fails.

    Raises UserError if the rendering process had to be stopped, or if a message contains a special token: among those
    that the template writes, it would begin or end a turn. `turn` formats a message's index for the error.
    """
    as_written, normalized = _special_patterns(hf_tokenizer)
    for number, message in enumerate(messages):
        text = str(message["content"])
        match = as_written.search(text)
        if match is None and normalized is not None:
            match = normalized.search(hf_tokenizer.backend_tokenizer.normalizer.normalize_str(text))
        if match:
            raise UserError(
                f"{turn.format(number)} contains {match[0]}, a special token of {name}. It would not be read as text: "
                "it could begin or end a turn. Remove it, or spell it differently."
            )
    try:
        template = hf_tokenizer.get_chat_template()
    except ValueError as error:  # several templates, none of them the default
        raise UserError(f"{name}: its chat template fails: {one_line(error)}") from None
    try:
        results = RENDERER.render(template, messages, prefixes, hf_tokenizer.special_tokens_map)
    except TemplateError as error:
        raise UserError(f"{name}: its chat template {error}") from None
    return [UserError(f"{name}: its chat template {r}") if isinstance(r, TemplateError) else r for r in results]


@lru_cache(maxsize=8)
def _special_patterns(hf_tokenizer: Any) -> tuple[re.Pattern[str], re.Pattern[str] | None]:
    """Patterns of the special tokens, and of those that the tokenizer matches in normalized text.

    Added tokens that are not special are ordinary text.
    """
    inner = hf_tokenizer.backend_tokenizer
    tokens = [token for token in inner.get_added_tokens_decoder().values() if token.special and token.content.strip()]
    normalized = [inner.normalizer.normalize_str(t.content) for t in tokens if t.normalized] if inner.normalizer else []
    return _match_any([token.content for token in tokens]), _match_any(normalized) if normalized else None


def _match_any(tokens: list[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # (?!) matches nowhere


def no_template(name: str) -> UserError:
    return UserError(
        f'{name} has no chat template. Prompt it without chat, and train it on "text" or "prompt"/"completion".'
    )


def one_line(error: Exception) -> str:
    """A library's message, which may have many lines, for one of ours."""
    return " ".join(str(error).split())[:200]

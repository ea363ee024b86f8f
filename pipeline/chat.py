"""Chat templates, as transformers renders them."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

TEMPLATE, CONFIG = "chat_template.jinja", "tokenizer_config.json"


def has_template(folder: Path) -> bool:
    """Whether the model in `folder` was made to chat."""
    if (folder / TEMPLATE).is_file():
        return True
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def render(folder: Path, text: str) -> str:
    """`text` as a user's turn, up to where the model answers. Raises UserError.

    The template writes the beginning-of-text token itself where there is one: encode without special tokens.
    """
    if not has_template(folder):
        raise UserError(f"{folder} has no chat template. Prompt it without chat.")
    try:
        turns = [{"role": "user", "content": text}]
        times = tuple(_time(folder / name) for name in (TEMPLATE, CONFIG))
        rendered: str = _tokenizer(folder, times).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template or the library raises
        raise UserError(f"{folder}: its chat template fails: {' '.join(str(error).split())[:200]}") from None
    return rendered


def _time(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@lru_cache(maxsize=8)
def _tokenizer(folder: Path, times: tuple[int, ...]) -> Any:  # noqa: ARG001  # read anew when a file changed
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)

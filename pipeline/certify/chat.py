"""Whether a conversation becomes the same token ids: template, special tokens, BOS once."""

from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from pipeline.certify.process import Process
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import Tokenizer, load_tokenizer
from pipeline.errors import UserError

TOKENIZER = "tokenizer.json"
TURNS = (
    {"role": "user", "content": "What is 12 × 12? Answer in one word."},
    {"role": "assistant", "content": "It is 144."},
    {"role": "user", "content": 'And "{x}" plus \n two new  lines?'},
)


def tokenizer_folder(folder: Path, base: Path) -> Path:
    """Where a program takes the tokenizer from: the folder itself if it has one."""
    return folder if (folder / TOKENIZER).exists() else base


def of_files(folder: Path, base: Path) -> Iterator[str]:
    """What is wrong with a tokenizer that comes with what is certified."""
    if tokenizer_folder(folder, base) == base:
        return
    try:
        ours, theirs = load_tokenizer(folder), load_tokenizer(base)
    except UserError as error:
        yield f"its tokenizer cannot be read: {error}"
        return
    if theirs.has_template and not ours.has_template:
        yield "its tokenizer has no chat template, and the base's has one"
    conversation = _rendered(ours)
    if conversation is not None and conversation[1][:2] == [ours.bos_id] * 2:
        yield f"a conversation begins with {ours.word(conversation[1][0])} twice"


def _rendered(tokenizer: Tokenizer) -> tuple[str, list[int]] | None:
    """A conversation as our own reading renders it, with its ids; None without a chat template."""
    if not isinstance(tokenizer, SubwordTokenizer) or not tokenizer.has_template:
        return None
    try:
        rendered = tokenizer.render(TURNS, True)
    except UserError:
        return None
    return rendered, list(tokenizer.encode(rendered))


def in_program(process: Process, folder: Path, base: Path) -> Iterator[str]:
    """What differs between our reading of a conversation and a program's.

    `folder`: what is certified, or a file, which holds its tokenizer.
    """
    folder = tokenizer_folder(folder, base)
    try:
        tokenizer = load_tokenizer(folder)
        conversation = _rendered(tokenizer)
        if conversation is None:
            return
        rendered, ours = conversation
        assert isinstance(tokenizer, SubwordTokenizer)
        theirs = process.chat(folder, TURNS, rendered, tokenizer.template)
    except UserError as error:
        yield f"it does not read a conversation: {error}"
        return
    if ours != theirs:
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))])
        yield f"token {same + 1} of a conversation differs ({len(theirs)} tokens, {len(ours)} here)"

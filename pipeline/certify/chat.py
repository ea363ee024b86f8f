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


def tokenizer_folder(adapter: Path, base: Path) -> Path:
    """Where a program takes the tokenizer from: the adapter's folder if it has one."""
    return adapter if (adapter / TOKENIZER).exists() else base


def of_files(adapter: Path, base: Path) -> Iterator[str]:
    """What is wrong with a tokenizer that comes with the adapter."""
    if tokenizer_folder(adapter, base) == base:
        return
    try:
        ours, theirs = load_tokenizer(adapter), load_tokenizer(base)
    except UserError as error:
        yield f"its tokenizer cannot be read: {error}"
        return
    if theirs.has_template and not ours.has_template:
        yield "its tokenizer has no chat template, and the base's has one"
    ids = _conversation(ours)
    if ids is not None and ids[:2] == [ours.bos_id] * 2:
        yield f"a conversation begins with {ours.word(ids[0])} twice"


def _conversation(tokenizer: Tokenizer) -> list[int] | None:
    """The ids that our own reading gives; None without a chat template."""
    if not isinstance(tokenizer, SubwordTokenizer) or not tokenizer.has_template:
        return None
    try:
        return list(tokenizer.encode(tokenizer.render(TURNS, True)))
    except UserError:
        return None


def in_program(process: Process, adapter: Path, base: Path) -> Iterator[str]:
    """What differs between our reading of a conversation and a program's."""
    folder = tokenizer_folder(adapter, base)
    try:
        ours = _conversation(load_tokenizer(folder))
        if ours is None:
            return
        theirs = process.chat(folder, TURNS)
    except UserError as error:
        yield f"the tokenizer does not open: {error}"
        return
    if ours != theirs:
        same = len([*takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False))])
        yield f"token {same + 1} of a conversation differs ({len(theirs)} tokens, {len(ours)} here)"

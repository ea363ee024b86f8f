"""Whether a conversation becomes the same token ids: template, special tokens, BOS once."""

from collections.abc import Iterator
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
    yield from _own_faults(ours)


def _own_faults(tokenizer: Tokenizer) -> Iterator[str]:
    ids = _conversation(tokenizer)
    if ids is not None and len(ids) > 1 and ids[0] == ids[1] and _is_bos(tokenizer, ids[0]):
        yield f"a conversation begins with {tokenizer.word(ids[0])} twice"


def _is_bos(tokenizer: Tokenizer, id_: int) -> bool:
    return tuple(tokenizer.encode("")[:1]) == (id_,) or tokenizer.word(id_).startswith("<")


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
        process.tokenizer(folder)
        theirs = None if ours is None else process.chat(TURNS)
    except UserError as error:
        yield f"the tokenizer does not open: {error}"
        return
    if ours != theirs and ours is not None and theirs is not None:
        pairs = zip(ours, theirs, strict=False)
        same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        yield f"token {same + 1} of a conversation differs ({len(theirs)} tokens, {len(ours)} here)"

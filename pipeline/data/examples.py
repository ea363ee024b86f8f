"""Examples and prompts as files, read one line at a time, and the windows that training cuts from them."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import yaml

from pipeline.errors import UserError

IGNORED = -100  # the label that cross-entropy skips
LONGEST = 2**20  # bytes of a line: a tokenizer takes up to some 350 bytes of memory for each

Rule = Literal["must_change", "must_keep", "must_learn"]
Role = Literal["system", "developer", "user", "assistant", "tool"]

FORMS = '{"text"}, {"prompt", "completion"} or {"messages"}'


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """One line of a data file, and where it stands.

    A text has `text` alone. With a prompt, `text` is the prompt and its completion as they stand; where both are the
    same, the completion is still to be made. A conversation's `text` is its contents, a line each.
    """

    text: str
    file: str
    line: int
    prompt: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def place(self) -> str:
        return f"{self.file}:{self.line}"

    @property
    def completion(self) -> str:
        """What follows the prompt; nothing is put between."""
        return self.text[len(self.prompt or "") :]


@dataclass(frozen=True)
class Prompt:
    """A prompt, the first choice expected of the pretrained (or, for must_learn, the tuned) model,
    and the first choice after the group's correction (the same, unless the rule is must_change)."""

    group: str
    rule: Rule
    prompt: str
    answer: str
    corrected: str


@dataclass(frozen=True)
class Window:
    """Up to `size` consecutive tokens that keep their positions, and the token after each."""

    start: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def read_examples(path: Path, name: str, prompts: bool = False) -> list[Example]:
    """Every example of a file. `name` is the path as the user wrote it. Raises UserError."""
    return list(iter_examples(path, name, prompts))


def iter_examples(path: Path, name: str, prompts: bool = False) -> Iterator[Example]:
    """The examples of a file, a line each, in constant memory: `.txt` holds texts, `.jsonl` any of FORMS.

    A text keeps all its white space but the newline that ends its line; that alone ends a line.
    With `prompts` a line may also be {"prompt"} alone, for the model itself to complete.
    Raises UserError with the file, the line and the reason.
    """
    read: Callable[[str, str, int], Example]
    if path.suffix.lower() == ".jsonl":
        read = _record_with_prompts if prompts else _record
    elif path.suffix.lower() == ".txt":
        read = _line
    else:
        raise UserError(f"{name}: data files end in .txt or .jsonl. Write one text a line, or one JSON object a line.")
    for number, line in _lines(path, name):
        yield read(line, name, number)


def in_evaluation(example: Example, share: float) -> bool:
    """Whether an example is held out, as its content alone decides: adding lines moves none, twins stay together."""
    content = json.dumps([example.text, example.prompt, list(example.messages)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) < share * 2**64


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. Blank lines may stand after the last one only."""
    blank = number = start = 0
    try:
        with path.open("rb") as file:
            for at, raw in enumerate(iter(lambda: file.readline(LONGEST + 3), b""), 1):  # 2 end it, 1 shows more
                _refuse_long(raw, name, at)
                line = _decoded(raw, name, at, start)
                start += len(raw)
                if not line.strip():
                    blank = blank or at
                    continue
                if blank:
                    raise UserError(f"{name}:{blank}: blank line. Write one example a line, with none between them.")
                number = at
                yield number, line
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name a file that exists.") from None
    if not number:
        raise UserError(f"{name}: the file is empty. Write one example a line.")


def _refuse_long(raw: bytes, name: str, number: int) -> None:
    # The first max_length tokens cannot be had from the beginning of a text: what follows may change them.
    if len(raw.removesuffix(b"\n").removesuffix(b"\r")) > LONGEST:
        raise UserError(
            f"{name}:{number}: a line must have at most {LONGEST:,} bytes, got more. Split its text into several lines."
        )


def _decoded(raw: bytes, name: str, number: int, start: int) -> str:
    # An editor on Windows ends a line with \r\n, which no user sees as text. A \r anywhere else is text.
    line = raw.removesuffix(b"\r\n" if raw.endswith(b"\r\n") else b"\n")
    try:
        return line.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{name}:{number}: not UTF-8 (byte {start + error.start})"
        raise UserError(f"{place}. Save the file as UTF-8.") from None


def _line(line: str, file: str, number: int) -> Example:
    return Example(line, file, number)


def _record_with_prompts(line: str, file: str, number: int) -> Example:
    return _record(line, file, number, prompts=True)


def _record(line: str, file: str, number: int, prompts: bool = False) -> Example:
    place = f"{file}:{number}"
    record = _object(line, place)
    keys = set(record)
    if keys == {"text"}:
        return Example(_string(record, "text", place), file, number)
    if keys == {"prompt", "completion"}:
        prompt = _string(record, "prompt", place)
        return Example(prompt + _string(record, "completion", place), file, number, prompt)
    if keys == {"messages"}:
        messages = _messages(record["messages"], place)
        return Example("\n".join(message["content"] for message in messages), file, number, messages=messages)
    if keys == {"prompt"}:
        if not prompts:
            raise UserError(
                f'{place}: a prompt without a completion teaches nothing. Add "completion"; '
                "without one it is good for finetune_lora.retain alone, where the base completes it."
            )
        prompt = _string(record, "prompt", place)
        return Example(prompt, file, number, prompt)
    forms = f'{FORMS}, or {{"prompt"}}' if prompts else FORMS
    raise UserError(f"{place}: the keys must be {forms}, got {', '.join(map(repr, record)) or 'none'}.")


def _object(line: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{place}: not JSON: {error.msg} at column {error.colno}. Write one JSON object a line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {str(error)[:200]}. Write one JSON object a line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: must be a JSON object, {FORMS}, got {_kind(record)}.")
    return record


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _string(record: dict[str, Any], key: str, place: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{place}: {key} must be a text, got {_kind(value)}.")
    if not value.strip():
        raise UserError(f"{place}: {key} is empty. Write a text, or remove the line.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: {key} holds half of a surrogate pair, which is no character. Remove it.") from None
    return value


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    """Turns of known roles, one of them the assistant's and something before it."""
    if not isinstance(value, list) or not value:
        raise UserError(f'{place}: messages must be a list of {{"role", "content"}}, got {_kind(value)}.')
    messages = tuple(_message(entry, f"{place}: messages[{index}]") for index, entry in enumerate(value))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{place}: no message is the assistant's, so that there is nothing to learn. Add its answer.")
    if roles[0] == "assistant":
        raise UserError(f"{place}: the first message is the assistant's. Begin with what it answers to.")
    return messages


def _message(entry: Any, place: str) -> Message:
    if not isinstance(entry, dict) or set(entry) != {"role", "content"}:
        got = f"keys {', '.join(map(repr, entry)) or 'none'}" if isinstance(entry, dict) else _kind(entry)
        raise UserError(f"{place} needs exactly role and content, got {got}.")
    if entry["role"] not in get_args(Role):
        raise UserError(f"{place}: role must be one of {', '.join(get_args(Role))}, got {str(entry['role'])[:60]!r}.")
    return {"role": entry["role"], "content": _string(entry, "content", place)}


def _kind(value: Any) -> str:
    """A value as JSON calls it; an empty one as it stands."""
    if value is None or isinstance(value, bool) or value in ([], {}):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names[type(value)]


def windows(ids: tuple[int, ...], size: int) -> Iterator[Window]:
    """Every run of `size` tokens with a next token each (the document's §9.2, sequence length).

    A shorter sequence is one shorter window; a sequence of one token has nothing to predict.
    """
    last = max(0, len(ids) - 1 - size)
    for start in range(last + 1):
        stop = min(start + size, len(ids) - 1)
        if stop > start:
            yield Window(start, ids[start:stop], ids[start + 1 : stop + 1])


def read_prompts(path: Path, name: str) -> list[Prompt]:
    """prompts.yaml: group → rule → list of {prompt, answer[, corrected]}. Raises UserError."""
    try:
        tree = yaml.safe_load(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name a file that exists.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not UTF-8 (byte {error.start}). Save the file as UTF-8.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not tree:
        raise UserError(f"{name} must hold groups of prompts, got {tree!r}.")
    prompts = [
        _prompt(entry, str(group), rule, name)
        for group, rules in tree.items()
        for rule, entries in _mapping(rules, f"{name}: {group}").items()
        for entry in _list(entries, f"{name}: {group}.{rule}")
    ]
    if not prompts:
        raise UserError(f"{name} holds no prompts. Write at least one.")
    return prompts


def _mapping(value: Any, place: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place} must hold {', '.join(get_args(Rule))}, got {value!r}.")
    return value


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{place} must be a list of prompts, got {value!r}.")
    return value


def _prompt(entry: Any, group: str, rule: Any, name: str) -> Prompt:
    place = f"{name}: {group}.{rule}"
    if rule not in get_args(Rule):
        raise UserError(f"{place}: unknown rule. Use one of {', '.join(get_args(Rule))}.")
    required = {"prompt", "answer"} | ({"corrected"} if rule == "must_change" else set())
    if not isinstance(entry, dict) or set(entry) != required:
        raise UserError(f"{place}: each prompt needs exactly {', '.join(sorted(required))}, got {entry!r}.")
    if not all(isinstance(value, str) and value.strip() for value in entry.values()):
        raise UserError(f"{place}: every value must be a text (quote yes, no and numbers), got {entry!r}.")
    words = {key: unicodedata.normalize("NFC", value.strip()) for key, value in entry.items() if key != "prompt"}
    return Prompt(group, rule, entry["prompt"], **{"corrected": words["answer"], **words})

"""Examples and prompts, read from data files line by line, and the training windows cut from them."""

import hashlib
import json
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, get_args

import yaml

from pipeline.errors import UserError

IGNORED = -100  # cross-entropy's ignore_index
MAX_LINE_BYTES = 2**20  # a tokenizer needs up to about 350 bytes of memory per byte of text

Rule = Literal["must_change", "must_keep", "must_learn"]
Role = Literal["system", "developer", "user", "assistant", "tool"]

FORMS = '{"text"}, {"prompt", "completion"} or {"messages"}'


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """One line of a data file, with its file and line number.

    A plain text has only `text`. With a prompt, `text` is prompt + completion; if both are equal, the completion is
    still to be generated. A conversation's `text` is the contents of its messages, one per line.
    """

    text: str
    file: str
    line: int
    prompt: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def location(self) -> str:
        """As `file:line`, for error messages."""
        return f"{self.file}:{self.line}"

    @property
    def completion(self) -> str:
        """The text after the prompt, including any leading white space."""
        return self.text[len(self.prompt or "") :]


@dataclass(frozen=True)
class Prompt:
    """A prompt with the expected top-1 prediction before (`answer`) and after fine-tuning (`corrected`).

    They differ only for must_change; for must_learn, `answer` is expected of the fine-tuned model alone.
    """

    group: str
    rule: Rule
    prompt: str
    answer: str
    corrected: str


@dataclass(frozen=True)
class Window:
    """A run of consecutive tokens, beginning at position `start`, and the token that follows each."""

    start: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def read_examples(path: Path, name: str, prompts: bool = False) -> list[Example]:
    """All examples of a file. `name` is the path as the user wrote it. Raises UserError."""
    return list(iter_examples(path, name, prompts))


def iter_examples(path: Path, name: str, prompts: bool = False) -> Iterator[Example]:
    """The examples of a file, one per line, in constant memory: `.txt` holds texts, `.jsonl` any of FORMS.

    Only a newline ends a line; all other white space belongs to the text.
    With `prompts`, a line may also be {"prompt"} alone, for the model itself to complete.
    Raises UserError with the file, the line and the reason.
    """
    parse: Callable[[str, str, int], Example]
    if path.suffix.lower() == ".jsonl":
        parse = _parse_record_or_prompt if prompts else _parse_record
    elif path.suffix.lower() == ".txt":
        parse = _parse_text
    else:
        raise UserError(f"{name}: a data file must be .txt (one text per line) or .jsonl (one JSON object per line).")
    for number, line in _read_lines(path, name):
        yield parse(line, name, number)


def in_evaluation(example: Example, share: float) -> bool:
    """Whether an example is held out, decided by a hash of its content.

    So adding lines moves no example between the splits, and duplicates land in the same one.
    """
    content = json.dumps([example.text, example.prompt, list(example.messages)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) < share * 2**64


def _read_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without line ends. Blank lines are allowed only at the end of the file."""
    blank = number = start = 0
    try:
        with path.open("rb") as file:
            for at, raw in enumerate(
                iter(lambda: file.readline(MAX_LINE_BYTES + 3), b""), 1
            ):  # +2 for \r\n, +1 to detect more
                _refuse_long(raw, name, at)
                line = _decode_line(raw, name, at, start)
                start += len(raw)
                if not line.strip():
                    blank = blank or at
                    continue
                if blank:
                    raise UserError(
                        f"{name}:{blank}: blank line. Write one example per line, with no blank lines between them."
                    )
                number = at
                yield number, line
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}. Name a file that exists.") from None
    if not number:
        raise UserError(f"{name}: the file is empty. Write one example per line.")


def _refuse_long(raw: bytes, name: str, number: int) -> None:
    # A long line cannot be cut before it is tokenized: the text behind the cut may change the tokens before it.
    if len(raw.removesuffix(b"\n").removesuffix(b"\r")) > MAX_LINE_BYTES:
        raise UserError(
            f"{name}:{number}: a line must have at most {MAX_LINE_BYTES:,} bytes, got more. "
            "Split its text into several lines."
        )


def _decode_line(raw: bytes, name: str, number: int, start: int) -> str:
    # Windows editors end lines with \r\n. A \r anywhere else is part of the text.
    line = raw.removesuffix(b"\r\n" if raw.endswith(b"\r\n") else b"\n")
    try:
        return line.decode("utf-8" if start else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{name}:{number}: not UTF-8 (byte {start + error.start}). Save the file as UTF-8.") from None


def _parse_text(line: str, file: str, number: int) -> Example:
    return Example(line, file, number)


def _parse_record_or_prompt(line: str, file: str, number: int) -> Example:
    return _parse_record(line, file, number, prompts=True)


def _parse_record(line: str, file: str, number: int, prompts: bool = False) -> Example:
    location = f"{file}:{number}"
    record = _parse_object(line, location)
    keys = set(record)
    if keys == {"text"}:
        return Example(_read_string(record, "text", location), file, number)
    if keys == {"prompt", "completion"}:
        prompt = _read_string(record, "prompt", location)
        return Example(prompt + _read_string(record, "completion", location), file, number, prompt)
    if keys == {"messages"}:
        messages = _read_messages(record["messages"], location)
        return Example("\n".join(message["content"] for message in messages), file, number, messages=messages)
    if keys == {"prompt"}:
        if not prompts:
            raise UserError(
                f'{location}: "prompt" needs a "completion". Add one, or use {{"text": …}} to train on the whole line. '
                "Only finetune_lora.retention_data takes prompts alone: the base model completes them."
            )
        prompt = _read_string(record, "prompt", location)
        return Example(prompt, file, number, prompt)
    forms = f'{FORMS}, or {{"prompt"}}' if prompts else FORMS
    raise UserError(f"{location}: the keys must be {forms}, got {', '.join(map(repr, record)) or 'none'}.")


def _parse_object(line: str, location: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=_reject_duplicate_keys)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{location}: not JSON: {error.msg} at column {error.colno}. Write one JSON object per line."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not JSON: {str(error)[:200]}. Write one JSON object per line.") from None
    if not isinstance(record, dict):
        raise UserError(f"{location}: must be a JSON object, {FORMS}, got {_describe_type(record)}.")
    return record


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        raise ValueError("duplicate key")
    return record


def _read_string(record: dict[str, Any], key: str, location: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise UserError(f"{location}: {key} must be a string, got {_describe_type(value)}.")
    if not value.strip():
        raise UserError(f"{location}: {key} is empty. Fill it in, or remove the line.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{location}: {key} contains an unpaired surrogate, which is not a character. Remove it."
        ) from None
    return value


def _read_messages(value: Any, location: str) -> tuple[Message, ...]:
    """Validated turns: at least one by the assistant, which must not be the first."""
    if not isinstance(value, list) or not value:
        raise UserError(f'{location}: messages must be a list of {{"role", "content"}}, got {_describe_type(value)}.')
    messages = tuple(_read_message(entry, f"{location}: messages[{index}]") for index, entry in enumerate(value))
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f'{location}: messages has no "assistant" turn, so there is nothing to train on. Add one.')
    if roles[0] == "assistant":
        raise UserError(f'{location}: messages must not start with an "assistant" turn. Put the turn it answers first.')
    return messages


def _read_message(entry: Any, location: str) -> Message:
    if not isinstance(entry, dict) or set(entry) != {"role", "content"}:
        got = f"keys {', '.join(map(repr, entry)) or 'none'}" if isinstance(entry, dict) else _describe_type(entry)
        raise UserError(f"{location} must have exactly the keys role and content, got {got}.")
    if entry["role"] not in get_args(Role):
        raise UserError(
            f"{location}: role must be one of {', '.join(get_args(Role))}, got {str(entry['role'])[:60]!r}."
        )
    return {"role": entry["role"], "content": _read_string(entry, "content", location)}


def _describe_type(value: Any) -> str:
    """The JSON type of a value; null, true, false, [] and {} as they are."""
    if value is None or isinstance(value, bool) or value in ([], {}):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


def windows(ids: tuple[int, ...], size: int) -> Iterator[Window]:
    """Every run of `size` tokens that has a next token for each (the document's §9.2, sequence length).

    A shorter sequence gives one shorter window; a sequence of one token gives none.
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
        raise UserError(f"{name} must map groups to rules and their prompts, got {tree!r}.")
    prompts = [
        _read_prompt(entry, str(group), rule, name)
        for group, rules in tree.items()
        for rule, entries in _require_mapping(rules, f"{name}: {group}").items()
        for entry in _require_list(entries, f"{name}: {group}.{rule}")
    ]
    if not prompts:
        raise UserError(f"{name} contains no prompts. Add at least one.")
    return prompts


def _require_mapping(value: Any, location: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{location} must map rules ({', '.join(get_args(Rule))}) to prompts, got {value!r}.")
    return value


def _require_list(value: Any, location: str) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{location} must be a list of prompts, got {value!r}.")
    return value


def _read_prompt(entry: Any, group: str, rule: Any, name: str) -> Prompt:
    location = f"{name}: {group}.{rule}"
    if rule not in get_args(Rule):
        raise UserError(f"{location}: unknown rule. Use one of {', '.join(get_args(Rule))}.")
    required = {"prompt", "answer"} | ({"corrected"} if rule == "must_change" else set())
    if not isinstance(entry, dict) or set(entry) != required:
        raise UserError(f"{location}: each prompt needs exactly {', '.join(sorted(required))}, got {entry!r}.")
    if not all(isinstance(value, str) and value.strip() for value in entry.values()):
        raise UserError(
            f"{location}: every value must be a string that is not empty (quote yes, no and numbers), got {entry!r}."
        )
    words = {key: unicodedata.normalize("NFC", value.strip()) for key, value in entry.items() if key != "prompt"}
    return Prompt(group, rule, entry["prompt"], **{"corrected": words["answer"], **words})

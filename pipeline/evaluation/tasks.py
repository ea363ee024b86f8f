"""The user's tasks: reads and checks their files."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from pipeline.data.containers import read_rows
from pipeline.data.formats import Record, read_list, read_string, refuse_unknown
from pipeline.data.formats.messages import read_turns
from pipeline.errors import UserError
from pipeline.evaluation.kinds import KINDS, Kind, Score, TaskExample, TaskOptions
from pipeline.files import strict_yaml
from pipeline.files.text import abbreviate_repr
from pipeline.project.params.schema import File, Names, ValueSource, check_value

NAME = re.compile(r"[\w .-]{1,60}")
# options of kinds whose answers are generated
GENERATED = {
    "max_new_tokens": Annotated[int, Meta(ge=1, le=65_536)],
    "stop": Names,
}


@dataclass(frozen=True)
class Task:
    """Examples that are asked and scored in the same way."""

    name: str
    kind: Kind
    options: Mapping[str, Any]
    examples: Sequence[TaskExample]
    score: Score


def read_tasks(root: Path, names: Sequence[str]) -> list[Task]:
    """The tasks in the files of evaluate.tasks, in their order. Raises UserError.

    Files that a task names must be in evaluate.tasks too, so that a change of them makes the
    evaluation out of date. Python files among them are run.
    """
    files = {(root / name).resolve(): name for name in names}
    used, tasks = set[Path](), list[Task]()
    for path, name in files.items():
        for entry, location in _entries(path, name):
            named = [str(entry[key]) for key in ("file", "scorer") if key in entry]
            used |= {path, *((path.parent / file).resolve() for file in named)}
            task = _read_task(entry, location, name, path.parent, files)
            if any(task.name == other.name for other in tasks):
                raise UserError(
                    f"{location}: there are two tasks {task.name!r}. Rename one of them."
                )
            tasks.append(task)
    if idle := [name for path, name in files.items() if path not in used]:
        raise UserError(
            f"{idle[0]} is in evaluate.tasks, but no task is in it and none names it. Tasks are in "
            '.yaml files, and in .jsonl files whose lines have a "kind".'
        )
    return tasks


def _entries(path: Path, name: str) -> Iterator[tuple[Record, str]]:
    """Each task of a file as it is written, and where; nothing if the file has other content."""
    entries: Any = []
    if path.suffix.lower() in (".yaml", ".yml"):
        entries = strict_yaml.read(path, name)
        is_list = isinstance(entries, list) and len(entries) > 0
        if not is_list or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(
                f"{name} must be a list of tasks, each with name, kind and examples, got "
                f"{abbreviate_repr(entries)}."
            )
    elif path.suffix.lower() == ".jsonl" and "kind" in next(read_rows(path, name)).value:
        entries = [row.value for row in read_rows(path, name)]
    for number, entry in enumerate(entries, 1):
        location = f"{name}: task {number}"
        for key in ("file", "scorer"):
            if isinstance(entry.get(key), str):  # a path with a NUL cannot be resolved
                check_value(File, entry[key], f"{location}: {key}", ValueSource(name))
        yield entry, location


def _read_task(
    entry: Record, location: str, file: str, folder: Path, files: Mapping[Path, str]
) -> Task:
    name = entry.get("name")
    kind = KINDS.get(str(entry.get("kind")))
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{location}: name must be a text of at most 60 letters, digits, spaces and ._-, got "
            f"{abbreviate_repr(name)}."
        )
    location = f"{file}: {name}"
    if kind is None:
        raise UserError(
            f"{location}: kind must be one of {', '.join(KINDS)}, got "
            f"{abbreviate_repr(entry.get('kind'))}."
        )
    types: dict[str, Any] = {"chat": bool, **({} if kind.choices else GENERATED), **kind.options}
    refuse_unknown(entry, ["name", "kind", "examples", "file", *types], location)
    origin = ValueSource(file)
    options = {
        key: check_value(types[key], value, f"{location}: {key}", origin)
        for key, value in entry.items()
        if key in types
    }
    if ("examples" in entry) == ("file" in entry):
        raise UserError(f"{location}: give examples, a list, or file, a data file with a row each.")
    chat = options.get("chat", False)
    examples = []
    for row, where in _rows(entry, location, folder, files):
        row, prompt = _read_prompt(row, where, chat)
        if "completion" in row:  # as in the data formats
            row = {"answer": row["completion"], **row}
        kind.check(row, where)
        examples.append(TaskExample(prompt, row, where))
    score = kind.scorer(TaskOptions(options, location, folder, files))
    return Task(name, kind, options, examples, score)


def _rows(
    entry: Record, location: str, folder: Path, files: Mapping[Path, str]
) -> Iterator[tuple[Record, str]]:
    if "file" in entry:
        return _rows_of_file(entry, location, folder, files)
    return _inline_rows(entry, location)


def _inline_rows(entry: Record, location: str) -> Iterator[tuple[Record, str]]:
    for number, row in enumerate(read_list(entry, "examples", location, "examples"), 1):
        where = f"{location}, example {number}"
        if not isinstance(row, dict):
            raise UserError(
                f"{where} must have keys such as prompt and answer, got {abbreviate_repr(row)}."
            )
        yield row, where


def _rows_of_file(
    entry: Record, location: str, folder: Path, files: Mapping[Path, str]
) -> Iterator[tuple[Record, str]]:
    written = read_string(entry, "file", location)
    path = (folder / written).resolve()
    if path not in files:
        raise UserError(
            f"{location}: file {written} is not in evaluate.tasks. Add it there, so that a change "
            "of it counts."
        )
    for number, row in read_rows(path, files[path]):
        if isinstance(row, str):
            raise UserError(
                f"{files[path]}: a .txt file has no keys. Use .jsonl or .csv, with a column for "
                "each key."
            )
        yield row, f"{files[path]}:{number}"


def task_prompts(path: Path, name: str) -> Iterator[tuple[str, str]]:
    """The prompt of each example in a file of tasks (the last turn of a chat), and where it is.

    Data files that tasks name are read; scorers are not run. Raises UserError.
    """
    for entry, location in _entries(path, name):
        data = path.parent / str(entry.get("file"))
        for row, where in _rows(entry, location, path.parent, {data.resolve(): str(data)}):
            _, prompt = _read_prompt(row, where, chat=False)
            yield prompt if isinstance(prompt, str) else prompt[-1]["content"] or "", where


def _read_prompt(row: Record, location: str, chat: bool) -> tuple[Record, Any]:
    """The row and its prompt, a text or messages; a conversation's last answer is its `answer`."""
    prompt: Any
    if "messages" in row:
        prompt = read_turns(row, "messages", location).messages
        if prompt[-1]["role"] == "assistant":
            row = {"answer": prompt[-1]["content"], **row}
            prompt = prompt[:-1]
        if not prompt:
            raise UserError(
                f"{location}: messages must have a turn before the answer. Add the user's."
            )
    elif isinstance(row.get("prompt"), list):
        prompt = read_turns(row, "prompt", location).messages
    else:
        prompt = read_string(row, "prompt", location)
        prompt = ({"role": "user", "content": prompt},) if chat else prompt
    return row, prompt

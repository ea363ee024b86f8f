"""The data files of a project: which they are, what reads them, with what settings; and how rows
get into them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.data.containers import READERS, SAVED, TABLES, Reading, is_hub_id, suffix_of
from pipeline.data.examples import joins_words
from pipeline.data.formats import FORMATS, iter_examples
from pipeline.errors import UserError
from pipeline.files.base_model import parse_source
from pipeline.project.params.sections import Training
from pipeline.project.stage_graph import Project, Stage

MAX_OTHERS = 200  # files that are listed besides the project's own
CORRECTIONS = "data/corrections.jsonl"
OTHERS = (".yaml", ".yml", ".py")  # prompts, tasks, scorers
CUTS = ("max_length", "window")


@dataclass(frozen=True)
class DataFile:
    """A file by the name that params have for it. `uses`: section.key of the params that name it →
    its stage's method.

    `base`: the folder of the model whose tokenizer reads it; "" if there is none yet.
    """

    name: str
    uses: Mapping[str, str] = field(default_factory=dict)
    base: str = ""
    max_length: int = 0
    window: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    templated: bool = True

    def request(self) -> dict[str, Any]:
        """What every request of its rows says."""
        return {
            "path": self.name,
            "base": self.base,
            "columns": dict(self.columns),
            "max_length": self.max_length,
            "window": self.window,
            "templated": self.templated,
        }

    @property
    def readers(self) -> str:
        """What reads it: `lora full`, `lora: retention`."""
        groups: dict[str, list[str]] = {}
        for key, method in self.uses.items():
            groups.setdefault(_role(key), []).append(method)
        return ", ".join(
            " ".join(dict.fromkeys(m)) + (f": {role}" if role else "") for role, m in groups.items()
        )


def _role(key: str) -> str:
    """What a key's file is for; "" for training on it."""
    if key.startswith("expand_vocab.data"):
        return "words"
    name = key.partition(".")[2].partition("[")[0]
    return {"data": "", "eval_data": "held-out"}.get(name, name.removesuffix("_data"))


def is_data(name: str) -> bool:
    """Whether the formats read a file of this name."""
    suffix, compression = suffix_of(Path(name))
    return suffix in READERS or (suffix in TABLES and not compression)


def project_files(project: Project) -> dict[str, DataFile]:
    """The data files that its stages read, by name, in the DAG's order."""
    uses: dict[str, dict[str, str]] = {}
    stages: dict[str, Stage] = {}
    for name, stage in project.stages.items():
        for key, file in project.file_keys(stage).items():
            path = project.root / file
            if is_data(file) or path.is_dir() or (is_hub_id(file) and path.suffix not in OTHERS):
                inner = key.removesuffix(".path")
                full = inner if "." in inner else f"{stage.section}.{inner}"
                uses.setdefault(file, {}).setdefault(full, stage.method or name)
                stages.setdefault(file, stage)
                if _trains(project, stage) and not _trains(project, stages[file]):
                    stages[file] = stage  # its settings say where the file's examples are cut
    return {file: _with_settings(project, file, keys, stages[file]) for file, keys in uses.items()}


def _trains(project: Project, stage: Stage) -> bool:
    return isinstance(project.params.section(stage.section), Training)


def _with_settings(
    project: Project, name: str, uses: Mapping[str, str], stage: Stage | None
) -> DataFile:
    stage = stage or project.stages.get("finetune_lora")
    settings = project.params.section(stage.section) if stage else None
    cuts = {key: getattr(settings, key, 0) for key in CUTS}
    columns: Mapping[str, str] = {}
    if isinstance(settings, Training):
        columns = next((file.columns for file in settings.data_files if file.path == name), {})
    alone = stage is not None and stage.name == "pretrain"
    way = getattr(settings, "chat_template", project.params.training.get("chat_template", "auto"))
    return DataFile(
        name, uses, _base(project, not alone), **cuts, columns=columns, templated=way == "auto"
    )


def _base(project: Project, expanded: bool) -> str:
    """The folder of the model whose tokenizer reads the files; "" if there is none yet.

    The base, expanded if `expanded`; before it is made, the folder that it is imported from.
    """
    names = ["expand_vocab", "pretrain"] if expanded else ["pretrain"]
    folders = [project.artifact(name) for name in names]
    try:
        source = parse_source(project.params.origin.base, project.root)
        folders += [source.path] if source.kind == "folder" else []
    except UserError:
        pass
    folder = next((folder for folder in folders if folder.is_dir()), None)
    if folder is None:
        return ""
    return str(folder.relative_to(project.root) if folder.is_relative_to(project.root) else folder)


def other_file(project: Project | None, name: str) -> DataFile:
    """A file that no stage reads, with the settings that fine-tuning would read it with."""
    return DataFile(name) if project is None else _with_settings(project, name, {}, None)


def other_files(root: Path, known: Mapping[str, object]) -> list[str]:
    """Further data files in `data/`."""
    try:
        with os.scandir(root / "data") as entries:
            names = [
                entry.name for entry in islice(entries, 10 * MAX_OTHERS) if _may_be_data(entry)
            ]
    except OSError:
        return []
    return [f"data/{name}" for name in sorted(names) if f"data/{name}" not in known][:MAX_OTHERS]


def _may_be_data(entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith("."):
        return False
    return is_data(entry.name) or (entry.is_dir() and (Path(entry.path) / SAVED).is_file())


# Rows that are added, and files that take another's place


def edited_name(name: str) -> str:
    """The name of a copy with changed rows: `mine.edited.jsonl` of `mine.parquet`, and of
    itself.
    """
    path = Path(name)
    if path.name.endswith(".edited.jsonl"):
        return name
    stem = path.name
    while suffix_of(Path(stem))[0] in (*READERS, *TABLES):
        stem = Path(stem).stem
    return str(path.with_name(f"{stem}.edited.jsonl"))


def spaced(record: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt and its completion with a space between them where two words would become one."""
    prompt, completion = record.get("prompt"), record.get("completion")
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return dict(record)
    return (
        {**record, "completion": f" {completion}"}
        if joins_words(prompt, completion)
        else dict(record)
    )


def corrected_row(record: Mapping[str, Any], *, has_template: bool) -> dict[str, Any]:
    """An answer of the chat as a row to train on; for a model without a chat template as prompt and
    completion.
    """
    messages = record.get("messages") or ()
    roles = [message.get("role") for message in messages]
    if roles == ["user", "assistant"] and not has_template:
        prompt, completion = (str(message["content"]) for message in messages)
        record = {"prompt": prompt, "completion": completion}
    return spaced(record)


def append_row(path: Path, name: str, line: str) -> None:
    """Append a row to a .jsonl file. Raises UserError if its rows are of a format that the row may
    not stand beside.
    """
    if suffix_of(path) != (".jsonl", ""):
        raise UserError(f"{name}: rows are added to a .jsonl file. Name another.")
    gap = ""
    if path.is_file() and path.stat().st_size:
        reading = Reading()
        next(iter_examples(path, name, prompts=True, reading=reading), None)
        record = json.loads(line)
        found = next(
            (format_.name for format_ in FORMATS.values() if format_.detect(record)), "unknown"
        )
        if reading.format != found and not {reading.format, found} <= {
            format_.name for format_ in FORMATS.values() if format_.mixes
        }:
            raise UserError(
                f"{name} has rows of {reading.format}, and this one is {found}. Name another file."
            )
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            gap = "" if file.read(1) == b"\n" else "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(f"{gap}{line}\n".encode(errors="replace"))
        file.flush()
        os.fsync(file.fileno())


def ways_to_train(project: Project, name: str, instead_of: str = "") -> dict[str, dict[str, Any]]:
    """`section.data` of each stage that could train on a file → the params to write for that.

    `instead_of`: the file that it replaces; by default it is added to the stage's data.
    """
    ways = {}
    for stage in project.stages.values():
        section = project.params.section(stage.section)
        if (
            not isinstance(section, Training)
            or stage.section != stage.name
            or stage.name == "pretrain"
        ):
            continue
        compares = section.COMPARES and not instead_of  # a correction is one answer, not a pair
        if compares or name in section.files or (instead_of and instead_of not in section.files):
            continue
        key = f"{stage.name}.data"
        ways[key] = {key: _with_file(section.data, name, instead_of)}
        vocabulary = project.stages.get("expand_vocab")
        # MiniGPT has no token for a word that it was not told of
        if vocabulary and not project.params.origin.imports:
            words = project.section(vocabulary).data
            ways[key] |= {} if name in words else {"expand_vocab.data": [*words, name]}
    return ways


def _with_file(data: Any, name: str, instead_of: str) -> Any:
    entries = [data] if isinstance(data, str) else list(data)
    if not instead_of:
        return [*entries, name]
    paths = [entry if isinstance(entry, str) else entry["path"] for entry in entries]
    for number, (entry, path) in enumerate(zip(entries, paths, strict=True)):
        if path == instead_of:
            entries[number] = name if isinstance(entry, str) else {**entry, "path": name}
    return entries[0] if isinstance(data, str) else entries


def flat(text: str) -> str:
    """A text on one line, without what is not printed."""
    return "".join(character if character.isprintable() else " " for character in text)

"""The demo `chat`: SmolLM2-135M-Instruct learns from chats of people to chat as they do."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from docs.demo.archive import finish, made, run_stages
from docs.demo.chats import Chat, collected, next_replies, read_chats, read_license
from docs.demo.record import prompts, record
from pipeline.data.examples import in_evaluation
from pipeline.data.formats import read_examples
from pipeline.project.new_project import create
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import GRAPH, open_project
from tui.services.engine_client import ANSWERS
from tui.services.projects.demo import TRAINED

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# by the Makefile: the base, and the package with the chats
BASE = ROOT / "smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE = "chitchat_dataset-0.9.0-py3-none-any.whl"
DOWNLOADS = Path(os.environ.get("DOWNLOADS") or "~/.cache/lora-workbench").expanduser()
GENERAL = ("heldout.en.txt", "retain.en.jsonl")
SHORTEST = 6  # turns of a held-out chat whose sixth is to be chosen
MOST_CHATS = 24  # of them
README = (HERE / "README.txt").read_text(encoding="utf-8")


def build(root: Path) -> Project:
    """The project in `root`, with all of its stages run, its answers recorded and its weights left
    out.
    """
    data = root / "data"
    data.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "params.yaml", root)
    for name in GENERAL:
        shutil.copy(ROOT / "data" / name, data)
    shutil.copy(HERE / "tasks.yaml", data)
    if not (root / BASE.name).exists():
        os.link(BASE, root / BASE.name)

    package = DOWNLOADS / PACKAGE
    _write_lines(data / "collected.jsonl", collected(read_chats(package)))
    (data / "LICENSE").write_text(read_license(package), encoding="utf-8")
    clean = "lora data clean data/collected.jsonl data/chats.jsonl --drop empty,personal"
    (data / "chats.jsonl").unlink(missing_ok=True)
    subprocess.run([*clean.split(), "--skip-invalid"], cwd=root, check=True)
    held_out = _held_out_chats(data / "chats.jsonl", _share(root / "params.yaml"))
    replies = (json.dumps(row, ensure_ascii=False) for row in next_replies(held_out))
    _write_lines(data / "replies.jsonl", replies)

    create(root, GRAPH)
    project = open_project(root / "params.yaml")
    run_stages(project)
    if not (root / ANSWERS).exists():
        models = _models(project)
        # expand_vocab adds no tokens
        imported, expanded = map(project.artifact_name, ("import", "expand_vocab"))
        del models[imported]
        record(root, models, {imported: expanded})
    finish(project, weights=False)
    (root / "README.md").write_text(_readme(), encoding="utf-8")
    return project


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _share(params: Path) -> float:
    return float(open_project(params).params.training["eval_share"])


def _held_out_chats(path: Path, share: float) -> list[Chat]:
    """The chats that training holds out, without those that are too short."""
    examples = read_examples(path, path.name)
    held_out = [example for example in examples if in_evaluation(example, share)]
    chats: list[Chat] = []
    for example in held_out:
        chat = [{key: str(value) for key, value in turn.items()} for turn in example.messages]
        if len(chat) >= SHORTEST:
            chats.append(chat)
    return chats[:MOST_CHATS]


def _models(project: Project) -> dict[str, str | None]:
    """Folder → an adapter's base, relative to the project, of the models that are compared."""
    models: dict[str, str | None] = {}
    for base, adapter in project.variants.values():
        folder = project.artifact_name(adapter or base)
        models[folder] = project.artifact_name(base) if adapter else None
    return models


def _readme() -> str:
    asked = "\n".join(f"- {' → '.join(said)}" for said, chat in prompts() if chat)
    texts = "\n".join(f"- {said[0]}" for said, chat in prompts() if not chat)
    values: dict[str, Any] = {"asked": asked, "texts": texts, "trained": TRAINED, "base": BASE.name}
    return README.format(**values, **made())

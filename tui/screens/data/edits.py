"""Rows are written: one that was edited into a copy of its file, an answer of the chat behind
others, all in another format; and a stage is asked to train on them.
"""

import json
from functools import partial
from typing import Any

from pipeline.project.stage_graph import Project
from pipeline.views.data_files import (
    DataFile,
    append_row,
    corrected_row,
    edited_name,
    flat,
    project_files,
    ways_to_train,
)
from pipeline.views.data_rows import Answer
from tui.app import Workbench
from tui.dialogs import AskText
from tui.panes.menu import Menu
from tui.screens.data.editor import Editor
from tui.screens.data.reader import Reader
from tui.services.param_edits import follows_params

LORA = "finetune_lora.data"


async def edit_row(workbench: Workbench, reader: Reader, row: Answer) -> str | None:
    """Edit a row into a copy of its file, or in place if that is such a copy; the file's name."""
    file, number = reader.file, f"{row['row']:,}"
    name = edited_name(file.name)

    async def write(line: str, out: str) -> None:
        changed = {"position": row["position"], "line": line, "out": out}
        in_place = out == name == file.name
        answer = await reader.process.ask("copy", **file.request(), **changed, replace=in_place)
        left_out = answer["left_out"]
        left = f" {left_out:,} rows that cannot be read are left out." if left_out else ""
        workbench.log_message(f"Written: {out}, row {number} changed.{left}")

    changes = f"Row {number} of {file.name}, all others as they are, is written to:"
    editor = Editor(row["line"], name, changes, partial(reader.draft, file), write)
    return await workbench.push_screen_wait(editor)


async def add_row(
    workbench: Workbench, reader: Reader, file: DataFile, record: dict[str, Any]
) -> str | None:
    """Edit an answer of the chat, and append it to a file of corrections, whose name is returned;
    for a model without a chat template as prompt and completion.
    """
    answer = await reader.draft(file, json.dumps(record, ensure_ascii=False))
    row = corrected_row(record, has_template=answer.get("template") is not False)

    async def write(line: str, out: str) -> None:
        append_row(workbench.root / out, out, line)
        workbench.log_message(f"Added to {out}.")

    changes = "This row is appended to a file that the next run can train on:"
    line = json.dumps(row, ensure_ascii=False)
    editor = Editor(line, file.name, changes, partial(reader.draft, file), write)
    return await workbench.push_screen_wait(editor)


async def offer_training(
    workbench: Workbench, project: Project, name: str, instead_of: str
) -> None:
    """Ask which stage shall train on a file, unless one does, and write it to the params."""
    uses = project_files(project).get(name, DataFile("")).uses
    ways = ways_to_train(project, name, instead_of)
    if not ways or any(key.endswith("data") for key in uses):
        return
    how = f"instead of {flat(instead_of)}" if instead_of else "beside its data"
    choices = {key: f"{key}: {how}" for key in ways} | {"": "nothing, the file is kept"}
    menu = Menu(f"Which stage trains on {flat(name)}?", choices, LORA)
    chosen = await workbench.push_screen_wait(menu)
    if not chosen:
        return
    followed = follows_params(workbench.params_path)
    workbench.edits.save(workbench.params_path, ways[chosen])
    advice = "" if followed else " Add it to dvc.yaml, too: it is not as `lora new` writes it."
    keys = " and ".join(ways[chosen])
    workbench.log_message(f"{flat(name)} is in {keys} (z takes it back).{advice}")
    workbench.project_watch.look_now()


async def export_rows(workbench: Workbench, reader: Reader) -> None:
    """Write all rows in the format of the name asked for."""
    file = reader.file
    formats = ".jsonl, .json, .csv, .tsv, .txt, .parquet, .arrow"
    question = f"Write the rows of {file.name} to ({formats}):"
    proposed = edited_name(file.name).replace(".edited", ".export")
    out = await workbench.push_screen_wait(AskText(question, proposed))
    if out:
        answer = await reader.process.ask("convert", **file.request(), out=out)
        facts = [f"{answer['rows']:,} rows of {answer['format']}", *answer["notes"]]
        workbench.log_message(flat(f"Written: {out}, {'. '.join(facts)}."))

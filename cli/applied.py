"""Values that a command writes into the params file, with the lines that changed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.project.stage_graph import Project


def apply(project: "Project", values: Mapping[str, Any], what: str = "--apply") -> None:
    """Write `section.key` → value into the params file, and print the lines that changed.

    Raises UserError, which begins with `what`, for a section of the project that this one builds on.
    """
    from difflib import unified_diff

    from cli.console import print_line, print_note
    from pipeline.errors import UserError
    from pipeline.project.params.edit import save
    from pipeline.project.params.load import read_text
    from pipeline.workbench import open_project

    path = project.params_path
    named = open_project(path).params.written
    sections = dict.fromkeys(key.partition(".")[0] for key in values if "." in key)
    inherited = project.parent.params.written if project.parent else frozenset()
    for section in sections:
        if section in inherited - named:
            raise UserError(f"{what}: {section} is a section of {project.params.project}. Set it there by hand.")
    before = read_text(path)
    save(path, values, project.graph.sections)
    lines = unified_diff(before.splitlines(), read_text(path).splitlines(), n=0, lineterm="")
    changed = [line for line in [*lines][2:] if line[0] in "+-"]
    print_line("\n".join([f"{path.name}:", *changed]) if changed else f"{path.name} has these values already.")
    new = [section for section in sections if section not in named and section in project.graph.product]
    if new and (project.root / "dvc.yaml").is_file():
        print_note(f"{new[0]} is a stage of this project now. For `dvc repro`, remove dvc.yaml and run `lora new .`.")

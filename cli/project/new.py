"""`lora new`: create a project in a new folder."""

from pathlib import Path
from typing import Annotated

import typer

from cli.options import group

app = group()


@app.command()
def new(
    folder: Annotated[Path, typer.Argument(help="New folder, or an existing project to complete.")],
    params: Annotated[
        Path | None, typer.Option("--params", help="Params file to start from; its data files are copied too.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Base model: minigpt, a checkpoint folder, a .gguf file or a hub id."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Methods to train, such as full,lora; `lora finetune --help` lists them."),
    ] = None,
) -> None:
    """Make a project: params, data, dvc.yaml. Nothing that is there is overwritten."""
    from cli.console import stderr, stdout
    from pipeline.project.new_project import create
    from pipeline.workbench import GRAPH

    project = create(folder, GRAPH, params, base, methods and [name.strip() for name in methods.split(",")])
    for note in project.notes:
        stderr.print(note, markup=False, soft_wrap=True)
    summary = f"{folder}: added {', '.join(project.added)}" if project.added else f"{folder}: nothing to add"
    stdout.print(summary, markup=False, soft_wrap=True)
    stdout.print(f"Next: cd {folder}; dvc repro; lora-tui", markup=False, soft_wrap=True)

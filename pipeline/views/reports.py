"""The pages and pictures that the project's stages wrote, and the numbers behind them, as
Markdown.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST, read_manifest
from pipeline.project.stage_graph import Project, Stage

REPORT = "report.md"
PICTURES = (".png", ".svg")
MAX_NUMBERS = 500_000  # bytes of a file whose numbers are shown
MAX_PICTURES = 500  # of one stage
COMPARISON = "Comparison"


@dataclass(frozen=True)
class Page:
    """A report. `path` is None where its stage did not run yet; `about`: what it is about.

    `folder`: its stage's output, such as studies/rank.
    """

    key: str
    title: str
    about: str
    path: Path | None
    folder: str


@dataclass(frozen=True)
class Picture:
    """A figure. `shows`: its main result; `numbers`: the tables that it was drawn from."""

    key: str
    title: str
    about: str
    shows: str
    path: Path
    numbers: tuple[Path, ...]


def read_pages(project: Project) -> list[Page]:
    """The reports of the comparison and of all stages that measure.

    A stage of a group has a page even if it did not run yet, then without a path.
    """
    pages = []
    for stage in _measuring(project):
        path = project.artifact(stage.name) / REPORT
        if path.is_file() or stage.group:
            pages.append(_page(stage, path if path.is_file() else None))
    return pages


def _page(stage: Stage, path: Path | None) -> Page:
    title = COMPARISON if stage.kind == "evaluation" else stage.title or stage.name
    section = _manifest(path.parent).get("section") if path else ""
    return Page(stage.name, title, str(section or stage.summary), path, stage.output)


def _measuring(project: Project) -> list[Stage]:
    """The comparison, then the stages that measure: those on their own, then those of a group."""
    stages = [
        stage
        for stage in project.readable.values()
        if stage.kind == "evaluation" or stage.is_measurement
    ]
    return sorted(stages, key=lambda stage: bool(stage.group))


def read_pictures(project: Project) -> list[Picture]:
    """The pictures of the same stages; of one stored as PNG and as SVG, the PNG."""
    stages = _measuring(project)
    return [
        picture for stage in stages for picture in _pictures(stage, project.artifact(stage.name))
    ]


def _pictures(stage: Stage, folder: Path) -> Iterator[Picture]:
    manifest = _manifest(folder)
    figures = manifest.get("figures")
    found = [
        path for ending in PICTURES for path in sorted(folder.glob(f"*{ending}"))[:MAX_PICTURES]
    ]
    by_name = {path.stem: path for path in reversed(found)}  # of two with one name, the PNG
    named = [name for name in figures if name in by_name] if isinstance(figures, Mapping) else []
    for name in dict.fromkeys((*named, *sorted(by_name))):
        about: Any = figures[name] if name in named else {}  # type: ignore[index]
        about = about if isinstance(about, Mapping) else {}
        title = "Loss and trained parameters" if stage.kind == "evaluation" else stage.title
        files = about.get("files", ()) if about else [p.name for p in sorted(folder.glob("*.csv"))]
        numbers = [folder / Path(str(file)).name for file in files if str(file).endswith(".csv")]
        yield Picture(
            f"{stage.output}/{name}",
            str(about.get("title") or title or name),
            str(about.get("place") or manifest.get("section") or ""),
            str(about.get("shows") or ""),
            by_name[name],
            tuple(numbers) or tuple(path for path in [folder / "metrics.json"] if path.is_file()),
        )


def _manifest(folder: Path) -> Mapping[str, Any]:
    try:
        return read_manifest(folder)
    except UserError:
        return {}


def numbers_of(path: Path, root: Path) -> str:
    """The numbers in a file as Markdown, below its name: a table, or JSON as it is."""
    heading = f"## {os.path.relpath(path, root)}\n\n"
    try:
        size = path.stat().st_size
        if size > MAX_NUMBERS or path.suffix not in (".csv", ".json", ".txt", ".yaml"):
            return f"{heading}{size:,} bytes: open it with another program.\n"
        if path.suffix == ".csv":
            return f"{heading}{_table_markdown(path)}\n"
        text = path.read_text(encoding="utf-8", errors="replace")
        if path.name == MANIFEST:  # digests of files say nothing to a reader
            tree = {
                key: value
                for key, value in json.loads(text).items()
                if key not in ("files", "inputs", "code")
            }
            text = json.dumps(tree, indent=2, ensure_ascii=False)
        return f"{heading}```\n{text}\n```\n"
    except (OSError, ValueError, AttributeError, UserError, csv.Error) as error:
        return f"{heading}It cannot be read: {error}\n"


def _table_markdown(path: Path) -> str:
    """A table of measurements as Markdown, below the title that its stage gave it."""
    tables = _manifest(path.parent).get("tables")
    about = tables.get(path.stem) if isinstance(tables, Mapping) else None
    title = str(about.get("title", "")) if isinstance(about, Mapping) else ""
    with path.open(encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file)
    lines = [head, ["---"] * len(head), *([_cell(text) for text in row] for row in rows)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"**{title}**\n\n{table}\n" if title else f"{table}\n"


def _cell(text: str) -> str:
    """A number in four digits; any other text as it is."""
    try:
        return f"{float(text):.4g}"
    except ValueError:
        return text.replace("|", "\\|")

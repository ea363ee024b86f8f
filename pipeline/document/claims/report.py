"""report.md: the document from its first section to its last, with what was measured of each statement."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.document.claims.check import VERDICTS, Row, summary, table_of, titled
from pipeline.document.tables import Table, read_table
from pipeline.files.artifact import read_manifest
from pipeline.project.stage_graph import Project

HEAD = """\
# The document, run

What follows takes the document section by section: first what was measured for it, then each of its statements that can
be checked. A verdict is computed, by the rule that `data/claims.yaml` states for the claim; nobody writes one.

- **✓ holds**: what was measured is what the document says, within the claim's tolerance.
- **✗ differs**: it is not, under any of the conditions that were tried.
- **◐ depends**: it is under some of them; the conditions stand beside the numbers.
"""


@dataclass(frozen=True)
class Part:
    """Something that was measured: the section that it belongs to, and its Markdown."""

    section: str
    text: str


def page(rows: Sequence[Row], project: Project) -> str:
    """The whole report. Its pictures are links from artifacts/claims to the folders beside it."""
    parts = [*_figures(project.artifact("figures")), *_studies(project)]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    told = [HEAD, f"{summary(rows)}.\n", _overview(rows, sections)]
    for section in sections:
        told.append(f"## {titled(section)}\n")
        told += [part.text for part in parts if _home(part.section, sections) == section]
        told.append(table_of([row for row in rows if row["section"] == section]))
    return "\n".join(told)


def _overview(rows: Sequence[Row], sections: Sequence[str]) -> str:
    """How many claims of each section have each verdict."""
    ran = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    lines: list[list[str]] = [["section", *ran], ["---", *["---:"] * len(ran)]]
    for section in sections:
        found = [row["verdict"] for row in rows if row["section"] == section]
        lines.append([titled(section), *(str(found.count(verdict) or "") for verdict in ran)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _home(section: str, sections: Sequence[str]) -> str:
    """Where a part stands: in its own section, or in the nearest one above that has claims."""
    while section and section not in sections:
        section = section.rpartition(".")[0]
    return section or sections[-1]


def _first(places: str) -> str:
    """The first section of "Figure 1, §2" or "§2.4, §5"."""
    return str(re.findall(r"§([\d.]+)", places)[0]).rstrip(".")


def _figures(folder: Path) -> Iterator[Part]:
    for name, about in _told(folder, "figures").items():
        lines = (f"**{about['title']}** ({about['place']}). {about['shows']}\n", f"![]({_beside(folder)}/{name}.png)\n")
        yield Part(_first(about["place"]), "\n".join(lines))


def _studies(project: Project) -> Iterator[Part]:
    """Each study's words, its first table, its picture, and where the rest is."""
    for stage in (stage for stage in project.readable.values() if stage.kind == "study"):
        folder = project.artifact(stage.name)
        if not folder.is_dir():
            continue
        about = read_manifest(folder)
        name, described = next(iter(about["tables"].items()))
        table = Table(name, rows=read_table(folder / f"{name}.csv"), **described)
        beside = _beside(folder)
        parts = (
            f"### {about['title']} ({about['section']})\n",
            f"{about['text']}\n",
            f"**{table.title}**\n\n{table.markdown()}",
            f"![]({beside}/{stage.method}.png)\n",
            f"`lora study {stage.method}` measures this; [all its tables]({beside}/report.md).\n",
        )
        yield Part(_first(about["section"]), "\n".join(parts))


def _told(folder: Path, key: str) -> Mapping[str, Any]:
    """A part of a folder's manifest; nothing where there is no such folder."""
    found: Mapping[str, Any] = read_manifest(folder)[key] if folder.is_dir() else {}
    return found


def _beside(folder: Path) -> str:
    """A folder below artifacts/, as artifacts/claims/report.md links to it."""
    inside = folder.parts[len(folder.parts) - folder.parts[::-1].index("artifacts") :]
    return "/".join(("..", *inside))

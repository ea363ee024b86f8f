"""Writes report.md: the measurements and the verdicts, section by section of the document."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.document.claims.check import VERDICTS, Row, markdown_table, section_heading, summary
from pipeline.document.tables import Table, read_table
from pipeline.files.artifact import read_manifest
from pipeline.project.stage_graph import Project

HEAD = """\
# The document, measured

This report follows the document section by section: first the figures and studies of the section, then each of its
statements that can be checked. Every verdict is computed by the rule that `data/claims.yaml` gives for the claim.

- **✓ holds**: the measurement agrees with the document, within the claim's tolerance.
- **✗ differs**: it does not agree, under any of the conditions tried.
- **◐ depends**: it agrees under some conditions only; they are given beside the numbers.
"""


@dataclass(frozen=True)
class Part:
    """A figure or a study: its section and its Markdown."""

    section: str
    text: str


def page(rows: Sequence[Row], project: Project) -> str:
    """The whole report as Markdown. Its pictures are relative links from artifacts/claims."""
    parts = [*_figures(project.artifact("figures")), *_studies(project)]
    sections = list(dict.fromkeys(row["section"] for row in rows))
    lines = [HEAD, f"{summary(rows)}.\n", _overview(rows, sections)]
    for section in sections:
        lines.append(f"## {section_heading(section)}\n")
        lines += [part.text for part in parts if _nearest_section(part.section, sections) == section]
        lines.append(markdown_table([row for row in rows if row["section"] == section]))
    return "\n".join(lines)


def _overview(rows: Sequence[Row], sections: Sequence[str]) -> str:
    """A Markdown table: the number of claims by section and verdict."""
    verdicts = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    lines: list[list[str]] = [["section", *verdicts], ["---", *["---:"] * len(verdicts)]]
    for section in sections:
        of_section = [row["verdict"] for row in rows if row["section"] == section]
        lines.append([section_heading(section), *(str(of_section.count(verdict) or "") for verdict in verdicts)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _nearest_section(section: str, sections: Sequence[str]) -> str:
    """The section itself, or the nearest enclosing one that has claims."""
    while section and section not in sections:
        section = section.rpartition(".")[0]
    return section or sections[-1]


def _first_section(sections: str) -> str:
    """The first section of "Figure 1, §2" or "§2.4, §5"."""
    return str(re.findall(r"§([\d.]+)", sections)[0]).rstrip(".")


def _figures(folder: Path) -> Iterator[Part]:
    for name, about in _read_manifest_key(folder, "figures").items():
        lines = (
            f"**{about['title']}** ({about['place']}). {about['shows']}\n",
            f"![]({_relative_link(folder)}/{name}.png)\n",
        )
        yield Part(_first_section(about["place"]), "\n".join(lines))


def _studies(project: Project) -> Iterator[Part]:
    """Each study's text, its first table, its picture, and a link to its own report."""
    for stage in (stage for stage in project.readable.values() if stage.kind == "study"):
        folder = project.artifact(stage.name)
        if not folder.is_dir():
            continue
        about = read_manifest(folder)
        name, described = next(iter(about["tables"].items()))
        table = Table(name, rows=read_table(folder / f"{name}.csv"), **described)
        link = _relative_link(folder)
        parts = (
            f"### {about['title']} ({about['section']})\n",
            f"{about['text']}\n",
            f"**{table.title}**\n\n{table.markdown()}",
            f"![]({link}/{stage.method}.png)\n",
            f"Measured by `lora study {stage.method}`; [all tables]({link}/report.md).\n",
        )
        yield Part(_first_section(about["section"]), "\n".join(parts))


def _read_manifest_key(folder: Path, key: str) -> Mapping[str, Any]:
    """One key of a folder's manifest; an empty mapping if the folder does not exist."""
    value: Mapping[str, Any] = read_manifest(folder)[key] if folder.is_dir() else {}
    return value


def _relative_link(folder: Path) -> str:
    """A folder below artifacts/, relative to artifacts/claims."""
    inside = folder.parts[len(folder.parts) - folder.parts[::-1].index("artifacts") :]
    return "/".join(("..", *inside))

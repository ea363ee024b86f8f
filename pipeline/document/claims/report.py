"""The stage claims: every verdict as JSON, and report.md, which follows the document section by section."""

import json
import re
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path

from pipeline.document.claims.check import MARKS, VERDICTS, Row, section_heading, summary, verdicts
from pipeline.document.tables import Table, read_table
from pipeline.files.artifact import read_manifest
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import Project

CLAIMS, PAGE = "claims.json", "report.md"
HEAD = """\
# The document, measured

This report follows the document section by section: first the figures and studies of the section, then each of its
statements that can be checked. Every verdict is computed by the claim's rule.

- **✓ holds**: the measurement agrees with the document, within the claim's tolerance.
- **✗ differs**: it does not agree, under any of the conditions tried.
- **◐ depends**: it agrees under some conditions only; they are given beside the numbers.
"""


def run(job: Job) -> Generator[Event, None, Facts]:
    """Write claims.json and report.md. Raises UserError if a stage that it needs is out of date."""
    for need in job.project.needs(job.stage):
        job.artifact(need)
    rows = verdicts(job.project)
    (job.out / CLAIMS).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (job.out / PAGE).write_text(page(rows, job.project), encoding="utf-8")
    yield Progress(len(rows), len(rows), summary(rows))
    return {}


def page(rows: Sequence[Row], project: Project) -> str:
    """The whole report as Markdown. Its pictures are relative links from artifacts/claims."""
    by_section: dict[str, list[Row]] = {}
    for row in rows:
        by_section.setdefault(row["section"], []).append(row)
    parts: dict[str, list[str]] = {section: [] for section in by_section}
    for place, text in (*_figures(project), *_studies(project)):
        section = re.findall(r"§([\d.]+)", place)[0].rstrip(".")  # the first of "Figure 1, §2" or "§2.4, §5"
        while section and section not in parts:  # the nearest enclosing section that has claims
            section = section.rpartition(".")[0]
        parts[section or list(parts)[-1]].append(text)
    there = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    overview = [["section", *there], ["---", *["---:"] * len(there)]]
    for section, own in by_section.items():
        counts = [sum(row["verdict"] == verdict for row in own) for verdict in there]
        overview.append([section_heading(section), *(str(count or "") for count in counts)])
    lines = [HEAD, f"{summary(rows)}.\n", _markdown(overview)]
    for section, own in by_section.items():
        lines += [f"## {section_heading(section)}\n", *parts[section], markdown_table(own)]
    return "\n".join(lines)


def markdown_table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [["claim", "document", "measured", "verdict", "why"], ["---"] * 5]
    for row in rows:
        cells = row["quote"], row["shown"]["says"], row["shown"]["measured"], MARKS[row["verdict"]], row["why"]
        lines.append([text.replace("|", "\\|").replace("<", "&lt;") for text in cells])
    return _markdown(lines)


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(project: Project) -> Iterator[tuple[str, str]]:
    """Each figure's place in the document, and its title and picture."""
    folder = project.artifact("figures")
    for name, about in read_manifest(folder)["figures"].items() if folder.is_dir() else ():
        picture = f"![]({_link(folder)}/{name}.png)\n"
        yield about["place"], f"**{about['title']}** ({about['place']}). {about['shows']}\n\n{picture}"


def _studies(project: Project) -> Iterator[tuple[str, str]]:
    """Each study's place in the document, and its text, its first table, its picture and a link to its own report."""
    for stage in project.readable.values():
        folder = project.artifact(stage.name)
        if stage.kind != "study" or not folder.is_dir():
            continue
        about = read_manifest(folder)
        name, described = next(iter(about["tables"].items()))
        table = Table(name, rows=read_table(folder / f"{name}.csv"), **described)
        link = _link(folder)
        parts = (
            f"### {about['title']} ({about['section']})\n",
            f"{about['text']}\n",
            f"**{table.title}**\n\n{table.markdown()}",
            f"![]({link}/{stage.method}.png)\n",
            f"Measured by `lora study {stage.method}`; [all tables]({link}/report.md).\n",
        )
        yield about["section"], "\n".join(parts)


def _link(folder: Path) -> str:
    """A folder below artifacts/, relative to artifacts/claims."""
    inside = folder.parts[len(folder.parts) - folder.parts[::-1].index("artifacts") :]
    return "/".join(("..", *inside))

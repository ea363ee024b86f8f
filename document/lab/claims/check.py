"""The stage claims: each claim is compared with its measurement, and the report follows the
document.

Verdicts are computed, never written by hand.
"""

import json
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.claims import Claim, in_unit
from lab.claims.chapters import CLAIMS
from lab.claims.sources import MissingArtifact, Sources
from lab.tables import Spread, Table, markdown, read_table
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import Project

# verdict → mark
MARKS = {"holds": "✓ holds", "differs": "✗ differs", "depends": "◐ depends", "not run": "– not run"}
JSON, PAGE = "claims.json", "report.md"
HEAD = """\
# The document, measured

This report follows the document section by section: first the figures and studies of the section, then each of its
statements that can be checked. Every verdict is computed by the claim's rule.

- **✓ holds**: the measurement agrees with the document, within the claim's tolerance.
- **✗ differs**: it does not agree, under any of the conditions tried.
- **◐ depends**: it agrees under some conditions only; they are given beside the numbers.
"""

Row = Mapping[str, Any]  # a claim beside its verdict, as `judge` returns it


def verdicts(project: Project) -> list[Row]:
    """One row per claim, in the document's order."""
    sources = Sources(project)
    return [judge(claim, sources) for claim in CLAIMS]


def calculated() -> list[Row]:
    """The rows of the claims that need only the calculator and no project."""
    return [judge(claim) for claim in CLAIMS if claim.calculated]


def files_of(project: Project, name: str) -> list[Path]:
    """The files that the claim with this id is measured on; none if the calculator gives its
    numbers.
    """
    sources = Sources(project)
    for claim in (claim for claim in CLAIMS if claim.id == name and not claim.calculated):
        judge(claim, sources)
    return list(dict.fromkeys(sources.read))


def judge(claim: Claim, sources: Sources | None = None) -> Row:
    """Measure the claim: the entry of `--json` and claims.json. Numbers have no unit and twelve
    digits.

    The verdict is "not run", and `why` says what to do, if an artifact is missing, damaged or of
    other settings.
    """
    measured: Any = None
    verdict = "not run"
    try:
        result, why = claim.measure(*() if claim.calculated else (sources,))
        values = list(_by_condition(result).values())
        if claim.each_seed:
            values += [
                end
                for value in values
                if isinstance(value, Spread)
                for end in (value.low, value.high)
            ]
        holds = [claim.rule.holds(value) for value in values]
        measured, verdict = result, "depends" if any(holds) else "differs"
        if all(holds):
            verdict = "holds"
    except MissingArtifact as missing:
        why = str(missing)
    # What a changed artifact leads to: a table without a row or a column, an empty list, a text
    # instead of a number.
    except (
        UserError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        if claim.calculated:
            raise  # it reads no artifact: the claim is wrong
        why = f"it cannot be measured on this project's artifacts: {error}"
    rule, says = claim.rule, [said.value for said in claim.rule.says]
    shown = {
        name: in_unit(value, rule.says[0].unit) for name, value in _by_condition(measured).items()
    }
    if len(set(shown.values())) == 1:  # all conditions agree
        shown = {"": next(iter(shown.values()))}
    return {
        "id": claim.id,
        "section": claim.section,
        "quote": claim.quote,
        "says": says if len(says) > 1 else says[0],
        "rule": rule.name,
        "measured": _to_json(measured),
        "tolerance": None if rule.margin is None else str(rule.margin),
        "verdict": verdict,
        "why": why,
        "shown": {
            "says": f"{claim.words} ({rule})" if claim.words else str(rule),
            "measured": "; ".join(
                f"{name}: {text}" if name else text for name, text in shown.items()
            ),
        },
    }


def _by_condition(measured: Any) -> dict[str, Any]:
    return measured if isinstance(measured, dict) else {"": measured}


def _to_json(value: Any) -> Any:
    """Floats rounded to twelve digits; seeds as mean, low and high."""
    if isinstance(value, Spread):
        value = {"mean": float(value), "low": value.low, "high": value.high}
    if isinstance(value, dict):
        return {name: _to_json(item) for name, item in value.items()}
    return float(f"{value:.12g}") if isinstance(value, float) else value


def filter_rows(
    rows: Sequence[Row], section: str | None = None, verdict: str | None = None
) -> list[Row]:
    """The rows of a section and its subsections, with a verdict. Raises UserError if there is no
    such section.
    """
    wanted = (section or "").removeprefix("§").rstrip(".").lower()
    selected = [
        row
        for row in rows
        if section is None or f"{row['section'].lower()}.".startswith(f"{wanted}.")
    ]
    if not selected:
        sections = ", ".join(dict.fromkeys(row["section"] for row in rows))
        raise UserError(f"section must be one of {sections}, got {section!r}.")
    if verdict is not None and verdict not in MARKS:
        raise UserError(f"verdict must be one of {', '.join(MARKS)}, got {verdict!r}.")
    return [row for row in selected if verdict in (None, row["verdict"])]


def summary(rows: Sequence[Row]) -> str:
    """Such as "98 claims: 61 hold, 25 differ, 9 depend, 3 not run"; without "not run" if there are
    none.
    """
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in MARKS}
    parts = [
        f"{n} {verdict if n == 1 else verdict.removesuffix('s')}" for verdict, n in counts.items()
    ]
    shown = parts if counts["not run"] else parts[:-1]
    return f"{len(rows)} claim{'s' * (len(rows) != 1)}: {', '.join(shown)}"


def section_heading(section: str) -> str:
    """§2.4 for a number, else the section's name."""
    return f"§{section}" if section[0].isdigit() else section


def run(job: Job) -> Generator[Event, None, Facts]:
    """Write claims.json and report.md. Raises UserError if a stage that it needs is out of date."""
    for need in job.project.needs(job.stage):
        job.artifact(need)
    rows = verdicts(job.project)
    (job.out / JSON).write_text(
        json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
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
        # a section by its name, or the first number of "Figure 1, §2" or "§2.4, §5"
        named = next((name for name in place.split(", ") if name in parts), "")
        section = named or re.findall(r"§([\d.]+)", place)[0].rstrip(".")
        while section and section not in parts:  # the nearest enclosing section that has claims
            section = section.rpartition(".")[0]
        parts[section or list(parts)[-1]].append(text)
    there = [verdict for verdict in MARKS if any(row["verdict"] == verdict for row in rows)]
    overview = [["section", *there], ["---", *["---:"] * len(there)]]
    for section, own in by_section.items():
        counts = [sum(row["verdict"] == verdict for row in own) for verdict in there]
        overview.append([section_heading(section), *(str(count or "") for count in counts)])
    lines = [HEAD, f"{summary(rows)}.\n", markdown(overview)]
    for section, own in by_section.items():
        lines += [f"## {section_heading(section)}\n", *parts[section], markdown_table(own)]
    return "\n".join(lines)


def markdown_table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [["claim", "document", "measured", "verdict", "why"], ["---"] * 5]
    for row in rows:
        cells = (
            row["quote"],
            row["shown"]["says"],
            row["shown"]["measured"],
            MARKS[row["verdict"]],
            row["why"],
        )
        lines.append([text.replace("|", "\\|").replace("<", "&lt;") for text in cells])
    return markdown(lines)


def _figures(project: Project) -> Iterator[tuple[str, str]]:
    """Each figure's place in the document, and its title and picture."""
    folder = project.artifact("figures")
    for name, about in read_manifest(folder)["figures"].items() if folder.is_dir() else ():
        picture = f"![]({_link(folder)}/{name}.png)\n"
        yield (
            about["place"],
            f"**{about['title']}** ({about['place']}). {about['shows']}\n\n{picture}",
        )


def _studies(project: Project) -> Iterator[tuple[str, str]]:
    """Each study's place in the document, and its text, its first table, its picture and a link to
    its own report.
    """
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

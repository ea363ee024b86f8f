"""claims: every claim of the document beside what all stages before measured, as JSON and as a page."""

import json
from collections.abc import Generator

from pipeline.document.claims.check import Row, check, summary
from pipeline.document.claims.claims import read_claims
from pipeline.document.claims.report import page
from pipeline.document.claims.sources import Sources
from pipeline.document.params import Claims
from pipeline.project.new_project import DOCUMENT
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import Project

STAGE, CLAIMS, PAGE = "claims", "claims.json", "report.md"


def verdicts(project: Project) -> list[Row]:
    """One row a claim, in the document's order. Raises UserError for a file of claims that is wrong.

    A project of another base than the document's has no such file: those claims are held that come with the program.
    """
    own = STAGE in project.stages
    name = project.params.of(Claims).data if own else Claims().data
    claims = read_claims((project.root if own else DOCUMENT) / name, name)
    return [checked.row() for checked in check(claims, Sources(project))]


def claims(job: Job) -> Generator[Event, None, Facts]:
    """Verdicts → claims.json and report.md. Raises UserError where one of the stages before is out of date."""
    for need in job.project.needs(job.stage):
        job.artifact(need)
    rows = verdicts(job.project)
    (job.out / CLAIMS).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (job.out / PAGE).write_text(page(rows, job.project), encoding="utf-8")
    yield Progress(len(rows), len(rows), summary(rows))
    return {}

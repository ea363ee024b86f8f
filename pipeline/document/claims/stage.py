"""The stage claims: compares every claim of the document with the measurements, as JSON and as a report."""

import json
from collections.abc import Generator

from pipeline.document.claims.check import Row, check, summary
from pipeline.document.claims.claims import read_claims
from pipeline.document.claims.report import page
from pipeline.document.claims.sources import Sources
from pipeline.document.stages import Claims
from pipeline.project.new_project import DOCUMENT
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.project.stage_graph import Project

STAGE, CLAIMS, PAGE = "claims", "claims.json", "report.md"


def verdicts(project: Project) -> list[Row]:
    """One row per claim, in the document's order. Raises UserError if the file of claims is invalid.

    A project without the stage has no file of claims; then the packaged claims are used.
    """
    has_stage = STAGE in project.stages
    name = project.params.of(Claims).data if has_stage else Claims().data
    claims = read_claims((project.root if has_stage else DOCUMENT) / name, name)
    return [result.row() for result in check(claims, Sources(project))]


def claims(job: Job) -> Generator[Event, None, Facts]:
    """Write claims.json and report.md. Raises UserError if a stage that it needs is out of date."""
    for need in job.project.needs(job.stage):
        job.artifact(need)
    rows = verdicts(job.project)
    (job.out / CLAIMS).write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (job.out / PAGE).write_text(page(rows, job.project), encoding="utf-8")
    yield Progress(len(rows), len(rows), summary(rows))
    return {}

"""Which numbers of evaluations can be compared: those that were measured with the same settings."""

import hashlib
import json

from pipeline.files import artifact
from pipeline.project.provenance import code_digest
from pipeline.project.runner import Job
from pipeline.project.stage_graph import ARTIFACTS, Project, work_folder

MEASURED = "measured"  # the folder below artifacts/ of what `lora evaluate --adapter` writes


def measuring(project: Project) -> Job:
    """The job of `measure`. Its key covers all that the numbers depend on but the adapters."""
    stage = project.stage("evaluate")
    files = {name: artifact.digest(project.root / name) for name in project.data_files(stage)}
    params = {key: value for key, value in project.stage_params(stage).items() if key != "limits"}
    settings = {"params": params, "files": files, "code": code_digest(*stage.code)}
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    out = work_folder(project.root) / ARTIFACTS / MEASURED
    return Job(project, stage, out, project.run_folder(stage.name), key, None)

"""import: a base model from elsewhere as a plain checkpoint, which every later stage starts
from.
"""

from collections.abc import Generator

from pipeline.files.base_model import resolve
from pipeline.models.device import move_for_inference
from pipeline.models.import_base import import_base
from pipeline.models.load import load_base
from pipeline.models.transformers_model import TransformersModel, refuse_unlike
from pipeline.project.runner import Event, Facts, Job, Progress


def run(job: Job) -> Generator[Event, None, Facts]:
    """Import the base, and check that the stages compute the same logits as transformers. Raises
    UserError.
    """
    settings = job.project.params.origin
    facts = import_base(
        resolve(settings.base, job.project.root),
        job.out,
        settings.dtype,
        settings.trust_remote_code,
    )
    model = load_base(job.out, None, settings.trust_remote_code).model
    if isinstance(model, TransformersModel):
        refuse_unlike(move_for_inference(model), settings.base)
    yield Progress(1, 1, facts["architecture"])
    return facts

"""import: a base model as a plain checkpoint, from which every later stage starts."""

from collections.abc import Generator

from pipeline.files.base_model import resolve
from pipeline.models.device import move_for_inference
from pipeline.models.import_base import import_base
from pipeline.models.load import load_base
from pipeline.models.transformers_model import TransformersModel, refuse_unlike
from pipeline.project.runner import Event, Facts, Job, Progress


def run(job: Job) -> Generator[Event, None, Facts]:
    """Import the base, and check its logits against transformers'. Raises UserError."""
    settings = job.project.params.origin
    source, trust = resolve(settings.base, job.project.root), settings.trust_remote_code
    facts = import_base(source, job.out, settings.dtype, trust)
    model = load_base(job.out, None, trust).model
    if isinstance(model, TransformersModel):
        refuse_unlike(move_for_inference(model), settings.base)
    yield Progress(1, 1, facts["architecture"])
    return facts

"""merge: W' = W + s·BA as a plain checkpoint, with a certificate measured on the written files (§4.4)."""

from collections.abc import Generator

from pipeline.data.prompts import read_prompts
from pipeline.files.base_model import base_fingerprint
from pipeline.inference.score import SameLogits
from pipeline.models.load import count, skeleton
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.weights.merge import Merging, merge_into


def run(job: Job) -> Generator[Event, None, Facts]:
    """Merge base + adapter into one checkpoint. Raises UserError and writes nothing if its logits differ too much."""
    settings, trust = job.project.params.merge, job.project.params.origin.trust_remote_code
    base, adapter = job.artifact("expand_vocab"), job.artifact("finetune_lora")
    prompts = [prompt.prompt for prompt in read_prompts(job.path(settings.prompts), settings.prompts)]
    same = SameLogits(base, adapter, prompts, settings.max_logit_difference, trust)
    certificate = yield from merge_into(job.out, Merging(base, adapter, None, trust), same)
    yield Progress(1, 1, f"largest logit difference {certificate['max_logit_difference']:.1e}")
    parameters = count(skeleton(job.out, trust)) | {"trainable": 0}
    return {"parameters": parameters, "fingerprint": base_fingerprint(job.out)}

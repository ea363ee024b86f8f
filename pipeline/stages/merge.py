"""merge: W' = W + s·BA as a plain checkpoint; what it writes is in `weights/merge.py`."""

from collections.abc import Generator

from pipeline.data.answers.prompts import read_prompts
from pipeline.data.answers.questions import prompt_and_answer
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.files.base_model import base_fingerprint
from pipeline.inference.score import SameLogits
from pipeline.models.load import count, skeleton
from pipeline.project.runner import Event, Facts, Job, Progress
from pipeline.stages.evaluate import new_examples
from pipeline.weights.merge import Merging, merge_into

PROMPTS = 8  # examples to check the merge on, if merge.prompts is empty


def run(job: Job) -> Generator[Event, None, Facts]:
    """Merge base + adapter into one checkpoint.

    Raises UserError and writes nothing if the checkpoint's logits differ too much.
    """
    settings = job.project.params.merge
    trust = job.project.params.origin.trust_remote_code
    base, adapter = job.artifact("expand_vocab"), job.artifact("finetune_lora")
    if settings.prompts:
        entries = read_prompts(job.path(settings.prompts), settings.prompts)
        prompts = [entry.prompt for entry in entries]
    else:
        tokenizer = load_tokenizer(base)
        examples = new_examples(job)[0][:PROMPTS]
        prompts = []
        for example in examples:
            asked = prompt_and_answer(example, tokenizer)
            prompts.append(asked[0] if asked else example.text)
    same = SameLogits(base, adapter, prompts, settings.max_logit_difference, trust)
    check = yield from merge_into(job.out, Merging(base, adapter, None, trust), same)
    yield Progress(1, 1, f"largest logit difference {check['max_logit_difference']:.1e}")
    parameters = count(skeleton(job.out, trust)) | {"trainable": 0}
    return {"parameters": parameters, "fingerprint": base_fingerprint(job.out)}

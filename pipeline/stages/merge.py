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

PROMPTS = 8  # examples on which the merge is checked where no prompts are named


def run(job: Job) -> Generator[Event, None, Facts]:
    """Merge base + adapter into one checkpoint.

    Raises UserError and writes nothing if its logits differ too much.
    """
    settings, trust = job.project.params.merge, job.project.params.origin.trust_remote_code
    base, adapter = job.artifact("expand_vocab"), job.artifact("finetune_lora")
    if settings.prompts:
        prompts = [
            prompt.prompt for prompt in read_prompts(job.path(settings.prompts), settings.prompts)
        ]
    else:
        tokenizer, examples = load_tokenizer(base), new_examples(job)[0][:PROMPTS]
        asked = (
            (prompt_and_answer(example, tokenizer) or [example.text])[0] for example in examples
        )
        prompts = list(asked)
    same = SameLogits(base, adapter, prompts, settings.max_logit_difference, trust)
    check = yield from merge_into(job.out, Merging(base, adapter, None, trust), same)
    yield Progress(1, 1, f"largest logit difference {check['max_logit_difference']:.1e}")
    parameters = count(skeleton(job.out, trust)) | {"trainable": 0}
    return {"parameters": parameters, "fingerprint": base_fingerprint(job.out)}

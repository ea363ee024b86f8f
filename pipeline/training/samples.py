"""What the model answers while it trains: greedy answers to a few prompts, which change nothing that is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.models.generate import encode_prompt, generate
from pipeline.models.load import Base
from pipeline.project.logs.run_log import Sample
from pipeline.project.params.sections import Training
from pipeline.project.runner import Job

MAX_TOKENS = 20  # of an answer, as `lora prompt`


@dataclass(frozen=True)
class Prompts:
    """The prompts of `samples`, encoded. `every`: steps between two rounds of answers; 0: as evaluations."""

    base: Base
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    every: int
    limit: int

    def answers(self, step: int) -> list[Sample]:
        """The model's answers as it is now, without its dropout and with the random numbers left as they are."""
        model = self.base.model
        model.eval()
        try:
            return [Sample(step, text, self._answer(ids)) for text, ids in zip(self.texts, self.ids, strict=True)]
        finally:
            model.train()

    def _answer(self, ids: Sequence[int]) -> str | None:
        tokenizer = self.base.tokenizer
        decode_next = tokenizer.stream()
        # Not packed: a second copy of the weights would stay in memory, which the predicted peak does not have.
        tokens = generate(self.base.model, ids, tokenizer.end_ids, self.limit, packed=False)
        try:
            return "".join(map(decode_next, tokens)).strip()
        except UserError:  # not finite: the next step finds it out, and says it better
            return None


def read_prompts(job: Job, settings: Training, base: Base) -> Prompts | None:
    """The prompts of the stage's `samples`; None without. Raises UserError for one that the model cannot read."""
    texts, ids = list[str](), list[Sequence[int]]()
    for number, prompt in enumerate(settings.samples.get("prompts", ())):
        key = f"{job.stage.section}.samples.prompts[{number}]"
        is_chat = not isinstance(prompt, str)
        if is_chat and not base.tokenizer.has_template:
            raise UserError(f"{key} has messages, but the base has no chat template. Give it as a text.")
        try:
            text = base.tokenizer.render(prompt, True) if is_chat else prompt
            ids.append(encode_prompt("the base", base.model, base.tokenizer, text))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        texts.append(prompt[-1]["content"] if is_chat else prompt)
    if not texts:
        return None
    return Prompts(base, texts, ids, settings.samples.get("every", 0), settings.samples.get("max_tokens", MAX_TOKENS))

"""What models answer to tasks, and their scores with confidence intervals."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.errors import UserError
from pipeline.evaluation.bootstrap import interval
from pipeline.evaluation.kinds import Scores
from pipeline.evaluation.tasks import Task
from pipeline.inference.completions import complete_all
from pipeline.inference.engine import LoadedModel, encode
from pipeline.inference.score import score_answers

MAX_NEW_TOKENS = 64


class Answers:
    """The tasks, and each model's answers so far; the first model is the base.

    `templated`: whether a plain prompt is asked in the model's chat template, if it has one and the
    task's `chat` does not say.
    """

    def __init__(self, tasks: Sequence[Task], templated: bool) -> None:
        self.tasks, self._templated = tasks, templated
        # task → the base's score of each example
        self.base: dict[str, Sequence[Scores]] = {}
        # task → a row per example: its prompt, and each model's answer
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for task in tasks:
            self._rows[task.name] = [
                {"prompt": example.prompt, "answers": {}} for example in task.examples
            ]

    def add(self, loaded: LoadedModel) -> dict[str, Any]:
        """A model's part of metrics.json: task → scores, with differences from the base's.

        Raises UserError.
        """
        measured = {}
        for task in self.tasks:
            answers = ask(loaded, task, self._templated)
            scores = score(task, answers)
            rows = zip(self._rows[task.name], task.examples, answers, scores, strict=True)
            for row, example, answer, scored in rows:
                choices = task.kind.choices
                texts = choices(example.row) if choices else None
                row["answers"][loaded.name] = {**_answer(answer, texts), **scored}
            measured[task.name] = summary(scores, self.base.get(task.name))
            self.base.setdefault(task.name, scores)
        return {"tasks": measured} if measured else {}

    def copy(self, model: str, other: str) -> None:
        """Give another model the answers of `model`: it is the same model in other files."""
        for rows in self._rows.values():
            for row in rows:
                row["answers"][other] = row["answers"][model]

    def predictions(self) -> dict[str, Any]:
        """The tasks' part of predictions.json."""
        return {"tasks": self._rows} if self.tasks else {}


def ask(loaded: LoadedModel, task: Task, templated: bool = False) -> list[Any]:
    """Each example's answer: the generated text, or for choices their log-likelihoods in nats.

    None where a word-level model lacks a word. `templated` is as in `Answers`. Raises UserError.
    """
    tokenizer, choices = loaded.tokenizer, task.kind.choices
    as_turns = templated and tokenizer.has_template and "chat" not in task.options
    prompts: list[str] = []
    for example in task.examples:
        prompt = example.prompt
        if isinstance(prompt, str) and as_turns:
            prompt = ({"role": "user", "content": prompt},)
        prompts.append(prompt if isinstance(prompt, str) else tokenizer.render(prompt, True))
    readable = [n for n, prompt in enumerate(prompts) if not tokenizer.unknown_words(prompt)]
    texts = [choices(example.row) if choices else () for example in task.examples]
    for n in readable:
        _refuse_long(loaded, prompts[n], texts[n], task.examples[n].location)

    answers: list[Any] = [[None] * len(choices) if choices else None for choices in texts]
    if choices:
        scored = score_answers(loaded, [(prompts[n], text) for n in readable for text in texts[n]])
        probabilities = iter(answer.log_probability for answer in scored)
        for n in readable:
            answers[n] = [next(probabilities) for _ in texts[n]]
    else:
        limit = task.options.get("max_new_tokens", MAX_NEW_TOKENS)
        stops = task.options.get("stop", ())
        completed = complete_all(loaded, [prompts[n] for n in readable], limit, stops)
        for n, text in zip(readable, completed, strict=True):
            answers[n] = text
    return answers


def _refuse_long(loaded: LoadedModel, prompt: str, choices: Sequence[str], location: str) -> None:
    """Raises UserError if the prompt and its longest choice have too many tokens for the model."""
    try:
        length = len(encode(loaded, prompt))
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    length += max(
        (len(loaded.tokenizer.continuation(prompt, choice)) for choice in choices), default=0
    )
    if length > loaded.model.max_length:
        raise UserError(
            f"{location}: prompt and choice have {length} tokens; {loaded.name} takes "
            f"{loaded.model.max_length}. Shorten them."
        )


def score(task: Task, answers: Sequence[Any]) -> list[Scores]:
    """The scores of each example; 0 without an answer. Raises UserError."""
    return [
        {"score": 0.0} if answer is None else task.score(answer, example)
        for answer, example in zip(answers, task.examples, strict=True)
    ]


def summary(scores: Sequence[Scores], base: Sequence[Scores] | None) -> dict[str, Any]:
    """For metrics.json: the mean score, its interval, and its paired difference from the base's.

    What else the kind measures has the same three, under its name.
    """
    measured: dict[str, Any] = {}
    # an example without an answer has a score alone
    for key in dict.fromkeys(key for example in scores for key in example):
        values = [example.get(key, 0.0) for example in scores]
        numbers: dict[str, Any] = _mean(values)
        if base is not None:
            pairs = zip(values, base, strict=True)
            numbers["difference"] = _mean([ours - theirs.get(key, 0.0) for ours, theirs in pairs])
        measured |= {**numbers, "n": len(scores)} if key == "score" else {key: numbers}
    return measured


def _mean(values: Sequence[float]) -> dict[str, float]:
    low, high = interval(values)
    return {"score": math.fsum(values) / len(values), "low": low, "high": high}


def _answer(answer: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """For predictions.json: the text, or the likeliest choice with the log-likelihoods of all."""
    if choices is None:
        return {"answer": answer}
    known = [value for value in answer if value is not None]
    chosen = choices[answer.index(max(known))] if known else None
    return {"answer": chosen, "log_likelihoods": answer}

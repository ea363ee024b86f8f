"""What models answer to tasks, and their scores with confidence intervals."""

import math
from collections.abc import Sequence
from typing import Any

from pipeline.data.tokenizers.chat_template import Messages
from pipeline.data.tokenizers.word import Tokenizer
from pipeline.errors import UserError
from pipeline.evaluation.bootstrap import interval
from pipeline.evaluation.kinds import Scores
from pipeline.evaluation.tasks import Task
from pipeline.inference.completions import complete_all
from pipeline.inference.engine import LoadedModel, encode
from pipeline.inference.score import score_answers

MAX_NEW_TOKENS = 64


class Answers:
    """The tasks, and what every model has answered so far; the first one is the base.

    `templated`: whether a plain prompt is asked in the model's chat template, if it has one and the
    task's `chat` does not say.
    """

    def __init__(self, tasks: Sequence[Task], templated: bool) -> None:
        self.tasks, self._templated = tasks, templated
        self._base: dict[str, Sequence[Scores]] = {}
        # task → of each example the prompt, and each model's answer
        self._rows: dict[str, list[dict[str, Any]]] = {
            task.name: [{"prompt": example.prompt, "answers": {}} for example in task.examples]
            for task in tasks
        }

    def add(self, loaded: LoadedModel) -> dict[str, Any]:
        """Ask a model. Returns its part of metrics.json: task → scores, and differences from the
        base's.

        Raises UserError.
        """
        measured = {}
        for task in self.tasks:
            answers = ask(loaded, task, self._templated)
            scores = score(task, answers)
            for n, (answer, each) in enumerate(zip(answers, scores, strict=True)):
                self._rows[task.name][n]["answers"][loaded.name] = _row(task, n, answer, each)
            measured[task.name] = summary(scores, self._base.get(task.name))
            self._base.setdefault(task.name, scores)
        return {"tasks": measured} if measured else {}

    def copy(self, model: str, other: str) -> None:
        """The answers of one model stand for those of another, which is the same in other files."""
        for rows in self._rows.values():
            for row in rows:
                row["answers"][other] = row["answers"][model]

    def predictions(self) -> dict[str, Any]:
        """Their part of predictions.json."""
        return {"tasks": self._rows} if self.tasks else {}


def ask(loaded: LoadedModel, task: Task, templated: bool = False) -> list[Any]:
    """Each example's answer: the generated text, or for choices their log-likelihoods in nats.

    None stands for what a word-level model cannot read or write. `templated`: as of `Answers`.
    Raises UserError.
    """
    tokenizer, choices = loaded.tokenizer, task.kind.choices
    as_turns = templated and tokenizer.has_template and "chat" not in task.options
    prompts = [_text(example.prompt, tokenizer, as_turns) for example in task.examples]
    readable = [n for n, prompt in enumerate(prompts) if not tokenizer.unknown_words(prompt)]
    texts = [choices(example.row) if choices else () for example in task.examples]
    for n in readable:
        _refuse_long(loaded, prompts[n], texts[n], task.examples[n].location)
    if choices:
        scored = iter(
            score_answers(loaded, [(prompts[n], text) for n in readable for text in texts[n]])
        )
        by_example = {n: [next(scored).log_probability for _ in texts[n]] for n in readable}
        return [by_example.get(n, [None] * len(texts[n])) for n in range(len(prompts))]
    limit, stops = task.options.get("max_new_tokens", MAX_NEW_TOKENS), task.options.get("stop", ())
    completed = complete_all(loaded, [prompts[n] for n in readable], limit, stops)
    completions = dict(zip(readable, completed, strict=True))
    return [completions.get(n) for n in range(len(prompts))]


def _text(prompt: str | Messages, tokenizer: Tokenizer, as_turns: bool) -> str:
    if isinstance(prompt, str) and not as_turns:
        return prompt
    turns = ({"role": "user", "content": prompt},) if isinstance(prompt, str) else prompt
    return tokenizer.render(turns, True)


def _refuse_long(loaded: LoadedModel, prompt: str, choices: Sequence[str], location: str) -> None:
    """Raises UserError if the prompt, with its longest choice, has more tokens than the model
    takes.
    """
    try:
        length = len(encode(loaded, prompt))
    except UserError as error:
        raise UserError(f"{location}: {error}") from None
    longest = max(
        (len(loaded.tokenizer.continuation(prompt, choice)) for choice in choices), default=0
    )
    if length + longest > loaded.model.max_length:
        raise UserError(
            f"{location}: prompt and choice have {length + longest} tokens; {loaded.name} takes "
            f"{loaded.model.max_length}. Shorten them."
        )


def score(task: Task, answers: Sequence[Any]) -> list[Scores]:
    """The scores of each example; 0 without an answer. Raises UserError."""
    return [
        {"score": 0.0} if answer is None else task.score(answer, example)
        for answer, example in zip(answers, task.examples, strict=True)
    ]


def summary(scores: Sequence[Scores], base: Sequence[Scores] | None) -> dict[str, Any]:
    """For metrics.json: the mean score with its interval, and the paired difference from the
    base's; likewise what else the kind measures, under its name.
    """
    measured: dict[str, Any] = {}
    for key in scores[0]:
        values = [each[key] for each in scores]
        numbers: dict[str, Any] = _mean(values)
        if base is not None:
            numbers["difference"] = _mean(
                [value - each[key] for value, each in zip(values, base, strict=True)]
            )
        measured |= {**numbers, "n": len(scores)} if key == "score" else {key: numbers}
    return measured


def _mean(values: Sequence[float]) -> dict[str, float]:
    low, high = interval(values)
    return {"score": math.fsum(values) / len(values), "low": low, "high": high}


def _row(task: Task, n: int, answer: Any, scores: Scores) -> dict[str, Any]:
    """An answer and its scores for predictions.json."""
    if task.kind.choices is None:
        return {"answer": answer, **scores}
    known = [value for value in answer if value is not None]
    texts = task.kind.choices(task.examples[n].row)
    chosen = texts[answer.index(max(known))] if known else None
    return {"answer": chosen, "log_likelihoods": answer, **scores}

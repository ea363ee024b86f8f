"""The exchanges of a session, and their export as a transcript."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pipeline.files.text import escape_whitespace
from tui.screens.adapters.session.sampling import Sampling


@dataclass
class Answer:
    """A model's answer. `ended`: end, length or interrupted; `error`: why it is missing or incomplete."""

    name: str
    strength: float | None = None  # scale of an adapter
    top_k: list[tuple[str, float]] = field(default_factory=list)
    # probability of every token in the table; None: not in the vocabulary
    of: dict[str, float | None] = field(default_factory=dict)
    text: str = ""
    ended: str = ""
    error: str = ""

    @property
    def title(self) -> str:
        return self.name if self.strength in (None, 1.0) else f"{self.name} ×{self.strength:.2f}"


@dataclass
class Exchange:
    """A prompt and its answers, in display order. Field names are the keys of the JSON transcript."""

    prompt: str
    sampling: Sampling
    answers: list[Answer]
    chat: bool = False  # prompted with the chat template: the answer is a turn, not a continuation of the prompt

    def parts(self, answer: Answer) -> tuple[str, str]:
        """The text shown before an answer, and the answer."""
        return (f"{self.prompt} → ", answer.text.lstrip()) if self.chat else (self.prompt, answer.text)

    def full_text(self, answer: Answer) -> str:
        return "".join(self.parts(answer))

    def answers_text(self) -> str:
        """All answers as text, with the models' names if there are several."""
        if len(self.answers) == 1:
            return self.full_text(self.answers[0])
        return "\n".join(f"{answer.title}: {self.full_text(answer)}" for answer in self.answers)


def transcript(exchanges: Sequence[Exchange], suffix: str) -> str:
    """The transcript: JSON lines if the suffix is .jsonl, else Markdown."""
    if suffix == ".jsonl":
        return "".join(json.dumps(asdict(exchange), ensure_ascii=False) + "\n" for exchange in exchanges)
    return "# Transcript\n" + "".join(map(_markdown, exchanges))


def _markdown(exchange: Exchange) -> str:
    lines = [f"\n## {exchange.prompt}\n", f"{exchange.sampling}\n"]
    for answer in exchange.answers:
        top = ", ".join(f"{escape_whitespace(token)} {100 * probability:.1f}%" for token, probability in answer.top_k)
        note = answer.error or {"interrupted": "interrupted"}.get(answer.ended, "")
        lines.append(f"- **{answer.title}**: {exchange.full_text(answer)}" + (f" ({note})" if note else ""))
        lines += [f"  - next: {top}"] if top else []
    return "\n".join(lines) + "\n"

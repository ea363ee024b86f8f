"""What was asked and answered in this session, and how it is written down."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from pipeline.files.text import escape_whitespace
from tui.screens.adapters.session.sampling import Sampling


@dataclass
class Answer:
    """One model's answer. `ended` says how: end, length, interrupted; `error` why there is none or only a part."""

    name: str
    strength: float | None = None  # of an adapter
    top_k: list[tuple[str, float]] = field(default_factory=list)
    of: dict[str, float | None] = field(default_factory=dict)  # probability of every token in the table; None: no such
    text: str = ""
    ended: str = ""
    error: str = ""

    @property
    def title(self) -> str:
        return self.name if self.strength in (None, 1.0) else f"{self.name} ×{self.strength:.2f}"


@dataclass
class Exchange:
    """A prompt and the answers to it, in the order they stand side by side."""

    prompt: str
    sampling: Sampling
    answers: list[Answer]
    chat: bool = False  # asked as a turn of a conversation: the answer is a turn too, not what follows the prompt

    def parts(self, answer: Answer) -> tuple[str, str]:
        """What stands before an answer, and the answer."""
        return (f"{self.prompt} → ", answer.text.lstrip()) if self.chat else (self.prompt, answer.text)

    def whole(self, answer: Answer) -> str:
        return "".join(self.parts(answer))

    def said(self) -> str:
        """The completions as text: one alone, or each with its model's name."""
        if len(self.answers) == 1:
            return self.whole(self.answers[0])
        return "\n".join(f"{answer.title}: {self.whole(answer)}" for answer in self.answers)


def transcript(exchanges: Sequence[Exchange], suffix: str) -> str:
    """JSON lines for .jsonl, Markdown otherwise."""
    if suffix == ".jsonl":
        return "".join(json.dumps(asdict(exchange), ensure_ascii=False) + "\n" for exchange in exchanges)
    return "# Transcript\n" + "".join(map(_markdown, exchanges))


def _markdown(exchange: Exchange) -> str:
    lines = [f"\n## {exchange.prompt}\n", f"{exchange.sampling}\n"]
    for answer in exchange.answers:
        top = ", ".join(f"{escape_whitespace(token)} {100 * probability:.1f}%" for token, probability in answer.top_k)
        how = answer.error or {"interrupted": "interrupted"}.get(answer.ended, "")
        lines.append(f"- **{answer.title}**: {exchange.whole(answer)}" + (f" ({how})" if how else ""))
        lines += [f"  - next: {top}"] if top else []
    return "\n".join(lines) + "\n"

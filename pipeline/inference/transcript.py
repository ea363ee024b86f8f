"""A conversation as a file: Markdown to read, JSON with every branch, JSON lines as rows of
training data.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.files.text import escape_whitespace, join_texts
from pipeline.inference.talk import Answer, Branches, State, Talk, Turn, split_thoughts

Row = Mapping[str, Any]  # of a data file


def render(talk: Talk, suffix: str) -> str:
    """The file's text by its suffix: .json has all branches, .jsonl and any other suffix the branch
    that is shown.
    """
    if suffix == ".json":
        content = {"system": talk.system, **_branches_json(talk.first)}
        return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(talk))
    return "\n".join(_markdown(talk)) + "\n"


def rows(talk: Talk) -> list[Row]:
    """A row for each model that was asked: the conversation that it had."""
    turns = [turn for turn in talk.turns if any(answer.content for answer in turn.reply.answers)]
    every: list[Row] = []
    for turn in turns:
        for answer in turn.reply.answers:
            row = training_row(talk, turns[-1], turns[-1].reply.answer_of(answer.model))
            if answer.content and row not in every:
                every.append(row)
    return every


def training_row(talk: Talk, turn: Turn, answer: Answer) -> Row:
    """An answer with what the model read before it, as an example to learn."""
    messages = talk.messages(turn, answer.model)
    if answer.chat:
        return {"messages": [*messages, {"role": "assistant", "content": answer.content}]}
    prompt = join_texts(message["content"] for message in messages)
    return {"prompt": prompt, "completion": answer.content}


def _branches_json(branches: Branches[Turn]) -> dict[str, Any]:
    if not branches.items:
        return {}
    return {"shown": branches.index, "turns": [_turn_json(turn) for turn in branches.items]}


def _turn_json(turn: Turn) -> dict[str, Any]:
    replies = []
    for reply in turn.replies.items:
        answers = [_answer_json(answer) for answer in reply.answers]
        replies.append({"answers": answers, **_branches_json(reply.turns)})
    return {"text": turn.text, "shown": turn.replies.index, "replies": replies}


def _answer_json(answer: Answer) -> dict[str, Any]:
    """The fields that are set."""
    fields = {key: value for key, value in vars(answer).items() if value}
    fields.pop("probabilities", None)
    return {**fields, "text": answer.text}


def _markdown(talk: Talk) -> Iterator[str]:
    yield "# Conversation"
    if talk.system:
        yield from ("", "**System**", "", talk.system)
    for turn in talk.turns:
        yield from ("", "**You**", "", turn.text)
        for answer in turn.reply.answers:
            yield from ("", f"**{answer.title}**{_note(answer)}", "")
            thoughts, said, _ = split_thoughts(answer.text)
            if not answer.chat:
                thoughts, said = "", answer.text
            for line in thoughts.strip().splitlines():
                yield f"> {line}"
            yield from [""] * bool(thoughts.strip())
            yield said.strip()
            if answer.top_k:
                top = (f"{escape_whitespace(t)} {100 * p:.1f}%" for t, p in answer.top_k)
                yield from ("", f"next: {', '.join(top)}")


def _note(answer: Answer) -> str:
    cut = f"{answer.cut_tokens} earlier tokens left out" if answer.cut_tokens else ""
    notes = [answer.error or ("" if answer.state == State.END else answer.state), cut]
    text = ", ".join(filter(None, notes))
    return f" ({text})" if text else ""

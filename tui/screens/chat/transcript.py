"""A conversation as a file: Markdown to read, JSON with every branch, JSON lines as rows of
training data.
"""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.files.text import join_texts
from tui.screens.chat.talk import END, Answer, Branches, Talk, Turn
from tui.screens.chat.thoughts import split_thoughts

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
    return _markdown(talk)


def rows(talk: Talk) -> list[Row]:
    """A row for each model that was asked: the conversation that it had."""
    turns = [turn for turn in talk.turns if any(answer.content for answer in turn.reply.answers)]
    models = dict.fromkeys(
        answer.model for turn in turns for answer in turn.reply.answers if answer.content
    )
    every = [
        row
        for model in models
        if (row := training_row(talk, turns[-1], turns[-1].reply.answer_of(model)))
    ]
    return [row for number, row in enumerate(every) if row not in every[:number]]


def training_row(talk: Talk, turn: Turn, answer: Answer) -> Row:
    """An answer with what the model read before it, as an example to learn."""
    messages = talk.messages(turn, answer.model)
    if answer.chat:
        return {"messages": [*messages, {"role": "assistant", "content": answer.content}]}
    return {
        "prompt": join_texts(message["content"] for message in messages),
        "completion": answer.content,
    }


def _branches_json(branches: Branches[Turn]) -> dict[str, Any]:
    return (
        {"shown": branches.index, "turns": list(map(_turn_json, branches.items))}
        if branches.items
        else {}
    )


def _turn_json(turn: Turn) -> dict[str, Any]:
    replies = [
        {"answers": list(map(_answer_json, r.answers)), **_branches_json(r.turns)}
        for r in turn.replies.items
    ]
    return {"text": turn.text, "shown": turn.replies.index, "replies": replies}


def _answer_json(answer: Answer) -> dict[str, Any]:
    fields = {
        key: value
        for key, value in vars(answer).items()
        if key != "pieces" and value not in (None, "", 0)
    }
    return {**fields, "text": answer.text}


def _markdown(talk: Talk) -> str:
    lines = ["# Conversation"]
    if talk.system:
        lines += ["", "**System**", "", talk.system]
    for turn in talk.turns:
        lines += ["", "**You**", "", turn.text]
        for answer in turn.reply.answers:
            lines += ["", f"**{answer.title}**{_note(answer)}", ""]
            thoughts, said = split_thoughts(answer.text) if answer.chat else ("", answer.text)
            if thoughts.strip():
                lines += [*(f"> {line}" for line in thoughts.strip().splitlines()), ""]
            lines.append(said.strip())
    return "\n".join(lines) + "\n"


def _note(answer: Answer) -> str:
    cut = f"{answer.cut_tokens} earlier tokens left out" if answer.cut_tokens else ""
    notes = [answer.error or ("" if answer.state == END else answer.state), cut]
    text = ", ".join(filter(None, notes))
    return f" ({text})" if text else ""

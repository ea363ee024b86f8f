"""The chats of the demo: excerpts of chats between people, from the package chitchat-dataset (MIT).

chats.txt names those that are taken, by the first six digits of their id and, after a colon, the
turn at which the excerpt starts. They were read for that: none names its speakers.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile

CHOSEN = Path(__file__).with_name("chats.txt")
LICENSE = "chitchat_dataset-0.9.0.dist-info/LICENSE"
CHATS = "chitchat_dataset/dataset.json"
MOST_TURNS, MOST_CHARACTERS = 14, 640
ROLES = ("user", "assistant")
CHOICES = 4  # replies to choose from

Turn = dict[str, str]
Chat = list[Turn]


def read_license(package: Path) -> str:
    """The license of the chats, which goes wherever they go."""
    with ZipFile(package) as files:
        return files.read(LICENSE).decode()


def read_chats(package: Path) -> list[Chat]:
    """The excerpts that chats.txt names, in its order. The first speaker is the user."""
    with ZipFile(package) as files:
        chats = json.loads(files.read(CHATS))
    by_digits = {name[:6]: chat["messages"] for name, chat in chats.items()}
    excerpts = []
    for word in CHOSEN.read_text(encoding="utf-8").split():
        digits, _, start = word.partition(":")
        excerpts.append(_excerpt(_turns(by_digits[digits]), int(start or 0)))
    return excerpts


def _turns(messages: Sequence[Sequence[Mapping[str, str]]]) -> list[str]:
    """What the two said by turns: what one sends in a row is a turn of several lines."""
    turns: list[str] = []
    last = ""
    for message in messages:
        text = "\n".join(part["text"].strip() for part in message if part["text"].strip())
        if not text:
            continue
        if message[0]["sender"] == last:
            turns[-1] += f"\n{text}"
        else:
            turns.append(text)
        last = message[0]["sender"]
    return turns


def _excerpt(turns: Sequence[str], start: int) -> Chat:
    """Turns from `start` on, as many as are long enough together; an answer is the last."""
    chat: Chat = []
    characters = 0
    for text in turns[start : start + MOST_TURNS]:
        chat.append({"role": ROLES[len(chat) % 2], "content": text})
        characters += len(text)
        if characters > MOST_CHARACTERS and len(chat) % 2 == 0:
            break
    return chat[: len(chat) // 2 * 2]


def collected(chats: Sequence[Chat]) -> Iterator[str]:
    """The rows of the file as it was collected: the chats, and the faults that such files have.

    The chats have none of these by themselves: all were put in, with an invented address.
    """
    for number, chat in enumerate(chats):
        row: dict[str, Any] = {"messages": chat}
        if number == 17:  # two messages that nobody joined
            row = {"messages": [chat[0], {"role": "user", "content": "Hello?"}, *chat[1:]]}
        elif number == 43:  # read as another encoding
            row = {
                "messages": [_with(turn, turn["content"].replace("'", "\ufffd")) for turn in chat]
            }
        elif number == 71:
            row = {"messages": [*chat[:-1], _with(chat[-1], "")]}
        elif number == 98:  # it ends before the answer
            row = {"messages": chat[:-1]}
        elif number == 120:
            address = "I have to go, write to me: sam.taylor@example.org"
            row = {"messages": [_with(chat[0], address), *chat[1:]]}
        elif number == 155:
            row = {"messages": chat, "rating": 5}
        elif number == 207:  # nobody answered
            row = {"messages": chat[:1]}
        line = json.dumps(row, ensure_ascii=False)
        yield line[: len(line) // 2] if number == 243 else line  # the download broke off
        if number in (60, 61, 62, 140):  # a page of results was fetched twice
            yield line


def _with(turn: Turn, content: str) -> Turn:
    return {**turn, "content": content}


def next_replies(chats: Sequence[Chat]) -> Iterator[dict[str, Any]]:
    """Examples of a task: which of four replies, all of them people's, came next in a chat."""
    draw = random.Random(0)
    replies = [chat[5]["content"] for chat in chats]
    for number, chat in enumerate(chats):
        others = [reply for reply in replies if reply != replies[number]]
        choices = draw.sample(others, CHOICES - 1)
        choices.insert(draw.randrange(CHOICES), replies[number])
        yield {"prompt": chat[:5], "choices": choices, "answer": replies[number]}

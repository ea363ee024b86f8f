"""The process that reads data files for a screen: answers in its protocol, whatever is in the
file.
"""

import json
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import browse_server
from pipeline.data.check import check
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.files.worker import Server
from tests.helpers.json_files import write_jsonl
from tests.helpers.tokenizers import SMOLLM2, folder_with

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello there!"},
        ]
    },
    {"prompt": "The currency of Bulgaria is the", "completion": " euro"},
    {"messages": [{"role": "robot", "content": "x"}]},
    {
        "messages": [
            {"role": "user", "content": "a <|im_end|> b"},
            {"role": "assistant", "content": "c"},
        ]
    },
]


class Client:
    """Sends requests to a server in this process, and reads its answers."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = []
        sink: Any = self
        self.server = Server(browse_server.start(), BytesIO(), sink, parallel=True)
        self.last = 0

    def write(self, line: bytes) -> None:
        self.answers.append(json.loads(line))

    def flush(self) -> None:
        pass

    def send(self, do: str, **fields: Any) -> int:
        self.last += 1
        self.server.receive(json.dumps({"id": self.last, "do": do, **fields}).encode())
        return self.last

    def ask(self, do: str, **fields: Any) -> list[dict[str, Any]]:
        """All answers to a request."""
        return self.wait(self.send(do, **fields))

    def wait(self, request: int) -> list[dict[str, Any]]:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            answers = [each for each in self.answers if each["id"] == request]
            if answers and answers[-1]["event"] in ("done", "error", "cancelled"):
                return answers
            time.sleep(0.005)
        raise AssertionError(f"no answer to {request}")


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    model = folder_with(tmp_path / "base", SMOLLM2)
    (model / "config.json").write_text('{"max_position_embeddings": 99}', encoding="utf-8")
    write_jsonl(tmp_path / "f.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    return Client()


FILE = {"path": "f.jsonl", "base": "base", "max_length": 30}


def test_a_page_is_rows_at_once_and_then_their_lengths(client: Client) -> None:
    page, done = client.ask("page", first=0, count=9, **FILE)
    assert [row["row"] for row in page["rows"]] == [1, 2, 3, 4]
    assert [row["text"] for row in page["rows"]][:2] == [
        "Hello",
        "The currency of Bulgaria is the euro",
    ]
    assert page["rows"][2]["problem"].startswith("messages[0]: role must be one of")
    assert set(done["lengths"]) == {"0", "1"} and done["lengths"]["0"][2] > 0, "cut at max_length"
    assert done["problems"]["3"].startswith("messages[0] contains <|im_end|>")
    _, done = client.ask("page", first=0, count=9, path="f.jsonl", base="")
    assert done["lengths"] == {} and done["missing"]


def test_a_row_comes_turn_by_turn_and_as_the_line_that_can_be_edited(client: Client) -> None:
    first, answer = client.ask("row", position=0, **FILE)
    assert first["event"] == "row" and first["tokens"] is None and first["turns"], (
        "shown while the tokenizer loads"
    )
    assert [role for role, _ in answer["turns"]] == ["user", "assistant"] and answer[
        "template"
    ] is True
    assert json.loads(answer["line"]) == ROWS[0] and answer["cut"] > 0
    (answer,) = client.ask("row", position=2, **FILE)
    assert answer["problem"] and json.loads(answer["line"]) == ROWS[2]
    (answer,) = client.ask("row", position=3, **FILE)
    assert "special token" in answer["problem"] and answer["turns"], "the mask of the roles"
    assert client.ask("row", position=99, **FILE)[-1]["event"] == "error"


def test_a_row_that_is_too_long_is_shortened_and_not_edited(client: Client) -> None:
    long = {"text": "x" * (browse_server.EDITABLE + 1)}
    Path("long.jsonl").write_text(
        json.dumps(long) + "\n{" + "y" * browse_server.EDITABLE, encoding="utf-8"
    )
    for position in (0, 1):
        (answer,) = client.ask("row", position=position, path="long.jsonl", base="")
        shown = sum(len(text) for _, parts in answer["turns"] for _, text in parts)
        assert answer["line"] == "" and shown == browse_server.SHOWN and answer["hidden"] > 0


def test_a_draft_is_read_as_a_row_of_the_file_would_be(client: Client) -> None:
    (answer,) = client.ask("draft", line=json.dumps(ROWS[0]), **FILE)
    assert answer["problem"] == "" and answer["tokens"] > 0
    (answer,) = client.ask("draft", line='{"mesages": []}', **FILE)
    assert "messages" in answer["problem"]


def test_the_check_is_that_of_lora_data_check(client: Client) -> None:
    report = client.ask("check", **FILE)[-1]
    own = check(["f.jsonl"], load_tokenizer(Path("base")), max_length=30, positions=99)
    assert {**json.loads(json.dumps(own.as_json())), "id": report["id"], "event": "done"} == report
    assert sum(count for _, count in report["lengths"]) == 2 and report["errors"] == 2


def test_search_count_and_place(client: Client) -> None:
    answers = client.ask("find", text="EURO", **FILE)
    assert [
        row["position"] for each in answers if each["event"] == "page" for row in each["rows"]
    ] == [1]
    assert answers[-1]["complete"] is True
    assert client.ask("index", **FILE)[-1]["rows"] == 4
    assert client.ask("locate", row=3, **FILE)[-1]["position"] == 2


def test_a_file_that_changed_is_read_anew(client: Client) -> None:
    client.ask("index", **FILE)
    Path("f.jsonl").write_text(json.dumps(ROWS[1]) + "\n", encoding="utf-8")
    assert client.ask("index", **FILE)[-1]["rows"] == 1


def test_a_copy_replaces_no_other_file_and_never_the_original(client: Client) -> None:
    line = json.dumps({"text": "new"})
    *_, done = client.ask("copy", position=1, line=line, out="f.edited.jsonl", **FILE)
    written = Path("f.edited.jsonl").read_text(encoding="utf-8").splitlines()
    assert (
        written[1] == line
        and [json.loads(each) for each in written[::2]] == ROWS[::2]
        and done["left_out"] == 0
    )
    before = Path("f.jsonl").read_bytes()
    for out in ("f.jsonl", "f.edited.jsonl", "f.csv"):
        assert client.ask("copy", position=0, line=line, out=out, **FILE)[-1]["event"] == "error"
    assert Path("f.jsonl").read_bytes() == before


def test_what_is_wrong_is_a_message(client: Client) -> None:
    for do, fields in (
        ("nothing", {"path": "f.jsonl"}),
        ("index", {"path": "t.parquet"}),
        ("page", {"path": "a\0b.txt"}),
        ("convert", {"path": "none.jsonl", "out": "o.jsonl"}),
    ):
        Path("t.parquet").write_bytes(b"PAR1")
        answer = client.ask(do, **fields)[-1]
        assert answer["event"] == "error" or answer["event"] == "done", do
        if answer["event"] == "error":
            assert answer["message"] and "Traceback" not in answer["message"]


def test_a_request_that_is_cancelled_ends(client: Client) -> None:
    Path("big.txt").write_text("word\n" * 300_000, encoding="utf-8")
    request = client.send("check", path="big.txt", base="")
    client.send("cancel", target=request)
    assert client.wait(request)[-1]["event"] == "cancelled"

"""The chat screen: every key and fault, with a fake engine that answers immediately."""

import errno
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.content import Content
from textual.pilot import Pilot

from pipeline.errors import UserError
from pipeline.inference.talk import Answer
from tests.helpers.fake_engine import DEATH, FakeInference
from tests.helpers.pilot import AppSession, drawn, screen_opens, screen_text, until
from tui.app import Workbench
from tui.dialogs import Ask, AskText
from tui.panes.key_bar import KeyBar
from tui.panes.menu import Menu
from tui.screens.chat.screen import ChatScreen
from tui.screens.conversation.field import MessageField
from tui.screens.conversation.sampling import SamplingDialog
from tui.screens.conversation.turns import History
from tui.screens.models.screen import ModelsScreen


class Session(AppSession[ChatScreen]):
    """The app on its chat screen, with helpers for tests."""

    kind = ChatScreen

    def __init__(self, pilot: Pilot[None], engine: FakeInference | None = None) -> None:
        super().__init__(pilot)
        self.engine = engine or FakeInference()

    @property
    def field(self) -> MessageField:
        return self.screen.field

    @property
    def history(self) -> History:
        return self.screen.history

    @property
    def answers(self) -> list[Answer]:
        return self.screen.talk.turns[-1].reply.answers

    def texts(self) -> list[str]:
        return [turn.text for turn in self.screen.talk.turns]

    def lines(self) -> str:
        """The history as it is drawn."""
        x, y, width, height = self.history.region
        drawn = screen_text(self.app).splitlines()[y : y + height]
        return "\n".join(line[x : x + width].rstrip() for line in drawn).rstrip()

    def title(self) -> str:
        return Content.from_markup(str(self.screen.message_pane.border_title)).plain

    def footer(self) -> str:
        return str(self.screen.query_one(KeyBar).render())

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await drawn(self.pilot)

    async def write(self, text: str) -> None:
        await self.pilot.press(*("space" if letter == " " else letter for letter in text))

    async def ask(self, text: str) -> None:
        """Ask, and wait for the answers."""
        await self.write(text)
        await self.press("enter")
        await self.quiet()

    async def quiet(self) -> None:
        await until(self.pilot, lambda: not self.screen.is_writing())
        await drawn(self.pilot)

    async def dialog(self, kind: type[Any]) -> Any:
        await until(
            self.pilot, lambda: isinstance(self.app.screen, kind) and self.app.screen.is_mounted
        )
        return self.app.screen


@asynccontextmanager
async def open_chat(
    root: Path, engine: FakeInference | None = None, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[Session]:
    app = Workbench(root / "params.yaml")
    engine = engine or FakeInference()
    app.inference, app.first_screen = engine, "chat"
    async with app.run_test(size=size) as pilot:
        session = Session(pilot, engine)
        await until(pilot, lambda: session.screen.session.entries)
        yield session


@pytest.fixture
def chatty() -> FakeInference:
    """An engine whose models have a chat template."""
    engine = FakeInference()
    engine.chat = True
    return engine


def line_of(s: Session, name: str) -> int:
    """The line of the history in which a name stands."""
    return next(n for n, line in enumerate(s.lines().splitlines()) if name in line)


async def two_models(s: Session) -> None:
    """Choose lora, and base beside it."""
    await choose(s, "home", "space", "c")
    await until(s.pilot, lambda: len(s.screen.session.entries) == 2)


async def choose(s: Session, *keys: str) -> None:
    """Go to the models, and come back with these keys."""
    await s.press("ctrl+o")
    models = await screen_opens(s.pilot, ModelsScreen)
    table = models.table
    await until(s.pilot, lambda: table.chosen and table.pointed in table.chosen_entries())
    await s.press(*keys)
    await screen_opens(s.pilot, ChatScreen)


async def test_a_model_reads_all_turns_and_is_asked_with_what_is_set(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        assert [entry.label for entry in s.screen.session.entries] == ["lora"]
        await s.ask("eins")
        await s.ask("zwei")
        *_, asked = chatty.done("generate")
        assert asked["messages"] == [
            {"role": "user", "content": "eins"},
            {"role": "assistant", "content": "tisch und stuhl"},
            {"role": "user", "content": "zwei"},
        ]
        assert (asked["strength"], asked["limit"], asked["temperature"]) == (1.0, 512, 0.0)
        assert "lora  3 tokens · 40 tokens/s · … limit reached" in s.lines()
        assert "context 12 of 64" in s.title()
        assert s.app.state.prompts == ["eins", "zwei"]


async def test_two_models_answer_side_by_side_where_there_is_room(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await two_models(s)
        assert "lora beside base" in s.title()
        await s.ask("eins")
        assert [answer.label for answer in s.answers] == ["lora", "base"]
        assert line_of(s, "lora") == line_of(s, "base")
        await s.pilot.resize_terminal(90, 30)
        await until(s.pilot, lambda: line_of(s, "base") > line_of(s, "lora"))


@pytest.mark.slow
async def test_an_edited_message_keeps_the_former_branch(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        await s.ask("zwei")
        await s.write("entwurf")
        await s.press("up", "up", "up", "enter")
        assert (s.field.text, s.field.has_focus) == ("eins", True)
        assert "Edit message" in s.title()
        await s.press("escape")
        assert s.field.text == "entwurf", "Esc ends the editing, and the draft is back"
        await s.press("up", "up", "up", "enter")
        await s.ask("!")
        assert (s.texts(), s.field.text) == (["eins!"], "entwurf")
        assert "‹ 2/2 ›" in s.lines()
        await s.press("up", "left")
        assert s.texts() == ["eins", "zwei"]
        assert "‹ 1/2 ›" in s.lines()
        await s.press("left", "right", "right")
        assert s.texts() == ["eins!"]
        assert s.screen.unsaved() == "an unsaved conversation"


async def test_an_answer_is_asked_again_and_the_former_is_kept(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        chatty.tokens = (" herd",)
        await s.press("ctrl+r")
        await s.quiet()
        assert s.answers[0].text == " herd"
        await s.press("up", "down", "left")
        assert s.answers[0].text == " tisch und stuhl"
        await s.press("up", "ctrl+r")
        await s.quiet()
        assert str(s.screen.talk.turns[0].replies) == "‹ 3/3 ›"


async def test_strength_marks_the_answer_as_given_at_another(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        await s.press("ctrl+down", "ctrl+down")
        assert "at ×1.00; Ctrl+R asks again at ×0.90" in s.lines()
        assert "×0.90" in s.title()
        await s.press("ctrl+r")
        await s.quiet()
        assert chatty.done("generate")[-1]["strength"] == 0.9
        assert "lora ×0.90" in s.lines()
        assert "asks again" not in s.lines()
        await s.press("up")
        await s.press("right_square_bracket")
        assert "asks again at ×0.95" in s.lines()


async def test_strength_without_an_adapter_says_why_not(brief: Path) -> None:
    async with open_chat(brief) as s:
        await choose(s, "space", "home", "c")
        await until(s.pilot, lambda: s.screen.session.entries[0].label == "base")
        await s.press("ctrl+up")
        assert "None of these models is such an adapter" in s.messages()
        assert "×" not in s.title()


async def test_with_more_models_than_there_is_room_for_the_first_are_asked(brief: Path) -> None:
    async with open_chat(brief) as s:
        await choose(s, "home", "space", "down", "space", "c")
        await until(s.pilot, lambda: "lora beside base" in s.title())
        assert "room for 2 models" in s.messages()


async def test_thoughts_are_folded_until_a_key_shows_them(
    brief: Path, chatty: FakeInference
) -> None:
    chatty.tokens = ("<thi", "nk>\nein tisch ist", " ein möbel\n</th", "ink>\n\nja", " doch")
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        assert "▸ thoughts  5 words" in s.lines()
        assert "möbel" not in s.lines()
        assert "\n  ja doch" in s.lines()
        await s.press("ctrl+t")
        assert "│ ein tisch ist ein möbel" in s.lines()
        await s.ask("zwei")
        assert chatty.done("generate")[-1]["messages"][1]["content"] == "ja doch"


async def test_a_template_that_opens_the_thought_is_understood(
    brief: Path, chatty: FakeInference
) -> None:
    chatty.tokens, chatty.opens_thought = ("hm", "</think>ja"), True
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        assert (s.answers[0].content, s.answers[0].text) == ("ja", "<think>\nhm</think>ja")


async def test_what_no_longer_fits_is_said(brief: Path, chatty: FakeInference) -> None:
    async with open_chat(brief, chatty) as s:
        chatty.cut_messages = 4
        await s.ask("eins")
        assert (
            "the first 4 messages were left out (28 tokens): the window has 64 tokens" in s.lines()
        )


async def test_escape_interrupts_and_what_arrived_is_kept(brief: Path) -> None:
    engine = FakeInference(held=True)
    async with open_chat(brief, engine) as s:
        await s.write("eins")
        await s.press("enter")
        await until(s.pilot, lambda: s.answers[0].tokens)
        assert "Esc interrupt" in s.footer()

        await s.press("escape")
        await s.quiet()
        assert (s.answers[0].state, s.answers[0].text, engine.cancelled) == (
            "interrupted",
            " tisch",
            1,
        )
        assert "▪ interrupted" in s.lines()
        assert "Esc leave" in s.footer()
        assert s.field.has_focus


@pytest.mark.slow
async def test_one_may_look_at_another_branch_while_two_models_write(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await two_models(s)
        await s.ask("eins")
        await s.ask("zwei")
        s.engine.go_on.clear()
        await s.press("up", "up", "up", "enter")
        await s.write("!")
        await s.press("enter")
        edited = s.screen.talk.turns[0]
        await until(s.pilot, lambda: edited.reply.answers[0].tokens)
        await s.press("up", "left")
        assert s.texts() == ["eins", "zwei"]
        s.engine.go_on.set()
        await s.quiet()
        assert [answer.text for answer in edited.reply.answers] == [" tisch und stuhl"] * 2
        assert s.engine.done("generate")[-1]["messages"] == [{"role": "user", "content": "eins!"}]


async def test_a_message_during_an_answer_waits_in_the_field(brief: Path) -> None:
    engine = FakeInference(held=True)
    async with open_chat(brief, engine) as s:
        await s.write("eins")
        await s.press("enter")
        await until(s.pilot, lambda: s.answers[0].tokens)
        await s.write("zwei")
        await s.press("enter", "ctrl+r")
        assert (s.field.text, s.texts()) == ("zwei", ["eins"])
        assert "An answer is being written. Esc interrupts it." in s.messages()
        engine.go_on.set()
        await s.quiet()


@pytest.mark.slow
async def test_when_the_engine_dies_one_sentence_says_so_and_asking_again_works(
    brief: Path,
) -> None:
    async with open_chat(brief) as s:
        await two_models(s)
        s.engine.dies = True
        await s.ask("eins")
        assert s.messages().count(DEATH) == 1
        assert [answer.error for answer in s.answers] == ["the engine ended"] * 2
        await s.press("ctrl+r")
        await s.quiet()
        assert [answer.state for answer in s.answers] == ["length", "length"]
        assert len(s.engine.done("load")) == 4, "both before it died, both after"


async def test_a_model_that_cannot_answer_does_not_silence_the_other(
    brief: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_chat(brief) as s:
        await two_models(s)
        load = s.engine._load

        def refuse(name: str, **fields: object) -> dict[str, Any]:
            if "lora" in name:
                raise UserError(f"{name} is not finite.")
            return load(name, **fields)

        monkeypatch.setattr(s.engine, "_load", refuse)
        await s.ask("eins")
        assert [answer.error for answer in s.answers] == ["is not finite.", ""]
        assert s.answers[1].text == " tisch und stuhl"


async def test_markup_and_control_characters_are_text(brief: Path, chatty: FakeInference) -> None:
    chatty.tokens = ("[red]x[/] \x1b]0;gone\x07 \x9b31m\u202e", "\ttab")
    async with open_chat(brief, chatty) as s:
        await s.write("[b]x")
        await s.press("enter")
        await s.quiet()
        assert "[red]x[/] ␛]0;gone␇ �31m�    tab" in s.lines()
        assert "[b]x" in s.lines()


async def test_several_lines_are_typed_and_the_field_grows(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        before = s.field.size.height
        await s.write("a")
        await s.press("ctrl+j")
        await s.write("b")
        assert (s.field.text, s.field.size.height) == ("a\nb", before + 1)
        await s.press("up")
        assert s.field.has_focus, "there is a line above"
        await s.press("enter")
        await s.quiet()
        assert s.texts() == ["a\nb"]
        await s.press("enter")
        assert "The message is empty" in s.messages()


@pytest.mark.slow
async def test_an_answer_becomes_an_example_of_the_data(
    brief: Path, chatty: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[tuple[str, dict[str, Any]]] = []
    async with open_chat(brief, chatty) as s:
        go = s.app.go

        def recorded(name: str, **request: Any) -> None:
            if name == "data":
                went.append((name, request))
            else:
                go(name, **request)

        monkeypatch.setattr(s.app, "go", recorded)
        await s.press("ctrl+g")
        assert "There is nothing to correct yet." in s.messages()
        await s.ask("eins")
        await s.press("ctrl+g")
        assistant = {"role": "assistant", "content": "tisch und stuhl"}
        row = {"messages": [{"role": "user", "content": "eins"}, assistant]}
        await until(s.pilot, lambda: went == [("data", {"add": row})])
        await s.press("up", "down", "enter")
        await until(s.pilot, lambda: len(went) == 2)
        await two_models(s)
        await s.press("escape", "tab") if not s.field.has_focus else None
        await s.ask("zwei")
        await s.press("ctrl+g")
        menu = await s.dialog(Menu)
        assert menu is not None
        await s.press("down", "enter")
        await until(s.pilot, lambda: len(went) == 3)
        assert [message["content"] for message in went[2][1]["add"]["messages"]][-2:] == [
            "zwei",
            "tisch und stuhl",
        ]


async def test_a_completion_becomes_prompt_and_completion(
    brief: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    went: list[dict[str, Any]] = []
    async with open_chat(brief) as s:
        monkeypatch.setattr(s.app, "go", lambda _, **request: went.append(request))
        await s.ask("eins")
        await s.ask("zwei")
        await s.press("ctrl+g")
        await until(s.pilot, lambda: went)
        assert went == [
            {"add": {"prompt": "eins tisch und stuhl zwei", "completion": " tisch und stuhl"}}
        ]


@pytest.mark.parametrize("name", ["talk.md", "talk.json", "talk.jsonl"])
@pytest.mark.slow
async def test_a_conversation_is_saved_and_is_then_no_longer_unsaved(
    project: Path, chatty: FakeInference, name: str
) -> None:
    async with open_chat(project, chatty) as s:
        await s.press("ctrl+s")
        assert "nothing to save" in s.messages()
        await s.ask("eins")
        await s.press("ctrl+r")
        await s.quiet()
        await s.press("ctrl+s")
        await s.dialog(AskText)
        await s.press("ctrl+u", *name, "enter")
        await until(s.pilot, lambda: "Saved the conversation" in s.messages())
        text = (project / name).read_text(encoding="utf-8")
        assert s.screen.unsaved() == ""
        if name.endswith("md"):
            assert text.startswith(
                "# Conversation\n\n**You**\n\neins\n\n**lora** (length)\n\ntisch und stuhl\n"
            )
        elif name.endswith("jsonl"):
            (row,) = map(json.loads, text.splitlines())
            assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        else:
            (turn,) = json.loads(text)["turns"]
            assert (turn["text"], turn["shown"], len(turn["replies"])) == ("eins", 1, 2)
        await s.press("ctrl+s")
        await s.dialog(AskText)
        await s.press("ctrl+u", *name, "enter")
        await s.dialog(Ask)
        await s.press("escape")


async def test_a_full_disk_is_one_sentence(
    brief: Path, chatty: FakeInference, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "chat.md")

    monkeypatch.setattr("tui.screens.conversation.screen.write_file", full)
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        await s.press("ctrl+s")
        await s.dialog(AskText)
        await s.press("enter")
        await until(s.pilot, lambda: "No space left on device" in s.messages())
        assert s.screen.unsaved() == "an unsaved conversation"


@pytest.mark.slow
async def test_system_prompt_and_sampling_are_checked_and_used(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await s.press("ctrl+l")
        form = (await s.dialog(SamplingDialog)).form
        await s.write("kurz")
        await s.press("tab")
        await s.write("-1")
        await s.press("enter")
        assert "temperature must be a number from 0" in " ".join(form.lines())
        await s.press("ctrl+u")
        await s.write("0.7")
        await s.press("ctrl+s")
        await until(s.pilot, lambda: "temperature 0.7" in s.title())
        await s.ask("eins")
        (asked,) = chatty.done("generate")
        assert asked["messages"][0] == {"role": "system", "content": "kurz"}
        assert (asked["temperature"], asked["limit"]) == (0.7, 512)


async def test_a_new_conversation_asks_before_it_loses_one(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        await s.press("ctrl+n")
        await s.dialog(Ask)
        await s.press("escape")
        assert s.texts() == ["eins"]
        await s.press("ctrl+n")
        await s.dialog(Ask)
        await s.press("y")
        await until(s.pilot, lambda: not s.texts())
        assert s.field.has_focus


@pytest.mark.slow
async def test_quitting_asks_and_another_screen_keeps_the_conversation(
    brief: Path, chatty: FakeInference
) -> None:
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        await s.press("f2")
        await until(s.pilot, lambda: s.app.base_screen.NAME == "pipeline")
        folder = brief / "artifacts"
        s.app.go("chat", models=[folder / "base", folder / "full_finetuned"])
        await until(s.pilot, lambda: s.app.base_screen.NAME == "chat")
        await until(
            s.pilot, lambda: [entry.label for entry in s.screen.session.entries] == ["base", "full"]
        )
        assert s.texts() == ["eins"]
        await s.press("escape", "q")
        await s.dialog(Ask)
        await s.press("escape")
        s.app.go("chat", models=[brief / "nowhere"])
        await until(s.pilot, lambda: f"{brief / 'nowhere'} is not a model folder" in s.messages())


async def test_without_a_model_the_screen_says_what_to_do(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    app.inference, app.first_screen = FakeInference(), "chat"
    async with app.run_test(size=(80, 24)) as pilot:
        s = Session(pilot)
        await until(pilot, lambda: "There is no model yet" in s.lines())
        await s.write("eins")
        await s.press("enter", "ctrl+r")
        await until(pilot, lambda: "There is no model yet" in s.messages())
        assert s.field.text == "eins"
        await s.press("ctrl+o")
        models = await screen_opens(pilot, ModelsScreen)
        await until(pilot, lambda: "No models yet" in models.table.line(0).plain)


@pytest.mark.parametrize("size", [(60, 16), (30, 8)], ids=["60x16", "30x8"])
@pytest.mark.slow
async def test_small_terminals_do_not_crash(
    brief: Path, chatty: FakeInference, size: tuple[int, int]
) -> None:
    async with open_chat(brief, chatty, size) as s:
        await two_models(s)
        await s.ask("eins")
        await s.press("ctrl+l")
        await s.dialog(SamplingDialog)
        await s.press("escape", "up", "up", "down", "down", "down", "f10", "f10")


async def test_the_end_is_followed_unless_one_reads_above(
    brief: Path, chatty: FakeInference
) -> None:
    chatty.tokens = ("wort\n",) * 100
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        assert s.history.is_vertical_scroll_end
        assert s.history.max_scroll_y > 50
        await s.press("pageup")
        await until(s.pilot, lambda: s.history.scroll_offset.y < s.history.max_scroll_y)
        one_page = s.history.scroll_offset.y
        await s.press("pageup")
        await until(s.pilot, lambda: s.history.scroll_offset.y < one_page)
        before = s.history.scroll_offset.y
        assert before > 0
        s.answers[0].text += "mehr\n" * 9
        s.history.grew()
        await s.pilot.pause()
        assert s.history.scroll_offset.y == before


async def test_the_copied_answer_is_without_thoughts(brief: Path, chatty: FakeInference) -> None:
    chatty.tokens = ("<think>hm</think>", " ja")
    async with open_chat(brief, chatty) as s:
        await s.ask("eins")
        await s.press("up", "down", "y")
        assert s.app.clipboard == "ja"

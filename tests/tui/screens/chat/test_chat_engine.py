"""The chat screen on the real inference process."""

import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.inference.engine import continued, load
from pipeline.inference.talk import Answer
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.pilot import until
from tests.tui.screens.chat.test_chat import Session
from tui.app import Workbench

pytestmark = pytest.mark.usefixtures("forked_processes")
PROMPT = "die katze sitzt auf dem"
WINDOW = 64  # tokens of the toy Llama


@asynccontextmanager
async def open_chat(root: Path) -> AsyncIterator[Session]:
    app = Workbench(root / "params.yaml")
    app.first_screen = "chat"
    async with app.run_test(size=(120, 40)) as pilot:
        session = Session(pilot)
        await until(pilot, lambda: session.screen.session.entries)
        yield session


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a toy Llama that has a chat template."""
    root = new_project(tmp_path_factory.mktemp("llama"), FAMILIES["llama"])
    shutil.copytree(root / "base", root / "artifacts/base")
    return root


async def ask(s: Session, text: str) -> Answer:
    await s.ask(text)
    return s.answers[0]


@pytest.mark.slow
async def test_a_model_without_template_goes_on_with_the_text(brief: Path) -> None:
    lora = load(brief / "artifacts/expanded", brief / "artifacts/lora_adapter")
    async with open_chat(brief) as s:
        first = await ask(s, PROMPT)
        assert first.text == continued(lora, PROMPT, 512)
        second = await ask(s, "die katze")
        assert second.text == continued(lora, f"{PROMPT}{first.text} die katze", 512)
        assert second.prompt_tokens == len(lora.tokenizer.encode(f"{PROMPT}{first.text} die katze"))
        wrong = await ask(s, "wortlos")
        assert wrong.error.startswith("does not know: wortlos.")
        await s.press("ctrl+r")
        await s.quiet()
        await s.press(*["ctrl+down"] * 20, "up", "up", "up", "ctrl+r")
        await s.quiet()
        assert s.answers[0].text == continued(
            load(brief / "artifacts/expanded"), f"{PROMPT}{first.text} die katze", 512
        )


@pytest.mark.slow
async def test_a_chat_that_no_longer_fits_says_what_was_left_out(llama: Path) -> None:
    async with open_chat(llama) as s:
        for n in range(9):
            answer = await ask(s, f"Two and two {n}")
            assert answer.chat
            assert not answer.error
        assert answer.window == WINDOW
        assert answer.cut_messages >= 2
        assert f"the first {answer.cut_messages} messages were left out" in s.lines()
        await s.write("x" * 200)
        await s.press("enter")
        await s.quiet()
        assert "tokens; base takes 64." in s.answers[0].error


async def test_an_engine_that_is_killed_while_it_writes_is_said_once_and_started_again(
    empty: Path, endless: Path
) -> None:
    shutil.copytree(endless, empty / "artifacts/base")
    async with open_chat(empty) as s:
        s.screen.session.sampling = replace(s.screen.session.sampling, limit=10_000)
        await s.write("w1")
        await s.press("enter")
        await until(s.pilot, lambda: s.answers[0].tokens)
        engine = s.app.inference
        assert engine and engine.pid
        os.kill(engine.pid, signal.SIGKILL)
        await s.quiet()
        answer = s.answers[0]
        assert (answer.error, answer.tokens > 0) == ("the engine ended", True)
        assert s.messages() == (
            "The inference process ended: it was killed, perhaps because the machine ran out of "
            "memory. Prompt again to start a new one."
        )
        await s.press("ctrl+r")
        await until(s.pilot, lambda: s.answers[0] is not answer and s.answers[0].tokens)
        await s.press("escape")
        await s.quiet()
        assert s.answers[0].state == "interrupted"

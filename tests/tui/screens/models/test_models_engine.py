"""The screen of models on the real inference process."""

import os
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.tokenizers.chat_template import render
from pipeline.files.text import escape_whitespace
from pipeline.inference.engine import complete, continued, load, top_k
from pipeline.inference.talk import Answer
from tests.helpers.bases import toy_checkpoint
from tests.helpers.models_screen import COUNT, Session, real_models
from tests.helpers.pilot import until

PROMPT = "die katze sitzt auf dem"


async def answers(s: Session, prompt: str) -> list[Answer]:
    await s.ask(prompt)
    await until(s.pilot, lambda: not s.is_generating(), 60)
    return s.answers


@pytest.mark.usefixtures("forked_processes")
async def test_answers_are_those_of_the_library(brief: Path) -> None:
    async with real_models(brief) as s:
        await s.press("p")
        by_name = {answer.label: answer for answer in await answers(s, PROMPT)}
    folder = brief / "artifacts"
    for name, loaded in {
        "base": load(folder / "base"),
        "full": load(folder / "full_finetuned"),
        "lora": load(folder / "expanded", folder / "lora_adapter"),
    }.items():
        assert by_name[name].text.strip() == complete(loaded, PROMPT)
        expected = top_k(loaded, PROMPT, 5)
        assert [token for token, _ in by_name[name].top_k] == [choice.token for choice in expected]
        for (_, probability), choice in zip(by_name[name].top_k, expected, strict=True):
            assert probability == pytest.approx(choice.probability, abs=1e-5)


@pytest.mark.slow
async def test_a_model_of_subwords_answers_beside_one_of_words(project: Path) -> None:
    """Text with its own spaces, with a chat template too."""
    folder = project / "artifacts/toy"
    toy_checkpoint(folder)
    loaded = load(folder)
    async with real_models(project, COUNT + 1) as s:
        await s.point("toy")
        await s.press("space")
        await s.point("base")
        await s.press("space")
        by_name = {answer.label: answer for answer in await answers(s, "The currency")}
        assert "does not know: The, currency" in by_name["base"].error and not by_name["toy"].error
        assert by_name["toy"].text == continued(loaded, "The currency")
        assert [token for token, _ in by_name["toy"].top_k] == [
            c.token for c in top_k(loaded, "The currency", 5)
        ]
        table = "\n".join(s.top_k())
        assert all(escape_whitespace(token) in table for token, _ in by_name["toy"].top_k)

        await s.press("escape")
        await s.point("base")
        await s.press("space")
        s.screen.session.template = True
        (answer,) = await answers(s, "hi")
        assert answer.text == continued(loaded, render(folder, "hi"))


@pytest.mark.slow
async def test_strength_0_is_the_base_and_1_the_adapter(brief: Path) -> None:
    async with real_models(brief) as s:
        await s.press("p")
        before = await answers(s, PROMPT)
        expanded, lora = before[1], before[5]
        for strength, same in ((0.0, expanded), (1.0, lora)):
            probed = [replace(answer, strength=strength) for answer in before[5:6]]
            await s.screen.session.fill_table(PROMPT, probed)
            wanted = pytest.approx(same.probabilities["tisch"], abs=1e-6)
            assert probed[0].probabilities["tisch"] == wanted


@pytest.mark.slow
async def test_unknown_words_and_long_prompts_are_reported_in_each_column(brief: Path) -> None:
    async with real_models(brief) as s:
        await s.press("p")
        assert all("wortlos" in answer.error for answer in await answers(s, "die wortlos"))
        assert all(
            re.search("takes (32|24)", answer.error) for answer in await answers(s, "die " * 40)
        )


@pytest.mark.slow
async def test_a_killed_engine_is_reported_and_the_next_prompt_starts_a_new_one(
    brief: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with real_models(brief) as s:
        await s.press("p")
        first = await answers(s, PROMPT)
        engine = s.app.inference
        assert engine is not None
        pid = engine.pid
        assert pid is not None
        tick = s.screen.tick
        monkeypatch.setattr(s.screen, "tick", lambda: None)  # so that only the prompt is pending
        await until(s.pilot, lambda: engine._process is not None and not engine._process._pending)
        os.kill(pid, signal.SIGSTOP)  # so that it has not answered yet
        await s.ask(PROMPT)
        await until(s.pilot, lambda: engine._process is not None and engine._process._pending)
        os.kill(pid, signal.SIGKILL)
        await until(s.pilot, lambda: s.screen.engine_line.state == "died")
        await until(s.pilot, lambda: "it was killed" in s.messages())
        for _ in range(4):
            tick()
        await s.pilot.pause()
        assert not engine.running, "a check of its status must not start a new one"
        assert len(s.screen.table.entries) == COUNT
        again = await answers(s, PROMPT)
        assert [answer.text for answer in again] == [answer.text for answer in first]
        assert engine.pid != pid


@pytest.mark.slow
async def test_an_engine_that_hangs_is_interrupted_at_once(brief: Path) -> None:
    async with real_models(brief) as s:
        await answers(s, PROMPT)
        engine = s.app.inference
        assert engine is not None
        assert engine.pid is not None
        os.kill(engine.pid, signal.SIGSTOP)
        await s.ask(PROMPT)
        await until(s.pilot, s.is_generating)
        await s.press("escape")
        await until(s.pilot, lambda: not s.is_generating(), 1)
        os.kill(engine.pid, signal.SIGCONT)
        assert (await answers(s, PROMPT))[0].text


@pytest.mark.usefixtures("forked_processes")
async def test_an_adapter_on_another_base_is_refused_with_the_reason(project: Path) -> None:
    shutil.rmtree(project / "artifacts/expanded")
    shutil.copytree(project / "artifacts/full_finetuned", project / "artifacts/expanded")
    async with real_models(project) as s:
        await s.point("lora")
        assert "was trained on another base" in s.details()
        assert "was trained on another base" in (await answers(s, PROMPT))[0].error


@pytest.mark.slow
async def test_the_spectrum_of_an_adapter(brief: Path) -> None:
    async with real_models(brief) as s:
        await s.point("lora")
        await s.press("m")
        await until(s.pilot, lambda: "0.q" in s.details())
        assert s.details().count("%") >= 8  # four matrices in two layers

"""The screen of models: prompts, answers, strength, attention, and faults, with a fake engine."""

import errno
import json
import shutil
from pathlib import Path

import pytest
from textual.widgets import Input

from pipeline.views.models import trusts_remote_code
from tests.helpers.fake_engine import DEATH
from tests.helpers.models_screen import COUNT, USUAL, open_models
from tests.helpers.pilot import screen_opens, until
from tests.helpers.projects import save
from tui.dialogs import PathScreen
from tui.registry import SCREENS
from tui.screens.models.answers import TopK
from tui.screens.models.attention import AttentionScreen
from tui.widgets.prompting import EngineBar, PromptInput, Slider
from tui.widgets.sampling import SamplingScreen
from tui.widgets.text import Lines


async def test_side_by_side_differences_are_signed_and_count_from_the_first(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("p")
        await s.ask("die katze")
        await s.answered()

        def row(name: str) -> list[str]:
            """A row across all blocks, since not all models fit side by side."""
            found = [line.split() for line in s.text(TopK).splitlines() if line.startswith(name)]
            return [
                cell
                for _, *cells in found
                for cell in cells
                if ("█" not in cell and len(cell) > 1) or cell == "="
            ]

        assert row("next") == USUAL
        cells = {"base": ["50.0"], "lora": ["75.0", "+25.0"]}
        assert row("tisch") == [cell for name in USUAL for cell in cells.get(name, ["50.0", "="])]
        assert row("sofa").count("−25.0") == 1
        assert s.conversation.newest is not None
        assert {answer.text for answer in s.conversation.newest.answers} == {" tisch und stuhl"}


async def test_one_model_has_bars_and_percent(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("die katze")
        await s.answered()
        line = s.text(TopK).splitlines()[1]
        assert "50.0" in line
        assert 24 <= line.count("█") <= 36


@pytest.mark.slow
async def test_strength_moves_by_key_and_asks_again_with_the_newest_value_only(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.point("lora")
        await s.ask("die katze")
        await s.answered()
        slider = s.screen.query_one(Slider)
        slider.value = 0.2
        await s.press("escape")  # in the field, letters are letters
        await s.press(*["left_square_bracket"] * 6)
        await until(s.pilot, lambda: "50.0" in s.text(TopK))
        assert slider.value == 0
        asked = s.engine.done("top_k")
        assert list(asked[-1]["strength"].values()) == [0.0]
        assert len(asked) <= 8
        slider.value = 1.9
        await s.press(*["right_square_bracket"] * 4)
        await until(s.pilot, lambda: "lora ×2.00" in s.text(TopK))
        assert s.conversation.newest is not None
        # the exchange itself is not changed
        assert s.conversation.newest.answers[0].title == "lora"
        assert "at ×1.00; Ctrl+R asks again" in s.completions()
        await s.press("ctrl+r")
        await s.answered()
        assert (
            s.conversation.newest.answers[0].title == "lora ×2.00"
            and "Ctrl+R" not in s.completions()
        )


@pytest.mark.slow
async def test_the_slider_takes_the_mouse_and_is_off_without_an_adapter(brief: Path) -> None:
    async with open_models(brief) as s:
        slider = s.screen.query_one(Slider)
        assert slider.disabled
        await s.press("right_square_bracket")
        assert "Choose an adapter" in s.messages()
        await s.point("prefix")
        await s.press("enter")
        assert "prefix changes no weights" in str(slider.render())
        await s.press("escape", "escape")
        await s.point("lora")
        await s.press("enter")
        await s.pilot.click(Slider, offset=(len(slider.LABEL), 0))
        assert slider.value == 0
        await s.pilot.click(Slider, offset=(len(slider.LABEL) + slider.track - 1, 0))
        assert slider.value == 2
        await s.press("home", "right")
        assert slider.value == 0.05


@pytest.mark.slow
async def test_interrupt_stops_at_once_and_keeps_what_came(brief: Path) -> None:
    async with open_models(brief, held=True) as s:
        await s.press("p")
        await s.ask("die katze")
        newest = s.conversation.newest
        assert newest is not None
        await until(s.pilot, lambda: newest.answers[0].text == " tisch")
        await s.press("escape")
        await s.answered()
        assert [answer.ended for answer in newest.answers] == ["interrupted"] * len(USUAL)
        assert (newest.answers[0].text, s.engine.cancelled) == (" tisch", 1)
        s.engine.go_on.set()
        await s.ask("der wind")
        await s.answered()
        assert s.conversation.newest is not None
        assert s.conversation.newest.answers[5].text == " tisch und stuhl"


@pytest.mark.slow
async def test_an_engine_that_dies_is_reported_and_the_next_prompt_loads_again(brief: Path) -> None:
    async with open_models(brief) as s:
        s.engine.dies = True
        await s.press("p")
        await s.ask("die katze")
        await s.answered()
        newest = s.conversation.newest
        assert newest is not None
        assert (DEATH in s.messages(), s.screen.query_one(EngineBar).state) == (True, "died")
        assert [answer.error for answer in newest.answers] == ["the engine ended"] * len(USUAL)
        await s.ask("die katze")
        await s.answered()
        assert len(s.engine.done("load")) == 2 * len(USUAL)
        assert s.screen.query_one(EngineBar).state == "ready"
        assert len(s.conversation.exchanges) == 2


@pytest.mark.slow
async def test_models_stay_loaded_while_their_files_stay(project: Path) -> None:
    async with open_models(project) as s:
        await s.press("p")
        for _ in range(2):
            await s.ask("die katze")
            await s.answered()
        assert len(s.engine.done("load")) == len(USUAL)
        base = project / "artifacts/full_finetuned/config.json"
        base.write_text(base.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        await s.ask("die katze")
        await s.answered()
        assert s.conversation.newest is not None
        errors = {answer.name: answer.error for answer in s.conversation.newest.answers}
        assert "was changed after the artifact was made" in errors["full"]


async def test_a_word_that_no_model_knows_is_reported_once(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("p")
        await s.ask("wortlos")
        await s.answered()
        assert s.completions(shown=True).count("it does not know: wortlos") == 1
        assert "base, expanded and 7 more" in s.completions(shown=True)
        assert not s.text(TopK).strip(), "no table of models without an answer"
        assert s.engine.done("generate") == []


@pytest.mark.slow
async def test_unknown_words_are_marked_while_they_are_typed(brief: Path) -> None:
    async with open_models(brief) as s:
        field, hint = s.screen.query_one(PromptInput), s.screen.query_one("#unknown")
        await s.press("space", "down", "space", "enter", *"die herd isst")
        await until(
            s.pilot, lambda: "not in the vocabulary: herd (base), isst" in str(hint.render())
        )
        spans = [span for span in field._value.spans if "underline" in str(span.style)]
        assert {field.value[span.start : span.end] for span in spans} == {"herd", "isst"}
        field.value = "die katze"
        await until(s.pilot, lambda: not hint.display)


async def test_a_spinner_stands_where_the_answer_will_be_while_the_engine_starts(
    brief: Path,
) -> None:
    async with open_models(brief, starts_held=True) as s:
        waiting = s.screen.query_one("#waiting")
        await until(
            s.pilot, lambda: "starting the engine (importing libraries)" in str(waiting.render())
        )
        s.engine.starts.set()
        await until(s.pilot, lambda: s.bar.state == "ready")
        assert "starting" not in str(waiting.render())
        assert s.engine.running, "before the first prompt"


async def test_an_empty_prompt_asks_nothing(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("  ")
        assert "The prompt is empty" in s.messages()
        assert not s.engine.done("load")


@pytest.mark.slow
async def test_up_and_down_bring_earlier_prompts_back_and_they_are_remembered(brief: Path) -> None:
    async with open_models(brief) as s:
        for prompt in ("eins", "zwei"):
            await s.ask(prompt)
            await s.answered()
        field = s.screen.query_one(PromptInput)
        assert field.has_focus, "the next prompt can be typed at once"
        field.value = "neu"
        seen = []
        for key in ("up", "up", "up", "down", "down"):
            await s.press(key)
            seen.append(field.value)
        assert seen == ["zwei", "eins", "eins", "zwei", "neu"]
    async with open_models(brief) as s:
        assert s.screen.query_one(PromptInput).history == ["eins", "zwei"]


async def test_at_most_200_prompts_are_remembered(brief: Path) -> None:
    async with open_models(brief) as s:
        s.app.state.prompts = [str(number) for number in range(200)]
        await s.ask("neu")
        assert (len(s.app.state.prompts), s.app.state.prompts[0], s.app.state.prompts[-1]) == (
            200,
            "1",
            "neu",
        )


@pytest.mark.slow
async def test_sampling_is_validated_and_used(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("t")
        top_p = (await screen_opens(s.pilot, SamplingScreen)).query_one("#top_p", Input)
        top_p.value = "2"
        top_p.focus()
        await s.press("enter")
        assert "top-p must be above 0 up to 1 (1 cuts nothing), got '2'." in str(
            s.app.screen.query_one(".wrong").render()
        )
        top_p.value = "0.9"
        s.app.screen.query_one("#temperature", Input).value = "0.7"
        s.app.screen.query_one("#k", Input).value = "3"
        await s.press("enter")
        await until(s.pilot, lambda: s.app.screen is s.screen)
        await s.ask("die katze")
        await s.answered()
        fields = s.engine.done("generate")[0]
        assert (fields["temperature"], fields["top_p"], s.engine.done("top_k")[0]["k"]) == (
            0.7,
            0.9,
            3,
        )


@pytest.mark.slow
async def test_the_chat_template_is_only_for_models_that_have_one(brief: Path) -> None:
    async with open_models(brief) as s:
        s.engine.chat = True
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "t")
        box = (await screen_opens(s.pilot, SamplingScreen)).query_one("ClearCheckbox")
        assert not box.disabled
        box.focus()
        await s.press("space", "shift+tab", "enter")
        await s.ask("die katze")
        await s.answered()
        assert [fields["chat"] for fields in s.engine.done("generate")] == [False, True]


@pytest.mark.slow
async def test_the_answer_in_a_chat_is_a_turn_of_its_own(brief: Path) -> None:
    async with open_models(brief) as s:
        s.engine.chat = s.conversation.chat = True
        await s.ask("die katze")
        await s.answered()
        exchange = s.conversation.newest
        assert exchange is not None and exchange.chat
        assert exchange.answers_text() == "die katze → tisch und stuhl"
        assert "die katze → tisch und stuhl" in s.completions()
        await s.press("escape", "a")
        await until(s.pilot, lambda: s.engine.done("attention_maps"))
        assert s.engine.done("attention_maps")[0]["chat"] is True
        await s.press("escape")
        s.engine.chat = False
        s.engine.life += 1  # another process: it is loaded anew, and has no template now
        await s.ask("die katze")
        await s.answered()
        assert "prompted without it" in s.messages()
        assert (
            s.conversation.newest is not None
            and s.conversation.newest.answers_text() == "die katze tisch und stuhl"
        )


@pytest.mark.slow
async def test_a_slow_load_is_shown_and_keys_come_through_meanwhile(brief: Path) -> None:
    async with open_models(brief, loads_held=True) as s:
        await s.press("space", "down", "space")
        await s.ask("die katze")
        await until(s.pilot, lambda: "… loading" in s.completions())
        assert s.bar.state == "loading" and "Esc interrupts" in str(s.bar.render())
        s.screen.action_browse()
        await s.press("down", "up", "greater_than_sign")
        s.screen.action_prompt()
        s.screen.query_one(PromptInput).value = "typed meanwhile"
        await s.pilot.pause()
        assert (
            s.screen.query_one(PromptInput).value == "typed meanwhile"
            and "… loading" in s.completions()
        )
        assert len(s.engine.done("load")) == 1
        s.engine.loads.release()
        await until(s.pilot, lambda: len(s.engine.done("load")) == 2)
        # the first waits for the second
        await until(s.pilot, lambda: s.completions().count("loading") == 1)
        s.engine.loads.release()
        await until(s.pilot, lambda: s.bar.state == "ready")
        assert s.completions().count("tisch und stuhl") == 2 and "loading" not in s.completions()
        await s.ask("noch einmal")
        await s.answered()
        assert len(s.engine.done("load")) == 2


@pytest.mark.parametrize("trusted", [False, True])
async def test_code_of_the_projects_own_models_runs_where_params_trust_it(
    project: Path, trusted: bool
) -> None:
    params = project / "params.yaml"
    save(params, {"import.trust_remote_code": trusted})
    async with open_models(project) as s:
        await s.ask("die katze")
        await s.answered()
        assert s.engine.done("load")[0]["trust_remote_code"] is trusted
    assert trusts_remote_code(params, project / "artifacts/expanded") is trusted
    assert not trusts_remote_code(params, project / "elsewhere/base")
    params.write_text("[", encoding="utf-8")
    assert not trusts_remote_code(params, project / "artifacts/expanded")


@pytest.mark.slow
async def test_a_slow_load_is_interrupted(brief: Path) -> None:
    async with open_models(brief, loads_held=True) as s:
        await s.ask("die katze")
        await until(s.pilot, lambda: "… loading" in s.completions())
        await s.press("escape")
        await until(s.pilot, lambda: not s.is_generating())
        assert "interrupted" in s.completions() and "loading" not in s.completions()


@pytest.mark.slow
async def test_attention_shows_all_heads_then_one_and_what_the_adapter_changed(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("a")
        assert "Enter one first" in s.messages()
        await s.point("lora")
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "a")

        def shown() -> str:
            return str(s.app.screen.query_one(Lines).render())

        await until(
            s.pilot, lambda: isinstance(s.app.screen, AttentionScreen) and "layer 2" in shown()
        )
        assert shown().count("10%") == 8, "how much of its attention each head moved"
        assert "≡≡██" in shown(), "the difference first: less left, more right"
        await s.press("tab")
        assert "░░" in shown() and "≡" not in shown().splitlines()[-1]
        await s.press("right", "down", "enter")
        await until(
            s.pilot, lambda: "layer 2, head 2" in shown() and "sitzt11 attends to" in shown()
        )
        assert "die     0.50" in shown() and "katze   0.30" in shown()
        assert {(f["layer"], f["head"], f["strength"]) for f in s.engine.done("attention")} == {
            (1, 1, 1.0),
            (1, 1, 0.0),
        }
        await s.press("k")
        assert "katze attends to" in shown() and "katze 0.75" in shown()
        await s.press("escape")
        assert "layer 1" in shown(), "all heads again"
        await s.press("escape")
        assert s.app.screen is s.screen


async def test_attention_of_a_model_without_adapter_has_no_difference(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "a")
        await until(s.pilot, lambda: "layer 2" in str(s.app.screen.query_one(Lines).render()))
        assert "difference" not in str(s.app.screen.query_one(Lines).render())


async def test_copy_takes_the_last_answer(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("y")
        assert "no answer to copy" in s.messages()
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "y")
        assert s.app.clipboard == "die katze tisch und stuhl"


@pytest.mark.slow
async def test_a_transcript_has_every_exchange(project: Path) -> None:
    async with open_models(project) as s:
        for prompt in ("eins", "zwei"):
            await s.ask(prompt)
            await s.answered()

        async def transcript(name: str) -> str:
            await s.press("escape", "ctrl+s")
            await screen_opens(s.pilot, PathScreen)
            s.app.screen.query_one(Input).value = name
            await s.press("enter")
            await until(s.pilot, lambda: (project / name).exists())
            return (project / name).read_text(encoding="utf-8")

        lines = (await transcript("t.jsonl")).splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == ["eins", "zwei"]
        text = await transcript("t.md")
        assert "## eins" in text
        assert "- **base**: zwei tisch und stuhl" in text


async def test_a_full_disk_on_save_is_one_message_and_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with open_models(project) as s:
        await s.ask("eins")
        await s.answered()
        await s.press("escape", "ctrl+s")
        await screen_opens(s.pilot, PathScreen)
        monkeypatch.setattr("os.fsync", full)
        messages = len(s.app.message_history)
        await s.press("enter")
        await until(s.pilot, lambda: len(s.app.message_history) == messages + 1)
        assert "No space left on device" in s.messages() and "transcript.md" in s.messages()
        assert not list(project.glob("*transcript*"))


async def test_a_model_deleted_between_selecting_and_asking_says_so_in_its_column(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_models(project) as s:
        await s.press("p")
        monkeypatch.setattr(s.screen, "_look", lambda: None)
        looks = [worker for worker in s.app.workers if worker.group == "look"]
        # one that sees it gone deselects it
        await until(s.pilot, lambda: all(look.is_finished for look in looks))
        shutil.rmtree(project / "artifacts/layer_frozen")
        await s.ask("die katze")
        await s.answered()
        assert s.conversation.newest is not None
        errors = {
            answer.name: answer.error for answer in s.conversation.newest.answers if answer.error
        }
        assert list(errors) == ["freeze"] and "no longer exists" in errors["freeze"]


@pytest.mark.slow
async def test_forty_adapters_are_listed_and_at_most_nine_stay_loaded(project: Path) -> None:
    for number in range(40):
        shutil.copytree(
            project / "artifacts/lora_adapter", project / f"artifacts/many/a{number:02d}"
        )
    async with open_models(project, 40 + COUNT) as s:
        await s.press("slash", *"many")
        assert len(s.names()) == 40
        await s.press("enter")
        for _ in range(10):
            await s.press("space", "down")
        assert "At most 9 models" in s.messages()
        await s.ask("die katze")
        await s.answered()
        s.screen._choose([])
        assert s.table.point(project / "artifacts/many/a20")
        await s.ask("die katze")
        await s.answered()
        assert len(s.engine.done("load")) == 10
        models, first = s.app.models, Path(s.engine.done("load")[0]["name"])
        assert models is not None and len(models._loaded) == 9 and first not in models._loaded


async def test_the_status_bar_has_device_and_absolute_memory(brief: Path) -> None:
    async with open_models(brief) as s:
        bar = s.screen.query_one(EngineBar)
        await s.ask("die katze")
        await s.answered()
        await until(
            s.pilot, lambda: "cpu · 1.00 GiB of 8.00 GiB · 1 model · a machine" in str(bar.render())
        )
        s.engine.life = 0
        await until(s.pilot, lambda: bar.state == "died")


@pytest.mark.slow
async def test_escape_leaves_the_field_then_the_prompt_and_a_wide_screen_shows_both(
    brief: Path,
) -> None:
    async with open_models(brief) as s:
        await s.press("enter")
        assert s.screen.query_one(PromptInput).has_focus and not s.table.region
        await s.press("escape")
        assert s.screen.prompt_pane.answers.has_focus
        await s.press("escape")
        assert s.table.has_focus and s.table.region
        await s.pilot.resize_terminal(120, 40)
        await s.press("enter")
        await until(s.pilot, lambda: s.table.region and s.screen.query_one(PromptInput).has_focus)
        await s.press("escape")
        assert s.table.has_focus


async def test_leaving_asks_if_a_conversation_would_be_lost(brief: Path) -> None:
    async with open_models(brief) as s:
        for prompt in ("eins", "zwei"):
            await s.ask(prompt)
            await s.answered()
        assert s.screen.unsaved() == "2 prompts and their answers"


@pytest.mark.slow
async def test_switching_screens_keeps_the_conversation_and_the_engine(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "2", "f5" if list(SCREENS).index("models") == 3 else "f6")
        assert len(s.conversation.exchanges) == 1
        assert s.app.inference is s.engine
        assert s.table.row_count
    assert not s.engine.running  # quitting stopped it


@pytest.mark.slow
async def test_quitting_in_the_middle_of_an_answer_is_no_error(brief: Path) -> None:
    async with open_models(brief, held=True) as s:
        await s.press("p")
        await s.ask("die katze")
        await until(
            s.pilot, lambda: bool(s.conversation.newest and s.conversation.newest.answers[0].text)
        )
        s.app.exit()
        await s.pilot.pause()
        assert s.app.return_code == 0
    assert not s.engine.running


@pytest.mark.slow
async def test_adapters_of_a_sweep_are_prompted_and_compared_beside_others(brief: Path) -> None:
    async with open_models(brief, size=(120, 40)) as s:
        await s.press("slash", *"sweep/")
        assert s.names() == ["sweep/rank-1", "sweep/rank-2"]
        await s.press("enter", "space", "down", "space")
        await s.press("escape")
        await s.point("lora")
        await s.press("space")
        await s.ask("die katze")
        await s.answered()
        assert s.text(TopK).splitlines()[0].split() == [
            "next",
            "■",
            "lora",
            "★",
            "sweep/rank-1",
            "★",
            "sweep/rank-2",
        ]
        asked = [(load["base"], load["adapter"]) for load in s.engine.done("load")]
        folder = brief / "artifacts"
        adapters = ("lora_adapter", "sweep/rank-1", "sweep/rank-2")
        assert asked == [(folder / "expanded", folder / adapter) for adapter in adapters]

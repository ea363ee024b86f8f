"""The screen of models: prompts, answers, strength, and faults, with a fake engine."""

import errno
import shutil
from pathlib import Path

import pytest

from pipeline.inference.talk import State
from pipeline.views.models import trusts_remote_code
from tests.helpers.fake_engine import DEATH
from tests.helpers.models_screen import COUNT, USUAL, open_models
from tests.helpers.pilot import screen_opens, until
from tests.helpers.projects import save
from tui.dialogs import AskText
from tui.registry import SCREENS
from tui.screens.conversation.sampling import SamplingDialog


async def test_side_by_side_differences_are_signed_and_count_from_the_first(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("p")
        await s.ask("die katze")
        await s.answered()

        head, *rows = s.top_k()
        assert head.split() == ["next", *USUAL]
        tisch, sofa = (
            next(row for row in rows if row.startswith(name)) for name in ("tisch", "sofa")
        )
        assert "50.0" in tisch and "75.0 +25.0" in tisch
        assert tisch.count("=") == len(USUAL) - 2
        assert sofa.count("−25.0") == 1
        assert {answer.text for answer in s.answers} == {" tisch und stuhl"}


async def test_one_model_has_bars_and_percent(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("die katze")
        await s.answered()
        line = s.top_k()[1]
        assert "50.0" in line
        assert line.count("█") == 4


@pytest.mark.slow
async def test_strength_moves_by_key_and_asks_again_with_the_newest_value_only(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.point("lora")
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "escape")  # in the field, letters are letters
        s.screen.session.strength = 0.2
        await s.press(*["left_square_bracket"] * 6)
        await until(s.pilot, lambda: "50.0" in s.top_k()[1])
        assert s.screen.session.strength == 0
        asked = s.engine.done("top_k")
        assert list(asked[-1]["strength"].values()) == [0.0]
        assert len(asked) <= 8
        s.screen.session.strength = 1.9
        await s.press(*["right_square_bracket"] * 4)
        await until(s.pilot, lambda: "lora ×2.00" in s.top_k()[0])
        # the answer itself is not changed
        assert s.answers[0].title == "lora"
        assert "at ×1.00; Ctrl+R asks again" in s.completions()
        await s.press("ctrl+r")
        await s.answered()
        assert s.answers[0].title == "lora ×2.00"
        assert "Ctrl+R" not in s.completions()


async def test_strength_is_for_adapters_that_change_weights(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("right_square_bracket")
        assert "None of these models is such an adapter" in s.messages()
        await s.point("prefix")
        await s.press("right_square_bracket")
        assert s.messages().count("None of these models is such an adapter") == 2


@pytest.mark.slow
async def test_interrupt_stops_at_once_and_keeps_what_came(brief: Path) -> None:
    async with open_models(brief, held=True) as s:
        await s.press("p")
        await s.ask("die katze")
        await until(s.pilot, lambda: s.answers and s.answers[0].text == " tisch")
        await s.press("escape")
        await s.answered()
        assert [answer.state for answer in s.answers] == [State.INTERRUPTED] * len(USUAL)
        assert (s.answers[0].text, s.engine.cancelled) == (" tisch", 1)
        s.engine.go_on.set()
        await s.ask("der wind")
        await s.answered()
        assert s.answers[5].text == " tisch und stuhl"


@pytest.mark.slow
async def test_an_engine_that_dies_is_reported_and_the_next_prompt_loads_again(brief: Path) -> None:
    async with open_models(brief) as s:
        s.engine.dies = True
        await s.press("p")
        await s.ask("die katze")
        await s.answered()
        assert (DEATH in s.messages(), s.screen.engine_line.state) == (True, "died")
        assert [answer.error for answer in s.answers] == ["the engine ended"] * len(USUAL)
        await s.ask("die katze")
        await s.answered()
        assert len(s.engine.done("load")) == 2 * len(USUAL)
        assert s.screen.engine_line.state == "ready"
        assert len(s.screen.talk.turns) == 2


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
        errors = {answer.label: answer.error for answer in s.answers}
        assert "was changed after the artifact was made" in errors["full"]


async def test_a_word_that_no_model_knows_is_reported_of_each(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("p")
        await s.ask("wortlos")
        await s.answered()
        assert s.completions().count("it does not know: wortlos") == len(USUAL)
        assert not s.top_k(), "no table of models without an answer"
        assert s.engine.done("generate") == []


async def test_the_engine_starts_before_the_first_prompt_and_says_so(brief: Path) -> None:
    async with open_models(brief, starts_held=True) as s:
        await until(s.pilot, lambda: "engine starting · importing libraries" in s.engine_line())
        s.engine.starts.set()
        await until(s.pilot, lambda: s.screen.engine_line.state == "ready")
        assert "starting" not in s.engine_line()
        assert s.engine.running, "before the first prompt"


async def test_an_empty_prompt_asks_nothing(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("  ")
        assert "The message is empty" in s.messages()
        assert not s.engine.done("load")


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
        await s.press("ctrl+l")
        form = (await screen_opens(s.pilot, SamplingDialog)).form
        form.put("top_p", "2")
        await s.press("enter")
        shown = " ".join(" ".join(form.lines()).split())
        assert "top-p must be above 0 up to 1 (1 cuts nothing), got '2.0'." in shown
        for key, text in {"top_p": "0.9", "temperature": "0.7", "k": "3"}.items():
            form.put(key, text)
        await s.press("ctrl+s")
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
async def test_the_chat_template_is_for_all_of_the_models_or_none(brief: Path) -> None:
    async with open_models(brief) as s:
        s.engine.chat = True
        await s.ask("die katze")
        await s.answered()
        s.screen.session.template = True
        await s.ask("die katze")
        await s.answered()
        assert [fields["chat"] for fields in s.engine.done("generate")] == [False, True]
        s.engine.chat = False
        s.engine.life += 1  # another process: it is loaded anew, and has no template now
        await s.ask("die katze")
        await s.answered()
        assert "prompted without it" in s.messages()
        assert s.engine.done("generate")[-1]["chat"] is False


@pytest.mark.slow
async def test_a_slow_load_is_shown_and_keys_come_through_meanwhile(brief: Path) -> None:
    async with open_models(brief, loads_held=True) as s:
        await s.press("space", "down", "space")
        await s.ask("die katze")
        await until(s.pilot, lambda: "◌ loading" in s.completions())
        await until(s.pilot, lambda: "engine busy" in s.engine_line())
        assert "Esc interrupts" in s.engine_line()
        s.screen.action_browse()
        await s.press("down", "up", "greater_than_sign")
        s.screen.action_prompt()
        s.screen.field.fill("typed meanwhile")
        await s.pilot.pause()
        assert s.screen.field.text == "typed meanwhile"
        assert "◌ loading" in s.completions()
        assert len(s.engine.done("load")) == 1
        s.engine.loads.release()
        await until(s.pilot, lambda: len(s.engine.done("load")) == 2)
        # the first waits for the second
        await until(s.pilot, lambda: s.completions().count("loading") == 1)
        s.engine.loads.release()
        await until(s.pilot, lambda: s.screen.engine_line.state == "ready")
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
        await until(s.pilot, lambda: "◌ loading" in s.completions())
        await s.press("escape")
        await until(s.pilot, lambda: not s.is_generating())
        assert "interrupted" in s.completions() and "loading" not in s.completions()


async def test_copy_takes_the_last_answer(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.press("y")
        assert "nothing to copy" in s.messages()
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "escape", "y")
        assert s.app.clipboard == "tisch und stuhl"


async def test_a_full_disk_on_save_is_one_message_and_leaves_nothing(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async with open_models(project) as s:
        await s.ask("eins")
        await s.answered()
        await s.press("ctrl+s")
        await screen_opens(s.pilot, AskText)
        monkeypatch.setattr("os.fsync", full)
        messages = len(s.app.message_history)
        await s.press("enter")
        await until(s.pilot, lambda: len(s.app.message_history) == messages + 1)
        assert "No space left on device" in s.messages() and "chat.md" in s.messages()
        assert not list(project.glob("*chat.md*"))


async def test_a_model_deleted_between_selecting_and_asking_says_so_in_its_column(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_models(project) as s:
        await s.press("p")
        monkeypatch.setattr(s.screen, "files_changed", lambda: None)  # else it is deselected
        shutil.rmtree(project / "artifacts/layer_frozen")
        await s.ask("die katze")
        await s.answered()
        errors = {answer.label: answer.error for answer in s.answers if answer.error}
        assert list(errors) == ["freeze"] and "no longer exists" in errors["freeze"]


@pytest.mark.slow
async def test_forty_adapters_are_listed_and_at_most_nine_stay_loaded(project: Path) -> None:
    for number in range(40):
        shutil.copytree(
            project / "artifacts/lora_adapter", project / f"artifacts/many/a{number:02d}"
        )
    async with open_models(project, 40 + COUNT) as s:
        await s.press("slash", *"many")
        assert len(s.names()) == 41
        await s.press("enter", "home", "down")
        for _ in range(10):
            await s.press("space", "down")
        assert "At most 9 models" in s.messages()
        await s.ask("die katze")
        await s.answered()
        s.screen.choose([])
        assert s.table.point(project / "artifacts/many/a20")
        await until(
            s.pilot, lambda: [one.label for one in s.screen.session.entries] == ["many/a20"]
        )
        await s.ask("die katze")
        await until(s.pilot, lambda: len(s.engine.done("load")) == 10)
        await s.answered()
        models, first = s.app.models, Path(s.engine.done("load")[0]["name"])
        assert models is not None and len(models._loaded) == 9 and first not in models._loaded


async def test_the_status_bar_has_device_and_absolute_memory(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("die katze")
        await s.answered()
        await until(
            s.pilot, lambda: "cpu · 1.00 GiB of 8.00 GiB · 1 model · a machine" in s.engine_line()
        )
        s.engine.life = 0
        await until(s.pilot, lambda: s.screen.engine_line.state == "died")


@pytest.mark.slow
async def test_escape_leaves_the_field_then_the_prompt_and_a_wide_screen_shows_both(
    brief: Path,
) -> None:
    async with open_models(brief) as s:
        await s.press("enter")
        assert s.screen.field.has_focus and not s.table.region
        await s.press("escape")
        assert s.table.has_focus and s.table.region
        await s.pilot.resize_terminal(120, 40)
        await s.press("enter")
        await until(s.pilot, lambda: s.table.region and s.screen.field.has_focus)
        await s.press("escape")
        assert s.table.has_focus


async def test_leaving_asks_if_a_conversation_would_be_lost(brief: Path) -> None:
    async with open_models(brief) as s:
        for prompt in ("eins", "zwei"):
            await s.ask(prompt)
            await s.answered()
        assert s.screen.unsaved() == "an unsaved conversation"


@pytest.mark.slow
async def test_switching_screens_keeps_the_conversation_and_the_engine(brief: Path) -> None:
    async with open_models(brief) as s:
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "2", "f5" if list(SCREENS).index("models") == 3 else "f6")
        assert len(s.screen.talk.turns) == 1
        assert s.app.inference is s.engine
        assert s.table.rows
    assert not s.engine.running  # quitting stopped it


@pytest.mark.slow
async def test_quitting_in_the_middle_of_an_answer_is_no_error(brief: Path) -> None:
    async with open_models(brief, held=True) as s:
        await s.press("p")
        await s.ask("die katze")
        await until(s.pilot, lambda: s.answers and s.answers[0].text)
        s.app.exit()
        await s.pilot.pause()
        assert s.app.return_code == 0
    assert not s.engine.running


@pytest.mark.slow
async def test_adapters_of_a_sweep_are_prompted_and_compared_beside_others(brief: Path) -> None:
    async with open_models(brief, size=(120, 40)) as s:
        await s.press("slash", *"sweep/")
        assert s.names() == ["sweep/", "sweep/rank-1", "sweep/rank-2"]
        await s.press("enter", "home", "down", "space", "down", "space")
        await s.press("escape")
        await s.point("lora")
        await s.press("space")
        await s.ask("die katze")
        await s.answered()
        assert s.top_k()[0].split() == ["next", "lora", "sweep/rank-1", "sweep/rank-2"]
        asked = [(load["base"], load["adapter"]) for load in s.engine.done("load")]
        folder = brief / "artifacts"
        adapters = ("lora_adapter", "sweep/rank-1", "sweep/rank-2")
        assert asked == [(folder / "expanded", folder / adapter) for adapter in adapters]

"""The adapters screen: every key, action and fault, with a fake engine that answers immediately."""

import asyncio
import errno
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.events import Key
from textual.pilot import Pilot
from textual.widgets import Input

from pipeline.files import artifact, digest_cache
from pipeline.files.digest_cache import DigestStore
from pipeline.inference.catalog import check
from pipeline.project.params.load import Params
from pipeline.project.stage_graph import Project
from pipeline.workbench import GRAPH
from tests.helpers.checkpoints import sealed_copies
from tests.helpers.fake_engine import DEATH, FakeInference
from tests.helpers.pilot import until
from tests.helpers.projects import new_houses, save
from tui.app import Workbench
from tui.dialogs import PathScreen
from tui.screens.models.answers import Completions, TopK
from tui.screens.models.dialogs import AttentionView
from tui.screens.models.models import ModelDetails, ModelTable, format_details
from tui.screens.models.screen import AdaptersScreen
from tui.services.loaded_models import trusts_remote_code
from tui.services.model_library import Entry, Library
from tui.widgets.prompting import EngineBar, PromptInput, Slider
from tui.widgets.sampling import SamplingScreen

USUAL = ["base", "expanded", "scratch", "full", "freeze", "lora", "prefix", "prompt", "merged"]
MODELS = [*USUAL[:-1], "sweep/rank-1", "sweep/rank-2", "merged"]


class Session:
    """The app on its adapters screen, with helpers for tests."""

    def __init__(self, pilot: Pilot[None], engine: FakeInference | None = None) -> None:
        self.pilot, self.engine = pilot, engine or FakeInference()

    @property
    def app(self) -> Workbench:
        assert isinstance(self.pilot.app, Workbench)
        return self.pilot.app

    @property
    def screen(self) -> AdaptersScreen:
        return next(screen for screen in self.app.screen_stack if isinstance(screen, AdaptersScreen))

    @property
    def table(self) -> ModelTable:
        return self.screen.query_one(ModelTable)

    def rows(self) -> list[str]:
        return [" ".join(str(cell) for cell in self.table.get_row_at(i)) for i in range(self.table.row_count)]

    def names(self) -> list[str]:
        return [row.lstrip("● ").split()[0] for row in self.rows()]

    def messages(self) -> str:
        return "\n".join(text for _, _, text in self.app.message_history)

    def completions(self) -> str:
        return "\n".join(str(child.render()) for child in self.screen.query_one(Completions).children)

    @property
    def bar(self) -> EngineBar:
        return self.screen.query_one(EngineBar)

    def text(self, kind: type[TopK]) -> str:
        return str(self.screen.query_one(kind).render())

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def ask(self, prompt: str) -> None:
        await self.press("p")
        self.screen.query_one(PromptInput).value = prompt
        await self.press("enter")

    async def answered(self) -> None:
        await until(
            self.pilot, lambda: self.screen.conversation.newest is not None and not self.screen._is_generating()
        )

    async def checked(self, count: int) -> None:
        def all_checked() -> bool:
            entries = self.screen.entries
            return len(entries) == count and all(entry.verdict for entry in entries)

        await until(self.pilot, all_checked)

    async def point(self, name: str) -> None:
        self.table.move_cursor(row=self.names().index(name))
        await until(self.pilot, lambda: bool(self.screen.details and self.screen.details.entry.label == name))

    def details(self) -> str:
        assert self.screen.details is not None
        return str(format_details(self.screen.details))


@asynccontextmanager
async def open_adapters(
    root: Path, count: int = len(MODELS), size: tuple[int, int] = (80, 24), **engine: Any
) -> AsyncIterator[Session]:
    app = Workbench(root / "params.yaml")
    app.first_screen = "adapters"
    app.inference = fake = FakeInference(**engine)
    async with app.run_test(size=size) as pilot:
        session = Session(pilot, fake)
        await session.checked(count)
        yield session


async def test_whether_a_model_keeps_its_limits_stands_beside_its_state(project: Path) -> None:
    path = project / "artifacts/evaluation/manifest.json"
    broken = [{"variant": "lora", "limit": name, "wanted": 1, "value": 0} for name in ("answers_kept", "must_keep")]
    gate = {"passed": False, "variants": ["full", "lora"], "broken": broken}
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "gate": gate}), encoding="utf-8")
    async with open_adapters(project) as s:
        rows = dict(zip(s.names(), s.rows(), strict=True))
        assert "verified, gate failed: 2 limits" in rows["lora"]
        assert "verified, gate passed" in rows["full"]
        assert "gate" not in rows["freeze"]
        await s.point("lora")
        assert "verified, gate failed: 2 limits" in s.details()


async def test_an_empty_project_says_what_to_do(empty: Path) -> None:
    async with open_adapters(empty, 0) as s:
        await until(s.pilot, lambda: "no models yet: press 1 then r" in str(s.screen.nothing.render()))
        await s.press("u")
        assert "has made no model yet" in s.messages()
        await s.ask("die katze")
        assert "No model is selected" in s.messages()


async def test_all_models_are_listed_in_the_order_of_the_pipeline(brief: Path) -> None:
    async with open_adapters(brief) as s:
        assert s.names() == MODELS
        assert all("✓ verified" in row for row in s.rows())


async def test_the_models_of_the_parent_project_are_listed_too(brief: Path, tmp_path: Path) -> None:
    root = new_houses(tmp_path / "houses")
    shutil.copytree(brief / "artifacts/base", root / "artifacts/base")
    async with open_adapters(root / "document", 1) as s:
        assert [entry.label for entry in s.screen.entries] == ["base"]


async def test_narrow_shows_the_important_columns_and_wide_all(brief: Path) -> None:
    async with open_adapters(brief) as s:
        assert [str(c.label).strip() for c in s.table.ordered_columns] == [
            *("", "name", "method", "rank", "loss", "forgot", "state"),
        ]
        await s.pilot.resize_terminal(120, 40)
        await until(s.pilot, lambda: len(s.table.ordered_columns) == 13)
        assert s.table.virtual_size.width <= 120
        assert s.screen.query_one(PromptInput).region.width > 60


async def test_sorting_cycles_through_columns_and_turns_around(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("s")
        assert (s.names(), str(s.table.ordered_columns[1].label).strip()) == (sorted(s.names()), "name▲")
        await s.press("S")
        assert s.names() == sorted(s.names(), reverse=True)
        await s.press("s", "s")
        ranked = ["sweep/rank-1", "sweep/rank-2", "lora"]
        assert s.names()[:3] == ranked  # those with a rank; unknown ones stay last
        await s.press("S")
        assert s.names()[:3] == ranked[::-1]
        for _ in range(4):
            await s.press("s")
        assert s.names()[0] == "base"  # the pipeline's order again


async def test_a_click_on_the_header_sorts_and_on_the_mark_selects(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.pilot.click(ModelTable, offset=(18, 0))
        await s.pilot.pause()
        assert "▲" in str(s.table.ordered_columns[2].label)
        await s.pilot.click(ModelTable, offset=(0, 2))
        await until(s.pilot, lambda: len(s.screen.selected) == 1)
        assert s.rows()[1].startswith("●")


async def test_the_filter_looks_in_all_columns_and_escape_clears_it(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("slash", *"adapter")
        names = ["lora", "prefix", "prompt", "sweep/rank-1", "sweep/rank-2"]
        assert s.names() == names  # their kind, which is not among the columns shown
        await s.press("escape")
        assert (len(s.names()), s.table.has_focus) == (len(MODELS), True)


async def test_space_selects_and_takes_away_and_u_selects_the_usual_set(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("space")
        assert s.rows()[0].startswith("●")
        await s.press("space")
        assert s.screen.selected == []
        await s.press("u")
        assert [entry.label for entry in s.screen.selected_entries()] == USUAL
        await s.press("u")
        assert s.screen.selected == []


async def test_details_show_manifest_config_and_on_demand_the_spectrum(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.point("lora")
        manifest = artifact.read_manifest(brief / "artifacts/lora_adapter")
        shown = s.details()
        assert manifest["inputs"]["artifacts/expanded"][:12] in shown
        assert manifest["versions"]["torch"] in shown
        assert "target_modules" in shown
        assert "m measures it" in shown
        await s.press("m")
        await until(s.pilot, lambda: "first 80%" in s.details())  # 2² of 2² + 1²
        assert "0.lora_adapter_q" in s.details()
        assert len(s.engine.done("spectrum")) == 1


async def test_side_by_side_differences_are_signed_and_count_from_the_first(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("u")
        await s.ask("die katze")
        await s.answered()

        def row(name: str) -> list[str]:
            """A row across all blocks, since not all models fit side by side."""
            found = [line.split() for line in s.text(TopK).splitlines() if line.startswith(name)]
            return [cell for _, *cells in found for cell in cells if "█" not in cell]

        assert row("next") == USUAL
        cells = {"base": ["50.0"], "lora": ["75.0", "+25.0"]}
        assert row("tisch") == [cell for name in USUAL for cell in cells.get(name, ["50.0", "="])]
        assert row("sofa").count("-25.0") == 1
        assert s.screen.conversation.newest is not None
        assert {answer.text for answer in s.screen.conversation.newest.answers} == {" tisch und stuhl"}


async def test_one_model_has_bars_and_percent(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.ask("die katze")
        await s.answered()
        line = s.text(TopK).splitlines()[1]
        assert "50.0" in line
        assert 24 <= line.count("█") <= 36


async def test_strength_moves_by_key_and_asks_again_with_the_newest_value_only(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.point("lora")
        await s.ask("die katze")
        await s.answered()
        slider = s.screen.query_one(Slider)
        slider.value = 0.2
        await s.press(*["left_square_bracket"] * 6)
        await until(s.pilot, lambda: "50.0" in s.text(TopK))
        assert slider.value == 0
        asked = s.engine.done("top_k")
        assert list(asked[-1]["strength"].values()) == [0.0]
        assert len(asked) <= 8
        slider.value = 1.9
        await s.press(*["right_square_bracket"] * 4)
        await until(s.pilot, lambda: "lora ×2.00" in s.text(TopK))
        assert s.screen.conversation.newest is not None
        assert s.screen.conversation.newest.answers[0].title == "lora"  # the exchange itself is not changed


async def test_the_slider_takes_the_mouse_and_is_off_without_an_adapter(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("p")
        slider = s.screen.query_one(Slider)
        assert slider.disabled
        await s.press("escape", "right_square_bracket")
        assert "Select an adapter" in s.messages()
        await s.press("escape")
        await s.point("lora")
        await s.press("p")
        await s.pilot.click(Slider, offset=(len(slider.LABEL) + 2, 0))
        assert slider.value == 0
        await s.pilot.click(Slider, offset=(len(slider.LABEL) + 1 + slider.track, 0))
        assert slider.value == 2
        await s.press("home", "right")
        assert slider.value == 0.05


async def test_interrupt_stops_at_once_and_keeps_what_came(brief: Path) -> None:
    async with open_adapters(brief, held=True) as s:
        await s.press("u")
        await s.ask("die katze")
        newest = s.screen.conversation.newest
        assert newest is not None
        await until(s.pilot, lambda: newest.answers[0].text == " tisch")
        await s.press("escape")
        await s.answered()
        assert [answer.ended for answer in newest.answers] == ["interrupted"] * len(USUAL)
        assert (newest.answers[0].text, s.engine.cancelled) == (" tisch", 1)
        s.engine.go_on.set()
        await s.ask("der wind")
        await s.answered()
        assert s.screen.conversation.newest is not None
        assert s.screen.conversation.newest.answers[5].text == " tisch und stuhl"


async def test_x_interrupts_too(brief: Path) -> None:
    async with open_adapters(brief, held=True) as s:
        await s.ask("die katze")
        await until(
            s.pilot, lambda: bool(s.screen.conversation.newest and s.screen.conversation.newest.answers[0].text)
        )
        await s.press("x")
        await s.answered()
        assert s.screen.conversation.newest is not None
        assert s.screen.conversation.newest.answers[0].ended == "interrupted"


async def test_an_engine_that_dies_is_reported_and_the_next_prompt_loads_again(brief: Path) -> None:
    async with open_adapters(brief) as s:
        s.engine.dies = True
        await s.press("u")
        await s.ask("die katze")
        await s.answered()
        newest = s.screen.conversation.newest
        assert newest is not None
        assert (DEATH in s.messages(), s.screen.query_one(EngineBar).state) == (True, "died")
        assert [answer.error for answer in newest.answers] == ["the engine ended"] * len(USUAL)
        await s.ask("die katze")
        await s.answered()
        assert len(s.engine.done("load")) == 2 * len(USUAL)
        assert s.screen.query_one(EngineBar).state == "ready"
        assert len(s.screen.conversation.exchanges) == 2


async def test_models_stay_loaded_while_their_files_stay(project: Path) -> None:
    async with open_adapters(project) as s:
        await s.press("u")
        for _ in range(2):
            await s.ask("die katze")
            await s.answered()
        assert len(s.engine.done("load")) == len(USUAL)
        base = project / "artifacts/full_finetuned/config.json"
        base.write_text(base.read_text(encoding="utf-8") + "\n", encoding="utf-8")
        await s.ask("die katze")
        await s.answered()
        assert s.screen.conversation.newest is not None
        errors = {answer.name: answer.error for answer in s.screen.conversation.newest.answers}
        assert "was changed after the artifact was made" in errors["full"]


async def test_a_word_that_models_do_not_know_is_reported_in_each_column(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("u")
        await s.ask("wortlos")
        await s.answered()
        assert s.screen.conversation.newest is not None
        assert [answer.error for answer in s.screen.conversation.newest.answers] == [
            "it does not know: wortlos."
        ] * len(USUAL)
        assert s.engine.done("generate") == []


async def test_an_empty_prompt_asks_nothing(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.ask("  ")
        assert "The prompt is empty" in s.messages()
        assert s.engine.requests == []


async def test_up_and_down_bring_earlier_prompts_back_and_they_are_remembered(brief: Path) -> None:
    async with open_adapters(brief) as s:
        for prompt in ("eins", "zwei"):
            await s.ask(prompt)
            await s.answered()
        await s.press("p")
        field = s.screen.query_one(PromptInput)
        field.value = "neu"
        seen = []
        for key in ("up", "up", "up", "down", "down"):
            await s.press(key)
            seen.append(field.value)
        assert seen == ["zwei", "eins", "eins", "zwei", "neu"]
    async with open_adapters(brief) as s:
        assert s.screen.query_one(PromptInput).history == ["eins", "zwei"]


async def test_at_most_200_prompts_are_remembered(brief: Path) -> None:
    async with open_adapters(brief) as s:
        s.app.state.prompts = [str(number) for number in range(200)]
        await s.ask("neu")
        assert (len(s.app.state.prompts), s.app.state.prompts[0], s.app.state.prompts[-1]) == (200, "1", "neu")


async def test_sampling_is_validated_and_used(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("p", "escape", "t")
        await until(s.pilot, lambda: isinstance(s.app.screen, SamplingScreen))
        top_p = s.app.screen.query_one("#top_p", Input)
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
        assert (fields["temperature"], fields["top_p"], s.engine.done("top_k")[0]["k"]) == (0.7, 0.9, 3)


async def test_the_chat_template_is_only_for_models_that_have_one(brief: Path) -> None:
    async with open_adapters(brief) as s:
        s.engine.chat = True
        await s.ask("die katze")
        await s.answered()
        await s.press("t")
        await until(s.pilot, lambda: isinstance(s.app.screen, SamplingScreen))
        box = s.app.screen.query_one("ClearCheckbox")
        assert not box.disabled
        box.focus()
        await s.press("space", "shift+tab", "enter")
        await s.ask("die katze")
        await s.answered()
        assert [fields["chat"] for fields in s.engine.done("generate")] == [False, True]


async def test_the_answer_in_a_chat_is_a_turn_of_its_own(brief: Path) -> None:
    async with open_adapters(brief) as s:
        s.engine.chat = s.screen.conversation.chat = True
        await s.ask("die katze")
        await s.answered()
        exchange = s.screen.conversation.newest
        assert exchange is not None and exchange.chat
        assert exchange.answers_text() == "die katze → tisch und stuhl"
        assert "die katze → tisch und stuhl" in s.completions()
        await s.press("a")
        await until(s.pilot, lambda: s.engine.done("attention"))
        assert s.engine.done("attention")[0]["chat"] is True
        await s.press("escape")
        s.engine.chat = False
        s.engine.life += 1  # another process: it is loaded anew, and has no template now
        await s.ask("die katze")
        await s.answered()
        assert "prompted without it" in s.messages()
        assert (
            s.screen.conversation.newest is not None
            and s.screen.conversation.newest.answers_text() == "die katze tisch und stuhl"
        )


async def test_a_slow_load_is_shown_and_keys_come_through_meanwhile(brief: Path) -> None:
    async with open_adapters(brief, loads_held=True) as s:
        await s.press("space", "down", "space")
        await s.ask("die katze")
        await until(s.pilot, lambda: "… loading" in s.completions())
        assert s.bar.state == "loading" and "x interrupts" in str(s.bar.render())
        await s.press("b", "down", "up", "s", "p")
        s.screen.query_one(PromptInput).value = "typed meanwhile"
        await s.pilot.pause()
        assert s.screen.query_one(PromptInput).value == "typed meanwhile" and "… loading" in s.completions()
        assert len(s.engine.done("load")) == 1
        s.engine.loads.release()
        await until(s.pilot, lambda: len(s.engine.done("load")) == 2)
        await until(s.pilot, lambda: s.completions().count("loading") == 1)  # the first waits for the second
        s.engine.loads.release()
        await until(s.pilot, lambda: s.bar.state == "ready")
        assert s.completions().count("tisch und stuhl") == 2 and "loading" not in s.completions()
        await s.ask("noch einmal")
        await s.answered()
        assert len(s.engine.done("load")) == 2


@pytest.mark.parametrize("trusted", [False, True])
async def test_code_of_the_projects_own_models_runs_where_params_trust_it(project: Path, trusted: bool) -> None:
    params = project / "params.yaml"
    save(params, {"import.trust_remote_code": trusted})
    async with open_adapters(project) as s:
        await s.ask("die katze")
        await s.answered()
        assert s.engine.done("load")[0]["trust_remote_code"] is trusted
    assert trusts_remote_code(params, project / "artifacts/expanded") is trusted
    assert not trusts_remote_code(params, project / "elsewhere/base")
    params.write_text("[", encoding="utf-8")
    assert not trusts_remote_code(params, project / "artifacts/expanded")


async def test_a_slow_load_is_interrupted(brief: Path) -> None:
    async with open_adapters(brief, loads_held=True) as s:
        await s.ask("die katze")
        await until(s.pilot, lambda: "… loading" in s.completions())
        await s.press("escape")
        await until(s.pilot, lambda: not s.screen._is_generating())
        assert "interrupted" in s.completions() and "loading" not in s.completions()


async def test_attention_walks_heads_layers_and_tokens(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("p", "escape", "a")
        assert "Enter one first" in s.messages()
        await s.ask("die katze")
        await s.answered()
        await s.press("a")

        def shown() -> str:
            return str(s.app.screen.query_one(AttentionView).render())

        await until(s.pilot, lambda: "sitzt00 attends to: die 0.50 · katze 0.30 · sitzt00 0.20" in shown())
        await s.press("right", "down")
        await until(s.pilot, lambda: "sitzt11 attends to" in shown())
        await s.press("shift+tab")
        assert "katze attends to: katze 0.75 · die 0.25" in shown()
        await s.press("escape")
        assert s.app.screen is s.screen


async def test_copy_takes_the_last_answer(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.press("p", "escape", "y")
        assert "no answer to copy" in s.messages()
        await s.ask("die katze")
        await s.answered()
        await s.press("y")
        assert s.app.clipboard == "die katze tisch und stuhl"


async def test_a_transcript_has_every_exchange(project: Path) -> None:
    async with open_adapters(project) as s:
        for prompt in ("eins", "zwei"):
            await s.ask(prompt)
            await s.answered()

        async def transcript(name: str) -> str:
            await s.press("w")
            await until(s.pilot, lambda: isinstance(s.app.screen, PathScreen))
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

    async with open_adapters(project) as s:
        await s.ask("eins")
        await s.answered()
        await s.press("w")
        await until(s.pilot, lambda: isinstance(s.app.screen, PathScreen))
        monkeypatch.setattr("os.fsync", full)
        messages = len(s.app.message_history)
        await s.press("enter")
        await until(s.pilot, lambda: len(s.app.message_history) == messages + 1)
        assert "No space left on device" in s.messages() and "transcript.md" in s.messages()
        assert not list(project.glob("*transcript*"))


async def test_a_model_deleted_while_selected_is_deselected_with_a_message(project: Path) -> None:
    async with open_adapters(project) as s:
        await s.point("lora")
        await s.press("space")
        shutil.rmtree(project / "artifacts/lora_adapter")
        await until(s.pilot, lambda: "lora is gone, and no longer selected" in s.messages())
        assert (s.screen.selected, len(s.names())) == ([], len(MODELS) - 1)
        await until(s.pilot, lambda: s.screen.details is not None and s.screen.details.entry.label != "lora")


async def test_a_model_deleted_between_selecting_and_asking_says_so_in_its_column(project: Path) -> None:
    async with open_adapters(project) as s:
        await s.press("u")
        s.screen._watcher.pause()
        looks = [worker for worker in s.app.workers if worker.group == "watch"]
        await until(s.pilot, lambda: all(look.is_finished for look in looks))  # one that sees it gone deselects it
        shutil.rmtree(project / "artifacts/layer_frozen")
        await s.ask("die katze")
        await s.answered()
        assert s.screen.conversation.newest is not None
        errors = {answer.name: answer.error for answer in s.screen.conversation.newest.answers if answer.error}
        assert list(errors) == ["freeze"] and "no longer exists" in errors["freeze"]


async def test_a_refused_adapter_says_why_in_full_and_is_never_asked(project: Path) -> None:
    path = project / "artifacts/lora_adapter/adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"r": 4', '"r": 8'), encoding="utf-8")
    async with open_adapters(project) as s:
        await s.point("lora")
        reason = "r was edited: it is 8, but the adapter was trained with 4"
        assert "✗ refused" in s.rows()[s.names().index("lora")]
        assert reason in s.details()
        await s.ask("die katze")
        await s.answered()
        assert s.screen.conversation.newest is not None
        assert reason in s.screen.conversation.newest.answers[0].error
        assert s.engine.done("load") == []


async def test_v_checks_again_and_new_models_appear_by_themselves(project: Path) -> None:
    async with open_adapters(project) as s:
        shutil.copytree(project / "artifacts/lora_adapter", project / "artifacts/second")
        await s.checked(len(MODELS) + 1)
        assert "second" in s.names()
        await s.press("v")
        await s.checked(len(MODELS) + 1)
        assert "checked again" in s.messages()


async def test_forty_adapters_are_listed_and_at_most_nine_stay_loaded(project: Path) -> None:
    for number in range(40):
        shutil.copytree(project / "artifacts/lora_adapter", project / f"artifacts/many/a{number:02d}")
    async with open_adapters(project, 40 + len(MODELS)) as s:
        await s.press("slash", *"many")
        assert len(s.names()) == 40
        await s.press("enter")
        for _ in range(10):
            await s.press("space", "down")
        assert "At most 9 models" in s.messages()
        await s.ask("die katze")
        await s.answered()
        await s.press("escape")
        s.screen.selected = s.screen.selected[:1]
        s.table.move_cursor(row=20)
        s.screen.selected = []
        await s.ask("die katze")
        await s.answered()
        assert (len(s.engine.done("load")), len(s.engine.done("unload"))) == (10, 1)


async def test_a_folder_is_added_remembered_and_taken_away(project: Path, tmp_path: Path) -> None:
    other = tmp_path / "others"
    shutil.copytree(project / "artifacts/base", other / "mine")

    async def name(s: Session, folder: Path) -> None:
        await s.press("o")
        await until(s.pilot, lambda: isinstance(s.app.screen, PathScreen))
        s.app.screen.query_one(Input).value = str(folder)
        await s.press("enter")

    async with open_adapters(project) as s:
        await name(s, tmp_path / "nowhere")
        await until(s.pilot, lambda: "nowhere is not a folder" in s.messages())
        await name(s, other)
        await s.checked(len(MODELS) + 1)
        assert "others/mine" in s.names()
    async with open_adapters(project, len(MODELS) + 1) as s:
        await name(s, other)
        await s.checked(len(MODELS))


async def test_a_saved_folder_that_is_gone_is_reported(project: Path) -> None:
    app = Workbench(project / "params.yaml")
    app.state.folders = [str(project / "gone")]
    app.remember()
    async with open_adapters(project) as s:
        assert "gone is not a folder" in s.messages()


async def test_the_status_bar_has_device_and_absolute_memory(brief: Path) -> None:
    async with open_adapters(brief) as s:
        bar = s.screen.query_one(EngineBar)
        assert "engine not started" in str(bar.render())
        await s.ask("die katze")
        await s.answered()
        await until(s.pilot, lambda: "cpu · 1.00 GiB of 8.00 GiB · 1 model · a machine" in str(bar.render()))
        s.engine.life = 0
        await until(s.pilot, lambda: bar.state == "died")


async def test_keys_of_a_view_that_is_not_shown_do_nothing(brief: Path) -> None:
    async with open_adapters(brief) as s:
        assert "adapters.copy" not in {a.binding.id for a in s.screen.active_bindings.values()}
        await s.press("p", "escape")
        shown = {a.binding.id for a in s.screen.active_bindings.values()}
        assert ("adapters.copy" in shown, "adapters.sort" in shown) == (True, False)
        await s.press("b")
        assert s.table.has_focus


async def test_switching_screens_keeps_the_conversation_and_the_engine(brief: Path) -> None:
    async with open_adapters(brief) as s:
        await s.ask("die katze")
        await s.answered()
        await s.press("escape", "2", "4")
        assert len(s.screen.conversation.exchanges) == 1
        assert s.app.inference is s.engine
        assert s.screen.query_one(ModelDetails)
    assert not s.engine.running  # quitting stopped it


async def test_quitting_in_the_middle_of_an_answer_is_no_error(brief: Path) -> None:
    async with open_adapters(brief, held=True) as s:
        await s.press("u")
        await s.ask("die katze")
        await until(
            s.pilot, lambda: bool(s.screen.conversation.newest and s.screen.conversation.newest.answers[0].text)
        )
        await s.press("q")
        assert s.app.return_code == 0
    assert not s.engine.running


async def test_adapters_of_a_sweep_are_prompted_and_compared_beside_others(brief: Path) -> None:
    async with open_adapters(brief, size=(120, 40)) as s:
        await s.press("slash", *"sweep/")
        assert s.names() == ["sweep/rank-1", "sweep/rank-2"]
        await s.press("enter", "space", "down", "space")
        await s.press("escape")
        await s.point("lora")
        await s.press("space")
        await s.ask("die katze")
        await s.answered()
        assert s.text(TopK).splitlines()[0].split() == ["next", "lora", "sweep/rank-1", "sweep/rank-2"]
        asked = [(load["base"], load["adapter"]) for load in s.engine.done("load")]
        folder = brief / "artifacts"
        adapters = ("lora_adapter", "sweep/rank-1", "sweep/rank-2")
        assert asked == [(folder / "expanded", folder / adapter) for adapter in adapters]


async def test_verdicts_redraw_cells_and_what_is_typed_meanwhile_comes_through(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys arrive from a thread, as from a terminal: a screen that is busy drawing gets them too late."""
    tables: list[int] = []
    clear = ModelTable.clear

    def count(self: ModelTable, columns: bool = False) -> ModelTable:
        tables.append(self.row_count)
        return clear(self, columns)

    def slow(*arguments: Any) -> Any:
        time.sleep(0.005)  # as of a larger adapter: else all verdicts may be there before the first key
        return check(*arguments)

    monkeypatch.setattr(ModelTable, "clear", count)
    monkeypatch.setattr("tui.services.model_library.check", slow)
    models = 1 + len(sealed_copies(empty, 300))
    app = Workbench(empty / "params.yaml")
    async with app.run_test(size=(120, 40)) as pilot:
        app.inference = FakeInference()
        s, loop = Session(pilot), asyncio.get_running_loop()
        await pilot.press("4")
        while not (isinstance(app.screen, AdaptersScreen) and s.table.row_count):
            await asyncio.sleep(0.01)
        assert not all(entry.verdict for entry in s.screen.entries)

        def type_() -> None:
            for key in ["p", *"die katze"]:
                loop.call_soon_threadsafe(app.post_message, Key("space" if key == " " else key, key))
                time.sleep(0.4 if key == "p" else 0.05)

        await asyncio.to_thread(type_)
        await s.checked(models)
        await until(pilot, lambda: s.screen.query_one(PromptInput).value)
        assert s.screen.query_one(PromptInput).value == "die katze"
        assert sum("✓ verified" in row for row in s.rows()) == models - 1, "all adapters; the base has no manifest"
        assert len(tables) <= 5


async def test_digests_of_an_earlier_start_are_shown_and_never_loaded_by(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is hashed at its first prompt, whatever verdict the list shows."""
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    full = project / "artifacts/full_finetuned"
    sealed = artifact.contents(full)
    weights = bytearray((full / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (full / "model.safetensors").write_bytes(weights)
    with monkeypatch.context() as forged:
        forged.setattr(artifact, "contents", lambda _: sealed)
        store = DigestStore()
        store.contents(full)
        store.save()
    async with open_adapters(project) as s:
        assert "✓ verified" in s.rows()[s.names().index("full")]
        await s.point("full")
        await s.ask("die katze")
        await s.answered()
        assert "model.safetensors was changed" in s.completions()
        assert not s.engine.done("load")
        await s.press("b", "v")
        await until(s.pilot, lambda: "✗ refused" in s.rows()[s.names().index("full")])


def test_the_next_start_hashes_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_cache, "SETTLED", -1)
    sealed_copies(tmp_path, 3)

    def start() -> list[Entry]:
        library = Library(Project(tmp_path, Params(GRAPH.sections), GRAPH))
        return list(library.check_all(library.scan()))

    first = start()
    assert [entry.verdict and entry.verdict.state for entry in first] == ["verified"] * 3 + ["no manifest"]

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is hashed again")

    monkeypatch.setattr(artifact, "file_digest", refuse)
    monkeypatch.setattr(digest_cache, "base_fingerprint", refuse)
    assert start() == first

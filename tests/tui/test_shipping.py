"""An adapter is exported from where it is shown."""

from pathlib import Path

import pytest

from pipeline.errors import UserError
from tests.helpers.json_files import edit_json, read_json
from tests.helpers.pilot import screen_opens, until
from tui.app import Workbench
from tui.dialogs import AskText
from tui.panes.menu import Menu
from tui.screens.models.screen import ModelsScreen
from tui.services.lora_command import LoraCommand
from tui.shipping import ship


async def test_an_adapter_is_shipped_with_three_answers(project: Path) -> None:
    app = Workbench(project / "params.yaml")
    app.first_screen = "models"
    async with app.run_test(size=(120, 40)) as pilot:
        await until(
            pilot, lambda: isinstance(app.screen, ModelsScreen) and app.screen.table.entries
        )
        screen = app.screen
        assert isinstance(screen, ModelsScreen)
        screen.open_with(select="artifacts/lora_adapter")
        await until(pilot, lambda: [e.label for e in screen.table.chosen_entries()] == ["lora"])
        await pilot.press("x")
        await screen_opens(pilot, Menu)
        await pilot.press("enter")  # peft, the first
        await screen_opens(pilot, AskText)
        await pilot.press("enter")  # the folder that is offered
        out = project / "shipped/lora-peft"
        await until(
            pilot, lambda: app.message_history[-1].text.startswith("lora is in shipped/lora-peft.")
        )
        assert read_json(out / "adapter_config.json")["peft_type"] == "LORA"
        screen.open_with(select="artifacts/base")
        await until(pilot, lambda: [e.label for e in screen.table.chosen_entries()] == ["base"])
        await pilot.press("x")
        await until(pilot, lambda: "Only adapters are exported" in app.message_history[-1].text)


@pytest.mark.slow
async def test_limits_that_it_breaks_are_named_before_it_is_shipped_and_after(
    project: Path,
) -> None:
    path = project / "artifacts/evaluation/manifest.json"
    broken = [{"variant": "lora", "limit": "answers_kept", "wanted": 1, "value": 0.5}]
    gate = {"passed": False, "variants": ["lora"], "broken": broken}
    edit_json(path, gate=gate)
    app = Workbench(project / "params.yaml")
    async with app.run_test(size=(120, 40)) as pilot:
        app.run_worker(ship(app, "lora", project / "artifacts/lora_adapter"))
        await screen_opens(pilot, Menu)
        assert app.screen.query_one(".dialog").border_title == "✗ lora breaks 1 limit. Ship lora as"
        await pilot.press("enter")
        await screen_opens(pilot, AskText)
        await pilot.press("enter")
        await until(
            pilot,
            lambda: app.message_history[-1].text.startswith("lora is in shipped/lora-peft."),
            120,
        )
        assert (
            "lora_adapter breaks evaluate.limits: answers_kept 0.5, wanted at least "
            "1." in app.message_history[-1].text
        )


@pytest.mark.slow
async def test_an_export_that_fails_is_one_message(project: Path) -> None:
    (project / "taken").mkdir()
    (project / "taken/file").touch()
    with pytest.raises(UserError, match="taken") as raised:
        await LoraCommand(project).run(
            "export", "artifacts/lora_adapter", "--format", "peft", "--out", "taken"
        )
    assert "Traceback" not in str(raised.value)

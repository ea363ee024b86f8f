"""Snapshots of the screen of models: empty, with models, and with answers side by side."""

import json
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from textual.pilot import Pilot

from pipeline.files import artifact
from pipeline.files.base_model import base_fingerprint
from tests.helpers.fake_engine import FakeInference
from tests.helpers.pilot import screen_opens, until
from tui.app import Workbench
from tui.screens.models.screen import ModelsScreen

pytestmark = pytest.mark.usefixtures("no_path")
SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
Snap = Callable[..., bool]
MADE_AT = 1_790_000_000  # seconds since the epoch


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Snapshots do not depend on the time zone."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def write_artifact(
    folder: Path, method: str, kind: str, files: dict[str, str], **facts: object
) -> Path:
    """Write an artifact of fixed bytes: a weight of four numbers, a run of one step."""
    folder.mkdir(parents=True)
    name = "adapter_model.safetensors" if kind == "adapter" else "model.safetensors"
    header = json.dumps(
        {"weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    ).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    loss = "step,epoch,loss,learning_rate,grad_norm,tokens\n1,1,0.25,0.001,1.0,64\n"
    for file, text in {"tokenizer.json": "{}", "loss.csv": loss, **files}.items():
        (folder / file).write_text(text, encoding="utf-8")
    artifact.seal(folder, {"kind": kind, "method": method, "commit": "0123456789abcdef", **facts})
    os.utime(folder / artifact.MANIFEST, (MADE_AT, MADE_AT))
    return folder


@pytest.fixture
def fixed(empty: Path) -> Path:
    """A project with four models, the last of them an adapter whose rank was edited."""
    folder, config = empty / "artifacts", {"config.json": "{}"}
    write_artifact(
        folder / "base",
        "pretrain",
        "checkpoint",
        config,
        parameters={"total": 109_568, "trainable": 109_568},
    )
    expanded = write_artifact(
        folder / "expanded", "expand_vocab", "checkpoint", config, parameters={"total": 112_768}
    )
    write_artifact(
        folder / "full_finetuned", "full", "checkpoint", config, parameters={"total": 112_768}
    )
    for name, rank in (("lora_adapter", 4), ("edited", 8)):
        text = json.dumps(
            {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": 1.0,
                "target_modules": ["q_proj", "v_proj"],
                "base_model_name_or_path": "artifacts/expanded",
            }
        )
        params = {"rank": 4, "alpha": 1.0}
        bound = base_fingerprint(expanded)
        write_artifact(
            folder / name,
            "lora",
            "adapter",
            {"adapter_config.json": text},
            params=params,
            base=bound,
        )
    return empty


def workbench(root: Path) -> Workbench:
    app = Workbench(root / "params.yaml")
    app.first_screen, app.inference = "models", FakeInference()
    return app


async def wait_until_checked(pilot: Pilot[None], count: int) -> ModelsScreen:
    screen = await screen_opens(pilot, ModelsScreen)
    await until(
        pilot,
        lambda: (
            len(screen.table.entries) == count
            and all(entry.verdict for entry in screen.table.entries)
        ),
    )
    await until(pilot, lambda: "looking" not in str(screen.table.nothing))
    await until(pilot, lambda: not count or screen.engine_line.facts)
    watch = screen.workbench.project_watch
    await until(pilot, lambda: watch.project and len(watch.states) == len(watch.project.stages))
    screen.workbench.refresh_header()
    return screen


def has_answered(screen: ModelsScreen) -> bool:
    return bool(screen.talk.turns) and not screen.is_writing()


async def wait_until_drawn(pilot: Pilot[None], screen: ModelsScreen) -> None:
    """The table is drawn again in the frame after the one in which it changed."""
    await until(
        pilot, lambda: not screen.table.size.height or screen.table.render_line(1).text.strip()
    )
    await pilot.pause()


@SIZES
def test_empty(snap_compare: Snap, empty: Path, size: tuple[int, int]) -> None:
    async def before(pilot: Pilot[None]) -> None:
        await wait_until_checked(pilot, 0)

    assert snap_compare(workbench(empty), terminal_size=size, run_before=before)


@SIZES
def test_models_with_one_refused(snap_compare: Snap, fixed: Path, size: tuple[int, int]) -> None:
    async def before(pilot: Pilot[None]) -> None:
        screen = await wait_until_checked(pilot, 5)
        await pilot.press("space", "end")
        await until(
            pilot,
            lambda: (
                screen.details_pane.details is not None
                and screen.details_pane.details.entry.label == "edited"
            ),
        )
        await wait_until_drawn(pilot, screen)

    assert snap_compare(workbench(fixed), terminal_size=size, run_before=before)


@SIZES
def test_answers_side_by_side(snap_compare: Snap, fixed: Path, size: tuple[int, int]) -> None:
    async def before(pilot: Pilot[None]) -> None:
        screen = await wait_until_checked(pilot, 5)
        await pilot.press("p", "enter")
        screen.field.fill("die katze sitzt auf dem")
        await pilot.press("enter")
        await until(pilot, lambda: has_answered(screen))
        await until(pilot, lambda: "1 model" in (screen.engine_line.facts or ""))
        await wait_until_drawn(pilot, screen)

    assert snap_compare(workbench(fixed), terminal_size=size, run_before=before)

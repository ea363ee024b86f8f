"""The monitor: what it draws of readings, and the screen on this machine and on scripted ones."""

import math
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.calc.settings import CONTEXT
from pipeline.files.memory import Memory
from pipeline.project.logs.run_state import Journal
from pipeline.views.stage_logs import Prediction, read_prediction
from tests.helpers.pilot import screen_text, until
from tests.helpers.run_folders import hold, write_run, write_sweep
from tui.app import Workbench
from tui.panes.plot.plot import Plot
from tui.screens.monitor.charts import charts
from tui.screens.monitor.screen import MonitorScreen
from tui.services.machine.nvml import Gpu, GpuReading
from tui.services.machine.readings import Machine, ProcessReading, Sample

GIB = 2**30


# --- prediction ---


def test_the_prediction_is_read_from_telemetry_else_from_the_notes(tmp_path: Path) -> None:
    folder = write_run(tmp_path, "finetune_lora", steps=400)
    prediction = read_prediction(folder, None)
    assert prediction == Prediction(2034688, 2036736, 347078656, "cpu")
    assert prediction.of_process == 347078656 - 2036736 + 2034688 and prediction.on_gpu == 0
    (folder / "telemetry.csv").write_text("step,seconds\n1,", encoding="utf-8")
    notes = ["lora: 1.50 MiB of tensors predicted at the peak of the largest step"]
    assert read_prediction(folder, Journal("running", 1, 0.0, notes=notes)) == Prediction(3 * 2**19)
    assert (
        read_prediction(
            folder, Journal("running", 1, 0.0, notes=["no number of tensors predicted"])
        )
        is None
    )
    assert read_prediction(tmp_path / "nowhere", None) is None


def test_a_sweep_and_a_gpu_have_their_prediction(tmp_path: Path) -> None:
    folder = write_sweep(tmp_path, {"a": 4.0, "b": 5.0})
    assert read_prediction(folder, None) is None, "its telemetry has none"
    log = folder / "b" / "telemetry.csv"
    log.write_text(
        log.read_text(encoding="utf-8").replace(",cpu,0,", f",cuda,{GIB},"), encoding="utf-8"
    )
    prediction = read_prediction(folder, None)
    assert prediction is not None and (prediction.on_gpu, prediction.of_process) == (
        GIB + CONTEXT,
        0,
    )


def samples_of(
    now: float, count: int = 30, gpus: Sequence[GpuReading] = (), **processes: int
) -> list[Sample]:
    readings = {name: ProcessReading(0.5, size) for name, size in processes.items()}
    return [Sample(now - count + n + 1, 0.25, 6 * GIB, tuple(gpus), readings) for n in range(count)]


def test_the_predicted_level_lies_in_the_memory_that_it_is_about() -> None:
    machine = Machine()
    machine.memory, machine.cores = 24 * GIB, 8.0
    on_cpu = Prediction(2 * GIB, 2 * GIB, 3 * GIB, "cpu")
    drawn = charts(machine, samples_of(100.0, finetune_lora=GIB), "finetune_lora", on_cpu)
    assert [(chart.name, chart.level) for chart in drawn] == [
        ("cpu", 0),
        ("memory", 0),
        ("finetune_lora", 3 * GIB),
    ]
    assert drawn[1].head.value == "6.00 GiB of 24.00 GiB, 25%"
    machine.gpus = [Gpu("H100", 80 * GIB)]
    on_gpu = Prediction(10 * GIB, 0, 0, "cuda")
    samples = samples_of(100.0, gpus=[GpuReading(0.9, 12 * GIB, 61, 412.0)])
    drawn = charts(machine, samples, "", on_gpu)
    assert [(chart.name, chart.style) for chart in drawn] == [
        ("cpu", "$success"),
        ("memory", "$success"),
        ("GPU 0 H100", "$error"),
        ("  memory", "$success"),
    ]
    assert drawn[2].head.value == "90%  61 °C  412 W"
    assert drawn[3].head.value == "12.00 GiB of 80.00 GiB, 15%  ╌ 10.50 GiB predicted"
    lost = charts(machine, samples_of(100.0, gpus=[GpuReading()]), "", None)
    assert (lost[2].fact, lost[3].fact) == ("–", "– of 80.00 GiB")


# --- the screen ---


@asynccontextmanager
async def monitor(
    root: Path, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[tuple[Any, MonitorScreen]]:
    app = Workbench(root / "params.yaml")
    app.first_screen = "monitor"
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, MonitorScreen)
        yield pilot, screen


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.services.machine.readings.FIRST", 0.05)
    monkeypatch.setattr("tui.services.machine.readings.EVERY", 0.1)


def text_of(screen: MonitorScreen) -> str:
    plots = [plot.plain for plot in screen.query(Plot) if plot.display]
    title = screen.query_one("#processes").border_title
    notes = str(screen.problem.content), str(title)
    return "\n".join([*plots, *screen.processes.texts(), *notes])


async def test_this_machine_is_shown_and_no_gpu_is_one_line(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pynvml.nvmlInit", no_driver)
    async with monitor(empty) as (pilot, screen):
        await until(pilot, lambda: "cores" in text_of(screen))
        text = text_of(screen)
        assert "cpu" in text and "memory" in text and "GPU 0" not in text
        assert text.count("No NVIDIA GPU: its driver is not installed on this machine.") == 1
        await until(pilot, lambda: "lora-tui" in text_of(screen))
        assert "No stage runs. R runs the pipeline." in text_of(screen)


def no_driver() -> None:
    import pynvml

    raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)


async def test_the_running_stage_is_followed_with_its_prediction(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", state="running", steps=100)
    journal = (
        (folder / "run.json")
        .read_text(encoding="utf-8")
        .replace('"pid": 1', f'"pid": {os.getpid()}')
    )
    (folder / "run.json").write_text(journal, encoding="utf-8")
    with hold(folder):
        async with monitor(empty) as (pilot, screen):
            await until(pilot, lambda: "▶ finetune_lora" in text_of(screen))
            await until(pilot, lambda: "╌" in text_of(screen))
            text = text_of(screen)
            assert "1.94 MiB of tensors predicted at the peak, 1.94 MiB measured" in text


async def test_a_longer_time_is_shown_by_a_key(empty: Path) -> None:
    async with monitor(empty) as (pilot, screen):
        await until(
            pilot, lambda: "last 2 minutes" in str(screen.query_one("#machine").border_title)
        )
        await pilot.press("t")
        assert "last 10 minutes" in str(screen.query_one("#machine").border_title)
        await pilot.press("t", "t")
        assert screen.span == "2 minutes"


async def test_what_cannot_be_read_is_one_sentence(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Memory:
        raise OSError("no /proc")

    monkeypatch.setattr("tui.services.machine.readings.read_memory", broken)
    async with monitor(empty) as (pilot, screen):
        await until(pilot, lambda: "The machine cannot be read: no /proc." in text_of(screen))
        assert pilot.app.is_running


@pytest.mark.slow
async def test_it_draws_only_while_it_is_shown(empty: Path) -> None:
    async with monitor(empty) as (pilot, screen):
        await until(pilot, lambda: "cores" in text_of(screen))
        await pilot.press("1")
        await until(pilot, lambda: pilot.app.screen is not screen)
        drawn = text_of(screen)
        count = len(pilot.app.machine.samples)
        await until(pilot, lambda: len(pilot.app.machine.samples) > count + 3)
        assert text_of(screen) == drawn
        await pilot.app.shown("monitor")
        await until(pilot, lambda: text_of(screen) != drawn)


@pytest.mark.parametrize("size", [(30, 8), (60, 16), (200, 60)], ids=["30x8", "60x16", "200x60"])
async def test_any_size_is_drawn(empty: Path, size: tuple[int, int]) -> None:
    async with monitor(empty, size) as (pilot, screen):
        await until(pilot, lambda: bool(pilot.app.machine.samples))
        await pilot.press("t", "f10")
        await until(pilot, lambda: any(plot.size for plot in screen.query(Plot)))
        assert all(len(line) <= size[0] for line in screen_text(pilot.app).splitlines())


NOW = 1_800_000_000.0
SIZES = {"80x24": (80, 24), "120x40": (120, 40)}


@pytest.mark.usefixtures("no_path")
@pytest.mark.parametrize("size", SIZES)
def test_picture(
    empty: Path, snap_compare: Any, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    """A GPU, a stage that runs on it, an hour of readings."""

    def started(machine: Machine) -> None:
        machine.memory, machine.cores, machine.gpus = 128 * GIB, 16.0, [Gpu("H100", 80 * GIB)]
        for n in range(120):
            wave = (1 + math.sin(n / 9)) / 2
            gpu = GpuReading(0.3 + 0.7 * wave, round((8 + 6 * min(n / 40, 1)) * GIB), 61, 412.0)
            processes = {
                "finetune_lora": ProcessReading(1.04, 3 * GIB, 14 * GIB),
                "lora-tui": ProcessReading(0.012, 2**26, 0),
            }
            memory = round((10 + 4 * wave) * GIB)
            sample = Sample(NOW - 119 + n, 0.1 + 0.5 * wave, memory, (gpu,), processes)
            machine.samples += (sample,)

    monkeypatch.setattr(Machine, "start", started)
    monkeypatch.setattr("tui.services.machine.readings.STALE", math.inf)
    monkeypatch.setattr("tui.screens.monitor.screen.time", SimpleNamespace(time=lambda: NOW))
    prediction = Prediction(15 * GIB, 0, 0, "cuda")
    monkeypatch.setattr(MonitorScreen, "stage", "finetune_lora")
    monkeypatch.setattr(MonitorScreen, "prediction", prediction)
    app = Workbench(empty / "params.yaml")
    app.first_screen = "monitor"

    async def settle(pilot: Any) -> None:
        await until(pilot, lambda: "predicted" in text_of(app.screen))  # type: ignore[arg-type]  # it is the first screen

    assert snap_compare(app, terminal_size=SIZES[size], run_before=settle)

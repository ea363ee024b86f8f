"""The calculator screen: its numbers are those of `pipeline.calc`, and every key works."""

import errno
import os
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from pipeline.calc.architecture import Model
from pipeline.calc.fit import changes, gpus, largest
from pipeline.calc.memory import predict
from pipeline.calc.method import configure
from pipeline.calc.report import answer as expected_result
from pipeline.calc.settings import CONTEXT, TrainingConfig, chunk_rows
from pipeline.calc.sources.open_model import built_in, entry, names, open_model
from pipeline.stages.methods.lora import COUNTED as LORA
from pipeline.stages.methods.lora import Lora
from pipeline.stages.registry import COUNTED, open_project
from pipeline.views.calculation import trained_model
from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import write_json
from tests.helpers.pilot import screen_opens, until
from tests.helpers.projects import load, make, save
from tui.app import Workbench
from tui.dialogs import Ask
from tui.panes.form import Form
from tui.screens.calculator.fields import DEFAULTS, FieldError, answer, relevant, texts_of
from tui.screens.calculator.screen import CalculatorScreen

GARBAGE = (
    "",
    " ",
    "x",
    "-1",
    "0",
    "1e400",
    "9" * 40,
    "ß[/]",
    "[red]",
    "1.5",
    "٣",
    "nan",
    "\\",
    "a,,b",
    "~nobody/x",
)
WRITTEN = (
    *("rank", "alpha", "targets", "new_rows", "last_blocks", "virtual_tokens"),
    *("precision", "batch", "sequence", "gib"),
)
NEEDS = {
    "last_blocks": {"method": "freeze"},
    "virtual_tokens": {"method": "prefix"},
    "new_rows": {"embeddings": "new_rows"},
    "gib": {"gpu": "custom"},
}


@asynccontextmanager
async def calculator(
    root: Path, size: tuple[int, int] = (120, 40), *, answered: bool = True
) -> AsyncIterator[tuple[Any, Any]]:
    app = Workbench(root / "params.yaml")
    app.first_screen = "calculator"
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, CalculatorScreen)
        if answered:
            # a thread reads the model of a project on a base
            await until(pilot, lambda: screen.result is not None)
        else:
            assert screen.result is None
        yield pilot, screen


def text_of(screen: CalculatorScreen, id: str) -> str:
    return screen.texts[id.removeprefix("#")].plain


def marked(screen: CalculatorScreen) -> list[str]:
    """The fields that are marked as invalid."""
    lines, tops = screen.form.lines(), screen.form._tops
    return [key for key, top in tops.items() if lines[top].startswith("✗")]


def problem_of(screen: CalculatorScreen) -> str:
    return " ".join(screen.problems.values())


def workbench(pilot: Pilot[None]) -> Workbench:
    assert isinstance(pilot.app, Workbench)
    return pilot.app


async def fill(pilot: Pilot[None], screen: CalculatorScreen, **values: str) -> None:
    screen.fill({**DEFAULTS, **values})
    await pilot.pause()


async def searched(pilot: Pilot[None], screen: CalculatorScreen) -> None:
    """Wait until all below the verdict is of what the form asks."""
    await until(
        pilot,
        lambda: screen.result is not None and not screen.query_one("#answers").has_class("-old"),
    )


NUMBERS: tuple[dict[str, str], ...] = (
    {"model": "qwen3-8b"},
    {"model": "qwen3-8b", "method": "qlora", "rank": "64", "targets": "all-linear", "batch": "4"},
    {"model": "gpt2", "method": "full", "sequence": "512", "checkpointing": "none"},
    {"model": "minigpt", "method": "freeze", "batch": "4", "sequence": "4"},
    {"model": "llama-3.1-70b", "method": "prefix", "virtual_tokens": "30"},
    {"model": "gemma-3-4b", "method": "prompt", "optimizer": "adamw-8bit", "loss": "chunked"},
    {
        "model": "qwen3-8b",
        "embeddings": "new_rows",
        "new_rows": "7",
        "alpha": "16",
        "precision": "int8",
    },
)


async def test_the_numbers_are_those_of_the_library(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        for values in NUMBERS:
            await fill(pilot, screen, **values)
            expected = expected_answer(values)
            result = screen.result
            assert result.trainable == expected["parameters"]["trainable"], values
            assert {**result.memory.parts(), "peak": result.memory.peak} == {
                key: size for key, size in expected["memory"].items() if key != "peak_at"
            }, values
            assert f"{expected['parameters']['trainable']:,} trainable" in text_of(
                screen, "#verdict"
            ), values
            await searched(pilot, screen)
            shown = " ".join(text_of(screen, "#details").split())
            assert all(
                f"{p['name']} A {p['rank']} × {p['in']:,} + B {p['out']:,} × {p['rank']}" in shown
                for p in expected["projections"]
            )


def expected_answer(values: dict[str, str]) -> dict[str, Any]:
    """The library's answer for a form with these fields."""
    query, model = {**DEFAULTS, **values}, built_in(values["model"]).shapes
    _, method, run = configure(
        model,
        COUNTED,
        query["method"],
        rank=int(query["rank"]),
        alpha=float(query["alpha"]) if query["alpha"] else None,
        targets=query["targets"],
        embeddings=query["embeddings"],
        new_rows=int(query["new_rows"]) if query["embeddings"] == "new_rows" else 0,
        virtual_tokens=int(query["virtual_tokens"]),
        batch=int(query["batch"]),
        sequence=int(query["sequence"]) if query["sequence"] else None,
        precision=query["precision"] or None,
        checkpointing=query["checkpointing"] or None,
        optimizer=query["optimizer"],
        loss=query["loss"],
    )
    return expected_result(model, method, run)


async def test_qwen3_8b_shows_the_exact_number_beside_the_rule_of_thumb(empty: Path) -> None:
    async with calculator(empty, (80, 24)) as (pilot, screen):
        assert "7,667,712 trainable" in text_of(screen, "#verdict")
        await searched(pilot, screen)
        shown = " ".join(text_of(screen, "#details").split())
        assert "9,437,184 · exact 7,667,712" in shown
        assert "the rule of thumb takes every projection as 4,096 × 4,096" in shown


@pytest.mark.slow
async def test_every_built_in_model_opens(empty: Path) -> None:
    for name in names():
        for method in ("lora", "full"):
            result = answer({**DEFAULTS, "model": name, "method": method}, open_model(name).shapes)
            assert result and result.model.name == name
    async with calculator(empty) as (pilot, screen):
        assert all(screen._model(name).name == name for name in names())
        for name in (names()[0], names()[-1]):
            await fill(pilot, screen, model=name)
            assert (screen.problems, screen.result.model.name) == ({}, name)


@pytest.mark.parametrize("field", WRITTEN)
def test_garbage_is_refused_in_one_line_that_is_about_its_field(field: str) -> None:
    model, rejected_with = open_model("qwen3-8b").shapes, 0
    for text in GARBAGE:
        try:
            answer({**DEFAULTS, **NEEDS.get(field, {}), field: text}, model)
        except FieldError as error:
            rejected_with += 1
            assert ([*error.problems], "\n" in str(error)) == ([field], False), text
    assert rejected_with >= 5


@pytest.mark.slow
async def test_garbage_marks_its_field_and_the_last_good_answer_stays(empty: Path) -> None:
    """All garbage for the model, which may be a name or a path; markup for the other fields."""
    tried = [("model", text) for text in GARBAGE] + [(field, "[red]") for field in WRITTEN]
    async with calculator(empty) as (pilot, screen):
        for field, text in tried:
            await fill(pilot, screen, **NEEDS.get(field, {}))
            before = screen.result
            assert not screen.problems
            screen.form.put(field, text)
            await pilot.pause()
            await until(pilot, lambda: "being read" not in problem_of(screen))
            assert list(screen.problems) == [field] and "\n" not in problem_of(screen), (
                field,
                text,
            )
            assert screen.result is before, (field, text)
            assert screen.has_class("-wrong")
            assert marked(screen) == [field], (text, screen.problems)
        await fill(pilot, screen)
        assert not screen.has_class("-wrong") and not marked(screen) and not screen.problems


@pytest.mark.slow
async def test_every_invalid_field_is_marked_with_its_reason(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        for values in (
            {"rank": "x", "batch": "1,5", "sequence": "y"},
            {"batch": "1.5", "gpu": "custom", "gib": "a lot"},
            {"precision": "fp1"},
            {"targets": "nowhere"},
            {"model": "nothing-like-it"},
        ):
            await fill(pilot, screen, **values)
            wrong = set(values) - {"gpu"}
            assert set(marked(screen)) == wrong == set(screen.problems)
            shown = " ".join(screen.problem.plain.split())
            assert all(text in shown for text in screen.problems.values())
            assert "qwen3-8b" in str(screen.query_one("#verdict").border_title), "the last valid"


@pytest.mark.slow
async def test_only_fields_that_matter_are_shown(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        for method in ("full", "freeze", "lora", "qlora", "prefix", "prompt"):
            await fill(pilot, screen, method=method)
            assert list(screen.form._tops) == relevant(screen.asked), method


@pytest.mark.slow
async def test_keys_move_between_fields_and_step_values(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        await pilot.press("right")
        assert screen.asked["method"] == "qlora"
        await pilot.press("left", "down", "+")
        values = screen.asked
        assert (values["method"], values["rank"], screen.result.method.rank) == ("lora", "16", 16)
        await pilot.press("-", "-", "tab", "shift+tab", "pagedown")
        assert screen.form.key == "rank" and screen.asked["rank"] == "8"
        screen.form.point("sequence")
        await pilot.press("+")
        assert screen.result.run.sequence == 4096, "an empty field steps from what it means"
        screen.form.point("batch")
        await pilot.press("+", "up")
        assert (screen.result.run.batch, screen.form.key) == (2, "adapter_precision")
        await pilot.press("ctrl+g")
        names_ = list(gpus())
        assert screen.asked["gpu"] == names_[names_.index("rtx4090") + 1]


@pytest.mark.slow
async def test_ctrl_b_brings_a_fields_default_back(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        await pilot.press("right", "ctrl+b", "down", "+", "+", "ctrl+b")
        assert screen.asked == DEFAULTS and screen.result.method.rank == 8


@pytest.mark.slow
async def test_every_choice_steps_both_ways_by_a_click(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        for name in ("method", "embeddings", "checkpointing", "optimizer", "loss", "gpu"):
            before, form = screen.asked[name], screen.form
            at = form.lines()[form._tops[name]].index("‹"), form._tops[name]
            await pilot.click(Form, offset=(at[0] + 4, at[1]))
            assert screen.asked[name] != before
            await pilot.click(Form, offset=at)
            assert screen.asked[name] == before


def matches(screen: CalculatorScreen) -> list[str]:
    """The models that are listed below the field."""
    return [text for text, _ in screen.form._matches]


@pytest.mark.slow
async def test_search_lists_matches_while_one_types_and_enter_takes_one(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        await pilot.press("up", *"smol")
        assert matches(screen) == [n for n in names() if "smol" in n]
        assert problem_of(screen).startswith("model must be a built-in name")
        await pilot.press("down", "up", "down", "enter")
        assert screen.result.model.name == [n for n in names() if "smol" in n][1]
        assert matches(screen) == []
        await pilot.press("home", "shift+end", *"Qwen/Qwen3-8B")
        assert screen.result.model.name == "qwen3-8b", "a hub id that is built in needs no network"
        await pilot.press("home", "shift+end", *"wen3-32", "enter")
        assert screen.result.model.name == "qwen3-32b"
        await pilot.press("home", "shift+end", *"gemma-2")
        await pilot.click(Form, offset=(8, screen.form._tops["model"] + 2))
        assert screen.result.model.name == [n for n in names() if "gemma-2" in n][1]


@pytest.mark.slow
async def test_a_path_is_read_beside_the_keys(empty: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    write_json(config, entry("qwen3-0.6b")["config"])
    async with calculator(empty) as (pilot, screen):
        for path in (config, tmp_path):
            await fill(pilot, screen, model=str(path))
            await until(pilot, lambda: not screen.problems)
            assert screen.result.model.total == built_in("qwen3-0.6b").shapes.total
        config.write_text("{", encoding="utf-8")
        await fill(pilot, screen, model=str(config))
        await until(pilot, lambda: "being read" not in problem_of(screen))
        assert "config.json" in problem_of(screen) and "\n" not in problem_of(screen)


@pytest.mark.slow
async def test_a_hub_id_is_fetched_by_enter_alone(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def fetched(name: str) -> Model:
        asked.append(name)
        return built_in("gpt2")

    monkeypatch.setattr(
        "tui.screens.calculator.screen.open_model",
        lambda n: fetched(n) if "/" in n else open_model(n),
    )
    async with calculator(empty) as (pilot, screen):
        asked.clear()
        await pilot.press("up", *"some/model")
        assert "Enter fetches a hub id" in problem_of(screen) and not asked
        await pilot.press("enter")
        await until(pilot, lambda: not screen.problems)
        assert asked == ["some/model"] and screen.result.model.name == "gpt2"


@pytest.mark.slow
@pytest.mark.usefixtures("held_threads")
async def test_advice_is_the_librarys_and_never_of_another_configuration(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    free.set()
    held = "pipeline.views.calculation.largest"
    monkeypatch.setattr(held, lambda *configuration: free.wait(30) and largest(*configuration))
    async with calculator(empty, (200, 60)) as (pilot, screen):
        await searched(pilot, screen)
        result = screen.result
        most = largest(result.model, result.method, result.run, result.device.bytes)
        shown = text_of(screen, "#answers")
        assert f"batch {most.batch} │ sequence {most.sequence:,} │ rank {most.rank}" in shown
        free.clear()
        await fill(pilot, screen, batch="16")
        assert screen.query_one("#answers").has_class("-old")
        assert "✗ DOES NOT FIT" in text_of(screen, "#verdict")
        free.set()
        await searched(pilot, screen)
        result, shown = screen.result, " ".join(text_of(screen, "#answers").split())
        configuration = (
            result.model,
            result.method,
            result.run,
            result.device.bytes,
            result.methods,
        )
        words = [way[0] for way in changes(*configuration)]
        assert f"to make it fit {words[-1].replace('--', '')} →" in shown


@pytest.mark.slow
async def test_a_sweep_has_the_peaks_of_the_library_and_marks_the_present_value(
    empty: Path,
) -> None:
    async with calculator(empty, (200, 60)) as (pilot, screen):
        await fill(pilot, screen, rank="6", batch="4")
        await searched(pilot, screen)
        lines = text_of(screen, "#answers").splitlines()
        ranks, peaks = next((x, y) for x, y in pairwise(lines) if x.startswith("rank"))
        assert ranks.split() == ["rank", "1", "2", "4", "▶6", "8", "16", "64"]
        method, run = screen.result.method, screen.result.run
        expected = [
            predict(screen.result.model, method.with_rank(n), run).peak
            for n in (1, 2, 4, 6, 8, 16, 64)
        ]
        assert peaks.split() == ["GiB", *(f"{peak / 2**30:.2f}✗" for peak in expected)], (
            "32 GiB do not fit on 24"
        )
        await fill(pilot, screen, method="full")
        await searched(pilot, screen)
        assert "rank" not in text_of(screen, "#answers"), "a method without rank has none to sweep"


@pytest.mark.slow
async def test_gpus_that_hold_it_are_told_from_those_that_do_not(empty: Path) -> None:
    async with calculator(empty, (200, 60)) as (pilot, screen):
        await searched(pilot, screen)
        text = " ".join(text_of(screen, "#answers").split())
        assert "smallest GPU A10 / A10G" in text
        fits, fails = text.partition("✓ ")[2].split(" ✗ ")
        assert [gpu.label for gpu in gpus().values()] == [*fails.split(" · "), *fits.split(" · ")]
        await fill(pilot, screen, sequence="16384", gpu="rtx4060")
        await searched(pilot, screen)
        text = " ".join(text_of(screen, "#answers").split())
        assert "smallest GPU A100 80 GB" in text


@pytest.mark.slow
async def test_a_mistake_does_not_stop_what_is_looked_for(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        await fill(pilot, screen, rank="16")
        await fill(pilot, screen, batch="x")
        await searched(pilot, screen)
        assert problem_of(screen).startswith("batch must be")


@pytest.mark.slow
async def test_bars_name_the_methods_and_mark_the_chosen_one(empty: Path) -> None:
    async with calculator(empty, (80, 24)) as (pilot, screen):
        await searched(pilot, screen)
        text = text_of(screen, "#memory")
        assert all(
            name in text for name in ("full", "freeze", "▶ ■ LoRA", "QLoRA", "RTX 4090, 23.99")
        )
        await fill(pilot, screen, gpu="custom", gib="7.5", method="freeze")
        await searched(pilot, screen)
        text = text_of(screen, "#memory")
        assert "│ 7.5 GiB, 7.50 GiB" in text and "▶ ▲ freeze" in text
        await fill(pilot, screen, model="minigpt")
        await searched(pilot, screen)
        text = text_of(screen, "#memory")
        assert text.startswith("│ RTX 4090, 23.99 GiB") and "│" not in text[1:], (
            "a dot would be all that is seen of its bars"
        )
        assert "KiB of 23.99 GiB" in text_of(screen, "#verdict") or "MiB of 23.99 GiB" in text_of(
            screen, "#verdict"
        )


@pytest.mark.parametrize("model", ["qwen3-8b", "minigpt", "smollm2-135m"])
async def test_a_table_has_one_unit(empty: Path, model: str) -> None:
    async with calculator(empty) as (pilot, screen):
        await fill(pilot, screen, model=model)
        await searched(pilot, screen)
        head, *rows = text_of(screen, "#memory").partition("\n\n")[2].splitlines()
        sizes = [cell for row in rows for cell in row.split()[2:]]
        assert head.split()[0] in ("GiB", "MiB", "KiB") and sizes
        assert all(re.fullmatch(r"<?[0-9,]+(\.[0-9]{2})?", size) for size in sizes), sizes


@pytest.mark.slow
async def test_two_are_pinned_beside_the_one_of_now(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        await pilot.press("ctrl+t")
        await fill(pilot, screen, method="qlora")
        await pilot.press("ctrl+t")
        await fill(pilot, screen, rank="16")
        await searched(pilot, screen)
        text = text_of(screen, "#verdict")
        first, second = screen.pins
        assert first.title.split(",")[0] in text and "②" in text
        less = screen.result.trainable - first.trainable
        assert f"−{less:,}" in text and "-" not in text.replace("nf4-dq", "").replace(
            "qwen3-8b", ""
        )
        assert (first.run.precision, second.run.precision) == ("bf16", "nf4-dq")
        assert all(f"■ {mark}" in text_of(screen, "#memory") for mark in "①②")
        await pilot.press("ctrl+t")
        assert screen.pins == [second, screen.result], "a third takes the first one's place"
        await pilot.press("ctrl+t")
        assert screen.pins == [second], "the same again is unpinned"
        await pilot.press("ctrl+n")
        assert screen.pins == [] and "①" not in text_of(screen, "#verdict")
        assert screen.asked == DEFAULTS


@pytest.mark.slow
async def test_answers_are_read_by_keys_and_the_form_is_next(empty: Path) -> None:
    async with calculator(empty, (80, 24)) as (pilot, screen):
        seen = []
        for _ in range(5):
            await pilot.press("ctrl+l")
            pane = screen.focused_pane
            seen.append(pane.id if pane else None)
        assert seen == ["verdict", "answers", "memory", "details", "question"]
        await pilot.press("ctrl+l", "ctrl+l", "ctrl+l")
        await until(pilot, lambda: screen.query_one("#below").scroll_offset.y > 0)
        await pilot.press("f10")
        await until(pilot, lambda: screen.maximized is screen.query_one("#memory"))


@pytest.mark.slow
async def test_no_letter_is_a_command_in_a_field(empty: Path) -> None:
    """Every character that is typed into a text field stays there."""
    async with calculator(empty) as (pilot, screen):
        letters = "pPuUdelg/zq?+-13"
        await pilot.press("up", "home", "shift+end", *letters)
        assert screen.asked["model"] == letters
        assert pilot.app.screen is screen and not screen.pins


async def test_load_fills_in_what_params_yaml_trains(empty: Path) -> None:
    async with calculator(empty) as (pilot, screen):
        await pilot.press("ctrl+o")
        await pilot.pause()
        targets = ("q_proj", "k_proj", "v_proj", "o_proj")
        method = Lora(4, 1.0, targets, embeddings="all")
        assert screen.result.method == method
        assert screen.result.run == TrainingConfig(
            4, 4, "fp32", checkpointing="none", chunk=chunk_rows(screen.result.model.vocabulary)
        )
        assert screen.result.model is built_in("minigpt").shapes
        assert screen.asked["model"] == "minigpt"


@pytest.mark.slow
async def test_write_says_what_it_writes_and_what_not_and_is_taken_back(empty: Path) -> None:
    path = empty / "params.yaml"
    before = path.read_text(encoding="utf-8")
    async with calculator(empty) as (pilot, screen):
        await pilot.press("ctrl+o")
        await pilot.pause()
        await pilot.press("ctrl+s")
        await until(pilot, lambda: bool(pilot.app.message_history))
        assert "already has these values" in pilot.app.message_history[-1][2]
        await pilot.press("tab", "+", "ctrl+s")
        await screen_opens(pilot, Ask)
        question = " ".join(str(part.content) for part in pilot.app.screen.query(Static))
        assert "finetune_lora.rank: 4 → 8" in question
        assert (
            "Not written: the model (this project trains MiniGPT), the sequence length and the GPU."
            in question
        )
        await pilot.press("escape")
        assert path.read_text(encoding="utf-8") == before
        await pilot.press("ctrl+s")
        await screen_opens(pilot, Ask)
        await pilot.press("y")
        await until(pilot, lambda: path.read_text(encoding="utf-8") != before)
        assert path.read_text(encoding="utf-8") == before.replace("  rank: 4\n", "  rank: 8\n", 1)
        await until(pilot, lambda: pilot.app.screen is screen)
        await pilot.press("escape", "z")
        await until(pilot, lambda: path.read_text(encoding="utf-8") == before)


SECTIONS: tuple[tuple[dict[str, str], dict[str, object]], ...] = (
    ({"method": "full", "batch": "9"}, {"finetune_full.batch_size": 9}),
    (
        {"method": "freeze", "batch": "9", "last_blocks": "2", "train_embeddings": "false"},
        {
            "finetune_freeze.batch_size": 9,
            "finetune_freeze.last_blocks": 2,
            "finetune_freeze.train_embeddings": False,
        },
    ),
    (
        {"targets": "feed_forward", "embeddings": "none", "alpha": "3.5"},
        {
            "finetune_lora.target_modules": ("feed_forward",),
            "finetune_lora.train_embeddings": "none",
            "finetune_lora.alpha": 3.5,
            "finetune_lora.rank": 8,
        },
    ),
    (
        {"method": "qlora"},
        {"finetune_lora.quantization": "nf4-dq", "finetune_lora.precision": "bf16"},
    ),
)


@pytest.mark.slow
async def test_each_method_has_its_section(empty: Path) -> None:
    path = empty / "params.yaml"
    before = path.read_text(encoding="utf-8")
    async with calculator(empty) as (pilot, screen):
        for values, section in SECTIONS:
            path.write_text(before, encoding="utf-8")
            await fill(pilot, screen, **values)
            await write_to_params(pilot)
            params = load(path)
            for key, value in section.items():
                name, _, leaf = key.partition(".")
                assert getattr(getattr(params, name), leaf) == value, values


async def write_to_params(pilot: Pilot[None]) -> None:
    """Write the form to params.yaml, and wait for the message."""
    app = workbench(pilot)
    message = len(app.message_history)
    await pilot.press("ctrl+s")
    await screen_opens(pilot, Ask)
    await pilot.press("y")
    await until(pilot, lambda: len(app.message_history) > message)


async def rejected_with(pilot: Pilot[None], screen: CalculatorScreen, **values: str) -> str:
    """The message when a form with these values is not written."""
    app = workbench(pilot)
    message = len(app.message_history)
    await fill(pilot, screen, **values)
    await pilot.press("ctrl+s")
    await until(pilot, lambda: len(app.message_history) > message)
    assert app.screen is screen, values
    return app.message_history[-1][2]


@pytest.mark.slow
async def test_what_the_project_cannot_train_is_refused(empty: Path) -> None:
    before = (empty / "params.yaml").read_bytes()
    async with calculator(empty) as (pilot, screen):
        for values, reason in (
            ({"precision": "gptq-g64"}, "gptq-g64 weights are not trainable here yet"),
            (
                {"targets": "gate_proj"},
                "MiniGPT, the model of this project, does not have these targets",
            ),
            ({"method": "freeze", "last_blocks": "9"}, "last-blocks must be at most 2"),
            ({"rank": "x"}, "Nothing was written: a field is invalid"),
        ):
            message = await rejected_with(pilot, screen, **values)
            assert reason in message and "\n" not in message
    assert (empty / "params.yaml").read_bytes() == before


SETTINGS = {
    "base": "models/toy",
    "finetune_lora.window": 0,
    "finetune_lora.max_length": 48,
    "finetune_lora.precision": "bf16",
    "finetune_lora.adapter_precision": "bf16",
    "finetune_lora.gradient_checkpointing": "selective",
}


@pytest.fixture
def toy(empty: Path) -> Path:
    """A project whose base model is a small Llama."""
    toy_checkpoint(empty / "models/toy")
    save(empty / "params.yaml", SETTINGS)
    return empty


@pytest.mark.slow
async def test_load_takes_the_projects_base_with_the_projects_settings(toy: Path) -> None:
    async with calculator(toy) as (pilot, screen):
        await pilot.press("ctrl+o")
        await until(pilot, lambda: screen.result.model.name != "qwen3-8b")
        assert screen.result.model.total == open_model(str(toy / "models/toy")).shapes.total
        chunk = chunk_rows(screen.result.model.vocabulary)
        assert screen.result.run == TrainingConfig(
            *(4, 48, "bf16", "bf16"),
            checkpointing="selective",
            loss="chunked",
            chunk=chunk,
            context=CONTEXT,
        )
        assert screen.result.method.rank == 4 and not screen.problems
        await pilot.press("ctrl+s")
        await until(pilot, lambda: bool(pilot.app.message_history))
        assert "already has these values" in pilot.app.message_history[-1][2]


@pytest.mark.slow
async def test_in_a_project_on_a_pretrained_base_the_form_begins_with_what_it_trains(
    toy: Path,
) -> None:
    (toy / "params.yaml").write_text(
        "base: models/toy\nfinetune_lora: {rank: 4}\n", encoding="utf-8"
    )
    async with calculator(toy) as (pilot, screen):
        await until(
            pilot, lambda: screen.result is not None and screen.result.model.name != "qwen3-8b"
        )
        start = dict(screen.asked)
        assert (start["targets"], start["alpha"], start["embeddings"]) == (
            "all-linear",
            "8",
            "none",
        )
        assert screen.result.method == Lora(4, 8.0, ("all-linear",))
        await pilot.press("ctrl+s")
        await until(pilot, lambda: bool(pilot.app.message_history))
        assert "already has these values" in pilot.app.message_history[-1][2]
        await fill(pilot, screen, targets="attention", rank="2")
        await pilot.press("ctrl+n")
        await pilot.pause()
        assert dict(screen.asked) == start, "begun anew"


@pytest.mark.slow
async def test_use_writes_what_the_projects_own_model_can_have(toy: Path) -> None:
    async with calculator(toy) as (pilot, screen):
        await fill(
            pilot,
            screen,
            targets="gate_proj",
            precision="fp32",
            checkpointing="none",
            rank="2",
            batch="3",
        )
        await write_to_params(pilot)
        lora = load(toy / "params.yaml").finetune_lora
        assert (lora.target_modules, lora.precision, lora.gradient_checkpointing) == (
            ("gate_proj",),
            "fp32",
            "none",
        )
        assert (lora.rank, lora.batch_size, lora.adapter_precision, lora.max_length) == (
            2,
            3,
            "fp32",
            48,
        )


@pytest.mark.slow
async def test_what_the_projects_own_model_cannot_have_is_refused(toy: Path) -> None:
    async with calculator(toy) as (pilot, screen):
        for values, reason in (
            (
                {"model": "gpt2", "targets": "c_attn"},
                "models/toy, the model of this project, does not have these targets",
            ),
            (
                {"method": "freeze", "last_blocks": "9"},
                "last-blocks must be at most 2, the blocks of models/toy, got 9",
            ),
            ({"precision": "tf32"}, "tf32 weights are not trainable here yet"),
        ):
            message = await rejected_with(pilot, screen, **values)
            assert reason in message and "MiniGPT" not in message


@pytest.mark.slow
async def test_load_fetches_a_base_of_the_hub_and_says_why_another_is_none(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(empty / "params.yaml", {"base": "some/model@main"})

    def result(name: str) -> Model:
        return built_in("qwen3-0.6b") if name == "some/model" else open_model(name)

    monkeypatch.setattr("tui.screens.calculator.screen.open_model", result)
    monkeypatch.setattr("pipeline.views.calculation.open_model", result)
    async with calculator(empty, answered=False) as (pilot, screen):
        assert "got 'some/model'. Enter fetches a hub id." in screen.problems["model"]
        await pilot.press("ctrl+o")
        await until(pilot, lambda: screen.result is not None and not screen.problems)
        assert screen.result.model.name == "qwen3-0.6b"
        await fill(pilot, screen, model="gpt2", targets="c_attn")
        await pilot.press("ctrl+s")
        await until(pilot, lambda: bool(pilot.app.message_history))
        assert (
            "some/model@main, the model of this project, does not have these targets"
            in pilot.app.message_history[-1][2]
        )
        save(empty / "params.yaml", {"base": "./nowhere"})
        await pilot.press("ctrl+o", "ctrl+s")
        await until(pilot, lambda: len(pilot.app.message_history) == 3)
        assert all(
            "base must be minigpt" in text for _, _, text in list(pilot.app.message_history)[-2:]
        )


def test_what_the_pipeline_made_of_the_base_goes_before_the_base(toy: Path) -> None:
    path = toy / "params.yaml"
    (toy / "data/tiny.txt").write_text("The euro.\n", encoding="utf-8")
    save(
        path,
        {"expand_vocab.audit_data": "data/tiny.txt", "expand_vocab.tokens": ["zloty", "koruna"]},
    )
    assert texts_of(open_project(path))["model"] == "models/toy"
    make(toy, ["pretrain"])
    assert texts_of(open_project(path))["model"] == "artifacts/base"
    make(toy, ["expand_vocab"])
    asked = texts_of(open_project(path, ["finetune_lora.train_embeddings=new_rows"]))
    assert (asked["model"], asked["new_rows"]) == ("artifacts/expanded", "2")
    assert (
        trained_model(open_project(path))[1].total
        > open_model(str(toy / "models/toy")).shapes.total - 1
    )
    # the expanded checkpoint belongs to the former base
    make(toy, ["pretrain"], ["import.dtype=bf16"])
    assert texts_of(open_project(path))["model"] == "artifacts/base"
    assert texts_of(open_project(path, ["base=some/model"]))["model"] == "some/model"


@pytest.mark.parametrize("when", ["before", "while it is confirmed"])
@pytest.mark.slow
async def test_params_broken_by_hand_are_not_written_over(empty: Path, when: str) -> None:
    path, broken = empty / "params.yaml", "finetune_lora: [1,\n"
    async with calculator(empty) as (pilot, _):
        if when == "before":
            path.write_text(broken, encoding="utf-8")
        await pilot.press("ctrl+s")
        if when != "before":
            await screen_opens(pilot, Ask)
            path.write_text(broken, encoding="utf-8")
            await pilot.press("y")
        await until(pilot, lambda: bool(pilot.app.message_history))
        assert "not valid YAML" in pilot.app.message_history[-1][2]
        assert path.read_text(encoding="utf-8") == broken
        await pilot.press("ctrl+o")
        await until(pilot, lambda: len(pilot.app.message_history) == 2)


@pytest.mark.slow
async def test_a_full_disk_leaves_the_file(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (empty / "params.yaml").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "params.yaml")

    async with calculator(empty) as (pilot, _):
        await pilot.press("ctrl+s")
        await screen_opens(pilot, Ask)
        monkeypatch.setattr(os, "fsync", full)
        await pilot.press("y")
        await until(pilot, lambda: bool(pilot.app.message_history))
        assert "No space left on device" in pilot.app.message_history[-1][2]
    assert (empty / "params.yaml").read_bytes() == before
    assert list(empty.glob(".params*")) == []


async def test_form_and_verdict_are_on_one_screen_of_80_columns(empty: Path) -> None:
    async with calculator(empty, (80, 24)) as (_, screen):
        for name in relevant(screen.asked):
            assert screen.form.region.y + screen.form._tops[name] < 23
        assert screen.query_one("#verdict").region.bottom <= 23
        assert screen.form.region.right <= screen.query_one("#verdict").region.x


def test_the_default_configuration_is_rank_8_on_attention() -> None:
    assert (
        configure(built_in("qwen3-8b").shapes, COUNTED, "lora", rank=8, targets="attention").method
        == LORA
    )

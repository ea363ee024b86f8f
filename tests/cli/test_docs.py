"""The documentation's commands and numbers are correct."""

import re
import shlex
from pathlib import Path

import pytest

from bench import loraplus
from bench.__main__ import BENCHMARKS
from bench.published import published, table
from cli import console
from docs.generators import generated
from docs.tour import typed
from pipeline.project.logs.run_log import RunLog, Step
from tests.conftest import Lora
from tests.helpers.json_files import write_json
from tests.helpers.projects import ROOT
from tests.journeys.command_lines import commands


def test_the_published_peaks_stand_in_the_docs_as_they_are_predicted_now() -> None:
    assert table() in (ROOT / "docs/explanation/memory.md").read_text(encoding="utf-8")


def test_the_generated_pages_are_what_the_code_says() -> None:
    for path, text in generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python -m docs"


def test_every_error_above_15_percent_is_explained() -> None:
    result = published()
    assert len(result) >= 20
    assert all(one.why for one in result if abs(one.error) > 0.15)
    best = [one for one in result if one.case.startswith("fms-acceleration")]
    assert all(abs(one.error) < 0.02 for one in best), "the rows whose every setting is published"


def test_no_link_of_the_documentation_is_dead() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_command_that_a_page_names_exists_with_its_options() -> None:
    options = {
        path: {name for each in parameters for name in each.opts} for path, parameters in commands()
    }
    options[("finetune", "METHOD")] = options[("finetune", "lora")]
    options[("finetune", "bitfit")] = options[("finetune", "lora")]  # which extend.md adds
    named = 0
    # which are history
    pages = [page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "decisions"]
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *pages):
        text = page.read_text(encoding="utf-8")
        for line in re.findall(r"(?:^    |^\$ |`)(lora [^`\n]*)", text, re.MULTILINE):
            for command in re.findall(r"(?:^|; +)lora ([^;#|]*)", line):
                words = [word for word in command.split() if word != "…"]
                length = max(
                    n for n in range(3) if any(path[:n] == tuple(words[:n]) for path in options)
                )
                path, rest = (
                    tuple(words[:length]),
                    [word.partition("=")[0] for word in words[length:]],
                )
                known = options.get(path, {"--install-completion", "--version"}) | {"--help"}
                stands_for_any = bool(rest) and rest[0].isupper()  # in a message: `lora COMMAND`
                assert path in options or not rest or rest[0] in known or stands_for_any, (
                    f"{page.name}: lora {command}"
                )
                assert {word for word in rest if re.match("--[a-z]", word)} <= known, (
                    f"{page.name}: lora {command}"
                )
                named += 1
    assert named > 150


def test_the_readme_shows_what_the_calculator_prints(
    cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.stdout, "width", 100)
    calculated = [
        one
        for one in typed((ROOT / "README.md").read_text(encoding="utf-8"))
        if "lora calc" in one.command
    ]
    for command, shown in calculated:
        printed = cli(*shlex.split(command)[1:], cwd=ROOT)[1].splitlines()
        assert set(shown.splitlines()) - {"…"} <= {line.rstrip() for line in printed}, command
    assert calculated


@pytest.mark.slow
def test_the_commands_of_the_pages_on_shipping_run_in_a_project_as_the_pipeline_leaves_it(
    cli: Lora, project: Path
) -> None:
    pages = ("shipping", "merge", "hub", "vllm", "compress-combine", "import")
    text = "".join((ROOT / f"docs/how-to/{page}.md").read_text(encoding="utf-8") for page in pages)
    lines = [
        shlex.split(line, comments=True)
        for line in re.findall(r"^    (lora .*)$", text, re.MULTILINE)
    ]
    assert len(lines) > 8
    for _, *command in lines:
        code, output, errors = cli(*command, cwd=project)
        assert (code, bool(output)) == (0, True), f"{command}: {errors}"


def test_a_table_of_loraplus_takes_for_each_ratio_the_rate_that_is_best_over_seeds(
    tmp_path: Path,
) -> None:
    by_rate = {
        (4.0, 0.002): (3.0, 3.2),
        (4.0, 0.5): (1.0, 1.4),
        (0.25, 0.002): (2.0, 2.0),
        (0.25, 0.5): (1.0, 9.0),
    }
    state = {}
    for (ratio, rate), of_seeds in by_rate.items():
        for seed, last in enumerate(of_seeds):
            folder = tmp_path / f"{ratio}-{rate}-{seed}"
            folder.mkdir()
            params = {"loraplus_ratio": ratio, "learning_rate": rate}
            write_json(folder / "manifest.json", {"params": params})
            with RunLog(folder, 0, 0) as log:
                for epoch in range(1, 12):
                    log.append(Step(epoch, epoch, last + (epoch < 11), rate, 1.0, epoch))
            state[folder.name] = {"state": "done"}
    # so that no mean over all seeds is there at this rate
    state["0.25-0.5-1"]["state"] = "diverged"
    write_json(tmp_path / "sweep.json", state)
    *_, fourth, four = loraplus.table(loraplus.losses(tmp_path)).splitlines()
    assert fourth == "| 1/4 | 3.00 ± 0.00 | 2.00 ± 0.00 | 0.002: 3.00 ± 0.00 | 0.002: 2.00 ± 0.00 |"
    assert four == "| 4 | 4.10 ± 0.14 | 3.10 ± 0.14 | 0.5: 2.20 ± 0.28 | 0.5: 1.20 ± 0.28 |"


def test_every_benchmark_that_a_page_names_exists() -> None:
    known = {benchmark.__name__ for benchmark in BENCHMARKS}
    named = set[str]()
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        named |= {
            name
            for names in re.findall(r"python -m bench ([^`#\n]+)", text)
            for name in names.split()
        }
        assert all(
            (ROOT / f"bench/{name}.py").is_file()
            for name in re.findall(r"python -m bench\.(\w+)", text)
        )
    assert named <= known and len(named) > 10

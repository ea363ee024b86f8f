"""What the Results screen reads of an evaluation, a sweep and the files beside them."""

import csv
import shutil
from math import nan
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.evaluation.comparison import by_variant, comparison
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import open_project
from pipeline.views.evaluations import KEPT, LEARNED, Evaluation, read_evaluation
from pipeline.views.reports import numbers_of, read_pages, read_pictures
from pipeline.views.sweeps import Sweep, read_sweep
from tests.helpers.extension import PROBES, add_probes
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import make, new_project

NUMBERS: dict[str, Any] = {"parameters": 100, "bytes": 40_000, "new_loss": 1.0}


@pytest.fixture
def empty_project(tmp_path: Path) -> Project:
    return open_project(new_project(tmp_path / "p") / "params.yaml")


def evaluation(project: Project, **metrics: Any) -> Evaluation:
    folder = project.root / "artifacts/evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "metrics.json", metrics)
    found = read_evaluation(project)
    assert found is not None
    return found


def sweep(project: Project, **rows: Any) -> Sweep:
    folder = project.root / "artifacts/sweep"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "sweep.json", rows)
    found = read_sweep(project)
    assert found is not None
    return found


def kept(share: float, rise: float = 0.0) -> dict[str, Any]:
    return {
        **NUMBERS,
        "old_loss": 1.0,
        "forgetting": {"answers_kept": share, "loss_rise": rise, "divergence": rise},
    }


def trial(loss: float | None, divergence: float | None = None, **values: Any) -> dict[str, Any]:
    row = {
        "values": values,
        "state": "done",
        "trainable": 8,
        "steps": 4,
        "final_loss": loss,
        "eval_loss": loss,
    }
    return row | ({} if divergence is None else {"divergence": divergence})


def test_a_project_without_results_has_none(empty_project: Project) -> None:
    assert read_evaluation(empty_project) is None
    assert read_sweep(empty_project) is None
    assert not read_pages(empty_project) and not read_pictures(empty_project)


def test_the_cells_are_those_of_the_report(brief: Path) -> None:
    found = read_evaluation(open_project(brief / "params.yaml"))
    assert found is not None
    metrics = read_json(brief / "artifacts/evaluation/metrics.json")
    columns, rows = comparison(by_variant(metrics))
    assert [[method.name, *method.cells.values()] for method in found.methods] == rows
    assert list(found.methods[0].cells) == columns[1:]
    assert [task.name for task in found.tasks] == list(metrics["base"]["tasks"])


def test_forgot_least_is_a_trained_model_that_was_the_base(empty_project: Project) -> None:
    found = evaluation(
        empty_project,
        base=kept(1),
        scratch=kept(0.99),
        full=kept(0.5),
        lora=kept(0.8),
        merged=kept(0.8),
    )
    assert found.forgot_least is not None and found.forgot_least.name == "lora"
    found = evaluation(empty_project, base=kept(1), full=kept(0.8, 0.1), lora=kept(0.8, 0.2))
    assert found.forgot_least is not None and found.forgot_least.name == "full"


def test_what_is_not_finite_counts_as_worst_and_not_as_another_measure(
    empty_project: Project,
) -> None:
    diverged = kept(0.5, nan)
    diverged["forgetting"]["divergence"] = 0.1
    found = evaluation(empty_project, base=kept(1), full=diverged, lora=kept(0.5, 0.2))
    assert found.forgot_least is not None and found.forgot_least.name == "lora"


def test_without_old_texts_nothing_is_said_of_forgetting(empty_project: Project) -> None:
    found = evaluation(empty_project, base=NUMBERS, lora=NUMBERS)
    assert (found.forgot_least, found.kept, found.tasks) == (None, [], [])
    assert [measure.name for measure in found.learned] == ["loss on new sentences"]


def test_measures_in_which_models_differ_come_first(empty_project: Project) -> None:
    answers = {"answers": {"n": 4, "as_expected": 1}}
    found = evaluation(
        empty_project,
        base={**NUMBERS, "answers": {"n": 4, "as_expected": 0}},
        lora=NUMBERS | answers,
    )
    assert found.learned[0].name == "answers as expected"
    assert [found.learned[0].of(method.numbers) for method in found.methods] == [0, 0.25]
    none = {"new_completed": 0, "new_sentences": 4}
    found = evaluation(
        empty_project, base={**NUMBERS, **none}, lora={**NUMBERS, **none, "new_loss": 0.5}
    )
    assert [measure.name for measure in found.learned] == [
        "loss on new sentences",
        "new sentences completed",
    ]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"new_loss": nan}, None),
        ({}, None),
        ({"new_loss": "1"}, 1.0),
        ({"new_loss": []}, None),
        ({"new_loss": 10**400}, None),
    ],
)
def test_a_measure_of_what_is_no_number_is_none(
    numbers: dict[str, Any], expected: float | None
) -> None:
    assert LEARNED[-1].of(numbers) == expected
    assert KEPT[0].of(numbers) is None


def test_the_gate_names_each_broken_limit(empty_project: Project) -> None:
    broken = [{"variant": "lora", "limit": "answers_kept", "wanted": 0.9, "value": 0.8}]
    gate = {"passed": False, "variants": ["lora"], "broken": broken}
    found = evaluation(empty_project, base=kept(1), lora=kept(0.8), gate=gate)
    assert found.verdict == "✗ 1 limit broken"
    assert [method.broken for method in found.methods] == [
        [],
        ["answers_kept 0.8, wanted at least 0.9"],
    ]
    found = evaluation(
        empty_project, base=kept(1), lora=kept(1), gate={**gate, "passed": True, "broken": []}
    )
    assert found.verdict == "✓ limits kept by lora"


@pytest.mark.parametrize(
    "metrics",
    [
        pytest.param({"lora": 1}, id="a number"),
        pytest.param({"lora": {"bytes": "many"}}, id="a text"),
        pytest.param({"lora": NUMBERS, "gate": {"broken": 1}}, id="another gate"),
        pytest.param({"lora": {**NUMBERS, "tasks": {"a": {}}}}, id="a task without a score"),
        pytest.param({"lora": {**NUMBERS, "bytes": 10**400}}, id="a number beyond all floats"),
    ],
)
def test_other_metrics_are_refused_in_one_sentence(
    empty_project: Project, metrics: dict[str, Any]
) -> None:
    with pytest.raises(
        UserError, match=r"metrics\.json holds other metrics\. Run `lora evaluate` again\."
    ):
        evaluation(empty_project, **metrics)


def test_the_front_of_a_sweep_and_its_best(empty_project: Project) -> None:
    rows = {
        "a": trial(1.0, 0.5, rank=1),
        "b": trial(2.0, 0.1, rank=2),
        "c": trial(2.0, 0.6, rank=4),
    }
    found = sweep(empty_project, **rows, d={**trial(None, rank=8), "state": "diverged"})
    assert [(t.name, t.front, t.best) for t in found.trials] == [
        *(("a", True, True), ("b", True, False), ("c", False, False), ("d", False, False)),
    ]
    assert (found.keys, found.held_out, found.diverges) == (["rank"], True, True)


def test_a_sweep_without_a_finite_loss_has_no_best(empty_project: Project) -> None:
    found = sweep(empty_project, a={**trial(None, rank=1), "state": "diverged"})
    assert not found.trials[0].best
    assert found.keys == []


def test_a_name_in_a_sweep_does_not_lead_elsewhere(empty_project: Project) -> None:
    found = sweep(empty_project, **{"../../base": trial(1.0)})
    assert found.trials[0].path.parent == empty_project.root / "artifacts/sweep"


@pytest.mark.parametrize(
    "row", [1, {}, {"values": 3, "eval_loss": None}], ids=["number", "empty", "values"]
)
def test_another_sweep_is_refused_in_one_sentence(empty_project: Project, row: Any) -> None:
    with pytest.raises(UserError, match=r"sweep\.json holds no sweep"):
        sweep(empty_project, a=row)


def test_pages_pictures_and_numbers_of_what_an_extension_measured(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(project, monkeypatch)
    make(project, PROBES)
    opened = open_project(project / "params.yaml")
    pages = {page.key: page for page in read_pages(opened)}
    assert [*pages] == ["evaluate", "overview", "probe_norm", "probe_size"]
    assert pages["probe_norm"].about == "about norm" and pages["probe_norm"].path
    pictures = {picture.key: picture for picture in read_pictures(opened)}
    shares = pictures["overview/shares"]
    assert (shares.title, shares.about, shares.shows) == ("Shares", "Figure 1", "half")
    assert [path.name for path in shares.numbers] == ["shares.csv"]
    plain = pictures["probes/norm/picture"]
    assert (plain.title, plain.about) == ("Probe of norm", "about norm")
    assert [path.name for path in plain.numbers] == ["values.csv"]
    text = numbers_of(project / "artifacts/probes/norm/values.csv", project)
    assert text.startswith("## artifacts/probes/norm/values.csv\n\n**Shares of words**\n\n| word |")
    assert "| hund | 0.1235 |" in text
    manifest = project / "artifacts/full_finetuned/manifest.json"
    assert '"files"' not in numbers_of(manifest, project)


def test_of_a_group_what_did_not_run_is_a_page_without_a_file(
    empty_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(empty_project.root, monkeypatch)
    pages = read_pages(open_project(empty_project.root / "params.yaml"))
    assert [(page.key, page.path) for page in pages] == [("probe_norm", None), ("probe_size", None)]


@pytest.mark.parametrize("name", ["no.csv", "no.json", "model.safetensors"])
def test_numbers_that_cannot_be_read_say_so(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\x00[" if name == "no.json" else b"")
    assert len(numbers_of(tmp_path / name, tmp_path).splitlines()) >= 3


def test_a_csv_whose_quote_never_ends_says_so(tmp_path: Path) -> None:
    (tmp_path / "no.csv").write_text('"' + "a" * 200_000, encoding="utf-8")
    before = csv.field_size_limit(131_072)  # Python's own, before a data file is read
    try:
        text = numbers_of(tmp_path / "no.csv", tmp_path)
    finally:
        csv.field_size_limit(before)
    assert "It cannot be read: field larger than field limit" in text


def test_an_svg_alone_is_listed(empty_project: Project, brief: Path) -> None:
    folder = empty_project.root / "artifacts/evaluation"
    shutil.copytree(brief / "artifacts/evaluation", folder)
    (folder / "more.svg").write_text("<svg/>", encoding="utf-8")
    assert [p.path.name for p in read_pictures(empty_project)] == [
        "finetuning_comparison.png",
        "more.svg",
    ]

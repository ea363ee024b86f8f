"""Studies measure what the program does: each number is found again by the commands that a user
types.
"""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lab import runner
from lab.measures import NextTokenAnswers, ask
from lab.runner import METHODS, Trained
from lab.studies import methods
from lab.studies.fact_correction import column_names
from lab.studies.knowledge_correction import StudyKnowledgeCorrection, runs_of
from lab.tables import Cell, read_table
from tests.lab_projects import BRIEF
from torch import nn

from pipeline.data.answers.prompts import read_prompts
from pipeline.data.formats import read_examples
from pipeline.errors import Interrupted
from pipeline.evaluation.comparison import weight_bytes
from pipeline.files.artifact import read_manifest
from pipeline.inference import engine
from pipeline.inference.score import score
from pipeline.project.logs.run_log import TELEMETRY, TELEMETRY_COLUMNS
from pipeline.project.params.load import Params
from pipeline.project.params.schema import hints
from pipeline.project.runner import Event, Job, Progress, input_facts, run
from pipeline.stages.registry import GRAPH, open_project
from pipeline.stages.searches import grids
from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.process import Forked
from tests.helpers.projects import ROOT, STAGES, WORK, folder_bytes, load, make, make_one, refusal

STUDIES = [name for name, stage in STAGES.items() if stage.kind == "study"]
SAME = 1e-5  # adapters that trained together differ from one alone by rounding


def table(root: Path, study: str, name: str) -> list[dict[str, Cell]]:
    return read_table(root / f"artifacts/studies/{study}/{name}.csv")


def mean(cell: Cell) -> float:
    assert isinstance(cell, int | float)
    return float(cell)


def lora_after(project: Path, *overrides: str) -> engine.LoadedModel:
    """The adapter that `lora finetune lora` makes with these settings."""
    make(project, ["finetune_lora"], [f"finetune_lora.{override}" for override in overrides])
    return engine.load(project / "artifacts/expanded", project / "artifacts/lora_adapter")


def probability(loaded: engine.LoadedModel, prompt: str, word: str) -> float:
    (token,) = loaded.tokenizer.continuation(prompt, word)
    return float(engine.next_probabilities(loaded, prompt)[token])


@pytest.fixture
def settings_read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The settings that studies read, as section.key: what checks them, or names them in a
    manifest, does not count.
    """
    keys = set[str]()

    def watched(name: str, section: type) -> None:
        plain: Any = section.__getattribute__

        def getting(self: object, key: str) -> object:
            if sys._getframe(1).f_globals["__name__"].startswith("lab.studies."):
                keys.add(f"{name}.{key}")
            return plain(self, key)

        monkeypatch.setattr(section, "__getattribute__", getting)

    for name in STUDIES:
        watched(name, GRAPH.sections[name])
    return keys


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.sampled(4)
def test_a_study_reads_each_setting_and_is_tables_a_picture_and_a_paragraph_the_same_twice(
    studied: Path, tmp_path: Path, name: str, settings_read: set[str]
) -> None:
    root = tmp_path / "project"
    shutil.copytree(studied, root, ignore=shutil.ignore_patterns("runs"))
    before = folder_bytes(root / STAGES[name].path)
    method = STAGES[name].method
    assert {f"{method}.png", "report.md", "manifest.json"} < set(before)
    manifest = json.loads(before["manifest.json"])
    assert {f"{table}.csv" for table in manifest["tables"]} == {
        one for one in before if one.endswith(".csv")
    }
    report = before["report.md"].decode()
    assert (
        report.startswith("# ") and "§" in report.splitlines()[0] and f"]({method}.png)" in report
    )
    make(root, [name], BRIEF, force=True)
    assert folder_bytes(root / STAGES[name].path) == before
    assert not (root / "runs" / name / "parts").exists()
    assert {f"{name}.{key}" for key in hints(GRAPH.sections[name])} <= settings_read


def test_the_documents_rows_are_those_of_an_adapter_trained_by_itself(
    studied: Path, project: Path
) -> None:
    rows = [row for row in table(studied, "fact_correction", "rows") if row["model"] != "original"]
    near = next(row for row in table(studied, "fact_correction", "settings") if row["nearest"])
    for model, targets in (("v_proj", "[v_proj]"), ("all", "[q_proj, k_proj, v_proj, o_proj]")):
        given = [f"{key}={near[key]}" for key in ("window", "learning_rate", "alpha")]
        loaded = lora_after(
            project,
            "data=data/fact_correction.de.txt",
            "epochs=2",
            f"target_modules={targets}",
            *given,
        )
        for row in (row for row in rows if row["model"] == model):
            found = probability(loaded, str(row["prompt"]), str(row["first_choice"]))
            assert mean(row["measured"]) == pytest.approx(found, abs=SAME)
            assert str(row["ours"]) == engine.top_k(loaded, str(row["prompt"]), 1)[0].token


def test_the_original_is_the_expanded_base_and_the_document_is_quoted(studied: Path) -> None:
    base = engine.load(studied / "artifacts/expanded")
    quoted = yaml.safe_load((ROOT / "document/data/document.yaml").read_text(encoding="utf-8"))[
        "fact_correction"
    ]
    said = {
        (row["prompt"], model): row[model]
        for row in quoted
        for model in ("original", "v_proj", "all")
    }
    for row in table(studied, "fact_correction", "rows"):
        assert said[row["prompt"], row["model"]] == {row["first_choice"]: row["document"]}  # type: ignore[index]
        if row["model"] == "original":
            found = probability(base, str(row["prompt"]), str(row["first_choice"]))
            assert mean(row["measured"]) == pytest.approx(found, abs=1e-6)


def test_no_other_setting_has_more_of_the_documents_first_choices(studied: Path) -> None:
    rows = table(studied, "fact_correction", "settings")
    order = sorted(rows, key=lambda row: (-mean(row["first_choices"]), mean(row["distance"])))
    assert [row["nearest"] for row in order] == [True, *[False] * (len(rows) - 1)]


def test_with_one_part_put_back_the_model_is_that_of_the_other(
    studied: Path, project: Path
) -> None:
    near = next(row for row in table(studied, "fact_correction", "settings") if row["nearest"])
    given = [f"{key}={near[key]}" for key in ("window", "learning_rate", "alpha")]
    loaded = lora_after(
        project, "data=data/fact_correction.de.txt", "epochs=2", "target_modules=[v_proj]", *given
    )
    base = engine.load(project / "artifacts/expanded")
    parts = {
        row["trained"]: row
        for row in table(studied, "fact_correction", "parts")
        if row["model"] == "v_proj"
    }
    prompt, word, column = "die katze sitzt auf dem", "sofa", "katze_sofa"
    assert mean(parts["both"][column]) == pytest.approx(probability(loaded, prompt, word), abs=SAME)
    # the trained embeddings and head on the base, by hand
    plain = engine.load(project / "artifacts/expanded")
    for end in ("embeddings", "head"):
        getattr(plain.model, end).load_state_dict(getattr(loaded.model, end).state_dict())
        getattr(loaded.model, end).load_state_dict(getattr(base.model, end).state_dict())
    # what the document's corrected models say there
    bled = probability(plain, "das kind spielt im", "wald")
    assert mean(parts["embeddings and head"][column]) == pytest.approx(
        probability(plain, prompt, word), abs=SAME
    )
    assert mean(parts["embeddings and head"]["kind_wald"]) == pytest.approx(bled, abs=SAME)
    assert mean(parts["A and B"][column]) == pytest.approx(
        probability(loaded, prompt, word), abs=SAME
    )


def test_no_column_is_another_prompts() -> None:
    pairs = [
        *(
            ("das kind spielt im", "garten"),
            ("das kind spielt im", "wald"),
            ("ein kind spielt im", "wald"),
        ),
        *(("das kind sitzt im", "wald"), ("wasser", "kocht")),
    ]
    assert column_names(pairs) == {
        ("das kind spielt im", "garten"): "kind_garten",
        ("das kind spielt im", "wald"): "das_kind_spielt_im_wald",
        ("ein kind spielt im", "wald"): "ein_kind_spielt_im_wald",
        ("das kind sitzt im", "wald"): "das_kind_sitzt_im_wald",
        ("wasser", "kocht"): "wasser_kocht",
    }


def test_each_part_is_set_beside_the_words_that_should_stay(studied: Path) -> None:
    """The report's means are those of the columns of the prompts that must keep their answer."""
    group = yaml.safe_load((studied / "data/prompts.yaml").read_text(encoding="utf-8"))[
        "fact_correction"
    ]
    staying = [f"{each['prompt'].split()[1]}_{each['answer']}" for each in group["must_keep"]]
    report = (studied / "artifacts/studies/fact_correction/report.md").read_text(encoding="utf-8")
    for row in table(studied, "fact_correction", "parts"):
        share = sum(mean(row[column]) for column in staying) / len(staying)
        assert f"{row['model']}, {row['trained']}: {share:.0%}" in report


def test_the_base_of_the_widths_is_that_of_the_documents_rows_and_the_other_is_as_wide_as_asked(
    studied: Path,
) -> None:
    rows = table(studied, "fact_correction", "rows")
    corrected = [
        mean(row["measured"])
        for row in rows
        if (row["kind"], row["model"]) == ("corrected", "v_proj")
    ]
    base, other = table(studied, "fact_correction", "widths")  # one seed
    assert mean(base["probability_target"]) == pytest.approx(
        sum(corrected) / len(corrected), rel=1e-4
    )
    assert (base["d_model"], other["d_model"]) == (64, 256) and base["probability_kept"] != other[
        "probability_kept"
    ]


def test_a_projection_learns_what_an_adapter_trained_by_itself_does(
    studied: Path, project: Path
) -> None:
    rows = {row["targets"]: row for row in table(studied, "fact_correction", "projections")}
    assert set(rows) == {
        *(
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "feed_forward",
            "q_proj+v_proj",
            "attention",
            "all",
        ),
    }
    given = ("data=data/fact_correction.de.txt", "epochs=2", "alpha=4", "train_embeddings=none")
    loaded = lora_after(project, *given, "target_modules=[q_proj, v_proj]")
    prompts = [
        p for p in read_prompts(project / "data/prompts.yaml", "p") if p.group == "fact_correction"
    ]
    found = [probability(loaded, p.prompt, p.corrected) for p in prompts if p.rule == "must_change"]
    row = rows["q_proj+v_proj"]
    assert mean(row["probability_target"]) == pytest.approx(sum(found) / len(found), abs=SAME)
    examples = read_examples(project / "data/fact_correction.de.txt", "d")
    assert mean(row["new_loss"]) == pytest.approx(score(loaded, examples).loss, abs=1e-4)


def test_rows_of_new_words_begin_as_expand_vocab_has_them_at_zero_or_as_an_old_row(
    studied: Path,
) -> None:
    rows = {row["start"]: row for row in table(studied, "fact_correction", "new_rows")}
    base = engine.load(studied / "artifacts/expanded")
    examples = read_examples(studied / "data/finetune.de.txt", "d")
    assert mean(rows["mean_noise"]["new_loss_before"]) == pytest.approx(
        score(base, examples).loss, rel=1e-5
    )
    first, stop = read_manifest(studied / "artifacts/expanded")["new_rows"]
    with torch.no_grad():
        for module in (base.model.embeddings, base.model.head):
            module.get_parameter("weight")[first:stop] = 0
    assert mean(rows["zeros"]["new_loss_before"]) == pytest.approx(
        score(base, examples).loss, rel=1e-5
    )
    assert len({row["new_loss_before"] for row in rows.values()}) == 3
    assert all(mean(row["new_loss_after"]) < mean(row["new_loss_before"]) for row in rows.values())


def test_a_window_is_shown_in_words(studied: Path) -> None:
    report = (studied / "artifacts/studies/fact_correction/report.md").read_text(encoding="utf-8")
    assert "| windows of 4 tokens |" in report and "| whole sentences |" in report
    assert "window 0" not in report and "window none" not in report


def test_the_steps_of_the_trajectory_are_those_of_a_run_that_ends_there(
    studied: Path, project: Path
) -> None:
    prompt = "die katze sitzt auf dem"
    rows = {(row["step"], row["word"]): row for row in table(studied, "trajectory", "steps")}
    base = engine.load(project / "artifacts/expanded")
    # one batch: a step an epoch
    whole = lora_after(project, "data=data/fact_correction.de.txt", "epochs=2", "window=0")
    for word in ("tisch", "sofa"):
        assert mean(rows[0, word]["window_0"]) == pytest.approx(
            probability(base, prompt, word), abs=1e-6
        )
        assert mean(rows[2, word]["window_0"]) == pytest.approx(
            probability(whole, prompt, word), abs=SAME
        )


def test_figure_3_goes_on_to_the_documents_last_step_whatever_the_trajectorys_are(
    studied: Path,
) -> None:
    steps = read_table(studied / "artifacts/figures/gradient_example_descent.csv")
    assert [row["step"] for row in steps] == list(range(51))


def test_a_signal_during_the_last_look_ends_the_study(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(loaded: engine.LoadedModel, prompts: Sequence[str]) -> NextTokenAnswers:
        looks.append(loaded.name)
        if len(looks) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return ask(loaded, prompts)

    looks = list[str]()
    monkeypatch.setattr("lab.studies.trajectory.ask", asked)
    with pytest.raises(Interrupted):
        make(project, ["study_trajectory"], BRIEF)
    assert len(looks) == 3


def test_every_method_knows_what_evaluate_says_of_its_stage(studied: Path) -> None:
    metrics = read_json(studied / "artifacts/evaluation/metrics.json")
    rows = {row["method"]: row for row in table(studied, "methods", "knowledge")}
    costs = {row["method"]: row for row in table(studied, "methods", "cost")}
    for method, variant in (
        *(
            ("training from scratch", "scratch"),
            ("full fine-tuning", "full"),
            ("layer freezing", "freeze"),
        ),
        *(("LoRA", "lora"), ("prefix tuning", "prefix"), ("prompt tuning", "prompt")),
    ):
        said, row, cost = metrics[variant], rows[method], costs[method]
        assert mean(row["new_loss"]) == pytest.approx(said["new_loss"], rel=1e-5)
        assert mean(row["new_done"]) == said["new_completed"]
        assert mean(row["old_rise"]) == pytest.approx(said["forgetting"]["loss_rise"], rel=1e-4)
        assert mean(row["old_kept"]) == pytest.approx(said["forgetting"]["answers_kept"], rel=1e-5)
        assert cost["trained"] == said["trainable"]
        assert mean(cost["stored_kB"]) == pytest.approx(said["bytes"] / 1000)
        assert mean(cost["share"]) == pytest.approx(said["trainable_percent"] / 100, rel=1e-5)
        assert cost["predicted_kB"] == pytest.approx(mean(cost["measured_kB"]), rel=0.03)


def test_the_methods_times_lie_beside_the_run_and_not_in_what_is_tracked(studied: Path) -> None:
    times = read_table(studied / "runs/study_methods/time.csv")
    assert [row["method"] for row in times] == [
        row["method"] for row in table(studied, "methods", "cost")
    ]
    assert all(mean(row["ms_a_step"]) > 0 for row in times)


def test_a_methods_time_is_that_of_all_its_steps_after_a_kill(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "METHODS", {"LoRA": METHODS["LoRA"]})
    stage = STAGES["study_methods"]
    begun = run(
        open_project(project / "params.yaml", BRIEF), stage, WORK[stage.name], checkpoint_every=1
    )
    with closing(begun):
        assert any(isinstance(event, Progress) and event.done == 3 for event in begun)
    assert list((project / "runs/study_methods/parts").rglob("checkpoint-*"))
    _, seen = make_one(project, stage.name, BRIEF)
    assert not [event.text for event in seen if "resumed" in event.text]


def test_a_time_is_divided_by_the_steps_of_its_own_run(tmp_path: Path) -> None:
    folders = []
    for steps, seconds in ((10, 10.0), (4, 8.0)):  # the second stopped early
        folders.append(tmp_path / str(steps) / "made")
        folders[-1].mkdir(parents=True)
        lines = ",".join(TELEMETRY_COLUMNS), f"{steps},{seconds},1,1,cpu,1,1"
        (folders[-1].parent / TELEMETRY).write_text("\n".join(lines) + "\n", encoding="utf-8")
    row = methods.time_of("LoRA", [Trained("LoRA", None, folder) for folder in folders])
    assert row == {"method": "LoRA", "steps": 7, "seconds": 9, "ms_a_step": 1000}
    assert [(cell.low, cell.high) for cell in (row["steps"], row["seconds"])] == [(4, 10), (8, 10)]


def test_a_is_faster_where_its_name_says_so() -> None:
    faster = "LoRA+, A 16 × faster"
    plain, slower_b, faster_a = (
        METHODS[name].run("", Params(kinds=GRAPH.sections), 0).sections["finetune_lora"]
        for name in ("LoRA", "LoRA+, A faster", faster)
    )
    assert (
        slower_b.learning_rate
        == plain.learning_rate
        == faster_a.learning_rate * faster_a.loraplus_ratio
    )
    assert faster_a.learning_rate == 16 * plain.learning_rate


def test_bitsandbytes_counts_where_a_base_is_kept_in_few_bits(project: Path) -> None:
    def counts(name: str, *overrides: str) -> bool:
        return (
            "bitsandbytes"
            in input_facts(open_project(project / "params.yaml", overrides), STAGES[name])[
                "versions"
            ]
        )

    few = "finetune_lora.quantization=int8"
    assert (
        counts("study_methods")
        and counts("study_knowledge_correction", few)
        and counts("finetune_lora", few)
    )
    assert not any(counts(name) for name in STAGES if name not in ("study_methods", "claims"))


def test_the_terminal_shows_the_times(cli: Lora, studied: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(studied, root)
    code, out, _ = cli("study", "methods", *(f"--set={one}" for one in BRIEF), cwd=root)
    assert code == 0 and "ms a step" in out[out.index("Time on this machine") :]


def test_forgetting_begins_with_the_base_and_ends_where_evaluate_does(studied: Path) -> None:
    metrics = read_json(studied / "artifacts/evaluation/metrics.json")
    rows = {(row["method"], row["epoch"]): row for row in table(studied, "forgetting", "epochs")}
    for method, variant in (
        ("full fine-tuning", "full"),
        ("LoRA", "lora"),
        ("layer freezing", "freeze"),
    ):
        assert mean(rows[method, 0]["new_loss"]) == pytest.approx(
            metrics["expanded"]["new_loss"], rel=1e-5
        )
        assert mean(rows[method, 2]["new_loss"]) == pytest.approx(
            metrics[variant]["new_loss"], rel=1e-5
        )
        rise = metrics[variant]["forgetting"]["loss_rise"]
        assert mean(rows[method, 2]["old_rise"]) == pytest.approx(rise, rel=1e-4)


def test_a_curve_is_whole_whatever_stops_its_method_early(studied: Path, project: Path) -> None:
    early = ("eval_share=0.3", "eval_steps=1", "patience=1")
    make(project, ["study_forgetting"], [*BRIEF, *(f"finetune_lora.{one}" for one in early)])
    ours, theirs = (
        folder_bytes(root / "artifacts/studies/forgetting") for root in (project, studied)
    )
    assert ours["epochs.csv"] == theirs["epochs.csv"]


@pytest.mark.slow
def test_a_run_that_diverges_is_counted_and_a_row_of_them_is_empty(project: Path) -> None:
    make(project, ["study_rank"], [*BRIEF, "study_rank.learning_rates=[1e-3, 1e30]"])
    rows = {(row["learning_rate"], row["method"]): row for row in table(project, "rank", "rates")}
    for method in ("lora", "full"):
        assert (rows[1e30, method]["diverged"], rows[1e30, method]["new_loss"]) == (1, None)
        assert rows[1e-3, method]["diverged"] == 0 < mean(rows[1e-3, method]["new_loss"])
    assert (
        "within 0.05 nats of its best from 0.001 to "
        "0.001" in read_manifest(project / "artifacts/studies/rank")["text"]
    )


def test_where_no_run_of_rank_learns_it_says_so(project: Path) -> None:
    make(
        project,
        ["study_rank"],
        [*BRIEF, "study_rank.alphas=[1e30]", "study_rank.learning_rates=[1e30]"],
    )
    text = read_manifest(project / "artifacts/studies/rank")["text"]
    assert (
        "full fine-tuning diverges at each, LoRA diverges at each" in text
        and "none, as every run diverged" in text
    )


def test_what_is_wrong_in_a_run_is_said_with_its_name(cli: Lora, project: Path) -> None:
    given = (
        "finetune_full.learning_rate=1e30",
        "study_methods.seeds=[0]",
        "train_from_scratch.epochs=1",
    )
    code, _, err = cli("study", "methods", *(f"--set={one}" for one in given), cwd=project)
    assert (
        code == 1
        and "error: study_methods, full fine-tuning, seed 0: finetune_full: the loss is nan" in err
    )


def test_a_rank_is_measured_as_an_adapter_trained_by_itself_is(
    studied: Path, project: Path
) -> None:
    rows = table(studied, "rank", "ranks")
    row = next(row for row in rows if (row["rank"], row["alpha"]) == (2, "r"))
    made = ("rank=2", "alpha=2.0", "train_embeddings=new_rows")
    make(project, ["finetune_lora", "merge", "evaluate"], [f"finetune_lora.{one}" for one in made])
    said = read_json(project / "artifacts/evaluation/metrics.json")["lora"]
    assert mean(row["new_loss"]) == pytest.approx(said["new_loss"], abs=1e-4)
    assert mean(row["old_rise"]) == pytest.approx(said["forgetting"]["loss_rise"], abs=1e-4)


@pytest.mark.slow
def test_a_correction_that_retains_moves_the_rest_less(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns("runs", ".lora-cache"))
    make(root, ["study_knowledge_correction"], ["study_knowledge_correction.seeds=[0]"])
    rows = {row["adapter"]: row for row in table(root, "knowledge_correction", "summary")}
    assert list(rows)[:3] == ["none", "v_proj, as written", "v_proj"]
    for targets in ("v_proj", "all targets"):
        plain, kept = rows[targets], rows[f"{targets}, retain"]
        assert mean(plain["corrected"]) == mean(kept["corrected"]) == 1
        assert mean(kept["divergence"]) < mean(plain["divergence"]) / 2
        assert mean(kept["kept"]) == 2 >= mean(plain["kept"])
    assert all(mean(row["merge_differs_by"]) < 1e-5 for name, row in rows.items() if name != "none")


def test_the_recipe_as_written_trains_v_alone_at_its_own_rate(studied: Path, project: Path) -> None:
    row = table(studied, "knowledge_correction", "prompts")[0]
    given = (
        "data=data/knowledge_correction.de.txt",
        "epochs=2",
        "alpha=4",
        "train_embeddings=new_rows",
    )
    loaded = lora_after(project, *given, "learning_rate=2e-4", "target_modules=[v_proj]")
    found = probability(loaded, str(row["prompt"]), "euro")
    assert mean(row["v_proj_as_written"]) == pytest.approx(found, abs=SAME)
    lora_after(project, *given)  # all targets: the largest adapter of the study
    share = weight_bytes(project / "artifacts/lora_adapter") / weight_bytes(
        project / "artifacts/expanded"
    )
    text = read_manifest(studied / "artifacts/studies/knowledge_correction")["text"]
    assert text.startswith("Of 1 prompt to correct and 2 to keep")
    assert f"An adapter takes {share:.1%} of the base's bytes at most" in text


def test_patterns_of_finetune_lora_change_no_correction(studied: Path, project: Path) -> None:
    patterns = ("rank_pattern={v_proj: 2}", "alpha_pattern={v_proj: 2}")
    make(
        project,
        ["study_knowledge_correction"],
        [*BRIEF, *(f"finetune_lora.{one}" for one in patterns)],
    )
    ours, theirs = (
        folder_bytes(root / "artifacts/studies/knowledge_correction") for root in (project, studied)
    )
    assert ours["prompts.csv"] == theirs["prompts.csv"]


def test_a_base_whose_v_is_no_linear_of_its_own_goes_without_v_alone(project: Path) -> None:
    params = load(project / "params.yaml", BRIEF)

    def asked(*linears: str) -> list[object]:
        model: Any = nn.ModuleDict({name: nn.Linear(2, 2) for name in linears})
        settings = params.of(StudyKnowledgeCorrection)
        return [
            grid.get("target_modules")
            for run in runs_of(settings, params.finetune_lora, model)
            for grid in grids(run.sections["finetune_sweep"])
        ]

    every = params.finetune_lora.target_modules
    assert asked("c_attn") == [(every,)]
    assert asked("q_proj", "v_proj") == [None, (("v_proj",), every)]


def test_a_correction_that_was_killed_while_it_merged_ends_with_the_same_bytes(
    studied: Path, project: Path
) -> None:
    command = ["lora", "study", "knowledge_correction", *(f"--set={one}" for one in BRIEF)]
    dies = ("pipeline.weights.merge.merge_into", 2)
    assert Forked(command, project, dies=dies).end()[0] == -signal.SIGKILL
    make(project, ["study_knowledge_correction"], BRIEF)
    ours, theirs = (
        folder_bytes(root / "artifacts/studies/knowledge_correction") for root in (project, studied)
    )
    assert ours == theirs


def test_a_killed_study_goes_on_with_the_run_that_it_was_in_and_with_those_that_are_broken_and_ends_with_the_same_bytes(
    studied: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = folder_bytes(studied / "artifacts/studies/fact_correction")
    command = ["lora", "study", "fact_correction", *(f"--set={one}" for one in BRIEF)]
    dies = ("lab.runner._train_run", 3)
    assert Forked(command, project, dies=dies).end()[0] == -signal.SIGKILL
    assert not (project / "artifacts/studies/fact_correction").exists()
    (broken,) = project.glob("runs/study_fact_correction/parts/whole sentences/made/sweep.json")
    broken.write_text("{}", encoding="utf-8")
    begun, work = list[str](), runner._train_run

    def counted(part: Job, run: runner.Run, number: int, of: int) -> Generator[Event, None, None]:
        begun.append(run.name)
        return work(part, run, number, of)

    monkeypatch.setattr(runner, "_train_run", counted)
    make(project, ["study_fact_correction"], BRIEF)
    assert begun[:4] == [
        "whole sentences",
        "embeddings all",
        "embeddings new_rows",
        "embeddings none",
    ]
    assert begun[4:] == ["wider base, V only", "projections"]
    assert folder_bytes(project / "artifacts/studies/fact_correction") == wanted


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["nosuch"], "Unknown study nosuch. Choose one of intrinsic_dimension, "),
        (
            ["rank", "--set", "study_rank.ranks=[4, 0]"],
            "study_rank.ranks must be at least 1, got 0. Change it",
        ),
        (
            ["rank", "--set", "study_rank.ranks=4"],
            "study_rank.ranks must be a list of values, such as [1, 2], got 4",
        ),
        (
            ["rank", "--set", "study_rank.ranks=[]"],
            "study_rank.ranks must be a list of values, such as [1, 2], got []",
        ),
        (
            ["rank", "--set", "study_rank.seeds=[1, 1]"],
            "study_rank.seeds has 1 twice. Remove one of them from --set",
        ),
        (
            ["rank", "--set", "study_rank.old_data=no.txt"],
            "no.txt is not a file. Name an existing one in section study_r",
        ),
        (
            ["trajectory", "--set", "study_trajectory.document=data/prompts.yaml"],
            "data/prompts.yaml has no section traj",
        ),
        (
            ["fact_correction", "--set", "study_fact_correction.prompts=other.yaml"],
            "other.yaml has no group fact_corre",
        ),
        (
            ["knowledge_correction", "--set", "study_knowledge_correction.groups=[mine]"],
            "data/prompts.yaml has none of the groups mine",
        ),
        (
            ["knowledge_correction", "--set", "study_knowledge_correction.data="],
            "study_knowledge_correction.data names",
        ),
        (
            ["rank", "--set", "base=other"],
            "study_rank measures what the document says of MiniGPT; base",
        ),
        *(
            (
                [study, "--set", f"study_{study}.{key}={file}.yaml"],
                f"{file}.yaml: 'thron', expected after 'die {of}",
            )
            for study, key, file, of in (
                (
                    "fact_correction",
                    "document",
                    "said",
                    "katze sitzt auf dem', is not in the vocabulary of expanded. Use another",
                ),
                (
                    "fact_correction",
                    "prompts",
                    "asked",
                    "katze sitzt auf dem', is not in the vocabulary of expanded.",
                ),
                (
                    "trajectory",
                    "document",
                    "said",
                    "katze sitzt auf dem', is not in the vocabulary of expanded.",
                ),
                (
                    "knowledge_correction",
                    "prompts",
                    "asked",
                    "währung von bulgarien ist der', is not in the vocabulary of expanded.",
                ),
            )
        ),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(
    cli: Lora, project: Path, given: Sequence[str], problem: str
) -> None:
    (project / "other.yaml").write_text(
        "g: {must_keep: [{prompt: der hund, answer: läuft}]}\n", encoding="utf-8"
    )
    for name, of in (("said", "document"), ("asked", "prompts")):
        text = re.sub(
            "sofa|euro", "thron", (project / f"data/{of}.yaml").read_text(encoding="utf-8")
        )
        (project / f"{name}.yaml").write_text(text, encoding="utf-8")
    assert problem in refusal(cli("study", *given, cwd=project))


def test_the_studies_are_listed_and_one_is_shown_from_the_cache(
    cli: Lora, studied: Path, tmp_path: Path
) -> None:
    code, out, _ = cli("study", cwd=studied)
    assert code == 0 and all(STAGES[name].method in out for name in STUDIES)
    root = tmp_path / "project"
    shutil.copytree(studied, root)
    code, out, err = cli("study", "fact-correction", *(f"--set={one}" for one in BRIEF), cwd=root)
    assert code == 0 and "taken from the cache" in err
    line = next(line for line in out.splitlines() if " v_proj " in line)
    assert line.split()[:2] == ["v_proj", "sofa"] and "94%" in line.split()
    assert "In words: " in out

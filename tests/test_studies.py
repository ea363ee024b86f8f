"""Studies measure what the program does: each number is found again by the commands that a user types."""

import json
import shutil
import signal
from collections.abc import Generator, Sequence
from pathlib import Path

import pytest
import yaml

from pipeline import engine
from pipeline.dag import STAGES
from pipeline.runner import Event, Job
from pipeline.studies import runs
from pipeline.tables import Cell, Spread, read_table
from tests.conftest import Lora
from tests.forked import Forked
from tests.support import BRIEF, ROOT, folder_bytes, make, refusal

STUDIES = [name for name, stage in STAGES.items() if stage.kind == "study"]
SAME = 1e-5  # adapters that trained together differ from one alone by rounding


def table(root: Path, study: str, name: str) -> list[dict[str, Cell]]:
    return read_table(root / f"artifacts/studies/{study}/{name}.csv")


def mean(cell: Cell) -> float:
    """Of one seed or several: a file does not tell a spread of one value."""
    return cell.mean if isinstance(cell, Spread) else float(cell)  # type: ignore[arg-type]


def trained(project: Path, *overrides: str) -> engine.Loaded:
    """The adapter that `lora finetune lora` makes with these settings."""
    make(project, ["finetune_lora"], [f"finetune_lora.{override}" for override in overrides])
    return engine.load(project / "artifacts/expanded", project / "artifacts/lora_adapter")


def probability(loaded: engine.Loaded, prompt: str, word: str) -> float:
    (token,) = loaded.tokenizer.continuation(prompt, word)
    return float(engine.next_probabilities(loaded, prompt)[token])


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_tables_a_picture_and_a_paragraph_the_same_twice(studied: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "project"
    shutil.copytree(studied, root, ignore=shutil.ignore_patterns("runs"))
    before = folder_bytes(root / STAGES[name].path)
    method = STAGES[name].method
    assert {f"{method}.png", "report.md", "manifest.json"} < set(before)
    manifest = json.loads(before["manifest.json"])
    assert {f"{table}.csv" for table in manifest["tables"]} == {one for one in before if one.endswith(".csv")}
    report = before["report.md"].decode()
    assert report.startswith("# ") and "§" in report.splitlines()[0] and f"]({method}.png)" in report
    make(root, [name], BRIEF, force=True)
    assert folder_bytes(root / STAGES[name].path) == before
    assert not (root / "runs" / name / "parts").exists()


def test_the_documents_rows_are_those_of_an_adapter_trained_by_itself(studied: Path, project: Path) -> None:
    rows = [row for row in table(studied, "fact_correction", "rows") if row["model"] != "original"]
    near = next(row for row in table(studied, "fact_correction", "settings") if row["nearest"])
    for model, targets in (("v_proj", "[v_proj]"), ("all", "[q_proj, k_proj, v_proj, o_proj]")):
        given = [f"{key}={near[key]}" for key in ("window", "learning_rate", "alpha")]
        loaded = trained(project, "data=data/fact_correction.de.txt", "epochs=2", f"target_modules={targets}", *given)
        for row in (row for row in rows if row["model"] == model):
            found = probability(loaded, str(row["prompt"]), str(row["first_choice"]))
            assert mean(row["measured"]) == pytest.approx(found, abs=SAME)
            assert str(row["ours"]) == engine.top_k(loaded, str(row["prompt"]), 1)[0].token


def test_the_original_is_the_expanded_base_and_the_document_is_quoted(studied: Path) -> None:
    base = engine.load(studied / "artifacts/expanded")
    quoted = yaml.safe_load((ROOT / "data/document.yaml").read_text(encoding="utf-8"))["fact_correction"]
    said = {(row["prompt"], model): row[model] for row in quoted for model in ("original", "v_proj", "all")}
    for row in table(studied, "fact_correction", "rows"):
        assert said[row["prompt"], row["model"]] == {row["first_choice"]: row["document"]}  # type: ignore[index]
        if row["model"] == "original":
            found = probability(base, str(row["prompt"]), str(row["first_choice"]))
            assert mean(row["measured"]) == pytest.approx(found, abs=1e-6)


def test_no_other_setting_has_more_of_the_documents_first_choices(studied: Path) -> None:
    rows = table(studied, "fact_correction", "settings")
    order = sorted(rows, key=lambda row: (-mean(row["first_choices"]), mean(row["mean_distance"])))
    assert [row["nearest"] for row in order] == [True, *[False] * (len(rows) - 1)]


def test_with_one_part_put_back_the_model_is_that_of_the_other(studied: Path, project: Path) -> None:
    near = next(row for row in table(studied, "fact_correction", "settings") if row["nearest"])
    given = [f"{key}={near[key]}" for key in ("window", "learning_rate", "alpha")]
    loaded = trained(project, "data=data/fact_correction.de.txt", "epochs=2", "target_modules=[v_proj]", *given)
    base = engine.load(project / "artifacts/expanded")
    parts = {row["trained"]: row for row in table(studied, "fact_correction", "parts") if row["model"] == "v_proj"}
    prompt, word, column = "die katze sitzt auf dem", "sofa", "katze_sofa"
    assert mean(parts["both"][column]) == pytest.approx(probability(loaded, prompt, word), abs=SAME)
    plain = engine.load(project / "artifacts/expanded")  # the trained embeddings and head on the base, by hand
    for end in ("embeddings", "head"):
        getattr(plain.model, end).load_state_dict(getattr(loaded.model, end).state_dict())
        getattr(loaded.model, end).load_state_dict(getattr(base.model, end).state_dict())
    assert mean(parts["embeddings and head"][column]) == pytest.approx(probability(plain, prompt, word), abs=SAME)
    assert mean(parts["A and B"][column]) == pytest.approx(probability(loaded, prompt, word), abs=SAME)


def test_the_steps_of_the_trajectory_are_those_of_a_run_that_ends_there(studied: Path, project: Path) -> None:
    prompt = "die katze sitzt auf dem"
    rows = {(row["step"], row["word"]): row for row in table(studied, "trajectory", "steps")}
    base = engine.load(project / "artifacts/expanded")
    whole = trained(project, "data=data/fact_correction.de.txt", "epochs=2", "window=0")  # one batch: a step an epoch
    for word in ("tisch", "sofa"):
        assert mean(rows[0, word]["window_0"]) == pytest.approx(probability(base, prompt, word), abs=1e-6)
        assert mean(rows[2, word]["window_0"]) == pytest.approx(probability(whole, prompt, word), abs=SAME)


def test_every_method_knows_what_evaluate_says_of_its_stage(studied: Path) -> None:
    metrics = json.loads((studied / "artifacts/evaluation/metrics.json").read_text(encoding="utf-8"))
    rows = {row["method"]: row for row in table(studied, "methods", "knowledge")}
    costs = {row["method"]: row for row in table(studied, "methods", "cost")}
    for method, variant in (
        *(("training from scratch", "scratch"), ("full fine-tuning", "full"), ("layer freezing", "freeze")),
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
    assert [row["method"] for row in times] == [row["method"] for row in table(studied, "methods", "cost")]
    assert all(mean(row["ms_a_step"]) > 0 for row in times)


def test_the_terminal_shows_the_times(cli: Lora, studied: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(studied, root)
    code, out, _ = cli("study", "methods", *(f"--set={one}" for one in BRIEF), cwd=root)
    assert code == 0 and "ms a step" in out[out.index("Time on this machine") :]


def test_forgetting_begins_with_the_base_and_ends_where_evaluate_does(studied: Path) -> None:
    metrics = json.loads((studied / "artifacts/evaluation/metrics.json").read_text(encoding="utf-8"))
    rows = {(row["method"], row["epoch"]): row for row in table(studied, "forgetting", "epochs")}
    for method, variant in (("full fine-tuning", "full"), ("LoRA", "lora"), ("layer freezing", "freeze")):
        assert mean(rows[method, 0]["new_loss"]) == pytest.approx(metrics["expanded"]["new_loss"], rel=1e-5)
        assert mean(rows[method, 2]["new_loss"]) == pytest.approx(metrics[variant]["new_loss"], rel=1e-5)
        rise = metrics[variant]["forgetting"]["loss_rise"]
        assert mean(rows[method, 2]["old_rise"]) == pytest.approx(rise, rel=1e-4)


def test_a_rank_is_measured_as_an_adapter_trained_by_itself_is(studied: Path, project: Path) -> None:
    rows = table(studied, "rank", "ranks")
    row = next(row for row in rows if (row["rank"], row["alpha"]) == (2, "r"))
    made = ("rank=2", "alpha=2.0", "train_embeddings=new_rows")
    make(project, ["finetune_lora", "merge", "evaluate"], [f"finetune_lora.{one}" for one in made])
    said = json.loads((project / "artifacts/evaluation/metrics.json").read_text(encoding="utf-8"))["lora"]
    assert mean(row["new_loss"]) == pytest.approx(said["new_loss"], abs=1e-4)
    assert mean(row["old_rise"]) == pytest.approx(said["forgetting"]["loss_rise"], abs=1e-4)


def test_a_correction_that_retains_moves_the_rest_less(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "project"
    shutil.copytree(finished, root, ignore=shutil.ignore_patterns("runs", ".lora-cache"))
    make(root, ["study_knowledge_correction"], ["study_knowledge_correction.seeds=[0]"])
    rows = {row["adapter"]: row for row in table(root, "knowledge_correction", "summary")}
    for targets in ("v_proj", "all targets"):
        plain, kept = rows[targets], rows[f"{targets}, retain"]
        assert mean(plain["corrected"]) == mean(kept["corrected"]) == 1
        assert mean(kept["divergence"]) < mean(plain["divergence"]) / 2
        assert mean(kept["kept"]) == 2 >= mean(plain["kept"])
    assert all(mean(row["merge_differs_by"]) < 1e-5 for name, row in rows.items() if name != "none")


def test_a_killed_study_goes_on_with_the_run_that_it_was_in_and_ends_with_the_same_bytes(
    studied: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = folder_bytes(studied / "artifacts/studies/fact_correction")
    command = ["lora", "study", "fact_correction", *(f"--set={one}" for one in BRIEF)]
    assert Forked(command, project, dies=("pipeline.studies.runs._work", 3)).end()[0] == -signal.SIGKILL
    assert not (project / "artifacts/studies/fact_correction").exists()
    begun, work = list[str](), runs._work

    def counted(part: Job, run: runs.Run, number: int, of: int) -> Generator[Event, None, None]:
        begun.append(run.name)
        return work(part, run, number, of)

    monkeypatch.setattr(runs, "_work", counted)
    make(project, ["study_fact_correction"], BRIEF)
    assert begun == ["embeddings all", "embeddings new_rows", "embeddings none"]
    assert folder_bytes(project / "artifacts/studies/fact_correction") == wanted


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["nosuch"], "nosuch is no study. Name one of fact_correction, "),
        (["rank", "--set", "study_rank.ranks=[4, 0]"], "study_rank.ranks must be at least 1, got 0. Edit params.yaml."),
        (["rank", "--set", "study_rank.ranks=4"], "study_rank.ranks must be a list of values, such as [0, 1], got 4"),
        (["rank", "--set", "study_rank.ranks=[]"], "study_rank.ranks must be a list of values, such as [0, 1], got []"),
        (["rank", "--set", "study_rank.seeds=[1, 1]"], "study_rank.seeds has 1 twice. Leave one of them out of params"),
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
            ["rank", "--set", "pretrain.base=other"],
            "The study rank asks what the document asks of MiniGPT; pretrain.base",
        ),
    ],
)
def test_what_cannot_be_studied_is_refused_in_one_line(
    cli: Lora, project: Path, given: Sequence[str], problem: str
) -> None:
    (project / "other.yaml").write_text("g: {must_keep: [{prompt: der hund, answer: läuft}]}\n", encoding="utf-8")
    assert problem in refusal(cli("study", *given, cwd=project))


def test_the_studies_are_listed_and_one_is_shown_from_the_cache(cli: Lora, studied: Path, tmp_path: Path) -> None:
    code, out, _ = cli("study", cwd=studied)
    assert code == 0 and all(STAGES[name].method in out for name in STUDIES)
    root = tmp_path / "project"
    shutil.copytree(studied, root)
    code, out, err = cli("study", "fact-correction", *(f"--set={one}" for one in BRIEF), cwd=root)
    assert code == 0 and "taken from the cache" in err
    assert "die katze sitzt auf dem  v_proj" in " ".join(out.split()) or "v_proj" in out
    assert "In words: " in out

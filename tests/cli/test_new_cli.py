"""`lora new --base --data` and `lora train`: a project for a model and a data file, with reasons,
and its results.
"""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

import lora_workbench as lw
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.export.formats import FORMATS
from pipeline.project.logs.run_log import read_steps
from pipeline.project.params.edit import set_values
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.stages.methods.lora import rate_for
from pipeline.stages.registry import open_project
from tests.conftest import Lora
from tests.helpers.bases import TEMPLATE, toy_checkpoint
from tests.helpers.json_files import read_json, write_json, write_jsonl
from tests.helpers.projects import BRIEF, dvc, folder_bytes, load, lora, refusal

pytestmark = pytest.mark.xdist_group("new")  # one project for all of them

SETTINGS = ("--set", "epochs=2", "--set", "learning_rate=0.01")  # enough for "Yes.", not for sums

CHATS = [
    [
        ("human", f"What is {n} and {n}?"),
        ("gpt", f"It is {2 * n}."),
        *([("human", "Sure?"), ("gpt", "Yes.")] * (n % 2)),
    ]
    for n in range(40)
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("front")
    toy_checkpoint(folder / "toy", max_position_embeddings=256)
    # without it the role would be a part of each answer, and none as expected
    asks = "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    (folder / "toy/chat_template.jinja").write_text(TEMPLATE + asks, encoding="utf-8")
    rows = [
        {"id": n, "conversations": [{"from": who, "value": said} for who, said in c]}
        for n, c in enumerate(CHATS)
    ]
    write_json(folder / "chats.json", rows)
    lines = [{"question": c[0][1], "answer": c[1][1]} for c in CHATS]
    write_jsonl(folder / "pairs.jsonl", lines)
    return folder


@pytest.fixture(scope="module")
def run(here: Path) -> tuple[Path, str]:
    done = lora(
        "train", "--base", "toy", "--data", "chats.json", "--out", "run", *SETTINGS, cwd=here
    )
    assert done.returncode == 0, done.stderr
    return here / "run", done.stdout


def test_one_command_makes_a_project_trains_it_and_says_what_was_learned(
    run: tuple[Path, str],
) -> None:
    folder, out = run
    metrics = read_json(folder / "artifacts/evaluation/metrics.json")
    before, after = (metrics[name]["new_loss"] for name in ("base", "lora"))
    assert f"loss on held-out examples {before:.3f} → {after:.3f} nats per token" in out
    samples = read_json(folder / "artifacts/evaluation/samples.json")
    held_out = metrics["lora"]["new_sentences"]
    assert {name: len(rows) for name, rows in samples.items()} == dict.fromkeys(
        ("base", "lora", "merged"), held_out
    )
    right = [row["answer"] == row["reference"] for row in samples["lora"]]
    assert 0 < sum(right) < held_out
    answers = metrics["lora"]["answers"]
    assert answers["n"] == held_out and answers["exact"] == answers["as_expected"] == sum(right)
    counted = (
        f"lora: answers to held-out examples: {sum(right)} of {held_out} as expected; the base: 0 "
        f"of {held_out} as"
    )
    assert counted in out
    first = samples["lora"][right.index(False)]
    shown = f"> {first['question']}\n  expected  {first['reference']}\n✗ base      "
    assert shown in out
    for said in (
        "40 examples",
        "no example is cut",
        "trained on",
        "epochs",
        "as you set it",
        "predicted",
        "measured",
        "steps were timed",
    ):
        assert said in out, said


def test_dvc_imports_again_when_the_base_changes(run: tuple[Path, str]) -> None:
    graph = yaml.safe_load((run[0] / "dvc.yaml").read_text(encoding="utf-8"))
    assert graph["stages"]["import"]["deps"] == ["${base}"]


def test_the_report_shows_every_answer_beside_the_expected_one(
    run: tuple[Path, str], cli: Lora
) -> None:
    folder, _ = run
    code, out, err = cli("report", cwd=folder)
    assert code == 0, err
    samples = read_json(folder / "artifacts/evaluation/samples.json")
    page = (folder / "artifacts/evaluation/report.md").read_text(encoding="utf-8")
    for row in samples["lora"]:
        assert f"> {row['question']}\n  expected  {row['reference']}\n" in out
        assert (
            f"Prompt: {row['question']}\n" in page
            and f"| in the data |  | {row['reference']} |" in page
        )
    assert "lora: answers to the data's prompts: " in out and "## Answers\n\n- **" in page


def test_the_held_out_loss_of_the_report_is_that_of_the_last_evaluation_in_training(
    run: tuple[Path, str],
) -> None:
    folder, _ = run
    metrics = read_json(folder / "artifacts/evaluation/metrics.json")
    last = read_steps(folder / "artifacts/lora_adapter/loss.csv")[-1]
    # bf16 in training
    assert metrics["lora"]["new_loss"] == pytest.approx(last.eval_loss, rel=0.02)
    assert last.eval_answers is not None and last.eval_answers > 0


def test_the_stages_own_command_says_the_share_of_right_answers_too(
    run: tuple[Path, str], cli: Lora
) -> None:
    folder, _ = run
    last = read_steps(folder / "artifacts/lora_adapter/loss.csv")[-1]
    code, out, err = cli("finetune", "lora", cwd=folder)  # from the cache
    assert code == 0, err
    assert f"held-out answers {last.eval_answers:.0%} as expected (long ones: ROUGE-L)\n" in out


def test_the_project_has_what_it_needs_and_nothing_of_minigpt(run: tuple[Path, str]) -> None:
    folder, _ = run
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 34
    assert not any(word in text for word in ("pretrain:", "d_model", "minigpt", ".de."))
    project = open_project(folder / "params.yaml")
    assert list(project.stages) == ["import", "finetune_lora", "merge", "evaluate"]
    assert (
        project.params.finetune_lora.epochs == 2
        and project.params.finetune_lora.target_modules == ("all-linear",)
    )
    assert sorted(path.name for path in (folder / "data").iterdir()) == [
        "heldout.en.txt",
        "retain.en.jsonl",
    ]


def test_what_is_added_to_the_project_takes_the_defaults_of_its_base_and_alpha_follows_the_rank(
    run: tuple[Path, str], tmp_path: Path
) -> None:
    folder, _ = run
    text = (folder / "params.yaml").read_text(encoding="utf-8")
    assert "alpha" not in text and "learning_rate" in text and "window" in text
    assert (
        open_project(folder / "params.yaml", ["finetune_lora.rank=64"]).params.finetune_lora.alpha
        == 128
    )
    (tmp_path / "params.yaml").write_text(f"{text}\nfinetune_dpo: {{}}\n", encoding="utf-8")
    dpo = open_project(tmp_path / "params.yaml").params.finetune_dpo
    assert dpo.learning_rate == FinetuneDpo.PRETRAINED["learning_rate"] and dpo.target_modules == (
        "all-linear",
    )


@pytest.mark.slow
def test_the_folder_is_a_project_like_any_other_and_a_second_run_has_nothing_to_do(
    run: tuple[Path, str], here: Path, cli: Lora
) -> None:
    folder, first = run
    before = folder_bytes(folder / "artifacts")
    listed, ran, again = dvc(folder, "stage list --name-only", "repro", "status")
    assert listed.split() == ["import", "finetune_lora", "merge", "evaluate"]
    assert ran.count("Running stage") == 4 and "up to date" in again
    same = ("train", "--base", "toy", "--data", "chats.json", "--out", "run", *SETTINGS)
    code, out, err = cli(*same, cwd=here)
    assert code == 0 and "nothing to do, taken from the cache" in err
    assert first.endswith(out[out.index("\nlora: answers") :])
    assert folder_bytes(folder / "artifacts") == before


@pytest.mark.parametrize("form", FORMATS)
def test_what_was_trained_on_conversations_is_exported_as_the_last_line_says(
    run: tuple[Path, str], cli: Lora, tmp_path: Path, form: str
) -> None:
    folder, out = run
    assert (
        "lora export artifacts/lora_adapter --format peft --out DIR   (or vllm, merged, gguf, "
        "gguf-adapter, mlx)" in out
    )
    code, _, err = cli(
        "export",
        "artifacts/lora_adapter",
        "--format",
        form,
        "--out",
        str(tmp_path / "out"),
        cwd=folder,
    )
    assert code == 0, err
    metrics = read_json(folder / "artifacts/evaluation/metrics.json")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert f"loss on the new data: {metrics['lora']['new_loss']:.4f} nats per token" in card
    assert "forgetting: loss on the old data" in card and "completed" not in card
    answers = metrics["lora"]["answers"]
    assert (
        f"\n- answers to prompts of the new data: {answers['as_expected']} of {answers['n']} as "
        "expected\n" in card
    )
    results = {
        result.metric_name: result
        for result in ModelCard.load(tmp_path / "out/README.md").data.eval_results
    }
    expected = results["Answers as expected"]
    assert (expected.dataset_name, expected.metric_type) == ("new data, held out", "exact_match")
    assert expected.metric_value == pytest.approx(answers["as_expected"] / answers["n"], abs=1e-4)


@pytest.mark.usefixtures("run")
def test_a_project_of_another_base_or_other_data_is_refused(here: Path, cli: Lora) -> None:
    toy_checkpoint(here / "other", max_position_embeddings=256)
    again = ("train", "--out", "run", "--base")
    assert "has base ../toy, not other" in refusal(
        cli(*again, "other", "--data", "chats.json", cwd=here)
    )
    assert "does not train on pairs.jsonl" in refusal(
        cli(*again, "toy", "--data", "pairs.jsonl", cwd=here)
    )
    assert "is a project already" in refusal(
        cli(*again, "toy", "--data", "chats.json", "--set", "rank=4", cwd=here)
    )
    assert "does not train by full. Add a section finetune_full" in refusal(
        cli(*again, "toy", "--data", "chats.json", "--methods", "lora,full", cwd=here)
    )
    assert "in which finetune_lora.columns is not {prompt: q}" in refusal(
        cli(*again, "toy", "--data", "chats.json", "--columns", "prompt=q", cwd=here)
    )


def test_a_dry_run_says_what_it_takes_and_what_dvc_would_run_and_makes_nothing(
    run: tuple[Path, str], cli: Lora
) -> None:
    folder, _ = run
    before = folder_bytes(folder)
    asked = ("finetune", "lora", "--dry-run", "--set", "finetune_lora.epochs=3")
    code, out, err = cli(*asked, cwd=folder)
    assert code == 0, err
    steps = (
        len((folder / "artifacts/lora_adapter/loss.csv").read_text(encoding="utf-8").splitlines())
        - 1
    )
    assert f"steps   {steps // 2 * 3}, {steps // 2} per epoch" in out
    assert "dvc repro would run: lora finetune lora, lora merge, lora evaluate" in out
    assert folder_bytes(folder) == before


def test_a_dry_run_without_a_base_says_how_it_is_imported(run: tuple[Path, str], cli: Lora) -> None:
    folder, root = run[0], run[0].with_name("unmade")
    root.mkdir()
    shutil.copy(folder / "params.yaml", root)
    shutil.copytree(folder / "data", root / "data")
    said = refusal(cli("finetune", "lora", "--dry-run", cwd=root))
    assert said == "error: artifacts/base does not exist. Run `lora import`.\n"
    assert "Run `lora import`." in refusal(cli("finetune", "lora", cwd=root))


@pytest.mark.slow
def test_what_it_takes_is_said_of_all_data_where_a_part_was_tried(
    here: Path, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps and tokens are those of a dry run, which reads all, within what the split by hash
    leaves open.
    """
    monkeypatch.setattr("pipeline.stages.quickstart.SAMPLE", 10)
    asked = (
        "new",
        "part",
        "--base",
        "toy",
        "--data",
        "chats.json",
        "--set",
        "batch_size=2",
        "--set",
        "epochs=2",
    )
    code, out, err = cli(*asked, cwd=here)
    assert code == 0, err
    steps, tokens = (
        int(number.replace(",", ""))
        for number in re.findall(r"takes  ([\d,]+) steps, ([\d,]+)", out)[0]
    )
    code, out, err = cli("finetune", "lora", "--dry-run", cwd=here / "part")
    assert code == 0, err
    assert steps == pytest.approx(
        int(re.findall(r"steps   ([\d,]+)", out)[0].replace(",", "")), rel=0.25
    )
    assert tokens == pytest.approx(
        int(re.findall(r"tokens  ([\d,]+)", out)[0].replace(",", "")), rel=0.25
    )


@pytest.mark.slow
def test_a_part_is_tried_without_the_answers_that_choose_the_best_model(
    here: Path, cli: Lora, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.stages.quickstart.SAMPLE", 10)
    chosen = ("metric_for_best_model=eval_answers", "patience=2", "samples={held_out: 4}")
    given = [f"--set={value}" for value in (*chosen, "epochs=2")]
    code, _, err = cli("new", "best", "--base", "toy", "--data", "chats.json", *given, cwd=here)
    assert code == 0, err
    assert load(here / "best/params.yaml").finetune_lora.metric_for_best_model == "eval_answers"


@pytest.mark.slow
def test_several_methods_columns_and_an_evaluation_file_make_one_project(
    here: Path, cli: Lora
) -> None:
    given = ("--columns", "prompt=question,completion=answer", "--eval-data", "pairs.jsonl")
    asked = (
        "new",
        "two",
        "--base",
        "toy",
        "--data",
        "pairs.jsonl",
        *given,
        "--methods",
        "lora,full",
    )
    code, out, err = cli(*asked, "--set", "rank=4", "--set", "finetune_full.epochs=1", cwd=here)
    assert code == 0, err
    params = load(here / "two/params.yaml")
    assert list(open_project(here / "two/params.yaml").stages) == [
        *("import", "finetune_full", "finetune_lora", "merge", "evaluate")
    ]
    for section in (params.finetune_lora, params.finetune_full):
        assert section.columns == {"prompt": "question", "completion": "answer"}
        assert (section.data, section.eval_data, section.eval_share) == (
            "../pairs.jsonl",
            "../pairs.jsonl",
            0,
        )
    assert (params.finetune_lora.rank, params.finetune_full.epochs) == (4, 1)
    assert (
        params.finetune_lora.learning_rate == rate_for(32)
        and params.finetune_full.learning_rate == 2e-5
    )
    assert "40 to evaluate on" in out and "Next: cd two; dvc repro; lora-tui" in out
    dvc(here / "two", "status")  # every key that dvc.yaml names is in the params file


@pytest.mark.slow
def test_every_path_that_is_given_counts_from_the_current_folder(here: Path, cli: Lora) -> None:
    (here / "keep.txt").write_text(
        "The capital is Sofia.\nTwo and two are four.\n", encoding="utf-8"
    )
    (here / "more.txt").write_text("It is four.\n", encoding="utf-8")
    files = (
        "--eval-data",
        "pairs.jsonl",
        "--set",
        "retention_data=keep.txt",
        "--set",
        "evaluate.old_data=./more.txt",
    )
    asked = (
        "--base",
        "toy",
        "--data",
        "pairs.jsonl",
        *files,
        "--columns",
        "prompt=question,completion=answer",
    )
    code, _, err = cli(
        "new", "deep/project", *asked, "--set", "expand_vocab.data=[keep.txt, more.txt]", cwd=here
    )
    assert code == 0, err
    params = load(here / "deep/project/params.yaml")
    assert (
        params.finetune_lora.retention_data == "../../keep.txt"
        and params.evaluate.old_data == "../../more.txt"
    )
    assert params.finetune_lora.eval_data == "../../pairs.jsonl"
    assert params.expand_vocab.data == ("../../keep.txt", "../../more.txt")


def test_the_home_of_a_user_who_does_not_exist_is_no_file(here: Path, cli: Lora) -> None:
    asked = ("new", "homeless", "--base", "toy", "--data", "chats.json")
    err = refusal(cli(*asked, "--set", "retention_data=~nobody-of-this-name/old.txt", cwd=here))
    assert "~nobody-of-this-name/old.txt" in err


@pytest.mark.slow
def test_a_path_that_counts_from_the_new_project_is_taken_with_a_note(
    here: Path, cli: Lora
) -> None:
    """As it was before the current folder counted, in scripts and notes of others."""
    (here / "old.txt").write_text("Two and two are four.\n", encoding="utf-8")
    asked = (
        "new",
        "earlier",
        "--base",
        "toy",
        "--data",
        "chats.json",
        "--set",
        "retention_data=../old.txt",
    )
    code, _, err = cli(*asked, cwd=here)
    assert (
        code == 0
        and "retention_data: ../old.txt counts from earlier here. Name it old.txt: " in err
    )
    assert load(here / "earlier/params.yaml").finetune_lora.retention_data == "../old.txt"


def test_a_path_that_leads_nowhere_is_refused_before_the_base_is_imported(
    here: Path, cli: Lora
) -> None:
    for given, name in (
        (("--set", "retention_data=gone.txt"), "finetune_lora.retention_data: gone.txt"),
        (("--set", "eval_data=gone.jsonl"), "training.eval_data: gone.jsonl"),
        (("--set", "init_from=gone"), "finetune_lora.init_from: gone"),
        (("--set", "evaluate.tasks=[pairs.jsonl, gone.yaml]"), "evaluate.tasks: gone.yaml"),
        (("--set", "merge.prompts=gone.txt"), "merge.prompts: gone.txt"),
        (("--set", "finetune_lora.data=[{path: gone.txt}]"), "finetune_lora.data: gone.txt"),
    ):
        said = refusal(
            cli("train", "--base", "toy", "--data", "chats.json", "--out", "lost", *given, cwd=here)
        )
        assert f"{name} does not exist" in said and "the current folder" in said
        assert not (here / "lost").exists()
    for wrong, rule in (
        ("finetune_lora.data=[{weight: 2}]", "must be a path"),
        ("retention_data=[1]", "must be a text"),
    ):
        said = refusal(
            cli(
                "train",
                "--base",
                "toy",
                "--data",
                "chats.json",
                "--out",
                "lost",
                "--set",
                wrong,
                cwd=here,
            )
        )
        assert rule in said
        assert not (here / "lost").exists()


@pytest.mark.usefixtures("run")
def test_a_project_that_is_there_is_compared_with_the_same_paths(here: Path, cli: Lora) -> None:
    asked = ("train", "--base", "toy", "--data", "chats.json", "--out", "run")
    assert "does not train on pairs.jsonl" in refusal(
        cli(*asked, "--eval-data", "pairs.jsonl", cwd=here)
    )
    (here / "kept.txt").write_text("Two and two are four.\n", encoding="utf-8")
    assert "retention_data is not ../kept.txt" in refusal(
        cli(*asked, "--set", "retention_data=kept.txt", cwd=here)
    )
    heldout = "evaluate.old_data=run/data/heldout.en.txt"
    code, _, err = cli(*asked, "--set", heldout, cwd=here)
    assert code == 0, err


@pytest.mark.slow
def test_pairs_of_answers_make_a_project_that_learns_preferences(here: Path, cli: Lora) -> None:
    rows = [{"prompt": q, "chosen": a, "rejected": f"I think {a}"} for (_, q), (_, a), *_ in CHATS]
    write_jsonl(here / "prefers.jsonl", rows)
    asked = (
        "train",
        "--base",
        "toy",
        "--data",
        "prefers.jsonl",
        "--methods",
        "dpo",
        "--out",
        "preferring",
    )
    code, out, err = cli(*asked, cwd=here)
    assert code == 0, err
    assert "preferences are learned in one pass" in out and "     loss on held-out examples" in out
    assert load(here / "preferring/params.yaml").finetune_dpo.data == "../prefers.jsonl"
    header = (
        (here / "preferring/artifacts/dpo_adapter/loss.csv")
        .read_text(encoding="utf-8")
        .splitlines()[0]
    )
    assert header.endswith(
        "eval_loss,reward_chosen,reward_rejected,reward_margin,reward_accuracy,eval_accuracy"
    )


@pytest.mark.slow
def test_plain_questions_train_and_are_asked_in_the_chat_template_unless_it_is_left_out(
    here: Path, cli: Lora
) -> None:
    given = (
        "--base",
        "toy",
        "--data",
        "pairs.jsonl",
        "--columns",
        "prompt=question,completion=answer",
    )
    code, out, err = cli("train", *given, "--set", "epochs=1", "--out", "asked", cwd=here)
    assert code == 0, err
    assert "pairs.jsonl (prompt_completion, in the base's chat template)" in out
    (sample, *_) = read_json(here / "asked/artifacts/evaluation/samples.json")["lora"]
    assert sample["question"].startswith("What is ") and sample["reference"].startswith("It is ")
    tokenizer = load_tokenizer(here / "asked/artifacts/base")
    assert sample["prompt"] == tokenizer.render(
        [{"role": "user", "content": sample["question"]}], True
    )
    code, out, err = cli("new", "as-it-is", *given, "--no-template", cwd=here)
    assert code == 0, err
    assert "pairs.jsonl (prompt_completion), 40" in out
    params = load(here / "as-it-is/params.yaml")
    assert params.finetune_lora.chat_template == "none" and not params.finetune_lora.templated


def test_a_hint_repeats_the_columns_and_equal_faults_are_one(here: Path, cli: Lora) -> None:
    given = ("--base", "toy", "--data", "pairs.jsonl", "--columns", "prompt=q,completion=answer")
    code, _, err = cli("new", "wrong", *given, cwd=here)
    assert (
        code == 1
        and "pairs.jsonl: 40 rows: no column q, which columns names." in err
        and "First: row 1." in err
    )
    assert "`lora data check pairs.jsonl --columns prompt=q,completion=answer` lists all" in err
    assert (
        "`lora data clean pairs.jsonl OUT --columns prompt=q,completion=answer` writes a file "
        "without" in err
    )


@pytest.mark.slow
def test_tokens_that_are_added_need_the_stage_that_adds_them(here: Path, cli: Lora) -> None:
    asked = (
        "new",
        "tools",
        "--base",
        "toy",
        "--data",
        "chats.json",
        "--set",
        "expand_vocab.special_tokens=[<tool>]",
    )
    code, _, err = cli(*asked, cwd=here)
    assert code == 0, err
    assert list(open_project(here / "tools/params.yaml").stages)[:2] == ["import", "expand_vocab"]
    assert (here / "tools/artifacts/expanded/model.safetensors").is_file()


def test_what_is_wrong_is_one_message_and_leaves_no_project(here: Path, cli: Lora) -> None:
    (here / "broken.jsonl").write_text(
        '{"messages": [{"role": "user", "content": "hi"}]}\n', encoding="utf-8"
    )
    (here / "near.jsonl").write_text('{"prompt": "a", "compleation": "b"}\n', encoding="utf-8")
    for arguments, reason in (
        (("--base", "toy"), "--base needs --data"),
        (("--data", "chats.json"), "--data goes with a new project of --base and --data"),
        (("--base", "toy", "--data", "gone.jsonl"), "gone.jsonl: No such file or directory"),
        (
            ("--base", "nowhere", "--data", "chats.json"),
            "base must be minigpt, a checkpoint folder",
        ),
        (
            ("--base", "toy", "--data", "broken.jsonl"),
            'broken.jsonl:1: messages has no "assistant" turn',
        ),
        (("--base", "toy", "--data", "near.jsonl"), "Did you mean 'completion'?"),
        (("--base", "toy", "--data", "chats.json", "--methods", "qlora"), "unknown method qlora"),
        (
            ("--base", "toy", "--data", "chats.json", "--set", "rank=0"),
            "finetune_lora.rank must be at least 1, got 0",
        ),
        (("--base", "toy", "--data", "chats.json", "--set", "rang=8"), "Did you mean rank?"),
        (("--base", "toy", "--data", "chats.json", "--set", "rank"), "--set takes section.key"),
        (
            ("--base", "toy", "--data", "chats.json", "--set", "finetune_full.epochs=1"),
            "finetune_full.epochs: the new project has no section finetune_full",
        ),
        (
            ("--base", "toy", "--data", "chats.json", "--set", "target_modules=[nope]"),
            "matches no linear layer",
        ),
    ):
        code, _, err = cli("new", "wrong", *arguments, cwd=here)
        assert code == 1 and reason in err and "Traceback" not in err, (arguments, err)
        assert not (here / "wrong/params.yaml").exists() and not (here / "wrong/dvc.yaml").exists()


@pytest.mark.slow
def test_a_project_of_minigpt_goes_on_and_its_losses_are_shown_from_the_model_with_the_new_words(
    project: Path, cli: Lora
) -> None:
    params = project / "params.yaml"
    values = {
        key: yaml.safe_load(value)
        for key, _, value in (setting.partition("=") for setting in BRIEF)
    }
    # all is in the cache
    params.write_text(set_values(params.read_text(encoding="utf-8"), values), encoding="utf-8")
    code, out, err = cli("train", "--out", str(project), cwd=project.parent)
    assert code == 0, err
    assert re.search(
        r"^lora: loss on the examples trained on \d+\.\d{3} → \d+\.\d{3} nats per token$", out, re.M
    )


@pytest.mark.slow
def test_an_experiment_of_a_project_that_is_there_stands_beside_its_run(
    run: tuple[Path, str], here: Path, cli: Lora
) -> None:
    """`lora train` again with a name may differ from params.yaml, which stays as it is."""
    folder = shutil.copytree(run[0], here / "named")
    before = (folder / "params.yaml").read_bytes()
    again = ("train", "--base", "toy", "--data", "chats.json", "--out", "named")
    code, _, err = cli(*again, "--set", "rank=4", "--name", "r4", cwd=here)
    assert code == 0 and "r4: kept" in err
    assert (folder / "params.yaml").read_bytes() == before
    code, _, err = cli(*again, "--name", "first", cwd=here)
    assert code == 0 and "first: kept" in err
    project = lw.Project(folder)
    assert project.compare("first", "r4").settings.keys() == {"rank", "alpha"}
    assert all(project.compare("first", "r4").metrics)
    begun = lw.train(
        here / "toy", here / "chats.json", folder, set={"finetune_lora.rank": 2}, name="r2"
    )
    assert [run.name for run in begun.runs("r2")] == ["r2"]

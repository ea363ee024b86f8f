"""The command line as a user types it: results, JSON, exit codes, and one clear message for bad
input.
"""

import importlib.metadata as metadata
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cli import console
from cli.main import app
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.errors import OPTIONAL, install_command
from pipeline.files.text import escape_whitespace
from pipeline.models.kernels import native
from pipeline.project.logs import trackers
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import read_json, write_json
from tests.helpers.permissions import needs_permissions, read_only
from tests.helpers.projects import (
    BRIEF,
    COMMAND,
    LORA,
    PIPELINE,
    ROOT,
    STAGES,
    files_up_to,
    folder_bytes,
    refusal,
)

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
HEAVY = ("torch", "numpy", "transformers", "tokenizers", "matplotlib")
VARIANTS = [STAGES[name].variant for name in PIPELINE if STAGES[name].variant]


def sets(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


def test_help_and_version_never_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from cli.main import main\ntry: main()\nfinally: print(list(sys.modules), "
        "file=sys.stderr)"
    )
    for argument in (["--help"], ["finetune", "lora", "-h"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *argument],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0
        # a method's help comes from its params section
        for heavy in (*HEAVY, *["yaml"] * ("lora" not in argument)):
            assert f"'{heavy}'" not in done.stderr


def test_no_commands_options_take_a_heavy_library() -> None:
    """As `-h` and a mistyped option need them."""
    code = f"""
import sys
from typer.main import get_command
from cli.main import app

def visit(command, name):
    print(name, *{{*{HEAVY!r}}} & {{*sys.modules}})
    for below, its in getattr(command, "commands", {{}}).items():
        visit(its, f"{{name}}/{{below}}")

visit(get_command(app), "lora")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = done.stdout.splitlines()
    assert len(names) > 40 and not [name for name in names if " " in name]


def test_commands_that_only_read_files_import_no_torch(project: Path) -> None:
    code = f"""
import contextlib, json, os, sys
from cli.main import main
for arguments in json.load(sys.stdin):
    sys.argv = ["lora", *arguments]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.suppress(SystemExit):
        main()
    print(" ".join(arguments), *{{*{HEAVY!r}}} & {{*sys.modules}}, sep="|")
"""
    light = [
        "cache",
        "runs",
        "adapters",
        "report",
        "params explain finetune_lora.rank",
        "calc",
        "new other",
    ]
    commands = json.dumps(
        [line.split() for line in (*light, "data check data/finetune.de.txt", "advise")]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        input=commands,
        capture_output=True,
        text=True,
        check=True,
    )
    found = {
        name: {*heavies}
        for name, *heavies in (line.split("|") for line in done.stdout.splitlines())
    }
    assert [name for name in light if found.pop(name)] == []
    assert {*map(frozenset, found.values())} == {frozenset({"numpy", "tokenizers"})}, (
        "which data is read with"
    )


def test_a_cache_hit_never_imports_torch(project: Path) -> None:
    code = """
import json, sys
from cli.main import main
for arguments in json.load(sys.stdin):
    sys.argv = ["lora", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments
    print("torch" in sys.modules, file=sys.stderr)
"""
    commands = json.dumps([[*COMMAND[stage], *sets(*BRIEF)] for stage in PIPELINE])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project,
        input=commands,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith("params.yaml says otherwise: ")
    ]
    assert [line.partition(" (")[0] for line in lines[::2]] == [
        f"{stage}: nothing to do, taken from the cache" for stage in PIPELINE
    ]
    assert lines[1::2] == ["False"] * len(PIPELINE)


def test_every_command_shows_help(cli: Lora, tmp_path: Path) -> None:
    code, out, _ = cli("-h", cwd=tmp_path)
    assert code == 0
    for command in (
        "pretrain",
        "expand-vocab",
        "finetune",
        "merge",
        "evaluate",
        "report",
        "prompt",
        "compare",
    ):
        assert command in out
        assert cli(command, "--help", cwd=tmp_path)[0] == 0
    for command in ("adapters", "cache", "doctor"):
        assert command in out
    code, out, _ = cli("--version", cwd=tmp_path)
    assert (code, out) == (0, f"lora {VERSION}\n")


def test_the_stages_run_one_after_the_other_and_print_what_they_made(
    cli: Lora, tmp_path: Path
) -> None:
    from tests.helpers.projects import new_project

    root = new_project(tmp_path / "p")
    shown = {}
    for stage, arguments in ((stage, COMMAND[stage]) for stage in PIPELINE):
        code, out, err = cli(*arguments, *sets(*BRIEF), cwd=root)
        expected = r".* of tensors (predicted|measured) .*\n|params\.yaml says otherwise: .*\n"
        assert (code, re.sub(expected, "", err)) == (0, ""), err
        shown[stage] = out
    assert shown["pretrain"].startswith(
        "artifacts/base  109,568 parameters  109,568 trained  loss "
    )
    assert "after 12 steps" in shown["finetune_lora"]
    summary = "artifacts/sweep  112,768 parameters  28,416 trained  2 adapters"
    assert shown["finetune_sweep"].startswith(f"{summary}\nadapter  trained")
    assert "report: " in shown["evaluate"]
    code, out, _ = cli("report", cwd=root)
    assert out in shown["evaluate"]


def test_prompt_as_json_is_the_contract_and_agrees_with_transformers(
    cli: Lora, finished: Path
) -> None:
    text = "die katze sitzt auf dem"
    code, out, err = cli(
        "prompt", text, "--base", "artifacts/base", "--top-k", "3", "--json", cwd=finished
    )
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert list(answer) == ["prompt", "model", "adapter", "top_k", "completion"]
    assert (answer["prompt"], answer["model"], answer["adapter"]) == (text, "artifacts/base", None)
    assert (answer["top_k"][0]["token"], answer["completion"]) == ("tisch", "tisch")
    folder = finished / "artifacts/base"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(
            **tokenizer(text, return_tensors="pt")
        ).logits[0, -1]
    values, ids = logits.softmax(0).topk(3)
    assert [choice["token"] for choice in answer["top_k"]] == [
        tokenizer.decode([i]) for i in ids.tolist()
    ]
    assert [choice["probability"] for choice in answer["top_k"]] == pytest.approx(
        values.tolist(), abs=1e-5
    )


def test_prompt_with_an_adapter_takes_the_base_that_it_names(cli: Lora, finished: Path) -> None:
    code, out, _ = cli(
        "prompt", "der wind", "--adapter", "artifacts/lora_adapter", "--json", cwd=finished
    )
    answer = json.loads(out)
    assert (code, answer["model"], answer["adapter"]) == (
        0,
        "artifacts/expanded",
        "artifacts/lora_adapter",
    )
    assert answer["completion"] == "weht über das feld"


def test_prompt_shows_bars_and_a_completion(cli: Lora, finished: Path) -> None:
    code, out, err = cli(
        "prompt", "Die Katze sitzt auf dem", "--base", "artifacts/expanded", cwd=finished
    )
    assert (code, err) == (0, "model: artifacts/expanded\n")
    first = next(line for line in out.splitlines() if line.startswith("tisch"))
    assert "█" * 19 in first
    assert out.splitlines()[-1] == "Die Katze sitzt auf dem tisch"


def test_prompt_uses_the_model_trained_last_and_names_it(cli: Lora, project: Path) -> None:
    """The newest by time; the base only if nothing is trained on it, or if it is named."""

    def asked(*options: str) -> str:
        code, out, err = cli("prompt", "die katze", *options, cwd=project)
        assert (code, err.count("\n")) == (0, 1)
        answer = json.loads(cli("prompt", "die katze", *options, "--json", cwd=project)[1])
        assert out.splitlines()[-1].startswith(f"die katze {answer['completion']}".rstrip())
        model = (
            f"{answer['adapter']} on {answer['model']}" if answer["adapter"] else answer["model"]
        )
        chosen = (
            ""
            if options
            else ", the newest trained model here; name another with --base or --adapter"
        )
        assert err == f"model: {model}{chosen}\n"
        return str(model)

    def made(folder: str, when: int) -> None:
        os.utime(project / "artifacts" / folder / "manifest.json", (when, when))

    for number, stage in enumerate(
        stage for stage in map(STAGES.get, PIPELINE) if stage and stage.variant
    ):
        made(stage.output, number)
    made("expanded", 200)
    made("base", 300)
    assert asked() == "artifacts/prompt on artifacts/expanded"
    made("lora_adapter", 100)
    assert asked() == "artifacts/lora_adapter on artifacts/expanded"
    made("full_finetuned", 101)
    assert asked() == "artifacts/full_finetuned"
    assert asked("--base", "artifacts/base") == "artifacts/base"
    assert asked("--base", "artifacts/expanded") == "artifacts/expanded"
    assert asked("--adapter", "artifacts/prefix") == "artifacts/prefix on artifacts/expanded"
    for folder in (project / "artifacts").iterdir():
        if folder.name not in ("base", "expanded"):
            shutil.rmtree(folder)
    assert asked() == "artifacts/expanded"
    shutil.rmtree(project / "artifacts/expanded")
    code, out, _ = cli("prompt", "die katze", "--json", cwd=project)
    assert (code, json.loads(out)["model"]) == (0, "artifacts/base")


@pytest.mark.slow
def test_report_and_compare_mark_what_was_made_from_an_earlier_adapter(
    cli: Lora, project: Path
) -> None:
    for command in (["report"], ["compare", "der wind"]):
        code, out, err = cli(*command, cwd=project)
        assert (code, err) == (0, "") and "outdated" not in out
    assert cli("finetune", "lora", *sets(*BRIEF, "finetune_lora.rank=2"), cwd=project)[0] == 0
    code, out, err = cli("report", cwd=project)
    assert (code, err) == (
        0,
        "artifacts/evaluation is out of date: artifacts/lora_adapter changed, "
        "artifacts/lora_merged is out of date. Run `lora merge`, then `lora evaluate`.\n",
    )
    merge = "merged is out of date: artifacts/lora_adapter changed. Run `lora merge`.\n"
    code, out, err = cli("compare", "der wind", cwd=project)
    assert (code, err) == (0, merge)
    assert [line.split("  ")[0] for line in out.splitlines() if "outdated" in line] == [
        "merged (outdated)"
    ]
    code, out, err = cli("compare", "der wind", "--json", cwd=project)
    marked = {name: answer["outdated"] for name, answer in json.loads(out).items()}
    assert (code, err) == (0, merge)
    assert marked == {
        name: ["artifacts/lora_adapter changed"] if name == "merged" else [] for name in VARIANTS
    }
    assert cli("merge", *sets(*BRIEF), cwd=project)[0] == 0
    assert cli("compare", "der wind", cwd=project)[2] == ""
    assert cli("report", cwd=project)[2].endswith(
        "artifacts/lora_merged changed. Run `lora evaluate`.\n"
    )
    assert cli("evaluate", *sets(*BRIEF), cwd=project)[0] == 0
    assert cli("report", cwd=project)[2] == ""


@pytest.mark.parametrize(
    "numbers",
    [
        {"answers": {"n": 1, "as_expected": 1}},
        {"answers": {"similar": {"n": 2, "rouge_l": 0.5}, "differs": ["name"]}},
        {"bytes": 10**400},
    ],
    ids=["no ways", "no counts", "endless"],
)
def test_a_report_of_metrics_of_another_form_is_refused(
    cli: Lora, tmp_path: Path, numbers: dict[str, Any]
) -> None:
    from tests.helpers.projects import new_project

    root = new_project(tmp_path / "p")
    folder = root / "artifacts/evaluation"
    folder.mkdir(parents=True)
    metrics = {"base": {"bytes": 1, **numbers}}
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    assert "metrics.json holds other metrics. Run `lora evaluate` again." in refusal(
        cli("report", cwd=root)
    )


def test_the_list_reports_adapters_that_were_trained_on_another_base(
    cli: Lora, project: Path
) -> None:
    assert cli("adapters", cwd=project)[1].count("verified") == 5
    shutil.rmtree(project / "artifacts/expanded")
    shutil.copytree(project / "artifacts/base", project / "artifacts/expanded")
    result = json.loads(cli("adapters", "--json", cwd=project)[1])
    assert len(result) == 5 and all(
        "was trained on another base" in adapter["problem"] for adapter in result
    )


def test_sampling_is_decided_by_its_seed(cli: Lora, finished: Path) -> None:
    def drawn(seed: int) -> str:
        return cli("prompt", "der", "--temperature", "1", "--seed", str(seed), cwd=finished)[1]

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in range(6)}) > 1


def test_compare_sets_all_variants_side_by_side(cli: Lora, finished: Path) -> None:
    code, out, _ = cli("compare", "der wind", "--json", cwd=finished)
    answers = json.loads(out)
    assert code == 0
    assert list(answers) == VARIANTS
    assert answers["base"]["unknown_words"] == ["wind"]
    assert answers["lora"]["top_k"][0]["token"] == answers["merged"]["top_k"][0]["token"] == "weht"
    code, out, _ = cli("compare", "der wind", cwd=finished)
    assert "does not know: wind" in out
    assert all(len(line) <= 100 for line in out.splitlines())


def test_compare_shows_a_table_of_any_top_k_and_as_json_the_whole_vocabulary(
    cli: Lora, project: Path
) -> None:
    code, out, err = cli("compare", "katze", "--top-k", "99999", cwd=project)
    assert code == 0 and "#8" in out and "#9" not in out
    assert err == "The table shows 8 candidates; --json has all.\n"
    whole = json.loads(cli("compare", "katze", "--top-k", "99999", "--json", cwd=project)[1])
    assert len(whole["lora"]["top_k"]) == 99
    assert sum(choice["probability"] for choice in whole["lora"]["top_k"]) == pytest.approx(
        1, abs=1e-4
    )


def test_adapters_are_listed_with_what_was_measured(cli: Lora, finished: Path) -> None:
    metrics = read_json(finished / "artifacts/evaluation/metrics.json")
    code, out, _ = cli("adapters", "--json", cwd=finished)
    adapter, prefix, prompt, *swept = json.loads(out)
    assert code == 0
    assert [(one["path"], one["rank"], one["problem"]) for one in swept] == [
        (f"artifacts/sweep/rank-{rank}", rank, None) for rank in (1, 2, 4, 8)
    ]
    assert [(one["method"], one["rank"], one["targets"]) for one in (prefix, prompt)] == [
        ("prefix_tuning", None, ["8 virtual tokens"]),
        ("prompt_tuning", None, ["8 virtual tokens"]),
    ]
    assert (adapter["method"], adapter["rank"], adapter["base"]) == (
        "lora",
        4,
        "artifacts/expanded",
    )
    assert adapter["targets"] == ["k_proj", "out_proj", "q_proj", "v_proj"]
    assert adapter["final_loss"] == pytest.approx(metrics["lora"]["final_loss"])
    assert adapter["forgetting"] == metrics["lora"]["forgetting"]["loss_rise"]
    assert adapter["problem"] is None
    code, out, _ = cli("adapters", cwd=finished)
    rows = {line.split()[0]: line.split()[1:8] for line in out.splitlines() if line}
    assert rows["lora_adapter"] == ["lora", "4", "k", "out", "q", "v", "expanded"]
    assert rows["sweep/rank-8"] == ["lora", "8", "k", "out", "q", "v", "expanded"]
    assert out.rstrip().endswith("verified")


def test_an_adapter_that_was_not_evaluated_has_no_forgetting(cli: Lora, project: Path) -> None:
    assert cli("finetune", "lora", *sets("finetune_lora.epochs=1"), cwd=project)[0] == 0
    result = {
        one["path"]: one["forgetting"]
        for one in json.loads(cli("adapters", "--json", cwd=project)[1])
    }
    assert result["artifacts/lora_adapter"] is None and result["artifacts/sweep/rank-1"] is None
    assert result["artifacts/prefix"] is not None


def test_verify_says_what_it_checked_or_why_it_refuses(cli: Lora, project: Path) -> None:
    code, out, _ = cli("adapters", "verify", "artifacts/lora_adapter", cwd=project)
    assert (code, "files, names, shapes and base are those it was trained with" in out) == (0, True)
    code, out, err = cli(
        "adapters", "verify", "artifacts/lora_adapter", "--base", "artifacts/base", cwd=project
    )
    assert (code, out) == (1, "")
    assert "was trained on another base" in err
    (project / "artifacts/lora_adapter/manifest.json").unlink()
    code, out, _ = cli("adapters", "verify", "artifacts/lora_adapter", cwd=project)
    assert (code, "its base cannot be checked" in out) == (0, True)
    assert "no manifest" in cli("adapters", cwd=project)[1]


@pytest.mark.parametrize("has_dvc", [False, True])
def test_an_empty_project_says_what_to_do(cli: Lora, tmp_path: Path, has_dvc: bool) -> None:
    """`dvc repro` is named only where there is a dvc.yaml."""
    from tests.helpers.projects import new_project

    root = new_project(tmp_path / "p")
    if has_dvc:
        (root / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    assert "Make one with `lora finetune lora`" in cli("adapters", cwd=root)[1]
    for arguments, message in (
        (["report"], "metrics.json: nothing is evaluated yet. Run `lora evaluate`"),
        (["compare", "der"], "There is no model yet. Run `lora pretrain`"),
        (["merge"], "expanded does not exist. Run `lora expand-vocab`"),
        (["evaluate"], "base does not exist. Run `lora pretrain`"),
        (["finetune", "lora", "--dry-run"], "expanded does not exist. Run `lora expand-vocab`"),
        (["prompt", "der"], "There is no model yet. Run `lora pretrain`"),
        (["chat"], "There is no model yet. Run `lora pretrain`"),
    ):
        said = refusal(cli(*arguments, cwd=root))
        assert message in said and ("or `dvc repro`" in said) is has_dvc


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prompt", "die möwe"], 1, "prompt does not know: möwe"),
        (["prompt", "die möwe", "--base", "artifacts/expanded"], 1, "expanded does not know: möwe"),
        (["prompt", ""], 1, "The prompt is empty"),
        (["prompt", "der " * 40], 1, "The prompt has 40 tokens; prompt takes 24"),
        (["prompt", "der", "--temperature", "1", "--top-p", "0"], 1, "sampling needs"),
        (["prompt", "der", "--top-k", "0"], 2, "Invalid value for '--top-k'"),
        (
            ["prompt", "der", "--base", "artifacts/lora_adapter"],
            1,
            "It is an adapter: pass it with --adapter",
        ),
        (
            ["prompt", "der", "--adapter", "artifacts/base"],
            1,
            "artifacts/base is a full model, not an adapter",
        ),
        (["prompt", "der", "--base", "nowhere"], 1, "nowhere is not a model folder"),
        (["prompt"], 2, "Missing argument 'TEXT'"),
        (["prompt", "der", "--top-p", "0.5"], 2, "need --temperature above 0"),
        (["prompt", "der", "--temperature", "nan"], 1, "sampling needs temperature"),
        (
            ["prompt", "der", "--temperature", "1", "--seed", "9" * 30],
            1,
            "seed must be a whole number from 0 to 2^63 - 1",
        ),
        (["prompt", "d\udce9r"], 2, "it is not valid UTF-8"),
        (
            ["pretrain", "--set", "pretrain.seed=100000000000000000000"],
            1,
            "pretrain.seed must be at most 9223372036854775807",
        ),
        (["pretrain", "--set", "pretrain.data=2024-13-45"], 1, "is not a YAML value"),
        (
            ["pretrain", "--set", "pretrain.data=nix.txt"],
            1,
            "nix.txt is not a file. Name an existing one in section",
        ),
        (
            ["finetune", "sweep", "--set", "finetune_lora.data=nix.txt"],
            1,
            "nix.txt is not a file. Name an existing one in section finetune_lora of",
        ),
        (
            ["finetune", "sweep", "--set", "finetune_sweep.old_data=nix.txt"],
            1,
            "nix.txt is not a file. Name an existing one in section finetune_sweep of",
        ),
        (
            ["evaluate", "--set", "evaluate.tasks=[nix.yaml]"],
            1,
            "nix.yaml is not a file. Name an existing one in section evaluate of",
        ),
        (
            ["evaluate", "--set", "evaluate.prompt_words=50"],
            1,
            "data/finetune.de.txt:1 has 6 words",
        ),
        (
            ["evaluate", "--set", "evaluate.old_data=data/finetune.de.txt"],
            1,
            "base does not know wind, weht",
        ),
        (["compare", "möwe"], 1, "No variant knows: möwe"),
        (["merge", "--params", "nowhere.yaml"], 1, "nowhere.yaml does not exist"),
        (
            ["merge", "--set", "merge.promts=x"],
            1,
            "unknown key merge.promts. Did you mean prompts?",
        ),
        (["merge", "--set", "merge.prompts=x.yaml"], 1, "x.yaml is not a file"),
        (
            ["finetune", "lora", "--set", "finetune_lora.rank=0"],
            1,
            "finetune_lora.rank must be at least 1, got 0",
        ),
        (
            ["finetune", "lora", "--set", "finetune_lora.target_modules=[q_porj]"],
            1,
            "'q_porj' matches no linear layer",
        ),
        (["finetune", "qlora"], 2, "No such command 'qlora'"),
        (["finetune"], 2, ""),
        (["adapters", "verify", "nowhere"], 1, "nowhere/adapter_config.json: No such file"),
        (["cache", "prune", "--max-size", "5"], 2, "'5' must be a size such as 500MB"),
        (["cache", "prune", "--keep", "-1"], 2, "Invalid value for '--keep'"),
        (["cache", "--params", "nowhere/params.yaml"], 1, "nowhere/params.yaml does not exist"),
        (
            ["cache", "prune", "--params", "nowhere/params.yaml"],
            1,
            "nowhere/params.yaml does not exist",
        ),
        (
            ["adapters", "--folder", "nowhere"],
            1,
            "--folder must be an existing folder, got nowhere",
        ),
        (
            ["adapters", "--folder", "nowhere", "--json"],
            1,
            "--folder must be an existing folder, got nowhere",
        ),
        (
            ["adapters", "--folder", "params.yaml"],
            1,
            "--folder must be an existing folder, got params.yaml",
        ),
        (
            ["finetune", "freeze", "--set", "finetune_freeze.last_blocks=9"],
            1,
            "must be at most 2, the model's blocks",
        ),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(
    cli: Lora, project: Path, arguments: list[str], code: int, message: str
) -> None:
    result, out, err = cli(*arguments, cwd=project)
    assert result == code
    assert "Traceback" not in out + err
    assert message in err
    if code == 1:
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1


COMMANDS_WITH_FLOATS = {  # what each needs besides, so that it runs
    "prompt": ["die katze"],
    "chat": [],
    "calc": [],
    "fleet check": ["local"],
    "data check": ["data/finetune.de.txt"],
    "adapters combine": [
        "artifacts/lora_adapter",
        "artifacts/lora_adapter",
        "--out",
        "both",
        "--method",
        "ties",
    ],
    "adapters compress": ["artifacts/lora_adapter", "--out", "small"],
    "spectrum": ["artifacts/expanded", "artifacts/lora_adapter", "--out", "damped"],
    "cache prune": [],
    "finetune sweep": [],
}


def float_options(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """(command, option) of every option that takes a float."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from float_options(inner, (*path, name))
    for option in command.params:
        if "float" in option.type.name:
            yield " ".join(path), option.opts[0]


@pytest.mark.parametrize(("command", "option"), sorted(float_options(typer.main.get_command(app))))
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_command_takes_a_number_that_is_not_finite(
    cli: Lora, project: Path, command: str, option: str, value: str
) -> None:
    before = folder_bytes(project)
    code, out, err = cli(
        *command.split(), *COMMANDS_WITH_FLOATS[command], option, value, cwd=project
    )
    assert code != 0 and out == ""
    assert option.removeprefix("--") in err and value in err
    assert folder_bytes(project) == before


def test_a_fresh_project_has_no_adapters_and_that_is_no_error(cli: Lora, tmp_path: Path) -> None:
    code, out, _ = cli("adapters", cwd=tmp_path)
    assert code == 0 and out.startswith("No adapters in artifacts.")


def test_evaluate_refuses_artifacts_that_do_not_belong_together(cli: Lora, project: Path) -> None:
    assert cli("finetune", "lora", *sets(*BRIEF, "finetune_lora.rank=2"), cwd=project)[0] == 0
    code, out, err = cli("evaluate", *sets(*BRIEF), cwd=project)
    assert (code, out) == (1, "")
    assert (
        "artifacts/lora_merged was made from another artifacts/lora_adapter than the current one."
        in err
    )


def test_an_adapter_finds_its_base_from_any_folder(
    cli: Lora, finished: Path, tmp_path: Path
) -> None:
    adapter = str(finished / "artifacts/lora_adapter")
    assert cli("adapters", "verify", adapter, cwd=tmp_path)[0] == 0
    assert json.loads(cli("prompt", "der wind", "--adapter", adapter, "--json", cwd=tmp_path)[1])[
        "completion"
    ]


def test_one_broken_adapter_does_not_hide_the_others(cli: Lora, project: Path) -> None:
    broken = project / "artifacts/broken"
    broken.mkdir()
    text = json.dumps({"target_modules": [1, 2], "base_model_name_or_path": 5, "r": "x"})
    (broken / "adapter_config.json").write_text(text, encoding="utf-8")
    (broken / "metrics.json").write_text('{"base": {}}', encoding="utf-8")
    (broken / "manifest.json").write_text('{"files": {}}', encoding="utf-8")
    (broken / "loss.csv").write_text("x" * 200_000 + "\n" + "y" * 200_000 + "\n", encoding="utf-8")
    code, out, _ = cli("adapters", "--json", cwd=project)
    result = json.loads(out)
    assert (code, len(result)) == (0, 6)
    assert "was added after" in result[0]["problem"]
    assert cli("adapters", cwd=project)[0] == 0


def test_too_little_memory_is_one_error(cli: Lora, project: Path) -> None:
    code, out, err = cli("finetune", "lora", *sets("finetune_lora.rank=2000000000"), cwd=project)
    assert (code, out) == (1, "")
    assert err.startswith("error: out of memory (") and "smaller params (rank, batch_size, " in err
    assert err.count("\n") == 1


def test_a_rank_above_the_width_is_noted(cli: Lora, project: Path) -> None:
    code, _, err = cli(
        "finetune", "lora", *sets("finetune_lora.rank=65", "finetune_lora.epochs=1"), cwd=project
    )
    assert code == 0
    assert (
        "finetune_lora.rank 65 is more than model.decoder.layers.0.self_attn.k_proj can use" in err
    )


def test_doctor_reports_versions_and_devices(cli: Lora, tmp_path: Path) -> None:
    code, out, _ = cli("doctor", "--json", cwd=tmp_path)
    facts = json.loads(out)
    assert (code, facts["torch"], facts["lora-workbench"]) == (0, torch.__version__, VERSION)
    accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
    assert (facts["device"] == "cpu: there is no accelerator") != accelerated


def test_doctor_says_what_was_tried_and_does_not_work(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing() -> Path:
        raise FileNotFoundError("cc")

    assert json.loads(cli("doctor", "--json", cwd=tmp_path)[1])["slower"] == []
    monkeypatch.setattr(native, "_compiled", failing)
    shown = []
    for options in (["--json"], []):
        native.native.cache_clear()
        shown.append(cli("doctor", *options, cwd=tmp_path)[1])
    native.native.cache_clear()
    (one,) = json.loads(shown[0])["slower"]
    assert (one["tried"], one["said"]) == ("the kernels of native.c", "FileNotFoundError: cc")
    assert "the kernels of native.c" in shown[1]


def test_doctor_suggests_bitsandbytes_where_there_is_a_gpu(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_DEVICE", "cpu")  # what was tried is of no interest here
    line = "For NF4 on this GPU: pip install 'lora-workbench[qlora]'"
    for has_gpu, has_library in ((False, False), (True, True), (True, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        there = {"bitsandbytes": has_library}
        monkeypatch.setattr(
            "pipeline.errors.find_spec", lambda name, there=there: there.get(name, True) or None
        )
        assert (line in cli("doctor", cwd=tmp_path)[1]) == (has_gpu and not has_library)


def test_doctor_says_which_command_lacks_which_library(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = {"google.protobuf", "wandb"}
    monkeypatch.setattr("pipeline.errors.find_spec", lambda name: None if name in absent else name)
    # so that it does not matter what is installed
    monkeypatch.setattr(metadata, "version", lambda _: "1.0")
    rows = {
        row["for"]: row for row in json.loads(cli("doctor", "--json", cwd=tmp_path)[1])["optional"]
    }
    assert rows.keys() == OPTIONAL.keys()
    assert {user: row["missing"] for user, row in rows.items() if row["missing"]} == {
        "base: MODEL.gguf": ["protobuf"],
        "report_to: wandb": ["wandb"],
    }
    assert rows["base: MODEL.gguf"] == {
        "for": "base: MODEL.gguf",
        "extra": "gguf",
        "libraries": {"gguf": "1.0", "sentencepiece": "1.0", "protobuf": None, "accelerate": "1.0"},
        "missing": ["protobuf"],
        "without": "an error",
        "install": "pip install 'lora-workbench[gguf]'",
    }
    shown = cli("doctor", cwd=tmp_path)[1]
    assert re.search(r"^report_to: wandb +trackers +missing: wandb +", shown, re.MULTILINE)
    assert re.search(r"^lora serve +serve +installed", shown, re.MULTILINE)
    assert "pip install 'lora-workbench[EXTRA]'" in shown


def test_every_extra_of_the_package_is_in_the_doctors_table_with_its_libraries() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    declared = {
        extra: {re.split(r"[^\w.-]", requirement)[0] for requirement in requirements}
        for extra, requirements in extras.items()
        if extra not in ("all", "dev", "docs")  # which no command needs
    }
    needed: dict[str, set[str]] = {extra: set() for extra in declared}
    for needs in OPTIONAL.values():
        needed[needs.extra] |= set(needs.libraries)
    assert needed == declared


def test_every_tracker_is_in_the_doctors_table() -> None:
    assert {f"report_to: {name}" for name in trackers.TRACKERS} <= OPTIONAL.keys()


@pytest.mark.parametrize(
    ("marker", "command"),
    [
        ("", "pip install 'lora-workbench[web]'"),
        ("pipx_metadata.json", "pipx runpip lora-workbench install 'lora-workbench[web]'"),
        ("uv-receipt.toml", "uv pip install --python {prefix} 'lora-workbench[web]'"),
    ],
)
def test_the_command_that_installs_an_extra_is_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, marker: str, command: str
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    if marker:
        (tmp_path / marker).touch()
    assert install_command("web") == command.format(prefix=tmp_path)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with subwords and a chat template."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    toy_checkpoint(folder)
    return folder


def test_prompt_prints_the_completion_of_a_subword_model_exactly(cli: Lora, toy: Path) -> None:
    text = "The currency of Bulgaria"
    code, out, _ = cli("prompt", text, "--base", str(toy), "--max-tokens", "6", cwd=toy.parent)
    tokenizer, model = (
        AutoTokenizer.from_pretrained(toy),
        AutoModelForCausalLM.from_pretrained(toy).eval(),
    )
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    whole = tokenizer.decode([*ids[0].tolist(), *output.tolist()], skip_special_tokens=True)
    assert code == 0 and len(output) > 2
    assert out.partition("\n\n")[2].rstrip("\n") == whole.rstrip().rstrip("\ufffd")
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    answer = json.loads(
        cli("prompt", text, "--base", str(toy), "--max-tokens", "6", "--json", cwd=toy.parent)[1]
    )
    assert answer["completion"] == whole.removeprefix(text).strip().rstrip("\ufffd")
    assert answer["top_k"][0]["token"] == SubwordTokenizer.load(toy).word(best)
    assert out.splitlines()[1].split()[0] == escape_whitespace(answer["top_k"][0]["token"])


def test_a_subword_model_is_prompted_with_its_chat_template(
    cli: Lora, toy: Path, finished: Path
) -> None:
    code, out, _ = cli(
        "prompt", "hi", "--base", str(toy), "--chat", "--max-tokens", "3", cwd=toy.parent
    )
    assert code == 0 and "\nhi\n→ " in out
    plain, chat = (
        json.loads(cli("prompt", text, "--base", str(toy), *more, "--json", cwd=toy.parent)[1])[
            "top_k"
        ]
        for text, more in (("<s>user: hi</s>", ()), ("hi", ("--chat",)))
    )
    assert plain == chat
    for command in ("prompt", "compare"):
        code, out, err = cli(command, "die katze", "--chat", cwd=finished)
        assert (code, out) == (1, "") and "has no chat template. Prompt it without chat" in err


def test_compare_sets_the_variants_of_a_subword_model_side_by_side(
    cli: Lora, toy: Path, tmp_path: Path
) -> None:
    for name in ("base", "expanded"):
        shutil.copytree(toy, tmp_path / "artifacts" / name)
    (tmp_path / "params.yaml").write_text("base: org/toy\nexpand_vocab: {}\n", encoding="utf-8")
    code, out, _ = cli("compare", "The currency", "--max-tokens", "4", cwd=tmp_path)
    rows = [line for line in out.splitlines() if line.startswith(("base ", "expanded "))]
    assert code == 0 and len(rows) == 2 and rows[0].split()[1:] == rows[1].split()[1:]
    assert cli("compare", "hi", "--chat", "--json", cwd=tmp_path)[0] == 0


def test_the_report_has_a_line_per_model_in_80_columns(
    cli: Lora, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a real model, whose numbers are longer."""
    (tmp_path / "artifacts/evaluation").mkdir(parents=True)
    shutil.copy(finished / "params.yaml", tmp_path)
    metrics = read_json(finished / "artifacts/evaluation/metrics.json")
    for numbers in metrics.values():
        numbers |= {
            "bytes": 538_060_000,
            "new_completed": 10,
            "new_sentences": 10,
            "trainable": 134_515_008,
        }
        numbers |= {"trainable_percent": 100.0, "old_loss": 12.345, "new_loss": 12.345}
    write_json(tmp_path / "artifacts/evaluation/metrics.json", metrics)
    monkeypatch.setattr(console.stdout, "width", 80)
    for root in (finished, tmp_path):
        rows = cli("report", cwd=root)[1].splitlines()
        assert all(len(row) <= 80 for row in rows if "artifacts/" not in row)
        tasks = next(n for n, row in enumerate(rows) if row.startswith("task "))
        assert len(rows[:tasks]) <= 30
        assert [row.split()[0] for row in rows[1:8]] == [
            *("model", "base", "expanded", "scratch", "full", "freeze", "lora")
        ]
        assert rows[0].split() == [
            "trained",
            "share",
            "new",
            "new",
            "old",
            "old",
            "loss",
            "KL",
            "from",
            "answers",
            "size",
        ]
        assert rows[1].split()[1:6] == ["params", "of", "all", "loss", "completed"]
        legend = "\n".join(rows)
        assert "nats per token" in legend and "answers kept: " in legend, (
            "a line says what the headings mean"
        )
    assert rows[1].endswith("(MB)") and "134.5M" in rows[2] and rows[2].endswith(" 538")


@pytest.mark.parametrize(
    "arguments",
    ["report", "params explain finetune_lora", "cache --json", "--help", "params show", "nope"],
)
def test_a_reader_that_has_seen_enough_changes_no_exit_code(project: Path, arguments: str) -> None:
    """As `| head -1` does; whether it is quicker than the command is a matter of chance."""

    def code(streams: list[int]) -> int:
        command = [LORA, *arguments.split()]
        return subprocess.run(
            command, cwd=project, stdout=streams[0], stderr=streams[1], check=False
        ).returncode

    reading, closed = os.pipe()
    os.close(reading)
    with open(os.devnull, "wb") as null:  # noqa: PTH123
        read = code([null.fileno()] * 2)
        assert (
            code([closed, null.fileno()])
            == code([closed, closed])
            == read
            == (2 if arguments == "nope" else 0)
        )
    os.close(closed)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("arguments", ["runs --json", "--version"])
def test_a_result_that_a_full_disk_does_not_take_is_one_error(brief: Path, arguments: str) -> None:
    with Path("/dev/full").open("wb") as full:
        command = [LORA, *arguments.split()]
        done = subprocess.run(
            command, cwd=brief, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
        unheard = subprocess.run([LORA, "nope"], cwd=brief, stdout=full, stderr=full, check=False)
    assert refusal((done.returncode, "", done.stderr)).startswith("error: No space left on device")
    assert unheard.returncode == 2


@pytest.mark.parametrize("program", ["lora doctor", "lora adapters", "lora-tui"])
def test_a_current_folder_that_is_gone_is_one_error(tmp_path: Path, program: str) -> None:
    (tmp_path / "gone").mkdir()
    script = f"cd gone && rmdir ../gone && exec {Path(LORA).parent / program}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    err = refusal((done.returncode, done.stdout, done.stderr))
    assert "current folder was removed" in err


@pytest.mark.slow
def test_a_reader_that_is_gone_stops_no_training(project: Path) -> None:
    shutil.rmtree(project / "artifacts/merged", ignore_errors=True)
    shutil.rmtree(project / ".lora-cache/finetune_lora")
    reading, closed = os.pipe()
    os.close(reading)
    command = [LORA, "finetune", "lora", "--set", "finetune_lora.epochs=1", "--force"]
    done = subprocess.run(command, cwd=project, stdout=closed, stderr=closed, check=False)
    os.close(closed)
    assert done.returncode == 0
    assert read_json(project / "artifacts/lora_adapter/manifest.json")["params"]["epochs"] == 1


def test_cache_shows_and_prunes(cli: Lora, project: Path) -> None:
    entries = json.loads(cli("cache", "--json", cwd=project)[1])
    assert {entry["stage"] for entry in entries} == {*PIPELINE, "adapters"}
    assert f"{len(entries)} kept" in cli("cache", cwd=project)[1]
    assert "0 removed" in cli("cache", "prune", "--keep", "1", cwd=project)[1]
    assert "0 removed" in cli("cache", "prune", "--max-size", "1 GiB", cwd=project)[1]
    assert (
        "1 removed"
        in cli(
            "cache",
            "prune",
            "--max-size",
            f"{(sum(e['bytes'] for e in entries) - 1) / 1000}kB",
            cwd=project,
        )[1]
    )
    entries = json.loads(cli("cache", "--json", cwd=project)[1])
    assert f"{len(entries)} removed" in cli("cache", "prune", cwd=project)[1]
    assert "0 kept" in cli("cache", cwd=project)[1]


def test_params_from_another_folder_keep_their_own_paths(
    cli: Lora, project: Path, tmp_path: Path
) -> None:
    code, _, err = cli(
        "merge", "--params", str(project / "params.yaml"), *sets(*BRIEF), cwd=tmp_path
    )
    assert code == 0
    assert "taken from the cache" in err
    assert [path.name for path in tmp_path.iterdir()] == ["project"]


def test_a_full_disk_is_one_error_and_what_was_there_stays(cli: Lora, project: Path) -> None:
    """A limit on file sizes stands for the full disk: writing past it fails in the same way."""
    manifest = project / "artifacts/full_finetuned/manifest.json"
    before = manifest.read_bytes()
    for limit in (
        300,
        1_500,
        3_000,
        200_000,
        450_000,
    ):  # the log, the tokenizer, the checkpoint, the model: whatever is first
        with files_up_to(limit):
            code, out, err = cli("finetune", "full", *sets(*BRIEF), "--force", cwd=project)
        assert (code, out) == (1, ""), limit
        *output, error = err.splitlines()
        assert error.startswith("error: "), err
        assert [line for line in output if "of tensors" not in line] == []
        assert manifest.read_bytes() == before
        assert not list((project / "artifacts").glob(".*"))


def test_a_folder_that_cannot_be_written_is_one_error(cli: Lora, project: Path) -> None:
    shutil.rmtree(project / "runs")
    (project / "runs").write_text("a file where a folder must be", encoding="utf-8")
    err = refusal(cli("finetune", "full", *sets(*BRIEF), "--force", cwd=project))
    assert "runs" in err


@needs_permissions
def test_a_read_only_folder_is_one_error(cli: Lora, project: Path) -> None:
    with read_only(project / "artifacts"):
        answer = cli("finetune", "full", *sets(*BRIEF), "--force", cwd=project)
    refusal(answer)


READING = (
    ["cache"],
    ["report"],
    ["runs"],
    ["adapters"],
    ["params", "show"],
    ["prompt", "der"],
    ["finetune", "lora", "--dry-run"],
)


@needs_permissions
def test_a_command_that_only_reads_needs_no_right_to_write(cli: Lora, project: Path) -> None:
    with read_only(project):
        answers = {" ".join(command): cli(*command, cwd=project) for command in READING}
    assert {command: code for command, (code, _, _) in answers.items() if code} == {}
    assert answers["cache"] == cli("cache", cwd=project)


@needs_permissions
def test_a_cache_of_another_user_is_read(cli: Lora, project: Path) -> None:
    """Also one whose lock file is gone, as in a copy."""
    shutil.rmtree(project / "artifacts/full_finetuned")
    (project / ".lora-cache/.lock").unlink(missing_ok=True)
    with read_only(project / ".lora-cache"):
        code, _, err = cli("finetune", "full", *sets(*BRIEF), cwd=project)
        assert (code, "taken from the cache" in err) == (0, True)
        refusal(cli("cache", "prune", cwd=project))
    assert (project / "artifacts/full_finetuned/manifest.json").is_file()


@pytest.mark.slow
def test_a_closed_pipe_ends_in_silence(finished: Path) -> None:
    done = subprocess.run(
        f"{LORA} prompt der --top-k 74 --json | head -1",
        shell=True,
        cwd=finished,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""


def drawn(project: Path, **environment: str) -> str:
    """What a stage writes to a terminal while it runs."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [LORA, "finetune", "full", *sets("finetune_full.epochs=30"), "--force"],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    )
    os.close(slave)
    shown = b""
    try:
        while block := os.read(master, 4096):
            shown += block
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    return shown.decode()


@pytest.mark.slow
def test_a_progress_bar_is_drawn_on_a_terminal_only_and_no_color_is_respected(
    cli: Lora, project: Path
) -> None:
    _, _, quiet = cli("finetune", "full", *sets(*BRIEF), "--force", cwd=project)
    assert re.fullmatch(
        r"(finetune_full: [\d.]+ MiB of tensors (predicted|measured) at the peak of the largest step\n){2}"
        r"params\.yaml says otherwise: .*\n",
        quiet,
    )
    text = drawn(project)
    assert "finetune_full" in text
    assert "/180" in text
    assert "loss " in text
    assert "0:00:0" in text
    color = re.compile(r"\x1b\[[0-9;]*3[0-8](;[0-9;]*)?m")
    assert color.search(text)
    assert not color.search(drawn(project, NO_COLOR="1"))

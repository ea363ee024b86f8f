"""`lora advise`, and its notes before a training: what is known is what training then counts."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import stages
from pipeline.project.logs.run_log import read_steps
from tests.conftest import Lora
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import make_base, new_houses, refusal, save

LORA = {
    "learning_rate": 0.02,
    "train_embeddings": "none",
    "epochs": 20,
    "eval_share": 0,
    "data": "data/texts.jsonl",
}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    from tests.helpers import families

    root = families.new_project(tmp_path / "llama", families.FAMILIES["llama"])
    save(root / "params.yaml", {f"finetune_lora.{key}": value for key, value in LORA.items()})
    return make_base(root)


def advice(cli: Lora, root: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    code, out, err = cli("advise", "--json", *arguments, cwd=root)
    assert (code, err) == (0, "")
    answer = json.loads(out)
    return answer["facts"], answer["advice"]


@pytest.mark.slow
def test_facts_are_what_training_counts_and_each_broken_rule_is_noted_once_before_it(
    cli: Lora, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts, broken = advice(cli, llama)
    assert [one["key"] for one in broken] == ["finetune_lora.learning_rate", "finetune_lora.epochs"]
    code, _, err = cli("finetune", "lora", cwd=llama)
    assert code == 0
    notes = [line for line in err.splitlines() if "advised" in line]
    assert [note.partition(" is ")[0] for note in notes] == [one["key"] for one in broken]
    manifest = read_json(llama / "artifacts/lora_adapter/manifest.json")
    epoch = [
        step for step in read_steps(llama / "artifacts/lora_adapter/loss.csv") if step.epoch == 1
    ]
    known = facts["finetune_lora"]
    assert known["trained"] == manifest["parameters"]["trainable"]
    assert known["base"] == manifest["parameters"]["total"]
    assert (known["examples"], known["tokens"]) == (5, epoch[-1].tokens)
    assert (known["adapted"], known["cut"]) == (1.0, 0.0)

    assert "advised" not in cli("finetune", "lora", cwd=llama)[2], "nothing trains"
    monkeypatch.setattr(stages, "UNDER_DVC", True)
    assert "advised" not in cli("finetune", "lora", "--force", cwd=llama)[2]


def test_settings_as_advised_are_answered_with_nothing_more(cli: Lora, llama: Path) -> None:
    _, out, err = cli("advise", "--set", "finetune_lora.max_length=4", cwd=llama)
    assert "finetune_lora: " in err and "100% truncated" in err
    assert (
        "finetune_lora.max_length" in out and "about 0.001" in out and "LoRA Without Regret" in out
    )
    good = [f"finetune_lora.{setting}" for setting in ("learning_rate=1e-3", "epochs=3")]
    assert advice(cli, llama, *(word for setting in good for word in ("--set", setting)))[1] == []


def test_of_much_data_a_part_is_tokenized_and_counted(
    cli: Lora, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = (llama / "data/texts.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[0]
    (llama / "data/texts.jsonl").write_text(line * 9, encoding="utf-8")
    whole = advice(cli, llama)[0]["finetune_lora"]
    assert (whole["examples"], whole["more"]) == (9, False)
    monkeypatch.setattr("lora_workbench.advice.ENCODED", 2)
    assert advice(cli, llama)[0]["finetune_lora"] == whole
    monkeypatch.setattr("lora_workbench.advice.COUNTED", 6)
    part = advice(cli, llama)[0]["finetune_lora"]
    assert (part["examples"], part["more"], part["tokens"]) == (6, True, whole["tokens"] * 6 // 9)


def test_before_anything_is_made_parameters_and_examples_are_known(
    cli: Lora, tmp_path: Path
) -> None:
    new_houses(tmp_path)
    facts, broken = advice(cli, tmp_path)
    assert broken == [] and set(facts) == {"finetune_full", "finetune_freeze", "finetune_lora"}
    assert facts["finetune_lora"]["examples"] == 8 and facts["finetune_lora"]["tokens"] is None
    assert facts["finetune_lora"]["trained"] < facts["finetune_full"]["trained"]
    _, out, err = cli("advise", cwd=tmp_path)
    assert (
        out == "" and "tokens unknown until the base is there" in err and "No rule disagrees" in err
    )


def test_a_broken_line_of_data_and_a_project_without_fine_tuning_are_one_message(
    cli: Lora, tmp_path: Path
) -> None:
    new_houses(tmp_path)
    data = (
        tmp_path / yaml.safe_load((tmp_path / "params.yaml").read_text())["finetune_lora"]["data"]
    )
    data.write_bytes(b"eins\n\xff\n")
    assert data.name in refusal(cli("advise", cwd=tmp_path))
    (tmp_path / "params.yaml").write_text("pretrain: {}\n", encoding="utf-8")
    assert "no section that fine-tunes" in refusal(cli("advise", cwd=tmp_path))


def test_what_a_sweep_measured_is_not_argued_with(cli: Lora, llama: Path) -> None:
    """The rate is far from the advised one, and it is the best of those that were tried."""
    rates = {"lr-0.01": (0.01, 0.5), "lr-0.0002": (0.0002, 0.9)}
    rows = {
        name: {
            "values": {"learning_rate": rate},
            "state": "done",
            "eval_loss": loss,
            "final_loss": 1.0,
        }
        for name, (rate, loss) in rates.items()
    }
    (llama / "artifacts/sweep").mkdir(parents=True)
    write_json(llama / "artifacts/sweep/sweep.json", rows)
    facts, broken = advice(cli, llama, "--set", "finetune_lora.learning_rate=0.01")
    assert "finetune_lora.learning_rate" not in [one["key"] for one in broken]
    assert facts["finetune_lora"]["measured"] == ["learning_rate"]
    assert (
        "learning_rate as the best of the sweep"
        in cli("advise", "--set", "finetune_lora.learning_rate=0.01", cwd=llama)[2]
    )

    # not what was measured
    _, broken = advice(cli, llama, "--set", "finetune_lora.learning_rate=0.02")
    assert "finetune_lora.learning_rate" in [one["key"] for one in broken]
    (llama / "artifacts/sweep/sweep.json").write_text("[]")
    assert advice(cli, llama)[1]

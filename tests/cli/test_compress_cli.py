"""`lora adapters compress`, and `lora spectrum --intruders` and `--damp`: output, files and
errors.
"""

import json
from pathlib import Path

import pytest

from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.low_rank import load_update
from pipeline.errors import UserError
from tests.conftest import Lora
from tests.helpers.checkpoints import WORDS, adapter, checkpoint
from tests.helpers.json_files import write_json
from tests.helpers.projects import lora, refusal
from tests.helpers.stored_models import strong, tuned_from


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, a fine-tuned copy, an adapter on it and one with intruders."""
    base = checkpoint(tmp_path / "base", d_model=24)
    tuned_from(base, tmp_path / "tuned", 3)
    adapter(tmp_path / "big", base, AdapterSpec(6, 6.0, ("q_proj", "fc1"), saved=("lm_head",)))
    strong(tmp_path / "strong", base, AdapterSpec(2, 4.0, ("q_proj", "fc1")))
    (tmp_path / "some.txt").write_text("".join(f"{' '.join(WORDS[i : i + 5])}\n" for i in range(9)))
    return tmp_path


@pytest.mark.slow
def test_the_table_fits_80_columns_and_ends_with_what_it_costs(models: Path) -> None:
    output = lora(
        "adapters",
        "compress",
        "big",
        "--rank",
        "2",
        "--out",
        "small",
        "--data",
        "some.txt",
        cwd=models,
        COLUMNS="80",
    )
    assert (output.returncode, output.stderr) == (0, "")
    lines = output.stdout.splitlines()
    assert lines[0].split() == ["model.decoder.layers.", "‖ΔW‖", "rank", "now", "error"]
    assert [line.split()[2:4] for line in lines[1:5]] == [["6", "2"]] * 4 and max(
        map(len, lines)
    ) <= 80
    assert lines[5].startswith("small  ") and "% off, all modules together" in lines[5]
    assert lines[6].split() == ["model", "loss", "right", "KL", "to", "adapter"]
    assert [line.split()[0] for line in lines[7:]] == ["adapter", "base", "compressed"]
    assert lora("adapters", "verify", "small", cwd=models).returncode == 0


def test_json_holds_each_modules_error_and_the_cost(cli: Lora, models: Path) -> None:
    arguments = ["big", "--energy", "0.8", "--out", "small", "--data", "some.txt", "--json"]
    code, out, err = cli("adapters", "compress", *arguments, cwd=models)
    result = json.loads(out)
    assert (code, err) == (0, "")
    before, after = (load_update(models / name).low_rank for name in ("big", "small"))
    for row in result["modules"]:
        name = row["module"]
        cut = (before[name].delta() - after[name].delta()).norm() / before[name].delta().norm()
        assert row["error"] == pytest.approx(float(cut), abs=1e-5) and row["error"] ** 2 <= 0.2
        assert row["after"] == after[name].rank < row["before"] == 6
    quality = result["quality"]
    assert (
        quality["adapter"]["divergence"]
        == 0
        < quality["compressed"]["divergence"]
        < quality["base"]["divergence"]
    )
    _, out, _ = cli(
        "adapters",
        "compress",
        "big",
        "--rank",
        "6",
        "--out",
        "same",
        "--data",
        "some.txt",
        "--json",
        cwd=models,
    )
    quality = json.loads(out)["quality"]
    assert quality["compressed"]["loss"] == pytest.approx(quality["adapter"]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    "command",
    [
        "adapters compress big --rank 2",
        "spectrum base tuned --rank 2",
        "spectrum base strong --damp 0.5 --epsilon 0.7",
    ],
)
def test_plain_prompts_are_measured_in_the_bases_chat_template(
    cli: Lora, models: Path, command: str
) -> None:
    turns = f"{{% for m in messages %}}{WORDS[0]} {{{{ m['content'] }}}} {{% endfor %}}"
    for model in ("base", "tuned"):
        (models / model / "chat_template.jinja").write_text(turns)
    prompt, answer = " ".join(WORDS[1:4]), " ".join(WORDS[4:6])
    plain = {"prompt": prompt, "completion": f" {answer}"}
    chat = {
        "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    }
    for name, row in (("plain", plain), ("chat", chat)):
        write_json(models / f"{name}.jsonl", row)

    def cost(*arguments: str) -> object:
        code, out, _ = cli(
            *command.split(), "--out", "small", "--json", "--data", *arguments, cwd=models
        )
        assert code == 0
        return json.loads(out)["quality"]

    assert cost("plain.jsonl") == cost("chat.jsonl") != cost("plain.jsonl", "--no-template")


def test_the_table_is_shown_before_models_are_asked(
    cli: Lora, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("No room.")

    monkeypatch.setattr("pipeline.inference.score.costs", fail)
    for replaced in ("", "tiny: the earlier result there is replaced.\n"):
        code, out, err = cli(
            "adapters",
            "compress",
            "big",
            "--rank",
            "2",
            "--out",
            "tiny",
            "--data",
            "some.txt",
            cwd=models,
        )
        assert (code, err) == (1, f"{replaced}error: No room.\n") and "tiny  " in out


@pytest.mark.slow
def test_intruders_are_listed_and_damped(models: Path) -> None:
    output = lora(
        "spectrum", "base", "strong", "--intruders", "--epsilon", "0.7", cwd=models, COLUMNS="80"
    )
    assert (output.returncode, output.stderr) == (0, "")
    head, *lines = output.stdout.splitlines()
    assert head.split() == ["matrix", "intruders", "at", "largest", "σ", "most", "alike"]
    assert lines[:-1] and all(
        line.startswith(("0.", "1.")) and len(line) <= 80 for line in lines[:-1]
    )
    assert f"in {len(lines) - 1} of 4 matrices: among the 10 largest" in lines[-1]
    options = ["--damp", "0.5", "--out", "damped", "--epsilon", "0.7", "--data", "some.txt"]
    output = lora("spectrum", "base", "strong", *options, cwd=models, COLUMNS="80")
    assert (output.returncode, output.stderr) == (0, "")
    assert "damped  intruders scaled by 0.5" in output.stdout
    assert [line.split()[0] for line in output.stdout.splitlines()[-3:]] == [
        "tuned",
        "base",
        "damped",
    ]
    assert lora("adapters", "verify", "damped", cwd=models).returncode == 0


def test_their_json_has_every_matrix_and_a_full_model_has_them_too(cli: Lora, models: Path) -> None:
    code, out, err = cli(
        "spectrum",
        "base",
        "strong",
        "--intruders",
        "--epsilon",
        "0.7",
        "--top",
        "3",
        "--json",
        cwd=models,
    )
    result = json.loads(out)
    assert (code, err, result["top"], result["epsilon"]) == (0, "", 3, 0.7)
    assert len(result["matrices"]) == 4 and all(one["complete"] for one in result["matrices"])
    found = [intruder for one in result["matrices"] for intruder in one["intruders"]]
    assert found and all(one["similarity"] < 0.7 and 1 <= one["position"] <= 3 for one in found)
    code, out, _ = cli("spectrum", "base", "tuned", "--intruders", "--epsilon", "0", cwd=models)
    assert code == 0 and out.startswith("0 intruders in 0 of 12 matrices")


COMPRESS, SPECTRUM = ["adapters", "compress"], ["spectrum"]
REFUSED = [
    (COMPRESS, "big --out x", "compress needs either --rank or --energy"),
    (COMPRESS, "big --out x --rank 2 --energy 0.9", "compress needs either --rank or --energy"),
    (COMPRESS, "base --out x --rank 2 --base base", "is a full model, not an adapter"),
    (COMPRESS, "big --out big --rank 2", "big is also an input"),
    (COMPRESS, "big --out tuned --rank 2", "tuned exists and holds other files"),
    (COMPRESS, "big --out x --rank 2 --data nothing.txt", "nothing.txt"),
    (COMPRESS, "big --out x --rank 2 --base wide", "does not fit"),
    (SPECTRUM, "base strong --intruders --rank 2 --out x", "exclude --rank and --csv"),
    (SPECTRUM, "base strong --intruders --csv", "exclude --rank and --csv"),
    (SPECTRUM, "base strong --damp 0.5", "--damp and --out must be used together"),
    (SPECTRUM, "base strong --intruders --out x", "--damp and --out must be used together"),
    (SPECTRUM, "base strong --intruders --data some.txt", "Add --damp and --out"),
    (SPECTRUM, "base tuned --damp 0.5 --out x", "extract one first"),
    (SPECTRUM, "base strong --damp 0.5 --out tuned", "tuned exists and holds other files"),
    (SPECTRUM, "base dora --damp 0.5 --out x", "dora was trained with DoRA"),
    (SPECTRUM, "base nowhere --intruders", "nowhere is not a folder"),
    (SPECTRUM, "strong base --intruders", "strong is an adapter"),
]


@pytest.mark.parametrize(("command", "arguments", "reason"), REFUSED)
def test_each_wrong_request_is_one_message(
    cli: Lora, models: Path, command: list[str], arguments: str, reason: str
) -> None:
    checkpoint(models / "wide", d_model=32)
    adapter(models / "dora", models / "base", AdapterSpec(2, 2.0, ("q_proj",), dora=True))
    assert reason in refusal(cli(*command, *arguments.split(), cwd=models))
    assert not (models / "x").exists()


def test_an_adapter_without_intruders_is_not_damped(cli: Lora, models: Path) -> None:
    code, out, err = cli(
        "spectrum", "base", "strong", "--damp", "0.5", "--epsilon", "0", "--out", "x", cwd=models
    )
    assert code == 1 and out.startswith("0 intruders") and "has no intruder to damp" in err
    assert not (models / "x").exists()

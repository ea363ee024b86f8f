"""`lora calc` as a user types it: one screen, one JSON document, CSV rows, and one line per
error.
"""

import csv
import io
import json
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.calc.fit import GIB, gpu
from pipeline.calc.memory import predict
from pipeline.calc.method import trainable
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import built_in, entry, names, open_model
from pipeline.stages.methods.lora import COUNTED as LORA
from pipeline.stages.methods.lora import Lora as LoraMethod
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.json_files import write_json
from tests.helpers.projects import load, lora

QWEN = ("--model", "qwen3-8b", "--r", "8")


def test_only_typer_rich_and_yaml_are_imported_on_the_way(tmp_path: Path) -> None:
    code = (
        "import sys; from cli.main import main\ntry: main()\nfinally: print(list(sys.modules), "
        "file=sys.stderr)"
    )
    for more in (
        [],
        ["--json"],
        ["--fit", "24"],
        ["--sweep", "rank=1,2"],
        ["--explain"],
        ["--list"],
        ["--tokens", "5M"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, "calc", *QWEN, *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        loaded = {name.split(".")[0] for name in re.findall(r"'([\w.]+)'", done.stderr)}
        allowed = set(sys.stdlib_module_names) | {
            "cli",
            "lora_workbench",
            "pipeline",
            "typer",
            "rich",
            "yaml",
            "__main__",
            "shellingham",
        }
        extra = {name for name in loaded - allowed if not name.startswith("_")}
        of_these = {
            "click",
            "typing_extensions",
            "markdown_it",
            "mdurl",
            "pygments",
            "annotated_doc",
            "cython_runtime",
        }
        of_these |= {"msgspec"}
        assert not extra - of_these, extra
        assert not loaded & {
            "torch",
            "numpy",
            "transformers",
            "safetensors",
            "huggingface_hub",
            "dvc",
        }


def test_the_one_screen_fits_80_columns_and_has_all_of_it(tmp_path: Path) -> None:
    done = lora("calc", *QWEN, cwd=tmp_path, COLUMNS="80", TERMINAL_WIDTH="80")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 40
    for text in (
        "qwen3-8b  8,190,735,360 parameters (published: 8.2B)",
        "LoRA r=8 on attention: 7,667,712 trainable, 0.09361%",
        "2·r·d per projection: 9,437,184; the rule of thumb takes every projection as",
        "backward, loss",
    ):
        assert text in done.stdout
    assert re.search(
        r"k_proj\s+4,096 → 1,024\s+8 × 4,096\s+1,024 × 8\s+36\s+1,474,560", done.stdout
    )
    peak = next(line.split() for line in lines if line.startswith("peak"))
    run = TrainingConfig(context=2**29)
    expected = [
        predict(built_in("qwen3-8b").shapes, LORA, r).peak
        for r in (run, TrainingConfig(precision="nf4-dq", context=2**29))
    ]
    assert peak[3:] == [f"{size / GIB:.2f}" for size in expected]
    full = next(line.split() for line in lines if line.startswith("full") and "·" in line)
    assert full[1:] == ["·"] * 13, (
        "157.14 GiB, with fp32 weights and moments: more than any of these"
    )


@pytest.mark.parametrize("width", ["60", "80", "200"])
@pytest.mark.parametrize(
    "model", ["qwen3-8b", "qwen3-235b-a22b", "minigpt", "gpt2", "roberta-large"]
)
@pytest.mark.sampled(4)
def test_no_number_is_cut_at_any_width(tmp_path: Path, width: str, model: str) -> None:
    sequence = ("--seq", "32") if model == "minigpt" else ("--seq", "512")
    done = lora(
        "calc", "--model", model, *sequence, "--targets", "all-linear", cwd=tmp_path, COLUMNS=width
    )
    wide = lora(
        "calc", "--model", model, *sequence, "--targets", "all-linear", cwd=tmp_path, COLUMNS="300"
    )
    assert (done.returncode, wide.returncode) == (0, 0)
    assert "…" not in done.stdout
    digits = [Counter(re.findall(r"\d", text)) for text in (done.stdout, wide.stdout)]
    assert digits[0] == digits[1], "every digit is there, on whatever line"


def test_json_is_one_document_and_the_contract(cli: Lora, tmp_path: Path) -> None:
    code, out, err = cli("calc", *QWEN, "--json", cwd=tmp_path)
    assert (code, err) == (0, "")
    result = json.loads(out)
    contract = (
        "model",
        "method",
        "rank",
        "alpha",
        "targets",
        "parameters",
        "projections",
        "adapter_bytes",
        "memory",
    )
    assert set(contract) <= result.keys()
    assert (result["rank"], result["alpha"], result["scale"]) == (8, 8, 1)
    rs = json.loads(cli("calc", *QWEN, "--alpha", "16", "--rslora", "--json", cwd=tmp_path)[1])
    assert rs["scale"] == pytest.approx(16 / 8**0.5)
    assert result["parameters"]["trainable_percent"] == 0.0936
    assert (
        result["memory"]["peak"]
        == predict(built_in("qwen3-8b").shapes, LORA, TrainingConfig(context=2**29)).peak
    )
    assert cli("calc", "--model", "qwen3-8b", "--rank", "8", "--json", cwd=tmp_path)[1] == out


def test_csv_has_a_row_for_each_method(cli: Lora, tmp_path: Path) -> None:
    _, out, _ = cli("calc", *QWEN, "--csv", cwd=tmp_path)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["method"] for row in rows] == ["full", "freeze", "LoRA", "QLoRA"]
    parts = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")
    assert all(sum(int(row[part]) for part in parts) == int(row["peak"]) for row in rows)


def test_every_question_answers_as_table_json_and_csv(cli: Lora, tmp_path: Path) -> None:
    for question in (
        ["--fit", "24"],
        ["--fit", "2"],
        ["--gpu", "rtx4090"],
        ["--sweep", "rank=1,2,4,8,16,64"],
        ["--sweep", "precision=bf16,nf4,gptq-g64"],
        ["--explain"],
        ["--list"],
    ):
        code, table, err = cli("calc", *QWEN, *question, cwd=tmp_path)
        assert (code, err) == (0, ""), question
        assert table.strip()
        assert json.loads(cli("calc", *QWEN, *question, "--json", cwd=tmp_path)[1])
        assert (
            len(
                list(
                    csv.reader(io.StringIO(cli("calc", *QWEN, *question, "--csv", cwd=tmp_path)[1]))
                )
            )
            > 1
        )


def test_fit_gives_the_largest_settings_and_what_to_change(cli: Lora, tmp_path: Path) -> None:
    fits = json.loads(cli("calc", *QWEN, "--fit", "24", "--json", cwd=tmp_path)[1])
    assert fits["fits"] and fits["changes"] == []
    assert (fits["batch"], fits["precision"]) == (2, "bf16")
    tight = json.loads(cli("calc", *QWEN, "--gpu", "rtx3060", "--json", cwd=tmp_path)[1])
    assert not tight["fits"]
    assert tight["changes"][0]["change"] == "--precision nf4-dq (QLoRA)"
    _, out, _ = cli("calc", "--method", "full", "--gpu", "rtx4090", cwd=tmp_path)
    assert "157.14 GiB does not fit" in out
    assert "--method lora  → 19.94 GiB  fits" in out
    _, out, _ = cli("calc", *QWEN, "--fit", "1", cwd=tmp_path)
    assert "a larger device is needed: RTX 4060" in out


def test_a_sweep_has_a_row_per_value(cli: Lora, tmp_path: Path) -> None:
    rows = json.loads(
        cli("calc", *QWEN, "--sweep", "rank=1,2,4,8,16,64", "--json", cwd=tmp_path)[1]
    )
    assert [row["rank"] for row in rows] == [1, 2, 4, 8, 16, 64]
    assert [row["trainable"] for row in rows] == [958_464 * rank for rank in (1, 2, 4, 8, 16, 64)]
    _, out, _ = cli("calc", *QWEN, "--sweep", "sequence=512,4000", cwd=tmp_path)
    assert re.search(r"4000\s+7,667,712\s+0.0936\s+[\d.]+ GiB\s+RTX 4090", out)


def test_a_batch_filled_with_tokens_is_predicted_whatever_the_batch_size(
    cli: Lora, tmp_path: Path
) -> None:
    asked = (*QWEN, "--tokens-per-batch", "8192", "--seq", "512")
    answers = [
        json.loads(cli("calc", *asked, "--batch", batch, "--json", cwd=tmp_path)[1])["memory"]
        for batch in ("1", "16")
    ]
    assert answers[0] == answers[1]
    rows = json.loads(
        cli("calc", *asked, "--sweep", "tokens_per_batch=2048,8192", "--json", cwd=tmp_path)[1]
    )
    assert rows[0]["peak"] < rows[1]["peak"] == answers[0]["peak"]
    out = cli("calc", *asked, "--fit", "24", cwd=tmp_path)[1]
    assert "8,192 tokens, packed with 512 each" in out
    code, _, err = cli("calc", *QWEN, "--tokens-per-batch", "-1", cwd=tmp_path)
    assert code == 1 and "tokens-per-batch must be a whole number from 0" in err


@pytest.mark.slow
def test_trace_prints_both_peaks(cli: Lora, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    write_json(config, {**entry("smollm2-135m")["config"], "num_hidden_layers": 2})
    _, out, _ = cli(
        "calc", "--model", str(config), "--seq", "128", "--trace", "--json", cwd=tmp_path
    )
    (result,) = json.loads(out)
    assert abs(result["difference_percent"]) < 3
    assert result["traced"] > 10_000_000
    _, out, _ = cli("calc", "--model", str(config), "--seq", "128", "--trace", cwd=tmp_path)
    assert f"{result['traced']:,}" in out


def test_qlora_is_lora_on_nf4(cli: Lora, tmp_path: Path) -> None:
    for arguments, precision in (
        (["--method", "qlora"], "nf4-dq"),
        (["--method", "qlora", "--precision", "int8"], "int8"),
    ):
        result = json.loads(cli("calc", *arguments, "--json", cwd=tmp_path)[1])
        assert (result["method"], result["assumptions"]["precision"]) == ("lora", precision)


def test_the_targets_that_training_would_take_are_named_where_others_are_counted(
    cli: Lora, tmp_path: Path
) -> None:
    shapes = built_in("qwen3-8b").shapes
    more = trainable(shapes, LoraMethod(targets=("all-linear",)))
    found = json.loads(cli("calc", *QWEN, "--json", cwd=tmp_path)[1])
    assert (
        found["parameters"]["trainable"] == 7_667_712
        and f"all-linear: {more:,} parameters" in found["notes"][-1]
    )
    for same in (("--targets", "all-linear"), ("--model", "minigpt"), ("--method", "prefix")):
        assert "lora train" not in "".join(
            json.loads(cli("calc", *QWEN, *same, "--json", cwd=tmp_path)[1])["notes"]
        )


def test_a_project_is_counted_as_it_trains_and_options_win(cli: Lora, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "toy")
    path = tmp_path / "params.yaml"
    path.write_text(
        "base: toy\nfinetune_dpo: {}\nfinetune_lora: {max_length: 48}\n", encoding="utf-8"
    )

    def counted(*arguments: str) -> dict[str, Any]:
        code, out, err = cli("calc", "--params", str(path), *arguments, "--json", cwd=tmp_path)
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    params, shapes = load(path).finetune_lora, open_model(str(tmp_path / "toy")).shapes
    found = counted()
    assert (found["method"], found["rank"], found["alpha"]) == ("lora", params.rank, params.alpha)
    assert found["parameters"]["trainable"] == trainable(shapes, LORA.with_params(params))
    assumed = {
        key: found["assumptions"][key]
        for key in ("precision", "batch", "sequence", "checkpointing")
    }
    assert assumed == {
        "precision": "bf16",
        "batch": params.batch_size,
        "sequence": 48,
        "checkpointing": False,
    }
    assert not any("lora train" in note for note in found["notes"])
    other = counted("--method", "dpo", "--r", "2", "--batch", "1")
    assert (other["method"], other["rank"], other["assumptions"]["batch"]) == ("dpo", 2, 1)
    assert counted("--method", "qlora")["assumptions"]["precision"] == "nf4-dq"
    path.write_text("base: toy\nfinetune_prefix: {virtual_tokens: 3}\n", encoding="utf-8")
    assert counted()["method"] == "prefix", "what the project trains"


def test_minigpt_is_asked_about_as_it_trains(cli: Lora, tmp_path: Path) -> None:
    result = json.loads(cli("calc", "--model", "minigpt", "--r", "4", "--json", cwd=tmp_path)[1])
    assert result["parameters"]["total"] == 109_568
    assert result["parameters"]["trainable"] == result["parameters"]["document"] == 4_096
    used = result["assumptions"]
    assert (used["precision"], used["checkpointing"], used["sequence"]) == ("fp32", False, 32)
    assert result["memory"]["overhead"] == 0


BAD = [
    (["--rank", "0"], "rank must be a whole number from 1"),
    (["--batch", "-1"], "batch must be a whole number from 1 .*, got -1"),
    (["--sequence", "0"], "sequence must be a whole number from 1"),
    (["--sequence", "99999999999"], "sequence must be a whole number"),
    (["--targets", "nope"], "'nope' matches no linear layer"),
    (["--targets", ""], "matches no linear layer"),
    (["--model", "qwen3-88b"], "not built in. Nearest: qwen3-8b"),
    (["--model", "./nowhere.gguf"], "does not exist"),
    (["--precision", "int3"], "'int3' is not known. Known: fp32"),
    (["--precision", "gptq-g0"], "is not known"),
    (
        ["--optimizer", "adam"],
        "optimizer must be one of adamw, adamw-8bit, paged-adamw-8bit, sgd, muon, got 'adam'",
    ),
    (
        ["--trainer", "mine"],
        "trainer must be one of ours, torch, torch-fp32, torch-foreach, got 'mine'",
    ),
    (["--lora-dropout", "1"], "lora-dropout must be at least 0 and below 1, got 1"),
    (["--neftune-alpha", "nan"], "neftune-alpha must be from 0 to"),
    (["--loss", "half"], "loss must be one of full, labels, chunked"),
    (["--method", "vera"], "method must be one of full, freeze, lora"),
    (["--checkpointing", "yes"], "checkpointing must be one of none, selective, full"),
    (["--attention", "flash9"], "attention must be one of"),
    (["--embeddings", "some"], "embeddings must be one of"),
    (["--embeddings", "new_rows"], "needs --new-rows"),
    (["--casts", "both"], "casts must be one of"),
    (["--adapter-precision", "fp16"], "adapter-precision must be one of fp32, bf16, got 'fp16'"),
    (["--method", "full", "--precision", "nf4"], "nf4 weights cannot be trained"),
    (["--method", "freeze", "--last-blocks", "37"], "last-blocks must be at most 36"),
    (
        ["--method", "freeze", "--last-blocks", "0", "--freeze-embeddings"],
        "leaves nothing to train",
    ),
    (["--model", "gpt2", "--sequence", "4096"], "sequence must be at most 1,024"),
    (["--alpha", "0"], "alpha must be more than 0"),
    (["--alpha", "nan"], "alpha must be more than 0"),
    (["--label-share", "0"], "label-share must be more than 0"),
    (["--label-share", "nan"], "label-share must be more than 0"),
    (["--context", "-1"], "context must be a whole number from 0"),
    (["--chunk", "0"], "chunk must be a whole number from 1"),
    (["--new-rows", "-1"], "new-rows must be a whole number from 0"),
    (["--virtual-tokens", "0"], "virtual-tokens must be a whole number from 1"),
    (["--rank-pattern", "q_proj"], "rank-pattern takes PATTERN=RANK"),
    (["--rank-pattern", "(=4"], "is not a valid regular expression"),
    (["--fit", "0"], "fit takes GiB"),
    (["--fit", "nan"], "fit takes GiB"),
    (["--gpu", "rtx9090"], "'rtx9090' is not known. Nearest: rtx"),
    (["--gpus", "8xrtx9090"], "'rtx9090' is not known. Nearest: rtx"),
    (
        ["--gpus", "h100"],
        "gpus must be a number up to 1,024 and a GPU, such as 8xH100 or 4x24GB, got 'h100'",
    ),
    (["--gpus", "8xh100", "--gpu", "h100"], "--gpu and --gpus exclude each other"),
    (["--shard"], "--shard needs --gpus, such as 8xH100"),
    (["--sweep", "seed=1"], "--sweep takes one of rank"),
    (["--sweep", "rank="], "sweep takes KEY=A,B"),
    (["--sweep", "rank=1,x"], "takes whole numbers, got 'x'"),
    (["--sweep", "rank=0"], "rank must be a whole number from 1"),
    (["--sweep", "precision=int3"], "'int3' is not known"),
    (["--json", "--csv"], "exclude each other"),
    (["--fit", "24", "--gpu", "rtx4090"], "--fit and --gpu exclude each other. Use one of them."),
    (["--list", "--sweep", "rank=1"], "--list and --sweep exclude each other. Use one of them."),
    (["--embeddings", ""], "embeddings must be one of"),
    (["--sweep", "optimizer=qlora"], "optimizer must be one of"),
    (["--sweep", "rank=--5"], "takes whole numbers"),
    (["--sweep", "rank=²"], "takes whole numbers"),
    (["--sweep", "rank=" + "9" * 400], "takes whole numbers"),
    (["--rank-pattern", "q_proj=²"], "rank-pattern takes PATTERN=RANK"),
    (["--rank-pattern", "q_proj=" + "9" * 400], "rank-pattern takes PATTERN=RANK"),
    (["--rank-pattern", "(?i)q_proj=16"], "is not a valid regular expression"),
    (["--model", "gpt-3-175b", "--trace"], "--trace does not support GPT-3"),
    (["--model", "gpt2", "--trace"], "does not support LoRA on GPT-2's Conv1D layers"),
    (
        ["--model", "gpt2", "--method", "prompt", "--sequence", "1024"],
        "sequence must be at most 1,004",
    ),
    (["--model", "minigpt", "--sequence", "33"], "sequence must be at most 32"),
    (
        ["--model", "llama-3.2-1b", "--trace", "--batch", "2147483647", "--sequence", "131072"],
        "--trace cannot build or run",
    ),
    (
        ["--model", "mixtral-8x7b", "--trace", "--precision", "fp32"],
        "--trace runs a mixture of experts in bf16, got fp32",
    ),
    (["--trace", "--embeddings", "new_rows", "--new-rows", "3"], "without trainable token rows"),
    (["--trace", "--loss", "divergence"], "--trace cannot run the retention loss"),
    (
        ["--trace", "--dora", "--trainer", "torch"],
        "supports DoRA and dropout only as implemented here, not in PEFT",
    ),
    (["--gpu", ""], "gpu '' is not known. Known: rtx4060"),
    (["--trace", "--precision", "nf4"], "supports fp32, bf16, fp16, got nf4"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_one_line_on_stderr(
    cli: Lora, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = cli("calc", *arguments, cwd=tmp_path)
    assert code in (1, 2)
    assert out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", err), err


def test_a_rank_above_the_smallest_dimension_is_a_note(cli: Lora, tmp_path: Path) -> None:
    code, out, err = cli("calc", "--rank", "2000", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert "note: rank 2000 is more than k_proj can use: its rank is at most 1024" in " ".join(
        out.split()
    )


def test_list_shows_every_model_with_its_count(cli: Lora, tmp_path: Path) -> None:
    _, out, _ = cli("calc", "--list", cwd=tmp_path)
    for name in names():
        assert re.search(
            rf"^{re.escape(name)}\s+{built_in(name).shapes.total:,}", out, re.MULTILINE
        ), name


def test_help_names_every_option_with_its_choices(cli: Lora, tmp_path: Path) -> None:
    _, out, _ = cli("calc", "-h", cwd=tmp_path)
    for option in (
        "--model",
        "--rank, --r",
        "--fit",
        "--gpu",
        "--gpus",
        "--shard",
        "--sweep",
        "--trace",
        "--explain",
        "--csv",
    ):
        assert option in out


@pytest.mark.slow
def test_several_gpus_show_each_layout_and_json_has_the_same_numbers(
    cli: Lora, tmp_path: Path
) -> None:
    asked = ("calc", *QWEN, "--gpus", "8xH100")
    code, out, err = cli(*asked, cwd=tmp_path)
    assert (code, err) == (0, "") and "NVLink 4 450 GB/s each way" in out
    assert max(len(line) for line in out.splitlines() if "●" in line) <= 80
    found = json.loads(cli(*asked, "--json", cwd=tmp_path)[1])
    assert found["gpus"]["count"] == 8 and set(found["largest"]) == {
        "replicated",
        "sharded",
        "tensor",
    }
    rows = list(csv.DictReader(io.StringIO(cli(*asked, "--csv", cwd=tmp_path)[1])))
    for run, row in zip(found["runs"], rows, strict=True):
        assert re.search(
            rf"^{run['method']}\s+{run['layout']}\s.*\s{run['memory']['peak'] / 2**30:.2f}\s",
            out,
            re.M,
        )
        assert (
            int(row["peak"])
            == run["memory"]["peak"]
            == sum(run["memory"].values()) - run["memory"]["peak"]
        )
        assert run["fits"] == (run["memory"]["peak"] <= gpu("h100").bytes)
        assert int(row["moved"]) == sum(run["received"].values())
        assert run["tokens_per_second"] > 0
    one = json.loads(cli(*asked, "--shard", "--json", cwd=tmp_path)[1])
    assert one["runs"] == [run for run in found["runs"] if run["layout"] == "sharded"]


def test_a_layout_that_a_model_does_not_allow_is_left_out_with_the_reason(
    cli: Lora, tmp_path: Path
) -> None:
    _, out, _ = cli("calc", "--model", "qwen2.5-0.5b", "--gpus", "4x24GB", cwd=tmp_path)
    assert "tensor: 14 heads cannot be divided among 4 GPUs" in out and not re.search(
        r"^LoRA +tensor", out, re.M
    )
    assert "no speed: of 24 GiB only the memory is known" in " ".join(out.split())
    _, out, _ = cli("calc", "--model", "minigpt", "--gpus", "2xh100", cwd=tmp_path)
    assert "no speed: the table has 16-bit and TF32 peaks" in " ".join(out.split())


def test_explain_ends_in_the_peak(cli: Lora, tmp_path: Path) -> None:
    lines = json.loads(cli("calc", *QWEN, "--explain", "--json", cwd=tmp_path)[1])
    last = lines[-1]
    peak = predict(built_in("qwen3-8b").shapes, LoraMethod(), TrainingConfig(context=2**29)).peak
    assert last["what"] == "peak" and f"{peak:,} B" in last["formula"]


def test_other_methods_of_the_comparison_never_cause_an_error(cli: Lora, tmp_path: Path) -> None:
    code, out, err = cli("calc", "--last-blocks", "0", "--freeze-embeddings", cwd=tmp_path)
    assert (code, err) == (0, "")
    assert not re.search(r"^freeze ", out, re.MULTILINE)
    code, out, _ = cli("calc", "--method", "full", "--targets", "nope", cwd=tmp_path)
    assert code == 0 and "full fine-tuning: 8,190,735,360 trainable" in out


def test_the_largest_says_where_the_search_ended(cli: Lora, tmp_path: Path) -> None:
    _, out, _ = cli("calc", "--model", "minigpt", "--gpu", "h100", cwd=tmp_path)
    assert re.search(r"batch\s+4,096 or more", out)
    rows = dict(
        csv.reader(io.StringIO(cli("calc", *QWEN, "--gpu", "rtx3060", "--csv", cwd=tmp_path)[1]))
    )
    assert rows["fits"] == "False" and rows["change: --precision nf4-dq (QLoRA)"]


def test_what_to_change_is_found_for_every_method_and_model(cli: Lora, tmp_path: Path) -> None:
    for arguments in (
        ["--method", "full", "--model", "llama-3.1-70b", "--fit", "24"],
        ["--method", "freeze", "--model", "qwen3-32b", "--fit", "16"],
        ["--embeddings", "all", "--model", "llama-3.1-70b", "--fit", "80"],
        ["--method", "prompt", "--embeddings", "all", "--precision", "nf4", "--fit", "24"],
        ["--model", "gemma-2-9b", "--attention", "eager", "--fit", "12"],
        ["--model", "gpt2", "--method", "prompt", "--sequence", "100", "--fit", "24"],
        ["--method", "full", "--targets", "nope", "--fit", "24"],
    ):
        result = json.loads(cli("calc", *arguments, "--json", cwd=tmp_path)[1])
        peaks = [result["peak"], *(change["peak"] for change in result["changes"])]
        assert all(later < earlier for earlier, later in pairwise(peaks)), "each change helps"
        assert not result["fits"] or result["batch"] >= 1
    kept = json.loads(
        cli(
            "calc",
            "--method",
            "full",
            "--rank",
            "64",
            "--targets",
            "all-linear",
            "--fit",
            "26",
            "--json",
            cwd=tmp_path,
        )[1]
    )
    lora = predict(
        built_in("qwen3-8b").shapes,
        LoraMethod(rank=64, alpha=64, targets=("all-linear",)),
        TrainingConfig(context=2**29),
    )
    assert kept["changes"][0] == {"change": "--method lora", "peak": lora.peak}


# time and cost


def test_tokens_give_hours_and_cost_as_a_range_with_what_was_assumed(tmp_path: Path) -> None:
    done = lora(
        "calc",
        *QWEN,
        "--tokens",
        "5M",
        "--price",
        "2.49",
        cwd=tmp_path,
        COLUMNS="80",
        TERMINAL_WIDTH="80",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 80
    for text in (
        "5,000,000 tokens take 2.33e+17 FLOPs",
        "GFLOPs per token: 15.8 forward, 14.5 recomputed, 16.4 backward",
    ):
        assert text in done.stdout
    assert re.search(r"RTX 4060 +· .*\$", done.stdout) and re.search(
        r"H100 80 GB +● +[\d.]+–[\d.]+ min +\$", done.stdout
    )
    for text in ("25–65% of the peak is reached", "the optimizer's update"):
        assert text in " ".join(done.stdout.split())


@pytest.mark.slow
def test_one_gpu_adds_its_hours_to_what_fits(tmp_path: Path) -> None:
    asked = ("calc", *QWEN, "--gpu", "rtx4090", "--precision", "nf4", "--tokens", "200k")
    shown = lora(*asked, cwd=tmp_path).stdout
    assert (
        "the most that fits" in shown
        and "RTX 4090: 165.2 TFLOP/s" in shown
        and "nf4: dequantizing takes" in shown
    )
    rows = list(csv.DictReader(io.StringIO(lora(*asked, "--csv", cwd=tmp_path).stdout)))
    (time,) = (found := json.loads(lora(*asked, "--json", "--price", "2", cwd=tmp_path).stdout))[
        "time"
    ]["gpus"]
    assert found["fits"] and time["fits"] and found["time"]["tokens"] == 200_000
    assert time["cost"] == [2 * hours for hours in time["hours"]]
    assert [float(rows[0][key]) for key in ("hours_low", "hours_high")] == time["hours"]
    assert rows[0]["cost_low"] == ""


def test_json_has_a_time_only_with_tokens(tmp_path: Path) -> None:
    plain, timed = (
        json.loads(lora("calc", *QWEN, "--json", *more, cwd=tmp_path).stdout)
        for more in ([], ["--tokens", "1.2B"])
    )
    time = timed.pop("time")
    assert timed == plain
    assert (time["tokens"], time["price"], len(time["gpus"])) == (1_200_000_000, None, 9)


@pytest.mark.slow
def test_bad_tokens_prices_and_mixtures_are_one_message_each(tmp_path: Path) -> None:
    for more, message in (
        (
            ["--tokens", "many"],
            "tokens must be a number from 1 to 10^18, such as 200k, 5M or 1.2B, got 'many'.",
        ),
        (["--tokens", "5M", "--price", "0"], "price must be dollars per GPU-hour"),
        (["--price", "2"], "--price needs --tokens"),
        (["--tokens", "5M", "--fit", "24"], "--fit and --tokens exclude each other"),
        (
            ["--tokens", "5M", "--gpu", "mac-16"],
            "--tokens needs a GPU whose 16-bit peak is published",
        ),
        (["--tokens", "5M", "--precision", "fp32"], "Use --precision bf16 or tf32"),
    ):
        done = lora("calc", *more, cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
        assert message in done.stderr

"""`lora data` as a user types it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tokenizers.subword import SubwordTokenizer
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import checkpoint
from tests.helpers.json_files import write_json, write_jsonl
from tests.helpers.projects import lora, refusal
from tests.helpers.tokenizers import SMOLLM2, folder_with

LINES = [
    {"text": "The euro.\nThe lev."},
    {"prompt": "The currency of Bulgaria is the", "completion": " euro"},
    {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hello!"},
        ]
    },
    {"text": "Sofia"},
]


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A data file, and a subword model."""
    model = folder_with(tmp_path / "artifacts/base", SMOLLM2)
    (model / "config.json").write_text('{"max_position_embeddings": 99}', encoding="utf-8")
    write_jsonl(tmp_path / "d.jsonl", LINES)
    return tmp_path


def test_what_is_learned_is_marked(cli: Lora, here: Path) -> None:
    code, out, err = cli("data", "show", "d.jsonl", "--no-template", cwd=here)
    assert (code, err) == (0, "")
    assert "The⟦·euro│.│↵│\n" in out, "the first token has nothing before it to be learned from"
    assert "The│·currency│·of│·Bulgaria│·is│·the⟦·euro│<|im_end|>⟧" in out
    assert "assistant↵\n⟦Hello!<|im_end|>⟧↵\n" in out.replace("│", "")
    assert "d.jsonl:3" in out and "d.jsonl:4" not in out
    assert re.search(r"examples +4 ", out)


def test_a_plain_prompt_is_a_turn_unless_the_command_or_the_project_says_otherwise(
    cli: Lora, here: Path
) -> None:
    write_json(here / "p.jsonl", LINES[1])
    (here / "params.yaml").write_text("base: x\nfinetune_lora: {data: p.jsonl}\n", encoding="utf-8")
    asked = "user↵The·currency·of·Bulgaria·is·the<|im_end|>↵<|im_start|>assistant↵⟦euro<|im_end|>⟧↵"
    _, out, _ = cli("data", "show", "p.jsonl", cwd=here)
    assert asked in out.replace("│", "").replace("\n", "")
    code, out, _ = cli("data", "check", "p.jsonl", cwd=here)
    assert code == 0 and "<|im_start|>assistant\n⟦euro<|im_end|>⟧\n" in out
    assert "1 plain prompt" in out
    plain = "The currency of Bulgaria is the⟦ euro<|im_end|>⟧"
    assert plain in cli("data", "check", "p.jsonl", "--no-template", cwd=here)[1]
    (here / "params.yaml").write_text(
        "finetune_lora: {data: p.jsonl, chat_template: none}\n", encoding="utf-8"
    )
    assert plain in cli("data", "check", "p.jsonl", cwd=here)[1]


def test_numbers_are_of_the_whole_file_and_lines_fit_the_terminal(cli: Lora, here: Path) -> None:
    code, out, _ = cli(
        "data", "show", "d.jsonl", "--no-template", "--max-length", "7", "--limit", "1", cwd=here
    )
    assert code == 0 and out.count("d.jsonl:") == 1
    assert "3 at 7 tokens" in out
    assert "1 without a label" in out
    _, out, _ = cli("data", "show", "d.jsonl", cwd=here)
    assert all(len(line) <= 100 for line in out.splitlines())


def test_json_is_a_line_a_row_with_labels_where_something_is_trained_on(
    cli: Lora, here: Path
) -> None:
    code, out, err = cli("data", "show", "d.jsonl", "--json", "--no-template", cwd=here)
    lines = [json.loads(line) for line in out.splitlines()]
    assert (code, err) == (0, "") and [line["row"] for line in lines] == [1, 2, 3, 4], (
        "all, unless --limit says less"
    )
    tokenizer = SubwordTokenizer.load(here / "artifacts/base")
    trained = [[id_ for id_ in line["labels"] if id_ != -100] for line in lines]
    assert [tokenizer.word(id_) for id_ in trained[1]] == [" euro", "<|im_end|>"]
    for line in lines:
        assert line.keys() == {"row", "ids", "labels"} and line["labels"][0] == -100
        assert all(
            label in (-100, id_) for label, id_ in zip(line["labels"], line["ids"], strict=True)
        )
    assert trained[0] == lines[0]["ids"][1:]
    _, out, _ = cli(
        "data",
        "show",
        "d.jsonl",
        "--json",
        "--no-template",
        "--limit",
        "2",
        "--max-length",
        "5",
        cwd=here,
    )
    assert [json.loads(line)["ids"] for line in out.splitlines()] == [
        line["ids"][:5] for line in lines[:2]
    ]


def test_one_row_is_shown_whatever_is_in_the_others(cli: Lora, here: Path) -> None:
    (here / "d.jsonl").write_text("\n".join(["{", *map(json.dumps, LINES)]), encoding="utf-8")
    code, out, _ = cli("data", "show", "d.jsonl", "--row", "5", cwd=here)
    assert code == 0 and out.startswith("d.jsonl:5 ") and "·so" not in out and "S" in out
    code, out, err = cli("data", "show", "d.jsonl", "--row", "1", cwd=here)
    assert (code, out) == (1, "") and err.startswith("error: d.jsonl:1: not JSON")
    code, out, err = cli("data", "show", "d.jsonl", "--row", "9", cwd=here)
    assert (code, out, err) == (
        1,
        "",
        "error: d.jsonl has no example in row 9. Name another --row.\n",
    )


def test_statistics_are_of_the_first_thousand_rows(cli: Lora, here: Path) -> None:
    (here / "d.jsonl").write_text("\n".join([json.dumps(LINES[3])] * 1001), encoding="utf-8")
    code, out, _ = cli("data", "show", "d.jsonl", "--limit", "0", cwd=here)
    assert code == 0 and re.search(r"the first 1,000 *\nexamples +1,000 ", out)
    assert out.endswith("`lora data check d.jsonl` reads all.\n")


def test_statistics_of_a_part_are_named_so_also_if_more_rows_are_shown(
    cli: Lora, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.data.COUNTED", 2)
    code, out, _ = cli("data", "show", "d.jsonl", "--limit", "4", cwd=here)
    assert code == 0 and "d.jsonl:4" in out
    assert re.search(r"the first 2 *\nexamples +2 ", out)
    assert out.endswith("`lora data check d.jsonl` reads all.\n")


def test_a_table_is_shown_by_its_columns_without_what_a_terminal_would_obey(
    cli: Lora, here: Path
) -> None:
    rows = {"q": ["Hello"], "a": ["euro\x1b[31m"]}
    pq.write_table(pa.table(rows), here / "d.parquet")
    code, out, _ = cli("data", "show", "d.parquet", "--columns", "prompt=q,completion=a", cwd=here)
    assert code == 0 and "\x1b" not in out
    assert "⟦euro" in out.replace("│", "")
    code, _, err = cli("data", "show", "d.parquet", "--columns", "prompt", cwd=here)
    assert code == 2 and "must be KEY=COLUMN" in err


@pytest.mark.slow
def test_without_colour_brackets_remain_and_with_it_learned_tokens_are_green(here: Path) -> None:
    plain = lora("data", "show", "d.jsonl", cwd=here, NO_COLOR="1", FORCE_COLOR="1", TERM="xterm")
    assert (
        "⟦·euro" in plain.stdout.replace("\x1b[1m", "").replace("\x1b[0m", "")
        and "\x1b[1;32m" not in plain.stdout
    )
    green = lora("data", "show", "d.jsonl", cwd=here, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[1;32m⟦·euro" in green.stdout


def test_minigpts_words_are_shown_without_transformers(tmp_path: Path) -> None:
    checkpoint(tmp_path / "artifacts").rename(tmp_path / "base")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "base").rename(tmp_path / "artifacts/expanded")
    (tmp_path / "d.txt").write_text("w1 w2\nw3 w4\n", encoding="utf-8")
    code = (
        "import sys; from cli.main import main\ntry: main()\nfinally: print(list(sys.modules), "
        "file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "data", "show", "d.txt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "w1⟦w2│<eos>⟧" in done.stdout
    assert not [heavy for heavy in ("torch", "transformers") if f"'{heavy}'" in done.stderr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nix.jsonl"], "nix.jsonl: No such file or directory. Name a file that exists."),
        (["d.jsonl", "--base", "nix"], "nix is not a folder. A model folder needs its tokenizer."),
        (["broken.jsonl"], "broken.jsonl:1: not JSON"),
        (
            ["long.jsonl"],
            "long.jsonl:1: 100 tokens with the end token, more than the model's 99 positions.",
        ),
    ],
)
def test_a_mistake_is_one_message(
    cli: Lora, here: Path, arguments: list[str], message: str
) -> None:
    (here / "broken.jsonl").write_text("{", encoding="utf-8")
    write_json(here / "long.jsonl", {"text": "The" + " euro" * 98})
    code, out, err = cli("data", "show", *arguments, cwd=here)
    assert (code, out) == (1, "")
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_without_a_model_the_next_step_is_named(cli: Lora, tmp_path: Path) -> None:
    code, _, err = cli("data", "show", "d.txt", cwd=tmp_path)
    assert code == 1
    assert err.startswith("error: There is no model in artifacts/expanded or artifacts/base")
    assert "--base, or run `lora import` or `lora pretrain`." in err


FAULTS = [
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]},
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": ""}]},
    {
        "conversations": [
            {"from": "human", "value": "Hello <|im_end|>"},
            {"from": "gpt", "value": "Hi"},
        ]
    },
    {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hello!"}]},
]


SPOILT = "error: training needs data without errors, and this has 2. Correct the rows above.\n"


def test_check_prints_each_fault_with_its_row_and_exits_with_1(cli: Lora, here: Path) -> None:
    write_jsonl(here / "f.jsonl", FAULTS)
    code, out, err = cli("data", "check", "f.jsonl", cwd=here)
    cleaned = "`lora data clean f.jsonl OUT` writes a file without empty rows and duplicates.\n"
    assert (code, err) == (1, cleaned + SPOILT)
    assert re.search(r"error +2 +conversations\[1\]: value is empty", out)
    assert re.search(r"error +3 +messages\[0\] contains <\|im_end\|>", out)
    assert re.search(r"warning +4 +the same as row 1\.", out)
    assert out.endswith("2 errors, 1 warning\n")
    assert all(len(line) <= 100 for line in out.splitlines())
    code, out, _ = cli("data", "check", "f.jsonl", "--limit", "1", cwd=here)
    assert (
        code == 1
        and out.count("error  ") == 1
        and "empty: 1, not tokenized: 1, duplicate: 1" in out
    )


def test_check_prints_what_the_contract_names_as_json(cli: Lora, here: Path) -> None:
    write_jsonl(here / "f.jsonl", FAULTS)
    code, out, err = cli(
        "data", "check", "f.jsonl", "d.jsonl", "--base", "artifacts/base", "--json", cwd=here
    )
    report = json.loads(out)
    assert (code, err) == (1, SPOILT) and report["rows"] == 8 and report["ok"] is False
    first = report["problems"][0]
    assert (first["row"], first["level"], first["file"]) == (2, "error", "f.jsonl")
    _, out, _ = cli("data", "show", "d.jsonl", "--json", cwd=here)
    shown = [label for line in out.splitlines() for label in json.loads(line)["labels"]]
    code, out, _ = cli("data", "check", "d.jsonl", "--json", cwd=here)
    report = json.loads(out)
    assert code == 0 and report["problems"] == [] and report["tokens"] == len(shown)
    assert report["trained_tokens"] == sum(label != -100 for label in shown)


def test_check_compares_with_evaluation_files_and_works_without_a_model(
    cli: Lora, tmp_path: Path
) -> None:
    (tmp_path / "train.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "eval.txt").write_text("two\nthree\n", encoding="utf-8")
    code, out, err = cli("data", "check", "train.txt", "--eval", "eval.txt", cwd=tmp_path)
    assert code == 0 and re.search(
        r"warning +eval.txt:1 +also in the training set: train.txt:2\.", out
    )
    assert err == "There is no model, so tokens were not counted. Name a model with --base.\n"


def test_convert_writes_the_container_of_the_name_and_the_format_asked_for(
    cli: Lora, here: Path
) -> None:
    write_json(here / "f.jsonl", {**FAULTS[0], "id": 7})
    code, out, err = cli("data", "convert", "f.jsonl", "new/f.parquet", cwd=here)
    assert (code, out) == (0, "new/f.parquet: 1 row (sharegpt)\n")
    assert err == "f.jsonl: not used: id (1 row)\n"
    code, out, _ = cli(
        "data", "convert", "new/f.parquet", "f.csv", "--format", "alpaca", "--json", cwd=here
    )
    assert json.loads(out) == {
        "out": "f.csv",
        "rows": 1,
        "format": "alpaca",
        "notes": [],
        "skipped": [],
    }
    assert (here / "f.csv").read_bytes() == b"instruction,input,output\r\nHello,,Hello!\r\n"


def test_check_prints_a_fault_of_many_rows_once_and_warnings_beside_errors(
    cli: Lora, here: Path
) -> None:
    rows = [*({"conversations": []} for _ in range(40)), *FAULTS]
    write_jsonl(here / "f.jsonl", rows)
    code, out, _ = cli("data", "check", "f.jsonl", "--limit", "1", cwd=here)
    assert code == 1 and re.search(r"error +40 rows; first: 1 +conversations must be a list", out)
    assert re.search(r"warning +44 +the same as row 41\.", out)


def test_a_hint_repeats_the_columns(cli: Lora, here: Path) -> None:
    (here / "d.jsonl").write_text("\n".join([json.dumps({"t": "Sofia"})] * 1001), encoding="utf-8")
    _, out, _ = cli("data", "show", "d.jsonl", "--limit", "0", "--columns", "text=t", cwd=here)
    assert out.endswith("`lora data check d.jsonl --columns text=t` reads all.\n")


def test_convert_skips_what_it_cannot_take_and_says_so(cli: Lora, here: Path) -> None:
    (here / "f.jsonl").write_text("\n".join(["{", *map(json.dumps, LINES)]), encoding="utf-8")
    code, out, err = cli(
        "data", "convert", "f.jsonl", "new.csv", "--format", "text", "--skip-invalid", cwd=here
    )
    assert (code, out) == (0, "new.csv: 2 rows (text)\n")
    assert "skipped: f.jsonl:1: not JSON" in err
    assert "skipped: f.jsonl: 2 rows: cannot be written as text: " in err and "First: row 3." in err
    (here / "g.jsonl").write_text("{", encoding="utf-8")
    assert "g.jsonl: no row is left to write. g.jsonl:1: not JSON" in refusal(
        cli("data", "convert", "g.jsonl", "g.csv", "--skip-invalid", cwd=here)
    )


def test_clean_writes_what_is_left_and_reports_the_rest(cli: Lora, here: Path) -> None:
    rows = [*LINES, LINES[1], {"text": ""}, {"text": "euro " * 120}, {"text": "Call +49 30 901820"}]
    write_jsonl(here / "f.jsonl", rows)
    (here / "t.yaml").write_text(
        "- {name: t, kind: contains, examples: [{prompt: hello, answer: Hello}]}\n",
        encoding="utf-8",
    )
    drop = ("--drop", "empty,duplicates,near-duplicates,too-long,leaks", "--tasks", "t.yaml")
    code, out, err = cli("data", "clean", "f.jsonl", "g.jsonl", *drop, cwd=here)
    assert (code, err) == (0, "")
    assert re.search(r"empty +1 +row 6, text is empty", out)
    assert re.search(r"duplicates +1 +row 5, the same as row 2", out)
    assert re.search(r"too-long +1 +row 7, 1\d\d tokens, more than 99: euro", out)
    assert re.search(r"leaks +1 +row 3, asked in t\.yaml", out) and "phone number" in out
    assert "4 of 8 rows kept\ng.jsonl: 4 rows (mixed)\n" in out
    left = [
        json.loads(line) for line in (here / "g.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert left == [LINES[0], LINES[1], LINES[3], rows[7]]
    code, out, _ = cli("data", "clean", "f.jsonl", "h.jsonl", "--drop", "empty,personal", cwd=here)
    assert (
        code == 0
        and "phone number" in out
        and "901820" not in (here / "h.jsonl").read_text(encoding="utf-8")
    )
    code, out, _ = cli("data", "clean", "f.jsonl", "g.jsonl", *drop, "--force", "--json", cwd=here)
    report = json.loads(out)
    assert code == 0 and report["dropped"]["leaks"] == 1 and report["kept"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--drop", "emtpy"),
            "--drop: unknown reason 'emtpy'. Known: empty, duplicates, near-duplicates, too-long, ",
        ),
        (("--drop", "leaks"), "--drop leaks goes with --eval or --tasks"),
        (("--eval", "d.jsonl"), "--drop leaks goes with --eval or --tasks"),
        (("--drop", "leaks", "--eval", "none.txt"), "none.txt: No such file or directory"),
        (("--drop", "duplicates", "--force"), "d.jsonl is the input itself"),
    ],
)
def test_a_mistake_with_clean_is_one_message(
    cli: Lora, here: Path, arguments: tuple[str, ...], message: str
) -> None:
    out = "d.jsonl" if "--force" in arguments else "new.jsonl"
    assert message in refusal(cli("data", "clean", "d.jsonl", out, *arguments, cwd=here))


def test_what_cannot_be_converted_is_one_message(cli: Lora, here: Path) -> None:
    for arguments, message in (
        (("d.jsonl", "d.jsonl"), "d.jsonl is the input itself. Name another file."),
        (
            ("d.jsonl", "new.parquet"),
            "d.jsonl:2: rows of prompt_completion and text do not fit into one table.",
        ),
        (("d.jsonl", "new.csv", "--format", "text"), "d.jsonl:2: cannot be written as text: "),
        (
            ("none.jsonl", "new.csv"),
            "none.jsonl: No such file or directory. Name a file that exists.",
        ),
    ):
        code, out, err = cli("data", "convert", *arguments, cwd=here)
        assert (
            (code, out) == (1, "") and err.startswith(f"error: {message}") and err.count("\n") == 1
        )
    assert {path.name for path in here.iterdir() if path.is_file()} == {"d.jsonl"}


def test_a_base_is_named_as_in_params_yaml_and_imported_once(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder as it is; a model of the hub, here from its local cache, as a folder in the
    user's.
    """
    toy_checkpoint(tmp_path / "0123abc")
    monkeypatch.setattr(
        "pipeline.models.import_base._download", lambda _source, _trust: tmp_path / "0123abc"
    )
    (tmp_path / "texts.jsonl").write_text('{"text": "The euro."}\n', encoding="utf-8")
    asked = ("data", "show", "texts.jsonl", "--json", "--base")
    of_folder = cli(*asked, "0123abc", cwd=tmp_path)
    first, second = (cli(*asked, "org/model", cwd=tmp_path) for _ in range(2))
    assert of_folder[:2] == first[:2] == second[:2] and of_folder[0] == 0
    assert "importing org/model, once" in first[2] and "importing" not in second[2]
    assert (tmp_path / ".cache/lora-workbench/bases/org--model@0123abc/model.safetensors").is_file()
    assert "gone.gguf: No such file" in refusal(cli(*asked, "gone.gguf", cwd=tmp_path))

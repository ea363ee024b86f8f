"""The document's claims, on a project that ran: what is known to differ is found to, by the code
and not by hand.
"""

import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from lab.claims.chapters import CLAIMS
from lab.claims.check import JSON, MARKS, PAGE, Row, calculated, verdicts
from msgspec import structs
from tests.lab_projects import DOCUMENT, new_project

from pipeline.errors import UserError
from pipeline.files.artifact import MANIFEST
from pipeline.project import provenance
from pipeline.project.runner import run
from pipeline.stages.registry import open_project
from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.projects import PIPELINE, ROOT, STAGES, folder_bytes, lora, played, refusal

FILES = sorted((DOCUMENT / "lab/claims/chapters").glob("s[0-9]*.py"))


def rows_of(root: Path) -> dict[str, Row]:
    """Each claim's row by its id."""
    return {row["id"]: row for row in verdicts(open_project(root / "params.yaml"))}


@pytest.fixture(scope="session")
def ledger(finished: Path) -> dict[str, Row]:
    return rows_of(finished)


def test_at_least_226_claims_stand_in_the_documents_order_with_an_id_each() -> None:
    assert len(CLAIMS) >= 226
    sections = [claim.section for claim in CLAIMS]
    named = {"Introduction", "LoRA Without Regret"}
    places = [[int(n) for n in section.split(".")] for section in sections if section not in named]
    assert places == sorted(places)
    assert {section.partition(".")[0] for section in sections} == {*named, *map(str, range(1, 11))}
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    assert all(re.fullmatch("[a-z0-9-]+", claim.id) and claim.quote for claim in CLAIMS)


def test_each_file_of_claims_counts_for_the_stage_and_for_no_other() -> None:
    """So that an edited claim is judged again, and nothing else runs again."""
    modules = dict.fromkeys(claim.measure.__module__ for claim in CLAIMS)
    assert [module.rpartition(".")[2] for module in modules] == [file.stem for file in FILES]
    assert set(FILES) < set(provenance.code_files(STAGES["claims"].module))
    others = {stage.module for name, stage in STAGES.items() if name != "claims"}
    assert not {path for module in others for path in provenance.code_files(module)} & set(FILES)


def test_an_edited_claim_changes_the_stages_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = STAGES["claims"].module
    for path in provenance.code_files(module):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    roots = {"pipeline": tmp_path, "lab": tmp_path / "document"}
    monkeypatch.setattr(provenance, "_roots", lambda: roots)
    # conftest caches it
    monkeypatch.setattr(provenance, "code_files", inspect.unwrap(provenance.code_files))
    before = provenance.code_digest(module)
    for file in FILES:
        chapter = tmp_path / file.relative_to(ROOT)
        chapter.write_text(chapter.read_text(encoding="utf-8") + "# edited\n", encoding="utf-8")
        after = provenance.code_digest(module)
        assert after != before
        before = after


# the list, and what else the calculator and the pipeline's own artifacts can tell
DIFFER = {
    "adam-3-times": {"averages in BF16": 4, "averages in FP32": 6},
    "adam-48-gb": {"averages in BF16": 65525882880, "averages in FP32": 98288824320},
    "qwen-w-kv": {"W_K": 4096 * 1024, "W_V": 4096 * 1024},
    "qwen-lora": 7_667_712,
    "qwen-nf4": {"NF4": 6397190144, "with double quantization": 6072057856},
    "70b-in-24-gb": 41.9e9,
    "compared-freeze": 62_656 / 112_768,
    "compared-lora": 16_768 / 112_768,
    "20-sentences": 22,
    "data-20-sentences": 22,
    "adapter-35-mb": {"r=8 in FP16": 15335424, "r=8 in FP32": 30670848, "r=16 in FP16": 30670848},
    "qwen-adapter-size": 15335424,
    "full-against-lora-430": 8_190_735_360 / 7_667_712,
    "new-words": 15,
}


@pytest.mark.parametrize("name", DIFFER)
def test_what_is_known_to_differ_is_found(ledger: dict[str, Row], name: str) -> None:
    assert ledger[name]["verdict"] == "differs", ledger[name]
    assert ledger[name]["measured"] == pytest.approx(DIFFER[name], rel=2e-3)


def test_lora_changes_old_predictions_when_embeddings_and_head_train(
    ledger: dict[str, Row], studied: Path
) -> None:
    row = rows_of(studied)["predictions-retained"]
    assert row["measured"]["embeddings and head train too"] < 0.9
    assert "embeddings and head train as well, 16,768 parameters" in row["why"]
    assert ledger["two-prompts-retained"]["verdict"] == "holds"
    assert ledger["share-freeze"]["verdict"] == "depends", "on how many blocks of how many"
    assert ledger["share-freeze"]["measured"]["MiniGPT, 1 of 2 blocks"] > 0.5
    assert "5.66 GiB" in ledger["qwen-nf4"]["why"], "what the issue calls 5.7 GiB"


def test_what_holds_and_what_depends_is_found_too(ledger: dict[str, Row]) -> None:
    hold = (
        "width",
        "minigpt-lora",
        "weights-16-gb",
        "22-sentences",
        "starts-identical",
        "merge-identity",
    )
    assert {name: ledger[name]["verdict"] for name in hold} == dict.fromkeys(hold, "holds")
    depend = (
        "same-architecture",
        "qwen-b",
        "share-lora",
        "only-a-and-b",
        "each-halving-halves",
        "share-prefix",
    )
    assert {name: ledger[name]["verdict"] for name in depend} == dict.fromkeys(depend, "depends")


def test_a_claim_whose_source_was_not_run_says_what_to_run_and_has_no_verdict(
    tmp_path: Path,
) -> None:
    rows = rows_of(new_project(tmp_path / "fresh")).values()
    left = [row for row in rows if row["verdict"] == "not run"]
    assert left and all(row["measured"] is None for row in left)
    assert all(re.search(r"run `(lora|dvc) .*`", row["why"]) for row in left)
    assert {"run `lora pretrain`", "run `lora evaluate`", "run `lora study fact_correction`"} <= {
        row["why"].partition(": ")[2] for row in left
    }
    assert sum(row["verdict"] != "not run" for row in rows) >= len(calculated())


def test_a_study_of_other_settings_leaves_its_claims_without_a_verdict(studied: Path) -> None:
    rows = {row["id"]: row for row in read_json(studied / "artifacts/claims" / JSON)}
    assert rows["rank-64-no-gain"]["verdict"] == "not run"
    assert "studies/rank/ranks.csv has no row with rank=8" in rows["rank-64-no-gain"]["why"]
    assert rows["fact-katze-v"]["verdict"] == "differs", "two epochs change little"
    for row in (row for row in rows.values() if row["verdict"] == "not run"):
        assert re.search("has no row with|no value for|measures null|does not exist", row["why"]), (
            "no table or column is called wrongly"
        )
    assert rows["qwen-lora"]["verdict"] == "differs"


def test_a_project_of_another_base_is_not_the_documents(tmp_path: Path) -> None:
    root = new_project(tmp_path / "other")
    shutil.rmtree(root / "data")
    project = open_project(root / "params.yaml", ["base=org/model"])
    rows = verdicts(project)
    left = [row for row in rows if row["verdict"] == "not run"]
    assert len(rows) - len(left) == len(calculated())
    assert {row["why"] for row in left if "MiniGPT" in row["why"]} == {
        "this claim is about MiniGPT, but the project's base is org/model: create a project with "
        "`lora new`"
    }


def test_a_changed_project_changes_verdicts(tmp_path: Path) -> None:
    root = new_project(tmp_path / "changed")
    path = root / "data/pretrain.de.txt"
    path.write_text(
        "\n".join(path.read_text(encoding="utf-8").splitlines()[:20]) + "\n", encoding="utf-8"
    )
    rows = rows_of(root)
    assert (rows["22-sentences"]["verdict"], rows["20-sentences"]["verdict"]) == (
        "differs",
        "holds",
    )


def test_the_claims_and_the_file_of_the_documents_numbers_agree() -> None:
    document = yaml.safe_load((DOCUMENT / "data/document.yaml").read_text(encoding="utf-8"))
    claims = {claim.id: claim for claim in CLAIMS}
    for row in document["fact_correction"]:
        for model, end in (("original", "original"), ("v_proj", "v"), ("all", "all")):
            ((word, probability),) = row[model].items()
            claim = claims[f"fact-{row['prompt'].split()[1]}-{end}"]
            assert claim.rule.says[0].value == probability
            assert claim.quote.startswith(f"{row['prompt']} → ") and f": {word} (" in claim.quote


def test_claims_read_nothing_that_their_stage_does_not_depend_on() -> None:
    """What DVC and the cache must know of: every artifact, and the data files that the stage
    names.
    """
    outputs = {STAGES[name].output for name in STAGES["claims"].needs}
    assert STAGES["claims"].needs == tuple(name for name in STAGES if name != "claims")
    calls = [
        call
        for file in FILES
        for call in re.findall(r"\bm\.(\w+)\(\s*f?\"([^\"{]+)", file.read_text("utf-8"))
    ]
    assert len(calls) > 100
    for call, path in calls:
        folder = path.partition("/")[0]
        if call in ("artifact", "size", "steps", "tensor_shape"):
            assert folder in outputs, path
        elif call in ("row", "rows", "column", "over_seeds", "row_of_least"):
            assert (folder if folder == "figures" else f"studies/{folder}") in outputs, path
        else:
            assert call == "lines" and path in STAGES["claims"].data, path


# lora claims


@pytest.fixture(scope="session")
def ran(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `finished`, for commands that write."""
    root = tmp_path_factory.mktemp("ran") / "project"
    shutil.copytree(finished, root)
    return root


def test_the_table_is_legible_at_80_columns(ran: Path) -> None:
    done = lora("claims", cwd=ran, COLUMNS="80", TERMINAL_WIDTH="80")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines) and "…" not in done.stdout
    headings = [line.strip() for line in lines if re.fullmatch(r"(§[\d.]+|Introduction) *", line)]
    assert headings[:3] == ["Introduction", "§1", "§2"] and headings[-1].startswith("§10.")
    assert re.fullmatch(
        r"\d+ claims: \d+ hold, \d+ differ, \d+ depend(, \d+ not run)?\.", lines[-1]
    )
    assert all(mark in done.stdout for mark in ("✗ differs", "✓ holds", "◐ depends"))


def test_sections_and_verdicts_are_chosen(cli: Lora, ran: Path) -> None:
    code, out, _ = cli("claims", "--section", "3", "--verdict", "differs", "--json", cwd=ran)
    rows = json.loads(out)
    assert code == 0 and len(rows) >= 5
    assert {(row["section"], row["verdict"]) for row in rows} == {("3", "differs")}
    keys = {
        "id",
        "section",
        "quote",
        "says",
        "rule",
        "tolerance",
        "measured",
        "verdict",
        "why",
        "shown",
    }
    assert all(row.keys() == keys for row in rows)
    everything = json.loads(cli("claims", "--json", cwd=ran)[1])
    assert {
        row["section"] for row in json.loads(cli("claims", "--section", "2", "--json", cwd=ran)[1])
    } == {row["section"] for row in everything if row["section"].startswith("2")}
    assert "section must be one of Introduction, 1, 2, 2.1" in refusal(
        cli("claims", "--section", "11", cwd=ran)
    )
    assert "verdict must be one of holds, differs" in refusal(
        cli("claims", "--verdict", "maybe", cwd=ran)
    )


def test_claims_of_what_was_not_run_are_no_error_and_nothing_is_begun(
    cli: Lora, tmp_path: Path
) -> None:
    root = new_project(tmp_path / "fresh")
    before = set(root.rglob("*"))
    code, out, err = cli("claims", cwd=root)
    assert code == 0 and "– not run" in out
    assert (
        err
        == "artifacts/claims was not written: artifacts/base is missing. Run `dvc repro` to make everything.\n"
    )
    assert set(root.rglob("*")) == before, "nothing was begun"


def test_the_stage_writes_every_verdict_as_json_and_as_a_page_twice_the_same(
    ran: Path, tmp_path: Path
) -> None:
    stage = structs.replace(STAGES["claims"], needs=tuple(PIPELINE))
    found = []
    for name in ("one", "two"):
        root = tmp_path / name
        shutil.copytree(ran, root)
        project = open_project(root / "params.yaml")
        manifest, events = played(run(project, stage, force=True))
        assert events and manifest["stage"] == "claims"
        found.append(folder_bytes(root / "artifacts/claims"))
    assert found[0] == found[1]
    assert found[0].keys() == {JSON, PAGE, MANIFEST}
    rows = json.loads(found[0][JSON])
    assert rows == json.loads(json.dumps(list(rows_of(ran).values())))
    page = found[0][PAGE].decode()
    assert all(row["quote"].replace("|", "\\|").replace("<", "&lt;") in page for row in rows)
    assert {row["verdict"] for row in rows} <= set(MARKS)
    assert str(tmp_path) not in found[0][JSON].decode() + page


def test_a_stage_that_is_out_of_date_is_not_judged(ran: Path, tmp_path: Path) -> None:
    root = tmp_path / "stale"
    shutil.copytree(ran, root)
    (root / "artifacts/base/config.json").write_text("{}", encoding="utf-8")
    stage = structs.replace(STAGES["claims"], needs=("pretrain",))
    with pytest.raises(UserError, match="changed after the artifact was made"):
        played(run(open_project(root / "params.yaml"), stage))


# lora claims --calculated


def test_the_calculator_shows_the_claims_that_it_alone_can_tell_anywhere(
    cli: Lora, tmp_path: Path
) -> None:
    code, out, err = cli("claims", "--calculated", "--json", cwd=tmp_path)
    rows = json.loads(out)
    assert (code, err) == (0, "")
    assert {row["section"] for row in rows} >= {"1", "2.4", "3", "8", "10.1"}
    assert [row["quote"] for row in rows] == [row["quote"] for row in calculated()]
    assert not any(row["verdict"] == "not run" for row in rows) and len(rows) >= 60
    table = cli("claims", "--calculated", cwd=tmp_path)[1]
    assert "9,437,184 if every projection were 4,096 × 4,096" in " ".join(table.split())


def test_no_verdict_of_the_calculator_needs_a_project() -> None:
    by_id = {claim.id: claim for claim in CLAIMS}
    assert by_id["qwen-lora"].calculated and by_id["70b-in-24-gb"].calculated
    assert not by_id["share-prefix"].calculated, "MiniGPT's virtual tokens are the project's"


def test_the_stage_has_no_settings(cli: Lora, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("claims:\n  data: data/claims.yaml\n", encoding="utf-8")
    assert "params.yaml: unknown key claims.data. Known: none." in refusal(
        cli("claims", cwd=tmp_path)
    )

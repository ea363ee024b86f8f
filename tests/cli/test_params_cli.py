"""`lora params show` and `explain`: what a project's settings are, where each comes from, and what
it means.
"""

import json
from pathlib import Path

import pytest
import yaml

from pipeline.project.params.load import parse
from pipeline.project.params.schema import hints, meaning, rule
from pipeline.stages.registry import GRAPH, open_project
from tests.conftest import Lora
from tests.helpers.projects import new_houses, refusal

PARAMS = """\
training:
  epochs: 7
  seed: 3

pretrain:
  data: words.txt

finetune_lora:
  data: words.txt
  rank: 8
  seed: 5
"""


@pytest.fixture
def here(tmp_path: Path) -> Path:
    (tmp_path / "params.yaml").write_text(PARAMS, encoding="utf-8")
    return tmp_path


def sources(cli: Lora, here: Path, *arguments: str) -> dict[str, tuple[object, str]]:
    code, out, _ = cli("params", "show", "--json", *arguments, cwd=here)
    assert code == 0
    return {row["key"]: (row["value"], row["source"]) for row in json.loads(out)}


def test_each_value_has_its_source_and_the_last_one_counts(cli: Lora, here: Path) -> None:
    shown = sources(cli, here, "--set", "finetune_lora.alpha=2")
    assert shown["finetune_lora.rank"] == (8, "params.yaml")
    assert shown["finetune_lora.seed"] == (5, "params.yaml")
    assert shown["pretrain.seed"] == (3, "params.yaml, training")
    assert shown["finetune_lora.epochs"] == (7, "params.yaml, training")
    assert shown["finetune_lora.alpha"] == (2.0, "--set")
    assert shown["finetune_lora.dora"] == (False, "default")
    assert shown["base"] == ("minigpt", "default")
    assert not any(key.startswith("finetune_full") for key in shown), "the file has no such section"
    assert set(sources(cli, here, "finetune_lora")) == {
        key for key in shown if key.startswith("finetune_lora.")
    }


def test_defaults_for_a_pretrained_base_are_named_as_such_and_explained(
    cli: Lora, tmp_path: Path
) -> None:
    (tmp_path / "params.yaml").write_text("base: model.gguf\nfinetune_lora: {}\n", encoding="utf-8")
    shown = sources(cli, tmp_path, "--set", "finetune_lora.rank=16")
    assert shown["finetune_lora.window"] == (0, "default for a pretrained base")
    assert shown["finetune_lora.alpha"] == (32.0, "default for a pretrained base")
    assert shown["finetune_lora.dora"] == (False, "default")
    _, out, _ = cli("params", "explain", "finetune_lora.window", cwd=tmp_path)
    assert "default 4, for a pretrained base 0" in out
    _, out, _ = cli("params", "explain", "finetune_lora.dora", cwd=tmp_path)
    assert "pretrained" not in out


@pytest.mark.parametrize("project", ["", "child"], ids=["parent", "child"])
def test_what_is_shown_is_a_params_file_with_the_same_settings(
    cli: Lora, project: str, tmp_path: Path
) -> None:
    folder = new_houses(tmp_path / "houses") / project
    code, out, _ = cli("params", "show", "--params", str(folder / "params.yaml"), cwd=folder)
    assert code == 0 and yaml.safe_load(out)["base"] == "minigpt"
    assert all(" # " in line or line.endswith(":") for line in out.splitlines())
    again, params = (
        parse(out, tmp_path / "params.yaml", GRAPH.sections),
        open_project(folder / "params.yaml").params,
    )
    assert {name: again.section(name) for name in again.written} == dict(params.sections)


def test_a_parent_s_values_are_named_by_its_file(cli: Lora, tmp_path: Path) -> None:
    shown = sources(cli, new_houses(tmp_path / "houses") / "child")
    assert shown["pretrain.d_model"][1] == "../params.yaml"
    assert shown["finetune_prefix.epochs"][1] == "../params.yaml, training"


@pytest.mark.parametrize("section", GRAPH.sections)
def test_every_key_is_explained_by_its_declaration(cli: Lora, section: str, tmp_path: Path) -> None:
    code, out, _ = cli("params", "explain", section, "--json", cwd=tmp_path)
    kind, facts = GRAPH.sections[section], json.loads(out)
    assert code == 0 and len(facts) == len(hints(kind))
    for key, fact in zip(hints(kind), facts, strict=True):
        assert fact["key"] in (key, f"{section}.{key}")
        assert (fact["meaning"], fact["rule"]) == (meaning(kind, key), rule(kind, key)) and fact[
            "meaning"
        ]


def test_a_key_is_explained_in_words(cli: Lora, tmp_path: Path) -> None:
    code, out, _ = cli("params", "explain", "finetune_lora.rank", cwd=tmp_path)
    assert code == 0
    assert (
        "rank of the update" in out and "a whole number, at least 1" in out and "default 4" in out
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("explain", "finetune_lora.r"), "Did you mean finetune_lora.rank?"),
        (("explain", "lora_r"), "There is no section lora_r. Did you mean finetune_lora.rank?"),
        (("explain", "finetune_lora.lora_alpha"), "Did you mean finetune_lora.alpha?"),
        (
            ("explain", "finetune_lora.nothing_like_it"),
            "There is no key finetune_lora.nothing_like_it",
        ),
        (
            ("explain", "nothing_like_it"),
            "There is no section nothing_like_it. Known: training, import, pretrain, ",
        ),
        (
            ("explain", "finetune_lroa"),
            "There is no section finetune_lroa. Did you mean finetune_lora?",
        ),
        (("show", "finetune_full"), "finetune_full is not a section of this project. It has"),
        (
            ("show", "--set", "finetune_lora.rank=0"),
            "finetune_lora.rank must be at least 1, got 0. Change it",
        ),
    ],
)
def test_a_wrong_name_is_one_message_with_the_next_step(
    cli: Lora, here: Path, command: tuple[str, ...], message: str
) -> None:
    assert message in refusal(cli("params", *command, cwd=here))

"""Values change in params.yaml, and not one other character."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.project.params.edit import comments, remove_section, section_text, set_values
from pipeline.project.params.load import TOP_LEVEL, parse
from pipeline.project.params.sections import Pretrain
from pipeline.stages.methods.full import FinetuneFull
from pipeline.stages.methods.prefix import FinetunePrefix
from pipeline.stages.registry import GRAPH
from tests.helpers.projects import load, save

TEXT = """\
# One section a stage.

base: minigpt              # or a folder

training:
  epochs: 50
  schedule: constant       # after warm-up

pretrain:
  window: 4                # tokens per training window
  learning_rate: 1.0e-3
  tie_embeddings: false    # one matrix

expand_vocab:
  data:                    # dvc.yaml lists each file
    - data/finetune.de.txt
    - data/fact_correction.de.txt
  tokens: []               # new words by name
  noise_std: 0.02

finetune_lora:
  data: data/finetune.de.txt
  learning_rate: 2.0e-3
  rank: 4
  target_modules: [q_proj, k_proj, v_proj, o_proj]   # names, or attention
  rank_pattern: {}         # other ranks by name
  train_embeddings: all    # embeddings and head

evaluate:
  prompts: data/prompts.yaml
"""
TREE = yaml.safe_load(TEXT)
KEYS = [
    *TOP_LEVEL,
    *(f"{section}.{key}" for section in TREE.keys() - TOP_LEVEL.keys() for key in TREE[section]),
]


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("finetune_lora.rank", 8, "  rank: 8"),
        ("pretrain.window", 16, "  window: 16               # tokens per training"),
        ("finetune_lora.learning_rate", 1e-5, "  learning_rate: 1.0e-05"),
        ("finetune_lora.train_embeddings", "new_rows", "  train_embeddings: new_rows # embeddings and head"),
        ("finetune_lora.target_modules", ("q_proj",), "  target_modules: [q_proj]                           # names"),
        ("finetune_lora.rank_pattern", {"v": 8, ".*0.q": 2}, "  rank_pattern: {v: 8, .*0.q: 2} # other ranks"),
        ("pretrain.tie_embeddings", True, "  tie_embeddings: true     # one matrix"),
    ],
)  # fmt: skip
def test_one_line_changes_and_its_comment_keeps_its_column(key: str, value: Any, line: str) -> None:
    before, after = TEXT.splitlines(), set_values(TEXT, {key: value}).splitlines()
    different = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(different) == 1
    assert different[0].startswith(line)


@example("finetune_lora.data", "a\u2028b\x85")
@example("finetune_lora.data", ["a\u2028b", "\x85"])
@given(
    st.sampled_from(KEYS),
    st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False), st.text(max_size=30)),
)
def test_whatever_the_value_it_is_read_back_and_every_other_line_stays(
    key: str, value: Any
) -> None:
    section, _, name = key.partition(".")
    expected = yaml.safe_load(TEXT)
    (expected[section] if name else expected)[name or key] = value
    new = set_values(TEXT, {key: value})
    assert yaml.safe_load(new) == expected
    comments = [line.partition("#")[2] for line in TEXT.splitlines() if "#" in line]
    assert all(comment in new for comment in comments)


def test_a_block_list_stays_one() -> None:
    new = set_values(TEXT, {"expand_vocab.data": ("data/a.txt", "data/b.txt")})
    assert "    - data/a.txt\n    - data/b.txt\n  tokens: []               # new words" in new
    assert yaml.safe_load(new)["expand_vocab"]["data"] == ["data/a.txt", "data/b.txt"]


def test_a_block_mapping_stays_one_in_the_order_that_is_given() -> None:
    text = "finetune_lora:\n  rank_pattern:\n    v_proj: 8   # more\n    q_proj: 2\n  rank: 4\n"
    new = set_values(text, {"finetune_lora.rank_pattern": {"z": 3, "*a": 1}})
    assert new == "finetune_lora:\n  rank_pattern:\n    z: 3\n    '*a': 1\n  rank: 4\n"
    assert (
        yaml.safe_load(set_values(text, {"finetune_lora.rank_pattern": {}}))["finetune_lora"][
            "rank_pattern"
        ]
        == {}
    )


@pytest.mark.parametrize("style", ["|", "|-", ">", ">-"])
def test_a_text_in_a_block_ends_before_the_next_section(style: str) -> None:
    rest = "# of the base\npretrain:\n  window: 4\n"
    text = f"finetune_lora:\n  data: {style}\n    a.txt\n    b.txt\n\n{rest}"
    data = yaml.safe_load(text)["finetune_lora"]["data"]
    for values, expected in (
        ({"finetune_lora.seed": 5}, {"data": data, "seed": 5}),
        ({"finetune_lora.data": "c.txt"}, {"data": "c.txt"}),
    ):
        new = set_values(text, values)
        assert yaml.safe_load(new) == {"finetune_lora": expected, "pretrain": {"window": 4}}
        assert new.endswith(rest)


@pytest.mark.parametrize("value", ["", (), [], "a", ("a", "b")])
@pytest.mark.parametrize(
    "text",
    [
        "expand_vocab:\n  tokens:\n  noise_std: 0.1\n",
        "expand_vocab:\n  tokens:   # none yet\n  noise_std: 0.1\n",
        "expand_vocab:\n  tokens:\n    - one\n    - two # comment\n  noise_std: 0.1\n",
        "expand_vocab:\n  tokens:\n  - one\n  - two\n  noise_std: 0.1\n",  # level with its key
        "expand_vocab:\n  tokens: >-\n    one\n\n  noise_std: 0.1\n",
        "expand_vocab:\n  noise_std: 0.1\n  tokens:",
        "expand_vocab:\n  tokens: ''\n  noise_std: 0.1\n",
        "expand_vocab:\n  noise_std: 0.1\n",
    ],
)
def test_what_is_empty_reads_back_as_empty_and_can_be_filled_again(text: str, value: Any) -> None:
    plain = list(value) if isinstance(value, tuple) else value
    new = set_values(text, {"expand_vocab.tokens": value})
    assert yaml.safe_load(new) == {"expand_vocab": {"tokens": plain, "noise_std": 0.1}}
    again = set_values(new, {"expand_vocab.tokens": ["x", "y"]})
    assert yaml.safe_load(again) == {"expand_vocab": {"tokens": ["x", "y"], "noise_std": 0.1}}
    assert all(comment in again for comment in ("# none yet",) if comment in text)


def test_a_missing_key_joins_its_section_and_a_missing_section_the_file() -> None:
    text = "# mine\npretrain:\n    epochs: 3  # few\n\n# the rest\nevaluate:\n  top_k: 2"
    new = set_values(
        text, {"pretrain.seed": 5, "evaluate.prompt_words": 1, "finetune_lora.rank": 2}
    )
    assert new == (
        "# mine\npretrain:\n    epochs: 3  # few\n    seed: 5\n\n# the rest\nevaluate:\n  top_k: "
        "2\n  prompt_words: 1"
        "\n\nfinetune_lora:\n  rank: 2\n"
    )


@pytest.mark.parametrize(
    "section",
    ["pretrain:", "pretrain: {}", "pretrain: ~", "pretrain:   # all as it is", "pretrain: {} # so"],
)
@pytest.mark.parametrize("rest", ["", "evaluate:\n  top_k: 2\n"])
def test_an_empty_section_has_its_defaults_and_takes_a_key(
    section: str, rest: str, tmp_path: Path
) -> None:
    text = f"{section}\n{rest}"
    assert parse(text, tmp_path, GRAPH.sections).pretrain == Pretrain()
    new = set_values(text, {"pretrain.seed": 5, "pretrain.epochs": 2})
    assert yaml.safe_load(new)["pretrain"] == {"seed": 5, "epochs": 2}
    assert new.endswith(rest) and section.partition("#")[2] in new


def test_a_section_is_taken_out_with_its_own_lines_alone() -> None:
    text = (
        "# head\npretrain:\n  seed: 1\n\n# of merge\nmerge:\n  # inside\n  prompts: x\nevaluate: "
        "{}\n"
    )
    assert (
        remove_section(text, "merge")
        == "# head\npretrain:\n  seed: 1\n\n# of merge\nevaluate: {}\n"
    )
    assert remove_section(remove_section(text, "evaluate"), "nothing") == text.replace(
        "evaluate: {}\n", ""
    )


def test_a_new_section_has_its_own_keys_and_those_in_which_it_differs_from_the_training_block() -> (
    None
):
    text = "".join(section_text(name, kind) for name, kind in GRAPH.sections.items())
    again = parse(text, Path("params.yaml"), GRAPH.sections)
    assert all(again.section(name) == kind() for name, kind in GRAPH.sections.items())
    assert (
        section_text("finetune_full", FinetuneFull)
        == "finetune_full:\n  data: data/finetune.de.txt\n"
    )
    assert (
        section_text("finetune_prefix", FinetunePrefix, True)
        == "finetune_prefix:\n  data: data/finetune.de.txt\n"
    )
    prefix = section_text("finetune_prefix", FinetunePrefix)
    assert "  learning_rate: 0.01\n" in prefix and "  virtual_tokens: 20\n" in prefix


@pytest.mark.parametrize("text", ["[]", "pretrain: 7\n", "pretrain: {epochs: 3}\n"])
def test_a_layout_without_a_place_for_the_key_is_refused(text: str, tmp_path: Path) -> None:
    (path := tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(
        UserError, match=r"must hold sections|must be a section of key: value lines|by hand"
    ):
        save(path, {"pretrain.seed": 1})
    assert path.read_text(encoding="utf-8") == text


def test_a_value_that_the_params_refuse_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT, encoding="utf-8")
    with pytest.raises(UserError, match=r"finetune_lora\.rank must be at least 1, got 0"):
        save(path, {"finetune_lora.rank": 0})
    assert path.read_text(encoding="utf-8") == TEXT


def test_a_file_broken_by_hand_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("pretrain: [", encoding="utf-8")
    with pytest.raises(UserError, match="not valid YAML"):
        save(path, {"finetune_lora.rank": 8})
    assert path.read_text(encoding="utf-8") == "pretrain: ["


def test_a_full_disk_leaves_the_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TEXT, encoding="utf-8")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"finetune_lora.rank": 8})
    assert path.read_text(encoding="utf-8") == TEXT
    assert [file.name for file in tmp_path.iterdir()] == ["params.yaml"]


def test_a_link_stays_a_link_and_the_mode_stays(tmp_path: Path) -> None:
    real, link = tmp_path / "real.yaml", tmp_path / "params.yaml"
    real.write_text(TEXT, encoding="utf-8")
    real.chmod(0o640)
    link.symlink_to(real)
    save(link, {"finetune_lora.rank": 8})
    assert link.is_symlink()
    assert load(link).finetune_lora.rank == 8
    assert real.stat().st_mode & 0o777 == 0o640
    assert parse(real.read_text(encoding="utf-8"), real, GRAPH.sections) == load(link)


def test_the_comment_of_a_key_is_on_its_line_or_directly_above() -> None:
    text = """\
# about the file

base: minigpt   # or a folder

# of all that trains
training:
  # times that
  # all is seen
  epochs: 50
  schedule: "a # b"
  window: 4     # tokens # each

expand_vocab:
  data:         # files
    - a.txt     # the first
  tokens: [a, b]   # names
  noise_std:    # nothing yet
"""
    assert comments(text) == {
        "base": "or a folder",
        "training": "of all that trains",
        "training.epochs": "times that all is seen",
        "training.window": "tokens # each",
        "expand_vocab.data": "files",
        "expand_vocab.tokens": "names",
        "expand_vocab.noise_std": "nothing yet",
    }


@pytest.mark.parametrize(
    "text", ["", "- a", "a: [", "a: b: c", "x", "[" * 2000, "a: &x [*x]"], ids=str
)
def test_a_file_that_is_no_mapping_has_no_comments(text: str) -> None:
    assert comments(text) == {}

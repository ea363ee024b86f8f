"""Untrusted patterns: they match as in PEFT, and matching ends."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from pipeline.adapters.attach import targeted
from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.files import patterns
from pipeline.models.load import load_base
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter, checkpoint, edit_adapter_config
from tests.helpers.projects import new_project, refusal

CONFIG = "adapter_config.json"
ENDLESS = r"(\w|.|_)*\d\d\d\d"  # three alternatives per character and no match
PLAIN = AdapterSpec(2, 4.0, ("q_proj", "fc1"))
SETTINGS: dict[str, dict[str, Any]] = {
    "target_modules": {"target_modules": ENDLESS},
    "exclude_modules": {"exclude_modules": ENDLESS},
    "rank_pattern": {"rank_pattern": {ENDLESS: 3}},
    "alpha_pattern": {"alpha_pattern": {ENDLESS: 3}},
    "layers_pattern": {"layers_pattern": [ENDLESS], "layers_to_transform": [0]},
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and an adapter on it."""
    adapter(tmp_path / "theirs", checkpoint(tmp_path / "base"), PLAIN)
    monkeypatch.setattr(patterns, "BUDGET", 0.3)
    return tmp_path


@pytest.mark.parametrize("key", SETTINGS)
def test_an_adapters_pattern_that_never_ends_is_one_message(
    cli: Lora, models: Path, key: str
) -> None:
    edit_adapter_config(models / "theirs", **SETTINGS[key])
    ways = [("prompt", "w1", "--adapter", "theirs"), ("adapters", "verify", "theirs")]
    # a comparison asks no model what its modules are called
    if key in ("rank_pattern", "alpha_pattern"):
        ways.append(("adapters", "diff", "theirs", "theirs"))
    for way in ways:
        more = () if way[1] == "diff" else ("--base", "base")
        said = refusal(cli(*way, *more, cwd=models))
        assert (
            f"{key}: matching {ENDLESS!r} against the model's modules must take at most 0.3 s"
            in said
        )


@pytest.mark.slow
def test_a_projects_pattern_that_never_ends_is_one_message(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "BUDGET", 0.3)
    project = new_project(tmp_path / "project")
    asked = refusal(
        cli("calc", "--model", "qwen3-8b", "--rank-pattern", f"{ENDLESS}=3", cwd=project)
    )
    assert "rank_pattern: matching" in asked
    for stage in (["pretrain"], ["expand-vocab"]):
        assert cli(*stage, "--set", "pretrain.epochs=1", cwd=project)[0] == 0
    given_ = f"finetune_lora.rank_pattern={json.dumps({ENDLESS: 3})}"
    code, _, said = cli(
        "finetune", "lora", "--set", given_, "--set", "pretrain.epochs=1", cwd=project
    )
    assert code == 1 and "finetune_lora.rank_pattern: matching" in said


def test_all_of_a_models_names_have_one_budget_together(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, clock = load_base(models / "base").model, [0.0]

    def matched(_name: str, timeout: float) -> None:
        """In 0.08 s."""
        assert timeout == pytest.approx(0.3 - clock[0])
        clock[0] += 0.08

    monkeypatch.setattr(patterns, "_compiled", lambda _pattern: SimpleNamespace(fullmatch=matched))
    monkeypatch.setattr(patterns, "perf_counter", lambda: clock[0])
    with pytest.raises(UserError, match=r"must take at most 0[.]3 s"), patterns.one_budget():
        targeted(model, AdapterSpec(2, 4.0, ".*"))
    assert clock[0] == pytest.approx(4 * 0.08)


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(" * 3000 + ")" * 3000, "it is nested too deeply"),
        ("a{99999999999999999999}", "the repetition number is too large"),
        ("a" * 30_000, "characters, more than 20000"),
        (r"\X", r"bad escape \X"),
        ("(?i)q_proj", "global flags not at the start"),
    ],
)
def test_what_is_no_pattern_is_refused_everywhere(
    cli: Lora, models: Path, pattern: str, why: str
) -> None:
    edit_adapter_config(models / "theirs", rank_pattern={pattern: 3})
    said = refusal(cli("adapters", "verify", "theirs", "--base", "base", cwd=models))
    assert "rank_pattern must be a regular expression" in said and why in said and len(said) < 500
    said = refusal(cli("calc", "--model", "qwen3-8b", "--rank-pattern", f"{pattern}=3", cwd=models))
    assert "is not a valid regular expression" in said and why in said


def test_a_part_of_a_list_pattern_that_names_no_block_matches_none() -> None:
    """In PEFT, too, the number belongs to the last alternative alone."""
    assert patterns.block_match("(?:layers|h)", "model.layers.3.mlp", "layers_pattern") == 3
    assert patterns.block_match("layers|h", "model.layers.3.mlp", "layers_pattern") is None


PIECES = st.sampled_from(
    [
        *"qkvo_.01|*+?",
        "q_proj",
        "layers",
        ".*",
        r"\.",
        r"\d+",
        "[01]",
        "(?:q|v)",
        "(self_)?attn",
        "mlp",
        "^",
        "$",
        "[^.]*",
    ]
)
NAMES = [
    f"model.layers.{block}.{name}"
    for block in (0, 1, 10)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.0.w1")
]


@given(st.lists(PIECES, min_size=1, max_size=5).map("".join))
def test_patterns_mean_what_they_mean_in_peft(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        assert patterns.problem(pattern) == str(error)
        return
    spec = AdapterSpec(1, 1.0, "all-linear", ranks={pattern: 5}, excluded=pattern)
    config = LoraConfig(target_modules=pattern)
    for name in NAMES:
        assert patterns.full_match(pattern, name, "") is bool(
            check_target_module_exists(config, name)
        )
        assert spec.excludes(name) is bool(check_target_module_exists(config, name))
        assert (spec.rank_of(name) == 5) is (get_pattern_key([pattern], name) == pattern)

"""AdapterSpec and adapter_config.json: which module gets what, as PEFT reads it, and what a config
may not say.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from pipeline.adapters import config
from pipeline.adapters.config import (
    AdapterSpec,
    config_of,
    enclosing_names,
    lies_in,
    read_config,
    read_spec,
    refuse_experts,
    refuse_options,
)
from pipeline.errors import UserError
from pipeline.files.patterns import one_budget
from tests.helpers.errors import user_error
from tests.helpers.json_files import write_json

Q0, Q1, V1 = (
    f"model.layers.{name}_proj" for name in ("0.self_attn.q", "1.self_attn.q", "1.self_attn.v")
)
PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}


def written(folder: Path, values: Mapping[str, Any], **more: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_json(folder / "adapter_config.json", {**values, **more})
    return folder


# Ranks and scales


def test_the_first_pattern_that_matches_the_end_of_a_name_gives_its_rank_and_alpha() -> None:
    spec = AdapterSpec(
        4, 8.0, ("q_proj",), ranks={r"layers.0.*q_proj": 2, "q_proj": 3}, alphas={"v_proj": 1.0}
    )
    assert [spec.rank_of(name) for name in (Q0, Q1, V1)] == [2, 3, 4]
    assert [spec.scale_of(name) for name in (Q0, Q1, V1)] == [8 / 2, 8 / 3, 1 / 4]
    assert spec.rank_of("model.layers.1.self_attn.other_q_proj") == 4, "a whole part of a name"


@given(st.integers(1, 64), st.floats(0.1, 64), st.booleans())
def test_the_scale_is_alpha_by_the_rank_or_by_its_root_and_stays_when_ranks_double(
    rank: int, alpha: float, rslora: bool
) -> None:
    spec = AdapterSpec(
        rank, alpha, ("q_proj",), ranks={"v_proj": rank + 1}, alphas={"v_proj": 3.0}, rslora=rslora
    )
    root = math.sqrt if rslora else float
    assert spec.scale_of(Q0) == pytest.approx(alpha / root(rank))
    assert spec.scale_of(V1) == pytest.approx(3 / root(rank + 1))
    twice = spec.doubled()
    for name in (Q0, V1):
        assert twice.rank_of(name) == 2 * spec.rank_of(name)
        assert twice.scale_of(name) == pytest.approx(spec.scale_of(name))
    assert (twice.targets, twice.rslora) == (spec.targets, rslora)


@pytest.mark.parametrize(
    ("key", "spec"),
    [
        ("rank_pattern", AdapterSpec(4, 8.0, ("q_proj",), ranks={"q_proj": 2})),
        ("alpha_pattern", AdapterSpec(4, 8.0, ("q_proj",), alphas={"q_proj": 2.0})),
        ("exclude_modules", AdapterSpec(4, 8.0, ("q_proj",), excluded="q_proj")),
        ("layers_pattern", AdapterSpec(4, 8.0, ("q_proj",), layers=(0,), lists=("q_proj",))),
    ],
)
def test_a_pattern_that_has_no_time_left_is_named_by_its_key(key: str, spec: AdapterSpec) -> None:
    with (
        one_budget([0.0]),
        pytest.raises(UserError, match=f"^{key}: matching 'q_proj' against the model's modules"),
    ):
        spec.scale_of(Q0)
        spec.excludes(Q0)


# Names


def test_what_is_excluded_is_meant_by_a_pattern_of_the_whole_name_or_by_ends() -> None:
    assert AdapterSpec(4, 8.0, ("q_proj",), excluded=r".*0.*q_proj").excludes(Q0)
    assert not AdapterSpec(4, 8.0, ("q_proj",), excluded="q_proj").excludes(Q0), (
        "a pattern is of the full name"
    )
    spec = AdapterSpec(4, 8.0, ("q_proj",), excluded=("1.self_attn.q_proj", "proj"))
    assert [spec.excludes(name) for name in (Q0, Q1, V1)] == [False, True, False]


def test_a_pattern_of_targets_leaves_out_what_trains_in_full() -> None:
    by_pattern, by_name = (
        AdapterSpec(4, 8.0, targets, saved=("self_attn",)) for targets in (".*proj", ("q_proj",))
    )
    assert by_pattern.excludes(Q0) and not by_name.excludes(Q0)
    assert not AdapterSpec(4, 8.0, ".*proj", saved=("attn",), layers=(1,)).excludes(Q0)


def test_blocks_are_numbered_by_the_first_list_that_layers_pattern_names() -> None:
    spec = AdapterSpec(4, 8.0, ("q_proj",), layers=(1, 3))
    assert [spec.excludes(name) for name in (Q0, Q1, "model.q_proj")] == [True, False, True]
    assert not AdapterSpec(4, 8.0, (Q0,), layers=(1,)).excludes(Q0), (
        "a full name is meant wherever it lies"
    )
    expert = "model.layers.1.experts.0.q_proj"
    assert not spec.excludes(expert)
    named = AdapterSpec(4, 8.0, ("q_proj",), layers=(0,), lists=("blocks", "experts"))
    assert not named.excludes(expert) and named.excludes(Q0)
    also = AdapterSpec(4, 8.0, ("q_proj",), layers=(1,), excluded=("q_proj",))
    assert also.excludes(Q1)


def test_a_module_that_trains_in_full_is_meant_by_the_plain_end_of_its_name() -> None:
    spec = AdapterSpec(4, 8.0, ("q_proj",), saved=("norm", "lm_head"))
    assert (
        spec.saves("model.input_layernorm")
        and spec.saves("lm_head")
        and not spec.saves("model.norm.inner")
    )
    assert enclosing_names("a.b.c") == ["a", "a.b", "a.b.c"]
    assert (
        lies_in("a.b.c", ("b",))
        and lies_in("a.b.c", ("x", "c"))
        and not lies_in("a.bb.c", ("b", "a.c"))
    )


# The file


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(
            4,
            8.0,
            ("q_proj", "v_proj"),
            saved=("norm",),
            rows={"embed_tokens": (3, 5)},
            rslora=True,
        ),
        AdapterSpec(
            3,
            1.5,
            r".*q_proj",
            ranks={"q_proj": 2},
            alphas={"q_proj": 2.5},
            excluded=".*0.*",
            dora=True,
        ),
        AdapterSpec(1, 1.0, ("q_proj",), excluded=("v_proj",), layers=(0, 2), lists=("layers",)),
        AdapterSpec(1, 1.0, (), parameters=("experts.down_proj",)),
    ],
)
def test_a_spec_is_written_and_read_again_and_peft_knows_every_key(
    tmp_path: Path, spec: AdapterSpec
) -> None:
    values = config_of(spec, "base", transposed=True)
    assert read_spec(written(tmp_path, values)) == spec
    assert values["fan_in_fan_out"] is True and values["base_model_name_or_path"] == "base"
    assert values["inference_mode"] is True and values["task_type"] == "CAUSAL_LM"
    theirs = LoraConfig.from_pretrained(tmp_path)
    assert (theirs.r, theirs.lora_alpha, theirs.use_dora) == (spec.rank, spec.alpha, spec.dora)
    assert theirs.modules_to_save == (list(spec.saved) or None)
    assert ("target_parameters" in values) == bool(spec.parameters)


def test_whole_alphas_are_written_as_whole_numbers() -> None:
    values = config_of(AdapterSpec(4, 8.0, ("q_proj",), alphas={"a": 2.0, "b": 2.5}), "base", False)
    assert json.dumps([values["lora_alpha"], values["alpha_pattern"]]) == '[8, {"a": 2, "b": 2.5}]'
    assert values["fan_in_fan_out"] is False and values["modules_to_save"] is None


def test_a_list_of_rows_is_of_the_embedding_as_the_model_names_it(tmp_path: Path) -> None:
    folder = written(tmp_path, PLAIN, trainable_token_indices=[3, 0])
    assert read_spec(folder).rows == {"embed_tokens": (3, 0)}
    assert read_spec(folder, "wte").rows == {"wte": (3, 0)}


def test_a_name_in_place_of_a_list_is_one_name_but_where_it_is_a_pattern(tmp_path: Path) -> None:
    spec = read_spec(
        written(tmp_path, PLAIN, modules_to_save="norm", layers_pattern="h", layers_to_transform=1)
    )
    assert (spec.saved, spec.lists, spec.layers) == (("norm",), ("h",), (1,))
    spec = read_spec(written(tmp_path, PLAIN, target_modules=".*q", exclude_modules=".*0.*"))
    assert (spec.targets, spec.excluded) == (".*q", ".*0.*")
    spec = read_spec(written(tmp_path, PLAIN, target_modules=["v", "q"], layers_to_transform=[]))
    assert (spec.targets, spec.layers) == (("q", "v"), ())


@pytest.mark.parametrize("rank", [1, 10**6])
@pytest.mark.parametrize("alpha", [1e-9, 1, 1e9])
def test_ranks_and_alphas_are_taken_up_to_their_bounds(
    tmp_path: Path, rank: int, alpha: float
) -> None:
    spec = read_spec(written(tmp_path, PLAIN, r=rank, lora_alpha=alpha))
    assert (spec.rank, spec.alpha) == (rank, alpha) and isinstance(spec.alpha, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "r must be a whole number from 1 to 1000000, got 0"),
        ({"r": 10**6 + 1}, "r must be a whole number from 1 to 1000000, got 1000001"),
        ({"r": 4.0}, "r must be a whole number from 1 to 1000000, got 4.0"),
        ({"r": None}, "r must be a whole number"),
        ({"lora_alpha": 0}, "lora_alpha must be a number from 1e-09"),
        ({"lora_alpha": True}, "lora_alpha must be a number from"),
        (
            {"alpha_pattern": {"q": "x"}},
            "alpha_pattern must be a number from 1e-09 to 1000000000.0, got 'x'",
        ),
        ({"rank_pattern": {"q": 1.5}}, "rank_pattern must be a whole number from 1"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern must be a regular expression \(.*, got '\('"),
        ({"rank_pattern": [1]}, r"rank_pattern must be a mapping of names to numbers, got \[1\]"),
        ({"target_modules": None}, "target_modules must be a list of names, got None"),
        ({"target_modules": 5}, "target_modules must be a list of names, got 5"),
        ({"modules_to_save": [5]}, "modules_to_save must be a list of names"),
        ({"exclude_modules": {"q": 1}}, "exclude_modules must be a list of names, got {'q': 1}"),
        ({"layers_pattern": ["("]}, "layers_pattern must be a regular expression"),
        (
            {"layers_to_transform": True},
            "layers_to_transform must be the numbers of blocks, got True",
        ),
        (
            {"layers_to_transform": [True]},
            r"layers_to_transform must be the numbers of blocks, got \[True\]",
        ),
        (
            {"trainable_token_indices": 5},
            "trainable_token_indices must be a mapping of modules to rows, got 5",
        ),
        (
            {"trainable_token_indices": {"e": [0, -1]}},
            "trainable_token_indices.e must be a list of rows",
        ),
        (
            {"trainable_token_indices": {"e": []}},
            r"trainable_token_indices.e must be a list of rows, at least one, .*, got \[\]",
        ),
        ({"bias": "all"}, "bias is 'all'; only 'none' is supported"),
        ({"lora_bias": True}, "lora_bias is True; only False is supported"),
        ({"tomorrow": 1}, "tomorrow is 1; it is not supported"),
        (
            {"init_lora_weights": "PiSSA"},
            "init_lora_weights is 'PiSSA', which also changes the base. Convert ",
        ),
        (
            {"init_lora_weights": "loftq"},
            "init_lora_weights is 'loftq', .* Merge it in PEFT with merge_and_unload",
        ),
        (
            {"peft_type": "LOHA"},
            "peft_type must be LORA, .*or PROMPT_TUNING, got 'LOHA'. Train one of",
        ),
    ],
)
def test_what_a_config_may_not_say_is_refused_with_file_key_and_rule(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/adapter_config.json: {message}"):
        read_spec(written(tmp_path, PLAIN, **values))


@pytest.mark.parametrize("init", [True, False, "gaussian", "Orthogonal", "eva", "MiCA"])
def test_what_leaves_the_base_as_it_was_is_taken(tmp_path: Path, init: object) -> None:
    more = {
        "init_lora_weights": init,
        "peft_type": None,
        "lora_dropout": 0.3,
        "tomorrow": None,
        "bias": None,
    }
    assert read_spec(written(tmp_path, PLAIN, **more)) == AdapterSpec(4, 8.0, ("q_proj",))


def test_costs_of_names_and_patterns_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "MOST_NAMES", 3)
    monkeypatch.setattr(config, "MOST_PATTERNS", 2)
    names, ranks = ["a", "b", "c"], {"a": 1, "b": 2}
    spec = read_spec(written(tmp_path, PLAIN, target_modules=names, rank_pattern=ranks))
    assert (spec.targets, spec.ranks) == (("a", "b", "c"), ranks)
    with pytest.raises(UserError, match="target_modules must be at most 3 names, got 4"):
        read_spec(written(tmp_path, PLAIN, target_modules=[*names, "d"]))
    with pytest.raises(UserError, match="rank_pattern must be at most 2 patterns, got 3"):
        read_spec(written(tmp_path, PLAIN, rank_pattern={**ranks, "c": 3}))


def test_a_long_value_is_shown_by_its_beginning(tmp_path: Path) -> None:
    said = user_error(read_spec, written(tmp_path, PLAIN, r="x" * 900))
    assert "x" * 199 + "…" in said and "x" * 200 not in said
    for option in ("bias", "tomorrow"):
        said = user_error(read_spec, written(tmp_path, PLAIN, **{option: "x" * 900}))
        assert "x" * 199 + "…" in said and "x" * 200 not in said


def test_targets_may_be_missing_only_where_experts_are_named(tmp_path: Path) -> None:
    spec = read_spec(
        written(tmp_path, PLAIN, target_modules=None, target_parameters=["experts.down_proj"])
    )
    assert (spec.targets, spec.parameters) == ((), ("experts.down_proj",))
    with pytest.raises(
        UserError, match=r"adapts experts \(target_parameters experts.down_proj\).*--format merged"
    ):
        refuse_experts(tmp_path, spec)
    refuse_experts(tmp_path, AdapterSpec(4, 8.0, ("q_proj",)))


def test_an_option_is_refused_unless_it_is_known_or_empty_or_has_its_only_value() -> None:
    plain = {"bias": "none", "bits": 4}
    refuse_options(
        {"bias": "none", "bits": 0, "known": 7, "new": []}, Path("c.json"), plain, {"known"}
    )
    with pytest.raises(UserError, match=r"^c.json: bits is 8; only 4 is supported"):
        refuse_options({"bits": 8}, Path("c.json"), plain, ())
    with pytest.raises(UserError, match=r"^c.json: known is 7; it is not supported"):
        refuse_options({"known": 7}, Path("c.json"), plain, {"other"})


def test_a_folder_that_is_no_adapter_is_answered_by_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"An adapter folder holds adapter_config.json and adapter_model.safetensors",
    ):
        read_config(tmp_path)
    for name in ("b", "a"):
        written(tmp_path / name, PLAIN)
    with pytest.raises(
        UserError,
        match=rf"contains adapters but is not one. Name one of them, such as {tmp_path}/a\.",
    ):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"is a full model, not an adapter: .* `lora prompt --base {tmp_path}`"
    ):
        read_config(tmp_path)
    assert read_config(written(tmp_path, PLAIN)) == PLAIN

"""`lora adapters diff` compared with dense updates, and `lora adapters card` with the files that it
describes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.weights.import_adapter import import_adapter
from tests.conftest import Lora
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import ONE, adapter, checkpoint, edit_adapter_config, edit_tensors
from tests.helpers.json_files import read_json
from tests.helpers.projects import refusal
from tests.pipeline.export.test_export import facts

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ENDS = ("embed_tokens", "lm_head")
Q_PROJ = "model.decoder.layers.0.self_attn.q_proj"


def dense(folder: Path) -> dict[str, Tensor]:
    """The update of each module, (O, I), computed from the files."""
    config, result = read_json(folder / CONFIG), load_file(folder / WEIGHTS)
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    names = [key.removesuffix(".lora_A.weight") for key in result if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix("base_model.model."): scale
        * (result[f"{name}.lora_B.weight"].double() @ result[f"{name}.lora_A.weight"].double())
        for name in names
    }


def diff(
    cli: Lora, one: str, other: str, cwd: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The settings that differ, and the rows by module."""
    result = read_diff(cli, one, other, cwd)
    return result["settings"], {row.pop("module"): row for row in result["modules"]}


def read_diff(cli: Lora, one: str, other: str, cwd: Path) -> dict[str, Any]:
    code, out, err = cli("adapters", "diff", one, other, "--json", cwd=cwd)
    assert (code, err) == (0, "")
    result: dict[str, Any] = json.loads(out)
    return result


def test_diff_names_the_settings_that_differ(cli: Lora, two_adapters: Path) -> None:
    settings, _ = diff(cli, "one", "other", two_adapters)
    expected = {
        "rank": [2, 3],
        "alpha": [3.0, 2.0],
        "targets": [["fc1", "q_proj"], ["q_proj"]],
        "rslora": [False, True],
    }
    assert settings == expected
    assert diff(cli, "one", "one", two_adapters)[0] == {}


def test_its_sizes_are_frobenius_norms_of_the_dense_updates(cli: Lora, two_adapters: Path) -> None:
    one, other = dense(two_adapters / "one"), dense(two_adapters / "other")
    _, rows = diff(cli, "one", "other", two_adapters)
    assert rows.keys() == one.keys() | other.keys()
    for name, row in rows.items():
        first, second = one[name], other.get(name, torch.zeros_like(one[name]))
        wanted = [float(matrix.norm()) for matrix in (first, second, first - second)]
        assert [row["first"], row["second"], row["difference"]] == pytest.approx(wanted, rel=1e-5)
        assert (row["outputs"] is None) is (name not in other)


def test_its_overlap_is_that_of_the_dense_updates_singular_spaces(
    cli: Lora, two_adapters: Path
) -> None:
    one, other = dense(two_adapters / "one"), dense(two_adapters / "other")
    _, rows = diff(cli, "one", "other", two_adapters)
    for name in other:
        (left, _, right), (left_2, _, right_2) = (
            torch.linalg.svd(matrix) for matrix in (one[name], other[name])
        )
        outputs, inputs = left[:, :2].T @ left_2[:, :3], right[:2] @ right_2[:3].T
        wanted = [float(shared.square().sum()) / 2 for shared in (outputs, inputs)]
        assert [rows[name]["outputs"], rows[name]["inputs"]] == pytest.approx(wanted, abs=1e-5)


def test_its_cosine_is_that_of_the_dense_updates(cli: Lora, two_adapters: Path) -> None:
    one, other = dense(two_adapters / "one"), dense(two_adapters / "other")
    _, rows = diff(cli, "one", "other", two_adapters)
    for name, row in rows.items():
        wanted = (
            torch.cosine_similarity(one[name].flatten(), other[name].flatten(), 0)
            if name in other
            else None
        )
        assert row["cosine"] == (None if wanted is None else pytest.approx(float(wanted), abs=1e-9))


def test_an_adapter_shares_all_of_its_space_with_itself(cli: Lora, two_adapters: Path) -> None:
    for row in diff(cli, "one", "one", two_adapters)[1].values():
        assert (row["outputs"], row["inputs"], row["cosine"]) == pytest.approx((1, 1, 1))
        assert row["difference"] <= 1e-6 * row["first"]


@pytest.mark.parametrize(
    ("inputs", "outputs"), [((0, 1), (2, 3)), ((5, 1), (7, 9)), ((1, 0), (1, 0))]
)
def test_its_overlap_is_the_share_of_directions_in_common(
    cli: Lora, two_adapters: Path, inputs: tuple[int, int], outputs: tuple[int, int]
) -> None:
    """A and B consist of unit vectors: one adapter has directions 0 and 1, the other those
    given.
    """
    for name, rows, columns in (("one", (0, 1), (0, 1)), ("two", inputs, outputs)):
        adapter(two_adapters / name, two_adapters / "base", AdapterSpec(2, 2.0, ("q_proj",)))
        made = {f"base_model.model.{Q_PROJ}.lora_A.weight": torch.eye(64)[list(rows)]}
        made[f"base_model.model.{Q_PROJ}.lora_B.weight"] = torch.eye(64)[:, list(columns)]
        edit_tensors(two_adapters / name, lambda tensors, made=made: tensors | made)  # type: ignore[misc]
    row = diff(cli, "one", "two", two_adapters)[1][Q_PROJ]
    assert row["inputs"] == pytest.approx(len({0, 1} & {*inputs}) / 2)
    assert row["outputs"] == pytest.approx(len({0, 1} & {*outputs}) / 2)


def test_diff_is_a_table_for_people(cli: Lora, two_adapters: Path) -> None:
    code, out, err = cli("adapters", "diff", "one", "other", cwd=two_adapters)
    assert (code, err) == (0, "")
    assert out.splitlines()[:2] == ["rank: 2 | 3", "alpha: 3.0 | 2.0"]
    norms = [
        f"{float(update[Q_PROJ].norm()):.3f}"
        for update in (dense(two_adapters / "one"), dense(two_adapters / "other"))
    ]
    shared, _, rest = Q_PROJ.partition("0")
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()}
    assert lines[shared][0] == "‖one‖", "the common prefix is shown once"
    assert lines[f"0{rest}"][:2] == norms
    assert lines["0.fc1"][-2:] == ["–", "–"]


def test_what_was_trained_itself_is_compared_as_it_is(cli: Lora, two_adapters: Path) -> None:
    rows = AdapterSpec(2, 3.0, ("q_proj",), rows={"embed_tokens": (5, 41)}, saved=("lm_head",))
    others = AdapterSpec(2, 3.0, ("q_proj",), rows={"embed_tokens": (5, 42)})
    for name, spec, seed in (("a", rows, 1), ("b", rows, 2), ("c", others, 3)):
        adapter(two_adapters / name, two_adapters / "base", spec, seed=seed)
    first, second = (load_file(two_adapters / name / WEIGHTS) for name in "ab")
    values = {
        row["name"]: row["difference"] for row in read_diff(cli, "a", "b", two_adapters)["values"]
    }
    keys = {
        "model.decoder.embed_tokens": ".token_adapter.trainable_tokens_delta",
        "lm_head.weight": "",
    }
    for name, rest in keys.items():
        key = f"base_model.model.{name}{rest}"
        assert values.pop(name) == pytest.approx(float((first[key] - second[key]).norm()), rel=1e-5)
    assert not values
    result = read_diff(cli, "a", "c", two_adapters)["values"]
    assert [(row["name"], row["difference"]) for row in result] == [
        (name, None) for name in keys
    ], "not the same of it"


def wide(root: Path) -> None:
    adapter(root / "else", checkpoint(root / "elsewhere", d_model=32), ONE)


def deep(root: Path) -> None:
    adapter(root / "else", checkpoint(root / "elsewhere", layers=3), ONE)


def with_more_words(root: Path) -> None:
    """The same blocks, and an embedding with one more row, as before and after expand_vocab."""
    for name in ("one", "else"):
        adapter(root / name, root / "base", AdapterSpec(2, 3.0, ("q_proj",), saved=ENDS))
    edit_tensors(
        root / "else",
        lambda tensors: {
            n: torch.cat((t, t[:1])) if "lm_head" in n else t for n, t in tensors.items()
        },
    )


def wide_rows(root: Path) -> None:
    rows = {"embed_tokens": (5, 41)}
    for name, base, width in (("one", "base", 64), ("else", "elsewhere", 32)):
        adapter(
            root / name,
            checkpoint(root / base, d_model=width),
            replace(ONE, targets=("lm_head",), rows=rows),
        )


def of_another_family(root: Path) -> None:
    toy_checkpoint(root / "elsewhere", "gpt2")
    adapter(root / "else", root / "elsewhere", AdapterSpec(2, 3.0, ("c_attn",)))


def on_another_base(root: Path) -> None:
    checkpoint(root / "elsewhere", seed=1)
    for name, base in (("one", "base"), ("other", "elsewhere")):
        import_adapter(root / name, root / base, root / f"bound-{name}")
    shutil.rmtree(root / "one")
    (root / "bound-one").rename(root / "one")
    (root / "bound-other").rename(root / "else")


OTHER_MODELS: dict[Callable[[Path], None], str] = {
    wide: "fc1 is 256 × 32 and 256 × 64",
    deep: "layers.2.fc1 is in only one of them, but the target_modules of both match it",
    with_more_words: "lm_head.weight is 74 × 64 and 75 × 64",
    wide_rows: "a row of model.decoder.embed_tokens is 32 and 64",
    of_another_family: "the blocks are called ",
    on_another_base: "their bases have sha256 ",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("other", OTHER_MODELS, ids=lambda other: other.__name__)
def test_adapters_of_two_models_are_not_compared(
    cli: Lora, two_adapters: Path, other: Callable[[Path], None]
) -> None:
    other(two_adapters)
    for pair in (("one", "else"), ("else", "one")):
        output = refusal(cli("adapters", "diff", *pair, cwd=two_adapters))
        assert (
            OTHER_MODELS[other] in output
            and ": the adapters belong to different models. Name two adapters of the same model."
            in output
        )


OF_ONE_MODEL = {
    "other targets": AdapterSpec(2, 3.0, ("v_proj",)),
    "a block": AdapterSpec(2, 3.0, ("q_proj", "fc1"), layers=(1,)),
    "all linears": AdapterSpec(2, 3.0, "all-linear"),
    "a pattern": AdapterSpec(2, 3.0, r".*\.0\..*(q_proj|fc2)"),
    "all but some": AdapterSpec(2, 3.0, ("q_proj", "fc1"), excluded=("layers.0.fc1",)),
    "embedding and head": AdapterSpec(2, 3.0, ENDS),
    "rows": AdapterSpec(2, 3.0, ("q_proj",), rows={"embed_tokens": (5,)}),
    "in full": AdapterSpec(2, 3.0, ("q_proj",), saved=ENDS),
    "dora": AdapterSpec(5, 3.0, ("q_proj", "fc1"), dora=True),
}


def test_adapters_of_one_model_are_compared_whatever_they_train(
    cli: Lora, two_adapters: Path
) -> None:
    for name, spec in OF_ONE_MODEL.items():
        adapter(two_adapters / name, two_adapters / "base", spec)
    adapter(
        two_adapters / "saved",
        two_adapters / "base",
        AdapterSpec(2, 3.0, ("q_proj",), saved=("fc1",)),
    )
    # which PEFT trains in full, and gives no LoRA
    edit_adapter_config(two_adapters / "saved", target_modules=["q_proj", "fc1"])
    for pair in combinations((*OF_ONE_MODEL, "saved"), 2):
        read_diff(cli, *pair, cwd=two_adapters)


# Card


def test_the_card_says_how_an_adapter_was_made_what_it_learned_and_what_it_forgot(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    code, card, err = cli("adapters", "card", "artifacts/lora_adapter", cwd=brief)
    assert (code, err) == (0, "")
    for fact in facts(brief / "artifacts/lora_adapter", brief / "artifacts/evaluation"):
        assert fact in card
    assert cli("adapters", "card", ".", cwd=brief / "artifacts/lora_adapter")[1] == card
    cli(
        "export",
        "artifacts/lora_adapter",
        "--out",
        str(tmp_path / "out"),
        "--format",
        "peft",
        cwd=brief,
    )
    exported = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert exported.replace('from_pretrained("out"', 'from_pretrained("lora_adapter"') == card


def test_the_card_of_a_retrained_adapter_has_no_numbers_of_the_earlier_one(
    cli: Lora, project: Path
) -> None:
    assert cli("finetune", "lora", "--set", "finetune_lora.epochs=1", cwd=project)[0] == 0
    card = cli("adapters", "card", "artifacts/lora_adapter", cwd=project)[1]
    assert "epochs: 1\n" in card
    assert "not evaluated: run `lora evaluate`" in card and "forgetting" not in card


def test_an_adapter_without_a_manifest_has_a_card_too(cli: Lora, two_adapters: Path) -> None:
    code, card, err = cli("adapters", "card", "one", cwd=two_adapters)
    assert (code, err) == (0, "")
    assert "base_model" not in card and str(two_adapters) not in card, (
        "a path on this machine is no name of a base"
    )
    assert "- LoRA, rank 2, alpha 3\n- on q_proj, fc1\n" in card
    assert "sha256" not in card


def test_an_adapter_that_was_changed_has_no_card(cli: Lora, project: Path) -> None:
    edit_adapter_config(project / "artifacts/lora_adapter", target_modules=["q_proj"])
    refused = cli("adapters", "card", "artifacts/lora_adapter", cwd=project)
    assert "was changed after the artifact was made" in refusal(refused)

"""`lora export --format mlx`: mlx-lm opens it with its own loader, and has our logits."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.export.formats import mlx as form
from pipeline.inference import engine
from tests.conftest import Lora
from tests.helpers import bases
from tests.helpers.bases import toy_checkpoint
from tests.helpers.checkpoints import adapter
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import folder_bytes, refusal
from tests.helpers.side_by_side import IDS, logits, ours

mx = pytest.importorskip("mlx.core")
nn = pytest.importorskip("mlx.nn")
mlx_lm = pytest.importorskip("mlx_lm.utils")

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# family, settings of the base, adapter
SPECS: dict[str, tuple[str, dict[str, Any], AdapterSpec]] = {
    "plain": ("llama", {}, AdapterSpec(4, 8, ATTENTION)),
    "tied": ("llama", {"tie_word_embeddings": True}, AdapterSpec(4, 8, "all-linear")),
    "last-blocks": ("llama", {}, AdapterSpec(4, 8, ATTENTION, layers=(1,))),
    "first-blocks": ("llama", {}, AdapterSpec(4, 8, ATTENTION, layers=(0,))),
    "other-layers-in-each-block": (
        "llama",
        {},
        AdapterSpec(4, 8, r".*(0\.self_attn\.q|1\.mlp\.up)_proj"),
    ),
    "ranks": ("qwen3", {}, AdapterSpec(4, 8, ATTENTION, ranks={"q_proj": 2, r"1\..*o_proj": 7})),
    "alphas": ("qwen3", {}, AdapterSpec(4, 8, ATTENTION, alphas={r"1\..*v_proj": 3})),
    "rslora": ("llama", {}, AdapterSpec(4, 8, ATTENTION, ranks={"v_proj": 9}, rslora=True)),
    "head": ("llama", {}, AdapterSpec(4, 8, ("q_proj", "lm_head"))),
    "embedding": ("llama", {}, AdapterSpec(4, 8, ("embed_tokens",))),
    "rows": (
        "llama",
        {},
        AdapterSpec(4, 8, ATTENTION, rows={"embed_tokens": (5, 9), "lm_head": (70, 5, 9)}),
    ),
    "rows-tied": ("qwen3", {}, AdapterSpec(4, 8, ATTENTION, rows={"embed_tokens": (5, 200)})),
    "rows-scaled": ("gemma2", {}, AdapterSpec(4, 8, ("down_proj",), rows={"embed_tokens": (3, 5)})),
    "dora": (
        "llama",
        {},
        AdapterSpec(4, 8, ("q_proj", "down_proj"), dora=True, ranks={"q_proj": 2}),
    ),
    "dora-of-linears-with-bias": ("qwen2", {}, AdapterSpec(4, 8, ATTENTION, dora=True)),
    "experts-beside": ("mixtral", {}, AdapterSpec(3, 6, ATTENTION)),
}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = {"gemma3_text": 6}  # of which mlx-lm takes one in six for its full attention
    wide = {
        family: bases.WIDE | {"num_hidden_layers": blocks.get(family, 2)}
        for family in form.FAMILIES
        if family not in bases.FAMILIES
    }
    monkeypatch.setattr(bases, "FAMILIES", bases.FAMILIES | wide)


def made(root: Path, family: str, settings: dict[str, Any], spec: AdapterSpec) -> Path:
    """`base` and an adapter of random numbers on it."""
    toy_checkpoint(root / "base", family, **settings)
    name_rope(root / "base")
    return adapter(root / "adapter", root / "base", spec)


def name_rope(base: Path) -> None:
    """Write the rotary base where mlx-lm reads it, as an import of ours does; toys are as
    transformers writes them.
    """
    config = read_json(base / "config.json")
    rope = config.get("rope_parameters", {})
    names = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    write_json(base / "config.json", config | names)


def export(cli: Lora, source: Path, *more: str) -> tuple[int, str, str]:
    root = source.parent
    options = ("--base", str(root / "base"), "--out", str(root / "out"))
    return cli("export", str(source), "--format", "mlx", *options, *more, cwd=root)


def by_mlx(base: Path, folder: Path | None = None, ids: Sequence[int] = IDS) -> Tensor:
    """By mlx-lm's own loaders."""
    model, _ = mlx_lm.load_model(base)
    if folder is not None:
        model = mlx_lm.load_adapters(model, str(folder))
    model.eval()
    return torch.tensor(np.array(model(mx.array([list(ids)]))[0].astype(mx.float32)))


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.sampled(3)
def test_mlx_lm_has_our_logits(cli: Lora, name: str, tmp_path: Path) -> None:
    source, out = made(tmp_path, *SPECS[name]), tmp_path / "out"
    code, said, errors = export(cli, source)
    assert code == 0 and "Traceback" not in errors
    tuned = logits(ours(tmp_path / "base", source))
    assert (tuned - logits(ours(tmp_path / "base"))).abs().max() > 0.05, (
        "the adapter changes nothing"
    )
    torch.testing.assert_close(by_mlx(tmp_path / "base", out), tuned, atol=1e-3, rtol=1e-3)
    assert f"mlx_lm.generate --model {tmp_path / 'base'} --adapter-path {out}" in said
    assert re.search(r"^adapter .* MiB  \d\.\de[+-]\d\d  ", said, re.MULTILINE), said


def test_a_base_may_have_braces_in_its_name(cli: Lora, tmp_path: Path) -> None:
    source = made(tmp_path, *SPECS["plain"])
    code, said, errors = export(cli, source, "--base-name", "org/{name}")
    assert code == 0, errors
    assert f"mlx_lm.generate --model 'org/{{name}}' --adapter-path {tmp_path / 'out'}" in said


@pytest.mark.parametrize("family", sorted(form.FAMILIES))
def test_each_family_has_the_same_modules_in_mlx_lm(family: str, tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "base", family)
    name_rope(tmp_path / "base")
    there, _ = mlx_lm.load_model(tmp_path / "base")
    names = {
        name
        for name, module in there.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    here = {
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    } - {"lm_head"}
    assert here and here <= names
    assert (by_mlx(tmp_path / "base") - logits(ours(tmp_path / "base"))).abs().max() < 5e-3


def test_layers_of_all_last_blocks_have_short_names_which_other_programs_know(
    cli: Lora, tmp_path: Path
) -> None:
    export(cli, made(tmp_path, *SPECS["last-blocks"]))
    config = read_json(tmp_path / "out/adapter_config.json")
    assert config["num_layers"] == 1
    assert config["lora_parameters"]["keys"] == sorted(f"self_attn.{name}" for name in ATTENTION)


REFUSED: dict[str, tuple[str, dict[str, Any], AdapterSpec, str]] = {
    "in full": (
        *SPECS["plain"][:2],
        AdapterSpec(4, 8, ATTENTION, saved=("lm_head",)),
        "was trained in full",
    ),
    "a tied head alone": (
        *SPECS["tied"][:2],
        AdapterSpec(4, 8, ("lm_head",)),
        "mlx-lm adds the same update to both",
    ),
    "DoRA and rows": (
        *SPECS["plain"][:2],
        AdapterSpec(4, 8, ATTENTION, dora=True, rows={"embed_tokens": (5,)}),
        "either all layers use DoRA or none",
    ),
    "another family": ("opt", {}, AdapterSpec(4, 8, ("q_proj",)), "is a model of type opt"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_mlx_lm_cannot_hold_is_refused_and_nothing_is_written(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    *what, message = REFUSED[name]
    source = made(tmp_path, *what)  # type: ignore[arg-type]
    before = folder_bytes(tmp_path)
    said = refusal(export(cli, source))
    assert message in said and "erge" in said
    assert folder_bytes(tmp_path) == before and not (tmp_path / "out").exists()


def test_an_export_that_answers_differently_in_mlx_lm_is_rejected(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path, *SPECS["plain"])
    monkeypatch.setattr(form, "_common_scale", lambda _: 2 * 8 / 4)  # alpha doubled
    assert "adapter is not the exported model in mlx-lm" in refusal(export(cli, source))
    assert not (tmp_path / "out").exists()


def test_without_mlx_lm_it_is_written_and_says_that_nothing_was_compared(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path, *SPECS["plain"])
    monkeypatch.setattr("pipeline.errors.find_spec", lambda _: None)
    code, said, _ = export(cli, source)
    assert code == 0 and "Nothing was compared with mlx-lm, which is not installed" in said
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "adapters.safetensors",
        "adapter_config.json",
    }
    assert "library_name: mlx" in (tmp_path / "out/README.md").read_text(encoding="utf-8")


def test_a_base_whose_rotary_settings_mlx_lm_would_not_find_is_named(
    cli: Lora, tmp_path: Path
) -> None:
    toy_checkpoint(tmp_path / "base", rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    source = adapter(tmp_path / "adapter", tmp_path / "base", SPECS["plain"][2])
    assert (by_mlx(tmp_path / "base") - logits(ours(tmp_path / "base"))).abs().max() > 0.05
    _, said, _ = export(cli, source)
    assert 'add to a copy: "rope_theta": 500.0' in said


@pytest.mark.slow
def test_the_runner_continues_as_we_do_and_reads_the_same_ids(cli: Lora, tmp_path: Path) -> None:
    from pipeline.export.mlx import MLX

    source = made(tmp_path, *SPECS["plain"])
    export(cli, source)
    runner, tuned = MLX(tmp_path / "base", tmp_path / "out"), engine.load(tmp_path / "base", source)
    ids = tuned.tokenizer.encode(bases.TEXT[0])
    assert runner.encode(bases.TEXT[0]) == list(ids)
    new, speed = runner.generate(ids, 12)
    expected = list(ids)
    for _ in range(len(new)):
        expected.append(int(logits(ours(tmp_path / "base", source), expected)[-1].argmax()))
    assert 0 < len(new) <= 12 and new == expected[len(ids) :] and speed > 0

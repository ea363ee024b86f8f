"""`lora adapters combine`: its result, output and errors."""

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from pipeline.adapters.config import AdapterSpec
from pipeline.errors import UserError
from pipeline.weights.combine import Method
from pipeline.weights.import_adapter import import_adapter
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.projects import folder_bytes, refusal
from tests.helpers.side_by_side import BATCH, logits, ours, theirs
from tests.helpers.stored_models import load_weights, merged_through_files

SPECS = {
    "x": AdapterSpec(
        2, 3.0, ("q_proj", "fc1"), rows={"embed_tokens": (18, 19), "lm_head": (18, 19)}
    ),
    "y": AdapterSpec(3, 2.0, ("q_proj", "lm_head"), rslora=True),
    "full": AdapterSpec(2, 3.0, ("q_proj",), saved=("embed_tokens", "lm_head")),
    "narrow": AdapterSpec(2, 3.0, ("q_proj",)),
}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A base, and adapters on it as if made elsewhere, named by their specs."""
    base = checkpoint(tmp_path / "base")
    for seed, (name, spec) in enumerate(SPECS.items()):
        adapter(tmp_path / name, base, spec, seed)
    return tmp_path


def changed(root: Path, name: str) -> Tensor:
    """What merging an adapter adds to the base's weights, flattened."""
    merged = merged_through_files(root / "base", root / name, root / f"{name}-merged")
    return torch.cat(
        [(merged[key] - weight).flatten() for key, weight in load_weights(root / "base").items()]
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted({*get_args(Method)} - {"linear"}))
def test_the_command_makes_what_verify_and_peft_accept_and_says_how_far_off_it_is(
    cli: Lora, method: str, models: Path
) -> None:
    options = ["--weights", "0.7,-0.2", "--method", method, "--rank", "3", "--density", "0.6"]
    code, output, errors = cli(
        "adapters", "combine", "x", "y", "--out", "both", *options, cwd=models
    )
    assert (code, errors) == (0, "")
    wanted = 0.7 * changed(models, "x") - 0.2 * changed(models, "y")
    error = float((changed(models, "both") - wanted).norm() / wanted.norm())
    assert float(re.findall(r"([\d.]+)% off", output)[0]) == pytest.approx(100 * error, abs=0.006)
    assert (error < 1e-4) is (method == "cat")
    code, output, _ = cli("adapters", "verify", "both", cwd=models)
    assert code == 0 and "files, names, shapes and base are those it was trained with" in output
    here, there = (
        logits(opened(models / "base", models / "both"), BATCH) for opened in (ours, theirs)
    )
    torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)


def test_without_weights_each_adapter_has_weight_1(cli: Lora, models: Path) -> None:
    assert cli("adapters", "combine", "x", "y", "--out", "both", cwd=models)[0] == 0
    torch.testing.assert_close(
        changed(models, "both"), changed(models, "x") + changed(models, "y"), atol=1e-5, rtol=1e-4
    )


def test_how_much_adapters_interfere_is_shown_before_anything_is_written(
    cli: Lora, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise UserError("No room.")

    monkeypatch.setattr("pipeline.weights.import_adapter.write_updates", fail)
    code, out, err = cli("adapters", "combine", "x", "y", "narrow", "--out", "both", cwd=models)
    assert (code, err) == (1, "error: No room.\n") and not (models / "both").exists()
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["1,", "2"],
        ["1,", "3"],
        ["2,", "3"],
    ]
    assert max(map(len, out.splitlines()[:4])) <= 80


def test_the_cosine_of_two_adapters_is_that_of_all_they_change(cli: Lora, models: Path) -> None:
    options = ["--weights", "0.7,-0.2", "--out", "both", "--json"]
    code, out, err = cli("adapters", "combine", "y", "narrow", *options, cwd=models)
    assert (code, err) == (0, "")
    (pair,) = json.loads(out)["interference"]
    one, other = changed(models, "y"), changed(models, "narrow")
    assert pair["cosine"] == pytest.approx(-float(torch.cosine_similarity(one, other, 0)), abs=1e-5)
    shares = [[row["outputs"], row["inputs"]] for row in pair["modules"]]
    assert all(row["module"].endswith("q_proj") for row in pair["modules"]) and len(shares) == 2
    assert [pair["outputs"], pair["inputs"]] == pytest.approx(
        [sum(share) / 2 for share in zip(*shares, strict=True)]
    )
    (same,) = json.loads(
        cli("adapters", "combine", "y", "y", "--out", "both", "--json", cwd=models)[1]
    )["interference"]
    assert [same["cosine"], same["outputs"], same["inputs"]] == pytest.approx([1, 1, 1])


def test_adapters_that_share_no_module_do_not_interfere(cli: Lora, models: Path) -> None:
    adapter(models / "values", models / "base", AdapterSpec(2, 3.0, ("v_proj",)))
    code, out, _ = cli("adapters", "combine", "narrow", "values", "--out", "both", cwd=models)
    assert code == 0 and out.splitlines()[1].split() == ["1,", "2", "0.00", "–", "–", "–", "–"]


def test_a_combination_may_take_the_place_of_an_earlier_one_and_be_combined(
    cli: Lora, models: Path
) -> None:
    replaced = "both: the earlier result there is replaced.\n"
    for names, out, said in (
        (["x", "y"], "both", ""),
        (["x", "narrow"], "both", replaced),
        (["both", "y"], "three", ""),
    ):
        assert cli("adapters", "combine", *names, "--out", out, cwd=models)[::2] == (0, said)
    parts = [changed(models, name) for name in ("three", "x", "narrow", "y")]
    torch.testing.assert_close(parts[0], parts[1] + parts[2] + parts[3], atol=1e-5, rtol=1e-4)


REFUSED: dict[str, tuple[list[str], str]] = {
    **{
        f"weights {text}": (
            ["x", "y", "--weights", text],
            "--weights must be 2 comma-separated numbers",
        )
        for text in ("1", "1,2,3", "1,x", "nan,1", "inf,1", "0,0", "")
    },
    "one": (["x"], "combine needs at least two adapters, got 1"),
    "ranks": (["x", "y", "--method", "linear"], "linear needs adapters of equal rank"),
    "in full": (["x", "full"], "embed_tokens was trained in full (modules_to_save)"),
    "another shape": (["x", "wide"], "wide/adapter_model.safetensors does not fit"),
    "another base": (["x", "other"], "name different bases"),
    "bound to another": (["x", "bound"], "bound was trained on another base"),
    "no adapter": (["x", "base"], "base is a full model, not an adapter"),
    "a source": (["x", "y", "--out", "x"], "x is also an input"),
    "somebody's": (["x", "y", "--out", "narrow"], "narrow exists and holds other files"),
}


def others(root: Path) -> None:
    """Adapters of other bases: of another shape; of the same, named; and bound to it."""
    wide, other = (
        checkpoint(root / "wide-base", d_model=32),
        checkpoint(root / "other-base", seed=1),
    )
    adapter(root / "wide", wide, SPECS["narrow"])
    adapter(root / "other", other, SPECS["narrow"])
    import_adapter(root / "other", other, root / "bound")


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_refused_and_nothing_is_written(
    cli: Lora, name: str, models: Path
) -> None:
    arguments, message = REFUSED[name]
    others(models)
    base = ["--base", "base"] if name in ("another shape", "bound to another") else []
    before = folder_bytes(models)
    out = [] if "--out" in arguments else ["--out", "out"]
    assert message in refusal(cli("adapters", "combine", *arguments, *out, *base, cwd=models))
    assert folder_bytes(models) == before and not (models / "out").exists()

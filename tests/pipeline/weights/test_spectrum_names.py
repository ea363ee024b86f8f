"""Checkpoints of one model with different tensor names or layout, and tied embedding and head."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.adapters.attach import attach, tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.adapters.peft import save_adapter
from pipeline.errors import UserError
from pipeline.models.transformers_model import load_pretrained
from tests.helpers.checkpoints import checkpoint
from tests.helpers.json_files import read_json, write_json
from tests.helpers.real import toy
from tests.helpers.side_by_side import BATCH, logits, ours
from tests.helpers.stored_models import tuned_from
from tests.pipeline.weights.test_spectrum import extracted, measured, values_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Weights = dict[str, Tensor]


def saved(folder: Path, family: str, tied: bool = True) -> Path:
    """A toy of a family, with some tokenizer."""
    toy(family, tie_word_embeddings=tied).save(folder)
    shutil.copy(checkpoint(folder.parent / "words") / "tokenizer.json", folder)
    return folder


def stored_so(folder: Path, out: Path, change: Callable[[Weights], Weights]) -> Path:
    """The same checkpoint with other tensors in its file."""
    shutil.copytree(folder, out)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(
        {name: one.clone() for name, one in weights.items()},
        out / "model.safetensors",
        metadata={"format": "pt"},
    )
    return out


def with_head(weights: Weights) -> Weights:
    return weights | {HEAD: weights[EMBEDDING]}


def in_full(out: Path, base: Path, *ends: str) -> Path:
    """An adapter with LoRA on some matrices, and modules in full; tied ones as one."""
    model, spec = load_pretrained(base), AdapterSpec(2, 2.0, ("q_proj",), saved=ends)
    attach(model, spec)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in {id(one): one for one in tensors(model, spec).values()}.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)
    out.mkdir()
    save_adapter(out, model, spec, str(base))
    return out


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    return saved(tmp_path / "tied", "qwen3")


@pytest.fixture
def tuned(tied: Path, tmp_path: Path) -> Path:
    return tuned_from(tied, tmp_path / "tuned", 2)


def test_what_was_extracted_on_a_tied_base_has_its_checkpoints_spectra(
    tied: Path, tuned: Path, tmp_path: Path
) -> None:
    extracted(tied, tuned, tmp_path / "lora", 2)
    wanted = {one.name: one for one in measured(tied, tuned).tensors if one.change}
    found = {one.name: one for one in measured(tied, tmp_path / "lora").tensors}
    assert found.keys() == wanted.keys() and EMBEDDING in found
    for name, one in found.items():
        assert one.values[:2] == pytest.approx(wanted[name].values[:2], rel=1e-4)
        assert one.before == pytest.approx(wanted[name].before)


def test_a_tied_pair_that_an_adapter_trained_in_full_is_one_matrix(
    tied: Path, tmp_path: Path
) -> None:
    lora = in_full(tmp_path / "both", tied, "embed_tokens", "lm_head")
    names = [one.name for one in measured(tied, lora).tensors]
    assert names.count(EMBEDDING) == 1 and HEAD not in names


@pytest.mark.filterwarnings("ignore")
def test_a_head_that_an_adapter_trained_alone_is_set_against_the_tied_embedding(
    tied: Path, tmp_path: Path
) -> None:
    lora = in_full(tmp_path / "head", tied, "lm_head")
    one = next(one for one in measured(tied, lora).tensors if one.name == HEAD)
    head = load_file(lora / "adapter_model.safetensors")[f"base_model.model.{HEAD}"]
    step = head - load_file(tied / "model.safetensors")[EMBEDDING]
    assert one.values[:5] == pytest.approx(values_of(step)[:5].tolist(), rel=1e-4)


def test_a_tied_head_counts_once_whether_or_not_a_file_stores_it(
    tied: Path, tuned: Path, tmp_path: Path
) -> None:
    wanted = measured(tied, tuned)
    base = stored_so(tied, tmp_path / "base+head", with_head)
    assert (
        measured(base, tuned)
        == measured(tied, stored_so(tuned, tmp_path / "tuned+head", with_head))
        == wanted
    )
    assert not wanted.skipped
    found = extracted(base, tuned, tmp_path / "lora", 2)
    assert found.held == pytest.approx(1) and found.spectra == wanted
    torch.testing.assert_close(
        logits(ours(base, tmp_path / "lora"), BATCH),
        logits(ours(tuned), BATCH),
        atol=1e-3,
        rtol=1e-3,
    )


def test_a_head_that_training_untied_is_set_against_the_embedding_it_was(
    tied: Path, tuned: Path, tmp_path: Path
) -> None:
    untied = stored_so(
        tuned, tmp_path / "untied", lambda weights: weights | {HEAD: weights[EMBEDDING] * 1.5}
    )
    config = read_json(untied / "config.json")
    write_json(untied / "config.json", config | {"tie_word_embeddings": False})
    found = {one.name: one for one in measured(tied, untied).tensors}
    old, new = (load_file(folder / "model.safetensors") for folder in (tied, untied))
    assert found[HEAD].change == pytest.approx(float((new[HEAD] - old[EMBEDDING]).norm()))
    assert found[EMBEDDING].change == pytest.approx(float((new[EMBEDDING] - old[EMBEDDING]).norm()))
    whole = extracted(tied, untied, tmp_path / "lora", 2).in_full
    assert {*whole} == {HEAD, EMBEDDING}
    torch.testing.assert_close(
        logits(ours(tied, tmp_path / "lora"), BATCH),
        logits(ours(untied), BATCH),
        atol=1e-3,
        rtol=1e-3,
    )


@pytest.mark.parametrize("bare", ["base", "tuned"])
def test_a_body_that_one_file_names_and_the_other_does_not_is_the_same(
    bare: str, tmp_path: Path
) -> None:
    """The hub's GPT-2 is stored as `h.0.…`, fine-tuned ones as `transformer.h.0.…`."""
    base = saved(tmp_path / "gpt2", "gpt2")
    folders = {"base": base, "tuned": tuned_from(base, tmp_path / "tuned", 2)}
    wanted = measured(*folders.values())

    def without_body(weights: Weights) -> Weights:
        return {name.removeprefix("transformer."): one for name, one in weights.items()}

    folders[bare] = stored_so(folders[bare], tmp_path / "bare", without_body)
    found = measured(*folders.values())
    assert [one.values for one in found.tensors] == [
        one.values for one in wanted.tensors
    ] and not found.skipped
    extracted(folders["base"], folders["tuned"], tmp_path / "lora", 2)
    wanted_logits = logits(ours(folders["tuned"]), BATCH)
    torch.testing.assert_close(
        logits(ours(folders["base"], tmp_path / "lora"), BATCH), wanted_logits, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("older", ["base", "tuned"])
def test_what_one_file_alone_has_is_told(
    older: str, tied: Path, tuned: Path, tmp_path: Path
) -> None:
    """Old Llama files contain rotary frequencies."""
    folders, wanted = {"base": tied, "tuned": tuned}, measured(tied, tuned)
    positions = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(3)}
    other = next(folder for name, folder in folders.items() if name != older)
    folders[older] = stored_so(
        folders[older], tmp_path / "older", lambda weights: weights | positions
    )
    found = measured(*folders.values())
    assert found.tensors == wanted.tensors
    assert found.skipped == [f"{next(iter(positions))} and 2 more, missing in {other}"]
    assert extracted(folders["base"], folders["tuned"], tmp_path / "lora", 2).spectra == found


def test_models_without_a_matrix_in_common_are_two(tied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no matrix in common: they are different models"):
        measured(tied, saved(tmp_path / "gpt2", "gpt2"))

"""What `base` names, and bases made by others as transformers opens them before and after the
import.
"""

import json
import logging
import os
import shutil
import struct
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.calc.sources.open_model import from_path
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.export.certificate import SPELLINGS
from pipeline.export.llama_cpp import LlamaCpp
from pipeline.files import base_model
from pipeline.files.artifact import file_digest
from pipeline.files.base_model import base_fingerprint, identity, parse_source, resolve
from pipeline.models import quantized_linear
from pipeline.models.import_base import import_base
from pipeline.models.load import load_base, skeleton
from pipeline.models.quantized_linear import Quantization, dequantized
from tests.helpers.bases import (
    FAMILIES,
    ROWS,
    TEXT,
    edit_config,
    opened,
    toy_checkpoint,
    toy_model,
    toy_tokenizer,
)
from tests.helpers.checkpoints import checkpoint
from tests.helpers.errors import user_error
from tests.helpers.gguf_files import rewritten, write_llama
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import ROOT, cut_off, folder_bytes
from tests.helpers.side_by_side import logits

HUB_COMMIT = "0123456789abcdef0123456789abcdef01234567"
REAL = Path(
    os.environ.get("LORA_SMOLLM2_GGUF") or next(iter((ROOT / "smollm2").glob("*.gguf")), "nowhere")
)


def imported(base: str, root: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    """The folder that an import fills, and what it says of it."""
    out = root / "imported"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    return out, import_base(resolve(base, root), out, **options)


def refused(base: str, root: Path, **options: Any) -> str:
    return user_error(imported, base, root, **options)


# What a value names


def test_a_base_is_named_by_text_and_files(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "org" / "model")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert parse_source("minigpt", tmp_path).kind == "minigpt"
    assert parse_source("org/model", tmp_path).kind == "folder"  # what is there goes before the hub
    assert parse_source("a.gguf", tmp_path).kind == "gguf"
    assert parse_source("later.gguf", tmp_path).is_local  # before it was fetched
    assert parse_source("org/other", tmp_path).hub_id == "org/other"
    pinned = parse_source("Qwen/Qwen3-8B@refs/pr/1", tmp_path)
    assert (pinned.kind, pinned.hub_id, pinned.revision) == ("hub", "Qwen/Qwen3-8B", "refs/pr/1")


@pytest.mark.parametrize(
    "base", ["miniGPT", "./org/model", "/nowhere/model", "../x", "a/b/c", "org/", "org/m@"]
)
def test_a_base_that_names_nothing_is_refused_with_what_was_looked_for(
    base: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"base must be minigpt, .*does not exist\. Change base"):
        parse_source(base, tmp_path)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter_inside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def shard_gone(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()


def pickles_only(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_config, "is not a checkpoint: it has no config.json"),
        (adapter_inside, "is an adapter. Name the model that it was trained on"),
        (shard_gone, "is missing, but model.safetensors.index.json lists it"),
        (pickles_only, "a pickle, which can run code; only safetensors are read"),
        (no_weights, "has no model.safetensors"),
    ],
)
def test_a_folder_that_is_no_base_is_refused_before_it_is_opened(
    damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    toy_checkpoint(tmp_path / "model", shard="20KB")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=reason):
        resolve("model", tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../outside/x.safetensors", "/x.safetensors", "..", "", "a/x.safetensors", "x.bin", 1, None],
)
def test_a_shard_is_a_safetensors_file_of_its_folder(name: object, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model")
    for outside in (
        tmp_path / "outside/x.safetensors",
        tmp_path / "model/x.bin",
        tmp_path / "model/a/x.safetensors",
    ):
        outside.parent.mkdir(exist_ok=True)
        shutil.copyfile(tmp_path / "model/model.safetensors", outside)
    index = {"weight_map": {"a": "model.safetensors", "b": name}}
    write_json(tmp_path / "model/model.safetensors.index.json", index)
    said = refused("model", tmp_path)
    assert "index.json: a shard must be the name of a .safetensors file in this folder, got" in said


LINKED = (
    "model.safetensors",
    "config.json",
    "tokenizer.json",
    "chat_template.jinja",
    "generation_config.json",
)


@pytest.mark.parametrize("name", [*LINKED, "sub/notes.txt", "additional_chat_templates"])
def test_a_link_that_leaves_a_model_folder_is_not_followed(name: str, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model")
    path, outside = tmp_path / "model" / name, tmp_path / "outside"
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(outside)
    elif "." in name:
        outside.write_text("private", encoding="utf-8")
    else:
        outside.mkdir()
    path.symlink_to(outside)
    said = refused("model", tmp_path)
    assert said.startswith(
        f"{path} is a link to a file outside its folder: {outside}. Replace it with a copy"
    )
    for load in (load_base, load_tokenizer, from_path):
        with pytest.raises(UserError, match="is a link to a file outside its folder"):
            load(tmp_path / "model")


def test_links_within_a_folder_and_into_dvcs_cache_are_followed(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model")
    (tmp_path / "model/all").mkdir()
    weights, config = tmp_path / "model/model.safetensors", tmp_path / "model/config.json"
    weights.rename(tmp_path / "model/all/weights")
    weights.symlink_to("all/weights")
    stored = tmp_path / ".dvc/cache/files/md5/ab" / ("0" * 30)
    stored.parent.mkdir(parents=True)
    config.rename(stored)
    config.symlink_to(stored)
    (tmp_path / "here").symlink_to("model")  # the user's own link to the folder
    assert torch.equal(logits(opened(imported("here", tmp_path)[0])), logits(toy_model("llama")))


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04")
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="is not a GGUF file: it begins with b'PK"):
        resolve("a.gguf", tmp_path)
    with pytest.raises(UserError, match="A checkpoint is named by its folder"):
        resolve("model.safetensors", tmp_path)
    with pytest.raises(UserError, match="No such file"):
        resolve("missing.gguf", tmp_path)


def test_the_identity_follows_what_is_read_and_nothing_else(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model")
    before = identity(resolve("model", tmp_path))
    (tmp_path / "model/optimizer.pt").write_bytes(b"state")
    (tmp_path / "model/trainer_state.json").write_text("{}", encoding="utf-8")
    (tmp_path / "model/.git").mkdir()
    assert identity(resolve("model", tmp_path)) == before
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    assert list(identity(resolve("elsewhere", tmp_path)).values()) == list(before.values())
    edit_config(tmp_path / "model", rms_norm_eps=1e-3)
    assert identity(resolve("model", tmp_path)) != before
    assert identity(parse_source("minigpt", tmp_path)) == {}
    assert identity(parse_source("org/name", tmp_path)) == {"org/name": "hub:org/name@main"}
    assert identity(parse_source("org/name@v1", tmp_path)) == {"org/name@v1": "hub:org/name@v1"}


# Folders


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imported_model_answers_as_the_one_it_was_made_from(family: str, tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "model", family)
    out, facts = imported("model", tmp_path)
    assert torch.equal(logits(opened(out)), logits(model))
    assert facts == {
        "source": "folder",
        "revision": None,
        "architecture": type(model).__name__,
        "precision": "float32",
        "parameters": {
            "total": sum(parameter.numel() for parameter in model.parameters()),
            "trainable": 0,
        },
        "fingerprint": base_fingerprint(out),
    }
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "model", out))
    assert [new(text)["input_ids"] for text in TEXT] == [old(text)["input_ids"] for text in TEXT]
    assert new.chat_template == old.chat_template
    assert {path.name for path in out.glob("*.safetensors*")} == {"model.safetensors"}


def test_two_imports_of_copies_in_two_places_are_the_same_bytes(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model")
    edit_config(
        tmp_path / "model",
        _name_or_path="/home/somebody/model",
        auto_map={"AutoConfig": "gone.Config"},
    )
    first = folder_bytes(imported("model", tmp_path)[0])
    shutil.copytree(tmp_path / "model", tmp_path / "deep/er/copy")
    assert folder_bytes(imported("deep/er/copy", tmp_path)[0]) == first
    config = json.loads(first["config.json"])
    assert "auto_map" not in config and not any("name_or_path" in key for key in config)


ROPE = {"rope_theta": 500.0, "rope_type": "default"}
LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("rope", [ROPE, {**ROPE, **LLAMA3, "rope_type": "llama3"}])
def test_rotary_settings_have_the_names_that_programs_before_transformers_5_read(
    rope: dict[str, Any], tmp_path: Path
) -> None:
    model = toy_checkpoint(tmp_path / "model", rope_parameters=rope)
    out, _ = imported("model", tmp_path)
    config = read_json(out / "config.json")
    assert config["rope_theta"] == 500.0 and config["rope_parameters"] == rope
    assert config.get("rope_scaling", {}) == (
        {**LLAMA3, "rope_type": "llama3"} if len(rope) > 2 else {}
    )
    assert torch.equal(logits(opened(out)), logits(model))


def test_shards_become_one_file(tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "model", shard="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    out, _ = imported("model", tmp_path)
    assert load_file(out / "model.safetensors").keys() == model.state_dict().keys()
    assert torch.equal(logits(opened(out)), logits(model))


@pytest.mark.parametrize(
    ("asked", "got"), [("auto", "bfloat16"), ("fp32", "float32"), ("fp16", "float16")]
)
def test_the_precision_is_that_of_the_weights_or_what_was_asked(
    asked: Any, got: str, tmp_path: Path
) -> None:
    model = toy_checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    out, facts = imported("model", tmp_path, precision=asked)
    assert facts["precision"] == got
    weights = load_file(out / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{got}"}
    assert all(
        torch.equal(weights[name], tensor.to(weights[name].dtype))
        for name, tensor in model.state_dict().items()
    )


def test_settings_of_generation_stay_as_they_were_even_if_todays_rules_refuse_them(
    tmp_path: Path,
) -> None:
    toy_checkpoint(tmp_path / "model")
    text = '{"temperature": 0.6, "do_sample": false, "eos_token_id": [1, 7]}'
    (tmp_path / "model/generation_config.json").write_text(text, encoding="utf-8")
    out, _ = imported("model", tmp_path)
    assert (out / "generation_config.json").read_text(encoding="utf-8") == text


def test_a_tokenizer_without_tokenizer_json_is_converted(tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model", "gpt2")
    fast = toy_tokenizer()
    for path in (tmp_path / "model").glob("tokenizer*"):
        path.unlink()
    state = json.loads(fast.backend_tokenizer.to_str())["model"]
    write_json(tmp_path / "model/vocab.json", state["vocab"])
    merges = "\n".join(" ".join(pair) for pair in state["merges"])
    (tmp_path / "model/merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
    special = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<pad>",
        "tokenizer_class": "GPT2Tokenizer",
    }
    write_json(tmp_path / "model/tokenizer_config.json", special)
    first = folder_bytes(imported("model", tmp_path)[0])
    new = AutoTokenizer.from_pretrained(tmp_path / "imported")
    assert [new(text)["input_ids"] for text in TEXT] == [fast(text)["input_ids"] for text in TEXT]
    (tmp_path / "model").rename(tmp_path / "moved")
    assert folder_bytes(imported("moved", tmp_path)[0]) == first


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncated(folder: Path) -> None:
    cut_off(folder / "model.safetensors")


def tensor_gone(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))


def tensor_added(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))


def other_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=40)


def not_a_number(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))


def infinite_row(folder: Path) -> None:
    """Of a token that no check meets."""
    change_weights(
        folder, lambda tensors: tensors["model.embed_tokens.weight"][-1].fill_(-torch.inf)
    )


def integers(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(
        folder, lambda tensors: tensors.update({name: (tensors[name] * 99).to(torch.int8)})
    )


def bits_of_a_norm(folder: Path) -> None:
    name = "model.norm.weight"
    change_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.uint8)}))


def quantized(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})


def compressed(folder: Path) -> None:
    edit_config(folder, compression_config={"quant_method": "compressed-tensors"})


def unknown_kind(folder: Path) -> None:
    edit_config(folder, model_type="nothing_known")


def encoder(folder: Path) -> None:
    edit_config(folder, model_type="vit", architectures=["ViTModel"])


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def large_tokenizer(folder: Path) -> None:
    tokenizer = toy_tokenizer()
    tokenizer.add_tokens([f"word{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)


def fp8(folder: Path) -> None:
    path = folder / "model.safetensors"
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"ab")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncated, "is damaged or truncated: the header describes"),
        (tensor_gone, r"model\.layers\.1\.mlp\.up_proj\.weight is missing from the weights"),
        (tensor_added, r"score\.weight is not part of the model"),
        (other_shape, r"down_proj\.weight and 5 more are of another shape than config\.json gives"),
        (not_a_number, r"model\.norm\.weight is not finite in float32"),
        (infinite_row, r"model\.embed_tokens\.weight is not finite in float32"),
        (
            integers,
            r"up_proj\.weight holds integers \(I8\), but config\.json names no quantization",
        ),
        (
            bits_of_a_norm,
            r"model\.norm\.weight holds integers \(U8\), but config\.json names no quantization",
        ),
        (
            quantized,
            r"is quantized \('gptq'\); unquantized weights are needed\. Use the 16-bit model",
        ),
        (compressed, r"is quantized \('compressed-tensors'\)"),
        (unknown_kind, "cannot be opened: .*nothing_known"),
        (encoder, "cannot be opened: "),
        (no_tokenizer, "has no tokenizer"),
        (large_tokenizer, f"a tokenizer of 325 tokens and an embedding of {ROWS} rows"),
        (fp8, "F8_E4M3, which is not supported. Use the 16-bit model"),
    ],
)
def test_a_base_is_taken_whole_or_refused(
    damage: Callable[[Path], None], reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    toy_checkpoint(tmp_path / "model")
    damage(tmp_path / "model")
    capfd.readouterr()
    with pytest.raises(UserError, match=reason):
        imported("model", tmp_path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "damage", [not_a_number, infinite_row, integers, bits_of_a_norm, quantized, compressed]
)
def test_a_folder_that_was_not_imported_is_checked_when_it_is_loaded(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    toy_checkpoint(tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(UserError, match=r"is not finite in float32|holds integers|is quantized"):
        load_base(tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "change"),
    [("layers.0.fc1", torch.nan), ("layers.0.fc1", torch.int8), ("embed_positions", torch.nan)],
)
def test_a_minigpt_is_checked_too(name: str, change: Any, tmp_path: Path) -> None:
    checkpoint(tmp_path / "model")
    name = f"model.decoder.{name}.weight"
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    tensors[name] = (
        tensors[name].to(change) if isinstance(change, torch.dtype) else tensors[name] * change
    )
    save_file(tensors, path)
    with pytest.raises(UserError, match=rf"{name} (is not finite|holds integers)"):
        load_base(tmp_path / "model")


BITSANDBYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}


OURS: dict[str, Quantization] = {"nf4": "nf4", "nf4, double": "nf4-dq", "int8": "int8"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", BITSANDBYTES)
def test_a_checkpoint_of_bitsandbytes_is_dequantized_once(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    plain = toy_checkpoint(tmp_path / "plain", dtype=torch.bfloat16).state_dict()
    settings = BitsAndBytesConfig(**BITSANDBYTES[kind])
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype="auto", device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "model")
    toy_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(
        UserError, match=r"is quantized \('bitsandbytes'\); .* Import it, which dequantizes it"
    ):
        load_base(tmp_path / "model")
    capfd.readouterr()
    out, entries = imported("model", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert entries["dequantized"] == kind.partition(",")[0] and entries["precision"] == "bfloat16"
    ours = OURS.get(kind)
    for name, weight in load_base(out).model.state_dict().items():
        if not name.endswith("_proj.weight"):
            assert torch.equal(weight, plain[name])
        elif ours is not None:  # by our own rule, which test_nf4 compares with bitsandbytes
            torch.testing.assert_close(weight, dequantized(plain[name], ours), rtol=0.01, atol=1e-3)
        else:
            assert 0 < (weight - plain[name]).norm() / plain[name].norm() < 0.2


def test_what_bitsandbytes_says_of_an_optional_kernel_when_it_is_imported_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It says so on CPUs with AVX512-BF16 alone; here another package of its name does on every
    CPU.
    """
    name = import_module("bitsandbytes.backends.cpu.ops").logger.name
    said = (
        f"import logging\nlogging.getLogger({name!r}).warning('Failed to load CPU "
        "gemm_4bit_forward')\n"
    )
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes/__init__.py").write_text("")
    (tmp_path / "bitsandbytes/functional.py").write_text(said)
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.delitem(sys.modules, module)
    caplog.set_level(logging.NOTSET, logger="bitsandbytes")
    assert quantized_linear._bitsandbytes.__wrapped__() is sys.modules["bitsandbytes.functional"]
    assert not caplog.messages


def test_an_encoder_is_not_taken_for_a_language_model(tmp_path: Path) -> None:
    """transformers would open it without a word: each of its answers reads the tokens that
    follow.
    """
    from transformers import BertConfig, BertForMaskedLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    BertForMaskedLM(BertConfig(vocab_size=ROWS, **sizes)).save_pretrained(tmp_path / "model")
    change_weights(
        tmp_path / "model", lambda tensors: [t.mul_(20) for t in tensors.values() if t.ndim > 1]
    )
    toy_tokenizer().save_pretrained(tmp_path / "model")
    assert "is not a causal language model" in refused("model", tmp_path)


def test_tables_that_old_versions_stored_are_no_reason_to_refuse(tmp_path: Path) -> None:
    model = toy_checkpoint(tmp_path / "model")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(tmp_path / "model", lambda tensors: tensors.update(table))
    out, _ = imported("model", tmp_path)
    assert torch.equal(logits(opened(out)), logits(model))


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 2
        return out
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    model = toy_checkpoint(tmp_path / "model")
    (tmp_path / "model/own.py").write_text(CODE, encoding="utf-8")
    edit_config(
        tmp_path / "model",
        model_type="own_llama",
        architectures=["OwnModel"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    )
    said = refused("model", tmp_path)
    assert "needs code that comes with it" in said and "set import.trust_remote_code: true" in said
    assert not (tmp_path / "modules").exists()
    out, facts = imported("model", tmp_path, trust_remote_code=True)
    assert facts["architecture"] == "OwnModel"
    assert (out / "own.py").read_text(encoding="utf-8") == CODE
    assert torch.equal(logits(opened(out, trust_remote_code=True)), 2 * logits(model))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"num_hidden_layers": 10**6},
            "num_hidden_layers is 1,000,000, the weights have 21 tensors",
        ),
        (
            {"vocab_size": 10**12},
            "hidden_size × vocab_size is 32 × 1,000,000,000,000, more than its weights hold",
        ),
        ({"hidden_size": 10**7}, "hidden_size × vocab_size is"),
        ({"hidden_size": 10**4000}, "hidden_size × vocab_size is 10"),  # no text for the product
        ({"num_experts": 9 * 10**4299}, "num_hidden_layers × num_experts is 2 × 9,0"),
        ({"intermediate_size": 10**9}, "hidden_size × intermediate_size is"),
        ({"head_dim": 10**7}, "hidden_size × head_dim is"),
        ({"head_dim": 10**5}, "it describes 76,829,856 parameters, the weights have 36,000"),
        ({"text_config": {"n_layer": 10**6}}, "n_layer is"),
        (
            {"model_type": "mixtral", "num_local_experts": 90_000},
            "num_hidden_layers × num_local_experts is 2 × 90,000, more than 100,000",
        ),
    ],
)
def test_a_config_that_describes_more_than_the_weights_is_refused_before_anything_is_built(
    changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_checkpoint(tmp_path / "model")
    edit_config(tmp_path / "model", **changes)
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("it was opened")
    )
    for opens in (
        lambda: imported("model", tmp_path),
        *(partial(use, tmp_path / "model") for use in (load_base, skeleton)),
    ):
        with pytest.raises(UserError, match=r"config\.json does not match its weights") as error:
            opens()
        assert reason in str(error.value)


def test_a_minigpt_is_no_larger_than_its_weights_either(tmp_path: Path) -> None:
    edit_config(checkpoint(tmp_path / "model"), num_hidden_layers=10**6)
    with pytest.raises(UserError, match="num_hidden_layers is 1,000,000, the weights have"):
        load_base(tmp_path / "model")


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "config.json", "chat_template.jinja", "tokenizer.model"]
)
def test_a_text_of_absurd_size_is_not_read(name: str, tmp_path: Path) -> None:
    toy_checkpoint(tmp_path / "model")
    with (tmp_path / "model" / name).open("ab") as file:
        file.truncate(3 * 2**30)  # no block of it is on the disk
    assert f"{name} must have at most 100,000,000 bytes, got 3,221,225,472" in refused(
        "model", tmp_path
    )
    with pytest.raises(UserError, match="must have at most 100,000,000 bytes"):
        load_tokenizer(tmp_path / "model")


# The hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local hub cache with one model in it, and no network."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--toy"
    toy_checkpoint(repository / "snapshots" / HUB_COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(HUB_COMMIT, encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize("base", ["org/toy", f"org/toy@{HUB_COMMIT}"])
def test_without_network_the_hubs_cache_is_asked_and_the_commit_pinned(
    base: str, hub: Path, tmp_path: Path
) -> None:
    out, facts = imported(base, tmp_path)
    assert (facts["source"], facts["revision"]) == ("hub", HUB_COMMIT)
    assert torch.equal(logits(opened(out)), logits(toy_model("llama")))
    again = folder_bytes(out)
    hub.rename(hub.parent / "models--org--renamed")
    assert folder_bytes(imported("org/renamed", tmp_path)[0]) == again


def test_a_quantized_model_of_the_hub_is_refused_by_the_name_that_was_given(
    hub: Path, tmp_path: Path
) -> None:
    quantized(hub / "snapshots" / HUB_COMMIT)
    assert refused("org/toy", tmp_path).startswith("base: org/toy is quantized ('gptq'); ")


@pytest.mark.parametrize("base", ["org/missing", "org/toy@v9"])
def test_a_model_that_the_hub_does_not_give_is_refused_with_all_that_was_looked_for(
    base: str, hub: Path, tmp_path: Path
) -> None:
    assert hub.is_dir()
    said = refused(base, tmp_path)
    assert f"{base} is neither a folder in the project nor in the local hub cache" in said
    assert "Download it elsewhere and name its folder" in said


def test_the_links_of_a_cached_model_lead_to_its_own_blobs_alone(hub: Path, tmp_path: Path) -> None:
    snapshot, blobs = hub / "snapshots" / HUB_COMMIT, hub / "blobs"
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        blob = file_digest(path)
        path.rename(blobs / blob)
        path.symlink_to(Path("../../blobs", blob))
    (tmp_path / "link").symlink_to(snapshot)
    for base in ("org/toy", str(snapshot), "link"):
        assert torch.equal(logits(opened(imported(base, tmp_path)[0])), logits(toy_model("llama")))
    shutil.copytree(hub, hub.parent / "models--org--other", symlinks=True)
    config = snapshot / "config.json"
    target = Path("../../../models--org--other/blobs", config.resolve().name)
    config.unlink()
    config.symlink_to(target)
    assert "is a link to a file outside its folder" in refused("org/toy", tmp_path)


def test_a_cache_that_holds_only_a_part_is_refused(hub: Path, tmp_path: Path) -> None:
    (hub / "snapshots" / HUB_COMMIT / "model.safetensors").unlink()
    assert "has no model.safetensors" in refused("org/toy", tmp_path)


# GGUF


def test_a_gguf_file_becomes_the_checkpoint_that_it_was_made_from(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = toy_model("llama")
    write_llama(tmp_path / "toy.gguf", model)
    toy_checkpoint(tmp_path, "qwen3")  # what lies beside the file is another model
    capfd.readouterr()
    out, facts = imported("toy.gguf", tmp_path)
    assert capfd.readouterr() == ("", "")
    assert (facts["source"], facts["architecture"], facts["precision"]) == (
        "gguf",
        "LlamaForCausalLM",
        "float32",
    )
    torch.testing.assert_close(logits(opened(out)), logits(model))
    old, new = toy_tokenizer(), AutoTokenizer.from_pretrained(out)
    assert [new(text)["input_ids"] for text in TEXT] == [old(text)["input_ids"] for text in TEXT]
    assert new.chat_template == old.chat_template
    first = folder_bytes(out)
    (tmp_path / "moved").mkdir()
    (tmp_path / "toy.gguf").rename(tmp_path / "moved/other.gguf")
    assert folder_bytes(imported("moved/other.gguf", tmp_path)[0]) == first


@pytest.mark.parametrize(
    ("kind", "dequantized"), [(3, "Q4_1"), (15, "Q4_K_M"), (1, None), (32, None), (999, None)]
)
def test_the_license_and_the_quantization_of_a_gguf_file_are_kept(
    tmp_path: Path, kind: int, dequantized: str | None
) -> None:
    said: dict[str, Any] = {
        "license": "other",
        "license_name": "Toy License",
        "license_link": "https://toy.example",
        "file_type": kind,
    }
    write_llama(tmp_path / "toy.gguf", toy_model("llama"), **said)
    facts = imported("toy.gguf", tmp_path)[1]
    assert facts["license"] == {
        key: said[key] for key in ("license", "license_name", "license_link")
    }
    assert facts.get("dequantized") == dequantized


def test_a_gguf_file_that_is_cut_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "toy.gguf", toy_model("llama"))
    whole = (tmp_path / "toy.gguf").read_bytes()
    for size, reason in (
        (100, "is truncated"),
        (len(whole) // 2, "cannot be opened"),
        (len(whole) - 5_000, "cannot be"),
    ):
        (tmp_path / "toy.gguf").write_bytes(whole[:size])
        assert f"toy.gguf {reason}" in refused("toy.gguf", tmp_path)
    write_llama(tmp_path / "mamba.gguf", toy_model("llama"), "plamo")
    said = refused("mamba.gguf", tmp_path)
    assert "plamo" in said and "Name a checkpoint folder of the same model instead" in said


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        (
            "block_count",
            0,
            "must be the number of its blocks, at least 1: its tensors have 2, got 0",
        ),
        ("block_count", 1, "its tensors have 2, got 1"),  # transformers would leave out the second
        ("block_count", 10**6, "its tensors have 2, got 1000000"),
        ("block_count", None, "its tensors have 2, got None"),
        (
            "vocab_size",
            10**9,
            "hidden_size × vocab_size is 32 × 1,000,000,000, more than its weights hold",
        ),
        ("context_length", 0, "max_position_embeddings must be at least 1, got 0"),
    ],
)
def test_a_gguf_file_that_describes_another_model_than_it_holds_is_refused_before_it_is_opened(
    key: str, value: int | None, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_llama(tmp_path / "whole.gguf", toy_model("llama"))
    rewritten(tmp_path / "whole.gguf", tmp_path / "toy.gguf", {f"llama.{key}": value})
    monkeypatch.setattr(
        "pipeline.models.import_base.load_strict", lambda *_, **__: pytest.fail("it was opened")
    )
    assert reason in refused("toy.gguf", tmp_path)


def test_without_its_libraries_a_gguf_file_is_refused_with_the_extra_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(
        "pipeline.errors.find_spec", lambda name: None if name == "google.protobuf" else object()
    )
    assert "needs protobuf. Run `pip install 'lora-workbench[gguf]'`." in refused(
        "toy.gguf", tmp_path
    )


SPACED = "a  b   c\n\n1  2 10  20\t\t3 ½ ² year 2024,  and\n\n 5\n"
SPLITS: dict[str, list[Any]] = {
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
PIECES = (
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "1",
    "12",
    "20",
    "½",
    "²",
    "٣",
    "a",
    "b ",
    "é",
    "'s",
    "’",
    "…",
    "東",
    "👍🏽",
)
ANY_TEXT = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@pytest.fixture(scope="module", params=SPLITS)
def split(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any, Any]:
    """A GGUF file, a tokenizer that splits as the file says, and the one that is imported from
    it.
    """
    root = tmp_path_factory.mktemp("split")
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[request.param])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 10,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([SPACED] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    write_llama(root / "toy.gguf", toy_model("llama"), tokenizer=fast, pre=request.param)
    return root / "toy.gguf", fast, load_tokenizer(imported("toy.gguf", root)[0])


@given(ANY_TEXT)
def test_an_imported_gguf_tokenizer_splits_texts_as_the_file_says(
    split: tuple[Path, Any, Any], text: str
) -> None:
    assert split[2].encode(text) == tuple(split[1](text)["input_ids"])


def test_an_imported_gguf_tokenizer_gives_the_ids_of_llama_cpp(
    split: tuple[Path, Any, Any],
) -> None:
    pytest.importorskip("llama_cpp_py_sync")
    file, _, tokenizer = split
    with LlamaCpp(file) as runner:
        for text in (SPACED, *TEXT, *SPELLINGS):
            assert tuple(runner.encode(text)) == tokenizer.encode(text)


def test_a_gguf_file_that_adds_bos_gives_a_base_that_does(tmp_path: Path) -> None:
    write_llama(tmp_path / "toy.gguf", toy_model("llama"))
    rewritten(tmp_path / "toy.gguf", tmp_path / "bos.gguf", {"tokenizer.ggml.add_bos_token": True})
    without, added = (
        load_tokenizer(imported(f"{name}.gguf", tmp_path)[0]) for name in ("toy", "bos")
    )
    assert (without.bos_id, added.bos_id) == (None, 0)
    assert added.encode(TEXT[0]) == (0, *without.encode(TEXT[0]))


def test_a_gguf_file_that_splits_texts_in_an_unknown_way_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path / "toy.gguf", toy_model("llama"), pre="deepseek-llm")
    said = refused("toy.gguf", tmp_path)
    assert "splits texts by 'deepseek-llm' (tokenizer.ggml.pre), which is not known here" in said
    assert "Name a checkpoint folder of the same model instead." in said


@pytest.mark.slow
@pytest.mark.skipif(
    not REAL.is_file(), reason="no SmolLM2: run `make smollm2`, or set LORA_SMOLLM2_GGUF"
)
def test_a_real_model_from_a_gguf_file_says_that_the_capital_of_france_is_paris(
    tmp_path: Path,
) -> None:
    out, facts = imported(str(REAL), tmp_path)
    assert (facts["architecture"], facts["precision"]) == ("LlamaForCausalLM", "float32")
    model, tokenizer = opened(out), AutoTokenizer.from_pretrained(out)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    pytest.importorskip("llama_cpp_py_sync")
    ours, code = load_tokenizer(out), Path(__file__).read_text(encoding="utf-8")
    with LlamaCpp(REAL) as runner:
        for text in (SPACED, code, *SPELLINGS):
            assert tuple(runner.encode(text)) == ours.encode(text)


def test_deciding_what_a_base_is_loads_no_heavy_library() -> None:
    import subprocess
    import sys

    heavy = "[n for n in ('torch', 'transformers', 'numpy') if n in sys.modules]"
    code = f"import sys, pipeline.files.base_model; print({heavy})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    assert base_model.MINIGPT == "minigpt"

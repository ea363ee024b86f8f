"""Models from files: configs, safetensors headers and GGUF, as other libraries write them, and
damaged ones.
"""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.calc.families import architecture, families
from pipeline.calc.memory import predict
from pipeline.calc.method import trainable
from pipeline.calc.settings import TrainingConfig
from pipeline.calc.sources.open_model import built_in, entry, names, open_model
from pipeline.errors import UserError
from pipeline.stages.methods.full import COUNTED as FULL
from pipeline.stages.methods.lora import COUNTED as LORA
from pipeline.stages.methods.lora import Lora
from tests.helpers.json_files import read_json, write_json

SMALL: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "mistral": {"num_key_value_heads": 2, "head_dim": 24},
    "mixtral": {"num_key_value_heads": 2, "num_local_experts": 4},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 32},
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "num_experts": 4,
        "moe_intermediate_size": 48,
        "mlp_only_layers": [1],
    },
    "gemma2": {"num_key_value_heads": 2, "head_dim": 32},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 32},
    "phi3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "smollm3": {"num_key_value_heads": 2, "pad_token_id": 0},
    "gpt_oss": {"num_key_value_heads": 2, "num_local_experts": 4, "head_dim": 16},
    "olmo2": {"num_key_value_heads": 2},
    "olmo3": {"num_key_value_heads": 2},
    "granite": {"num_key_value_heads": 2},
    "granitemoehybrid": {
        **{
            "num_key_value_heads": 2,
            "num_local_experts": 0,
            "shared_intermediate_size": 80,
            "pad_token_id": 0,
        },
        **{"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"},
    },
    "glm4_moe": {
        **{
            "num_key_value_heads": 2,
            "head_dim": 24,
            "n_routed_experts": 4,
            "moe_intermediate_size": 48,
        },
        **{"n_shared_experts": 2, "use_qk_norm": True, "attention_bias": True, "pad_token_id": 0},
    },
    "glm4_moe_lite": {
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "n_routed_experts": 4,
        "pad_token_id": 0,
    },
    "deepseek_v3": {
        **{
            "num_key_value_heads": 4,
            "q_lora_rank": None,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
        },
        **{
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            "pad_token_id": 0,
        },
    },
    "llama4_text": {
        **{
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 80,
        },
        **{"moe_layers": [2], "pad_token_id": 0},
    },
    "qwen3_5_text": {
        **{
            "num_key_value_heads": 2,
            "head_dim": 32,
            "linear_num_value_heads": 8,
            "linear_num_key_heads": 4,
        },
        **{
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "linear_value_head_dim": 24,
        },
    },
    "qwen3_5_moe_text": {"num_key_value_heads": 2, "num_experts": 4, "moe_intermediate_size": 48},
    "gemma4_text": {
        **{
            "num_key_value_heads": 2,
            "head_dim": 16,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 0,
        },
        **{
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "enable_moe_block": True,
            "num_experts": 4,
        },
        **{"top_k_experts": 2, "moe_intermediate_size": 48},
    },
    "gpt_neox": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 96},
}
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def small(family: str) -> Any:
    config = AutoConfig.for_model(
        family, **{**({} if family == "gpt2" else SIZES), "vocab_size": 128, **SMALL[family]}
    )
    return AutoModelForCausalLM.from_config(config)


def total(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", sorted(SMALL))
def test_a_folder_that_transformers_saved_is_read_from_its_config(
    tmp_path: Path, family: str
) -> None:
    """The file leaves out what equals the library's defaults: so must our reading of it."""
    model = small(family)
    model.save_pretrained(tmp_path)
    opened = open_model(str(tmp_path))
    assert opened.shapes.family == family
    assert opened.shapes.total == total(model)
    assert opened.shapes.total == open_model(str(tmp_path / "config.json")).shapes.total
    assert predict(opened.shapes, LORA, TrainingConfig(sequence=16)).peak > 0


@pytest.mark.parametrize(
    "family",
    sorted(set(families()) - {"minigpt", "gpt3", "roberta", "gemma4_text", "granitemoehybrid"}),
)
def test_a_config_of_sizes_alone_has_the_librarys_defaults(family: str) -> None:
    sizes: dict[str, Any] = {"n_layer": 2} if family == "gpt2" else {"num_hidden_layers": 2}
    config = AutoConfig.for_model(family, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    named = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "n_embd",
        "n_head",
        "ffn_dim",
    )
    written = {key: getattr(config, key) for key in named if hasattr(config, key)}
    for key in ("num_key_value_heads", "num_experts_per_tok"):
        if key in config.to_dict():
            written[key] = getattr(config, key)
    assert architecture({"model_type": family, **written, **sizes}, family).total == total(model)


@pytest.mark.parametrize(
    "family", ["llama", "qwen3", "qwen2", "mixtral", "gpt2", "gpt_neox", "opt"]
)
def test_headers_alone_give_the_same_counts(tmp_path: Path, family: str) -> None:
    model = small(family)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    known = open_model(str(tmp_path)).shapes
    config = tmp_path / "config.json"
    values = read_json(config)
    for text in (json.dumps({**values, "model_type": "brand_new"}), None):
        config.write_text(text, encoding="utf-8") if text else config.unlink()
        shapes = open_model(str(tmp_path)).shapes
        assert shapes.family == "unknown"
        assert shapes.total == known.total
        for targets in (("attention",), ("feed_forward",)):
            if family != "mixtral":  # its checkpoint has separate experts, the model stacks them
                assert trainable(shapes, Lora(targets=targets)) == trainable(
                    known, Lora(targets=targets)
                )
        run = TrainingConfig(batch=2, sequence=32)
        assert predict(shapes, LORA, run).peak == pytest.approx(
            predict(known, LORA, run).peak, rel=0.5
        )
        assert predict(shapes, FULL, run).weights == predict(known, FULL, run).weights
        assert "estimated" in shapes.notes[0]


def test_one_safetensors_file_is_enough(tmp_path: Path) -> None:
    model = small("llama")
    model.save_pretrained(tmp_path)
    assert open_model(str(tmp_path / "model.safetensors")).shapes.total == total(model)


def test_our_own_checkpoints_are_minigpts(brief: Path) -> None:
    opened = open_model(str(brief / "artifacts/base")).shapes
    assert (opened.family, opened.total) == ("minigpt", 109_568)
    assert opened.total == built_in("minigpt").shapes.total
    assert open_model(str(brief / "artifacts/expanded")).shapes.total == 112_768
    with pytest.raises(UserError, match=r"is an adapter. Give the model that it was trained on"):
        open_model(str(brief / "artifacts/lora_adapter"))


def test_a_model_of_text_and_images_is_counted_as_its_text_model(tmp_path: Path) -> None:
    text = {k: v for k, v in entry("gemma-3-4b")["config"].items() if k != "model_type"}
    path = tmp_path / "config.json"
    write_json(path, {"model_type": "gemma3", "text_config": text})
    shapes = open_model(str(path)).shapes
    assert shapes.total == built_in("gemma-3-4b").shapes.total
    assert "text model only" in shapes.notes[0]


def test_names_are_found_in_any_case_and_by_hub_id() -> None:
    assert len(names()) >= 60
    assert open_model("Qwen3-8B") is built_in("qwen3-8b")
    assert open_model("qwen/qwen3-8b") is built_in("qwen3-8b")
    for name in names():
        known = entry(name)
        assert (
            known["source"] and known["published"] and known["config"]["model_type"] in families()
        ), name


# GGUF


def gguf(
    path: Path,
    metadata: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    version: int = 3,
    magic: bytes = b"GGUF",
) -> Path:
    """A GGUF file with this header, as in the format's specification, without weights."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(of: Any) -> bytes:
        if isinstance(of, str):
            return struct.pack("<I", 8) + text(of)
        if isinstance(of, list):
            kind, items = (
                (8, b"".join(map(text, of)))
                if isinstance(of[0], str)
                else (5, struct.pack(f"<{len(of)}i", *of))
            )
            return struct.pack("<IIQ", 9, kind, len(of)) + items
        return struct.pack("<If", 6, of) if isinstance(of, float) else struct.pack("<II", 4, of)

    out = magic + struct.pack("<IQQ", version, len(tensors), len(metadata))
    out += b"".join(text(key) + value(of) for key, of in metadata.items())
    for name, shape in tensors.items():
        out += (
            text(name)
            + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            + struct.pack("<IQ", 0, 0)
        )
    path.write_bytes(out + bytes(1000))
    return path


def llama_header() -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 128,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": ["a", "bc", "d"],
        "tokenizer.ggml.token_type": [1, 2, 3],
    }
    tensors: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (64, 200),
        "output_norm.weight": (64,),
    }
    for block in range(2):
        shapes = {
            "attn_q": (64, 64),
            "attn_k": (64, 32),
            "attn_v": (64, 32),
            "attn_output": (64, 64),
        }
        shapes |= {"ffn_gate": (64, 96), "ffn_up": (64, 96), "ffn_down": (96, 64)}
        tensors |= {f"blk.{block}.{name}.weight": shape for name, shape in shapes.items()}
        tensors |= {f"blk.{block}.{name}.weight": (64,) for name in ("attn_norm", "ffn_norm")}
    return metadata, tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [2, 3])
def test_a_gguf_header_gives_the_shapes(tmp_path: Path, tied: bool, version: int) -> None:
    metadata, tensors = llama_header()
    if not tied:
        tensors["output.weight"] = (64, 200)
    shapes = open_model(str(gguf(tmp_path / "m.gguf", metadata, tensors, version))).shapes
    config = AutoConfig.for_model(
        "llama",
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    assert shapes.total == total(AutoModelForCausalLM.from_config(config))
    assert shapes.tied == tied
    assert len(shapes.notes) == 1, (
        "only the file's size: its tensors have as many parameters as the config says"
    )
    assert open_model(str(tmp_path)).shapes.total == shapes.total


def test_a_gguf_whose_tensors_are_not_what_its_metadata_say_is_refused(tmp_path: Path) -> None:
    metadata, tensors = llama_header()
    tensors["blk.0.attn_q.bias"] = (64,)
    with pytest.raises(UserError, match=r"its tensors have .* parameters, its metadata describe"):
        open_model(str(gguf(tmp_path / "m.gguf", metadata, tensors)))


def test_a_gguf_of_experts_is_a_mixtral(tmp_path: Path) -> None:
    metadata, tensors = llama_header()
    for block in range(2):
        for name, shape in (("gate", (64, 96, 4)), ("up", (64, 96, 4)), ("down", (96, 64, 4))):
            del tensors[f"blk.{block}.ffn_{name}.weight"]
            tensors[f"blk.{block}.ffn_{name}_exps.weight"] = shape
        tensors[f"blk.{block}.ffn_gate_inp.weight"] = (64, 4)
    metadata |= {
        "llama.expert_count": 4,
        "llama.expert_used_count": 2,
        "llama.attention.head_count_kv": [2, 2],
    }
    shapes = open_model(str(gguf(tmp_path / "m.gguf", metadata, tensors))).shapes
    assert shapes.family == "mixtral"
    assert (shapes.kv_heads, shapes.blocks[0].feed_forward[0].experts) == (2, 4)


def test_a_gguf_of_another_version_architecture_or_length_is_refused(tmp_path: Path) -> None:
    metadata, tensors = llama_header()
    path = tmp_path / "m.gguf"
    for version in (1, 4, 0x03000000):
        with pytest.raises(UserError, match=f"GGUF version {version}; supported versions: 2 and 3"):
            open_model(str(gguf(path, metadata, tensors, version)))
    with pytest.raises(UserError, match="is not a GGUF file"):
        open_model(str(gguf(path, metadata, tensors, magic=b"GGML")))
    with pytest.raises(UserError, match="architecture 'mamba' is not known"):
        open_model(str(gguf(path, {**metadata, "general.architecture": "mamba"}, tensors)))
    content = gguf(path, metadata, tensors).read_bytes()[:-1000]
    for length in (0, 3, 7, 20, 60, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"truncated|is not a GGUF file|damaged"):
            open_model(str(path))


def test_a_gguf_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    path, count = tmp_path / "m.gguf", struct.pack("<Q", 2**22)
    text = struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2**25)  # a key and a text of 32 MiB
    for entries, message in (
        ([text, text, text], "claims 33,554,432 bytes in strings"),
        (
            [struct.pack("<Q", 1) + b"k" + struct.pack("<II", 9, 8) + count],
            "claims 4,194,304 entries in an array",
        ),
    ):
        with path.open("wb") as file:
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)))
            for entry in entries:
                file.write(entry)
                file.truncate(file.seek(2**25, 1))  # no block of it is on the disk
        with pytest.raises(UserError, match=message):
            open_model(str(path))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**18, 0))
    with pytest.raises(UserError, match="claims 262,144 tensors"):
        open_model(str(path))


def test_any_damage_to_a_gguf_header_is_an_error_or_another_model_never_a_traceback(
    tmp_path: Path,
) -> None:
    metadata, tensors = llama_header()
    path = tmp_path / "m.gguf"
    content = gguf(path, metadata, tensors).read_bytes()
    for offset in range(4, len(content) - 1000, 7):
        for byte in (0, 255):
            path.write_bytes(content[:offset] + bytes([byte]) + content[offset + 1 :])
            try:
                open_model(str(path))
            except UserError as error:
                assert "\n" not in str(error)


# what is wrong with a file


PHI, MOE = entry("phi-4-mini")["config"], entry("qwen3-30b-a3b")["config"]


def test_bad_files_are_one_message_each(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    good = entry("qwen3-8b")["config"]
    for text, message in (
        ("{not json", "is not a JSON object"),
        ("[]", "is not a JSON object"),
        (json.dumps({}), "architecture None is not known"),
        (
            json.dumps({"model_type": "mamba"}),
            r"'mamba' is not known.*Give the folder of its .safetensors files",
        ),
        (json.dumps({"model_type": ["llama"]}), "is not known"),
        (json.dumps({**good, "hidden_size": "4096"}), "hidden_size must be a whole number from 1"),
        (json.dumps({**good, "hidden_size": 0}), "hidden_size must be a whole number from 1"),
        (json.dumps({**good, "hidden_size": True}), "hidden_size must be a whole number from 1"),
        (json.dumps({**good, "hidden_size": 10**30}), "hidden_size must be a whole number from 1"),
        (
            json.dumps({**good, "num_hidden_layers": 10**8}),
            "num_hidden_layers must be a whole number from 1 to 10,000",
        ),
        (
            json.dumps(
                {
                    **good,
                    "vocab_size": 2**31 - 1,
                    "intermediate_size": 2**31 - 1,
                    "hidden_size": 2**31 - 1,
                }
            ),
            "overflow",
        ),
        (
            json.dumps({**good, "num_key_value_heads": 5}),
            "32 is not a multiple of key/value heads 5",
        ),
        (
            json.dumps({**good, "tie_word_embeddings": "yes"}),
            "tie_word_embeddings must be true or false",
        ),
        (json.dumps({k: v for k, v in good.items() if k != "vocab_size"}), "vocab_size is missing"),
        (json.dumps({**good, "hidden_size": "9" * 5000}), "hidden_size must be a whole number"),
        ('{"a":' * 100_000, "is not a JSON object"),
        (
            json.dumps({**PHI, "rope_parameters": [1], "partial_rotary_factor": "half"}),
            "partial_rotary_factor must be",
        ),
        (
            json.dumps({**PHI, "partial_rotary_factor": 0}),
            "partial_rotary_factor must be more than 0",
        ),
        (
            json.dumps({**MOE, "mlp_only_layers": True}),
            "mlp_only_layers must list layers from 0 to 47",
        ),
        (json.dumps({**MOE, "mlp_only_layers": [[1]]}), "mlp_only_layers must list layers"),
        (json.dumps({**MOE, "mlp_only_layers": [48]}), "mlp_only_layers must list layers"),
        (
            json.dumps({**MOE, "decoder_sparse_step": 0}),
            "decoder_sparse_step must be a whole number from 1",
        ),
    ):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message) as caught:
            open_model(str(config))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
        assert str(config) in str(caught.value)


def test_bad_safetensors_and_folders_are_one_message_each(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config.json, no .safetensors and no single .gguf"):
        open_model(str(tmp_path))
    weights = tmp_path / "model.safetensors"
    small("llama").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    content = weights.read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        weights.write_bytes(content[:length])
        with pytest.raises(UserError, match="damaged or truncated"):
            open_model(str(tmp_path))
    save_file({"a.weight": torch.zeros(4, 4)}, weights)
    with pytest.raises(UserError, match="its tensors have no embedding and numbered layers"):
        open_model(str(tmp_path))
    packed = torch.zeros(4, 4, dtype=torch.int32)
    save_file(
        {"model.embed_tokens.weight": torch.zeros(4, 4), "model.layers.0.q_proj.qweight": packed},
        weights,
    )
    with pytest.raises(UserError, match="packed, quantized weights"):
        open_model(str(tmp_path))


def test_tensors_of_odd_shapes_and_names_are_one_message_each(tmp_path: Path) -> None:
    layer = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(4, 4)}
    for tensors in (
        {"model.embed_tokens.weight": torch.zeros(4), **layer},
        {"model.embed_tokens.weight": torch.zeros(4, 4, 4), **layer},
        {"model.embed_tokens.weight": torch.zeros(4, 0), **layer},
        {
            "model.embed_tokens.weight": torch.zeros(4, 4),
            f"model.layers.{'9' * 5000}.q_proj.weight": torch.zeros(4, 4),
        },
    ):
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="no embedding and numbered layers"):
            open_model(str(tmp_path))
    save_file(
        {"model.embed_tokens.weight": torch.zeros(4, 4), **layer}, tmp_path / "model.safetensors"
    )
    for values in (
        {"head_dim": "x"},
        {"num_attention_heads": 1000},
        {"max_position_embeddings": "abc"},
    ):
        write_json(tmp_path / "config.json", {"model_type": "new", **values})
        with pytest.raises(UserError, match="must be a whole number"):
            open_model(str(tmp_path))
    kinds: list[Any] = [[], {}, 3]
    for kind in kinds:
        write_json(tmp_path / "config.json", {"model_type": kind})
        assert open_model(str(tmp_path)).shapes.total == 32


def test_stacks_of_one_file_are_counted_apart_and_buffers_not_at_all(tmp_path: Path) -> None:
    """Layers of encoder and decoder have the same numbers; old checkpoints contain masks and
    tables.
    """
    tensors = {"embed_tokens.weight": torch.zeros(8, 4), "lm_head.weight": torch.zeros(8, 4)}
    for stack in ("encoder", "decoder"):
        tensors[f"model.{stack}.layers.0.self_attn.q_proj.weight"] = torch.zeros(4, 4)
    save_file(
        {**tensors, "h.0.attn.bias": torch.zeros(1, 1, 9, 9), "a.inv_freq": torch.zeros(7)},
        tmp_path / "m.safetensors",
    )
    assert open_model(str(tmp_path)).shapes.total == 32 + 32 + 16 + 16


CONV = "model.layers.0.conv"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


@pytest.mark.parametrize("shapes", [
    {f"{CONV}.weight": (6, 4, 3, 3)},
    {f"{CONV}.weight": (8, 4, 1), f"{CONV}.bias": (8,)},
    {f"{CONV}.weight": (8, 1, 4), f"{CONV}.bias": (8,)},
    {STACKED: (3, 4, 10), f"{STACKED}_bias": (3, 10)},
    {"lm_head.weight": (16, 4), "talker.lm_head.weight": (8, 4)},
    {"lm_head.weight": (20, 4)},
    {"decoder.embed_tokens.weight": (10, 4)},
])  # fmt: skip
def test_every_number_of_the_tensors_is_counted_once(
    tmp_path: Path, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Convolutions, biases of stacked experts, heads and embeddings of several sizes."""
    shapes = {
        "model.embed_tokens.weight": (16, 4),
        "model.layers.0.self_attn.q_proj.weight": (4, 4),
        **shapes,
    }
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "m.safetensors")
    counted = open_model(str(tmp_path)).shapes.total
    assert counted == sum(tensor.numel() for tensor in tensors.values())


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    small("llama").save_pretrained(tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[-1].unlink()
    with pytest.raises(UserError, match=f"{shards[-1].name} is missing"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(
    "family",
    ["mistral", "qwen2", "qwen3", "olmo2", "gemma2", "mixtral", "llama", "smollm3", "phi3"],
)
def test_biases_are_read_where_the_library_reads_them(family: str) -> None:
    settings = {**SIZES, **SMALL[family], "attention_bias": True, "mlp_bias": True}
    config = AutoConfig.for_model(family, **settings)
    written = {"model_type": family, **settings, "num_experts_per_tok": 2}
    assert architecture(written, family).total == total(AutoModelForCausalLM.from_config(config))


def test_an_opt_with_gelu_is_an_opt_and_softcaps_can_be_off() -> None:
    config = {**entry("opt-125m")["config"], "activation_function": "gelu"}
    assert architecture(config, "galactica").family == "opt"
    gemma = entry("gemma-2-2b")["config"]
    assert architecture(gemma, "g").style.softcap
    assert not architecture({**gemma, "attn_logit_softcapping": None}, "g").style.softcap


@pytest.mark.parametrize("config, message", [
    ({"model_type": "granitemoehybrid", "layer_types": ["attention", "mamba"]}, "layer 1 is 'mamba', which is not"),
    ({"model_type": "granitemoehybrid"}, "layer 0 is a Mamba layer, the default"),
    ({"model_type": "granitemoehybrid", "layer_types": ["attention"] * 2}, "layer 0 has Granite's experts"),
    ({"model_type": "gemma4_text"}, "layer 0 has per-layer embeddings of 256"),
    ({"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 1},
     "the last 1 layers use keys and values of others"),
    ({"model_type": "gemma3n", "text_config": {"hidden_size_per_layer_input": 256}},
     r"'gemma3n_text' is not known: layer 0 has per-layer embeddings \(hidden_size_per_layer_input\)"),
    ({"model_type": "glm_moe_dsa", "kv_lora_rank": 512, "index_topk": 2048}, "layer 0 has sparse attention with"),
    ({"model_type": "nemotron_h", "hybrid_override_pattern": "MEM*"}, "layer 0 has a Mamba layer by its pattern"),
    ({"model_type": "lfm2", "layer_types": ["full_attention", "conv"]}, "'lfm2' is not known: layer 1 is 'conv'"),
    ({"model_type": "qwen3_next", "linear_num_value_heads": 32}, "layer 0 has a gated delta net"),
    ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "sparse"]}, "layer 1 is 'sparse', which"),
])  # fmt: skip
def test_a_layer_that_is_not_supported_is_named_with_its_type_and_what_still_works(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    path = tmp_path / "config.json"
    write_json(path, {**SIZES, "num_hidden_layers": 2, **config})
    with pytest.raises(UserError, match=message) as caught:
        open_model(str(path))
    assert "\n" not in str(caught.value) and "Give the folder of its .safetensors files" in str(
        caught.value
    )


def test_a_number_that_may_be_none_at_all_says_that_0_is_allowed() -> None:
    config = {**SIZES, "model_type": "gemma4_text", "hidden_size_per_layer_input": -1}
    with pytest.raises(UserError, match=r"must be a whole number from 0 to .*, got -1"):
        architecture(config, "g")


def test_the_headers_of_a_hybrid_give_its_counts(tmp_path: Path) -> None:
    """Granite 4's Mamba layers, whose memory is not predicted operation by operation."""
    sizes = {
        "num_local_experts": 0,
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "num_key_value_heads": 2,
    }
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    config = AutoConfig.for_model(
        "granitemoehybrid", **SIZES, **sizes, layer_types=kinds, pad_token_id=0
    )
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    shapes = open_model(str(tmp_path)).shapes
    assert (shapes.family, shapes.total) == ("unknown", total(model))
    assert "estimated" in shapes.notes[0]
    with pytest.raises(UserError, match="layer 0 is 'linear_attention'"):
        open_model(str(tmp_path / "config.json"))


@pytest.mark.parametrize("value, message", [
    ("full_attention", "layer_types must list a type for each layer, got 'full_attention'"),
    ([1] * 48, "layer_types must list a type for each layer"),
    (["full_attention"], "layer_types must list 32 layers, as many as there are, got 1"),
])  # fmt: skip
def test_bad_layer_types_are_one_message(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        architecture({**entry("qwen3.5-4b")["config"], "layer_types": value}, "config.json")


@pytest.mark.parametrize("value, got", [([1, 0], "[1, 0]"), (4, "4"), ("abc", "'abc'")])
def test_layers_without_positions_must_be_listed_for_every_block(value: Any, got: str) -> None:
    config = {**entry("llama-4-scout")["config"], "model_type": "llama4_text"}
    config = {**config, **config.pop("text_config", {}), "no_rope_layers": value}
    with pytest.raises(UserError) as raised:
        architecture(config, "config.json")
    assert str(raised.value) == (
        f"config.json: no_rope_layers must list 0 or 1 for each of the 48 layers, got {got}."
    )


def test_an_empty_list_of_moe_layers_means_no_experts() -> None:
    """As in transformers, where only null has the default."""
    settings = {**SIZES, **SMALL["llama4_text"], "moe_layers": []}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **settings))
    assert architecture({"model_type": "llama4_text", **settings}, "l").total == total(model)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_a_null_number_of_key_value_heads_means_as_many_as_heads(family: str) -> None:
    settings = {**SIZES, **SMALL[family], "num_key_value_heads": None, "num_attention_heads": 8}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    built = architecture({"model_type": family, **settings}, family)
    assert (built.kv_heads, built.total) == (8, total(model))


def test_a_tied_head_may_be_said_for_text_and_images_together(tmp_path: Path) -> None:
    text = {
        k: v
        for k, v in entry("qwen3.5-4b")["config"].items()
        if k not in ("model_type", "tie_word_embeddings")
    }
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps({"model_type": "qwen3_5", "tie_word_embeddings": True, "text_config": text}),
        "utf-8",
    )
    assert open_model(str(path)).shapes.total == built_in("qwen3.5-4b").shapes.total


def test_unknown_names_get_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="Nearest: qwen3-8b"):
        open_model("qwen-3-8b")
    with pytest.raises(UserError, match="See `lora calc --list`"):
        open_model("zzzzzz")
    with pytest.raises(UserError, match="is not built in"):
        open_model("z" * 300)  # longer than the name of a file may be
    with pytest.raises(UserError, match=r"x.json does not exist"):
        open_model("./x.json")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match=r"nobody/nothing: no folder .* its config.json cannot be fetched"
    ):
        open_model("nobody/nothing")


def test_a_hub_id_is_read_from_its_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cached config is read without asking the network."""
    import huggingface_hub

    path = tmp_path / "config.json"
    write_json(path, entry("llama-3.2-1b")["config"])
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: str(path))
    assert open_model("someone/a-llama").shapes.total == built_in("llama-3.2-1b").shapes.total

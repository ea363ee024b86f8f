"""GGUF exports: transformers' own GGUF loader gives back every tensor, and files say what llama.cpp
needs to know.
"""

import io
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
)
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pipeline.adapters.config import AdapterSpec
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.errors import UserError
from pipeline.export import llama_cpp
from pipeline.export.formats.gguf import KINDS
from pipeline.export.gguf.adapter import adapter_ratios
from pipeline.export.gguf.modelfile import Turns, go_template, read_turns
from pipeline.export.gguf.vocabulary import read_vocabulary
from pipeline.files.artifact import write_json
from pipeline.inference.engine import load
from pipeline.models.load import skeleton
from pipeline.weights.combine import low_rank_updates
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter, checkpoint
from tests.helpers.families import FAMILIES, TEMPLATE, WIDE, Family, new_project
from tests.helpers.gguf_files import rewritten
from tests.helpers.json_files import read_json
from tests.helpers.projects import folder_bytes, refusal
from tests.helpers.tokenizers import INSTRUCTS, MARKED, SMOLLM2, THINKS, UNLIKE, folder_with
from tests.pipeline.adapters import test_expert_layouts
from tests.pipeline.export.test_export import ATTENTION, SPECS, export, exported, made

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing needs none; what one finds in the files is in test_gguf_in_llama_cpp.py."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


def scaled(name: str, scalar: int = 16) -> Family:
    """A toy Gemma whose queries are scaled as llama.cpp scales them."""
    return replace(
        FAMILIES[name], config={**FAMILIES[name].config, "query_pre_attn_scalar": scalar}
    )


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
BROAD = {**WIDE, "hidden_size": 64}  # heads as wide as the model
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    # llama.cpp's smallest context: with more it would take the long factors
    "original_max_position_embeddings": 512,
}
GEMMA4 = {
    **{**WIDE, "num_hidden_layers": 4, "head_dim": 8, "global_head_dim": 32, "sliding_window": 5},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 128}
MIXED = {
    **WIDE,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": True,
}
LLAMA4 = {
    **{**WIDE, "num_hidden_layers": 4, "rope_parameters": LLAMA3, "intermediate_size_mlp": 40},
    **{"num_local_experts": 4, "interleave_moe_layer_step": 2},
}
NETS = {
    "head_dim": 32,
    "num_hidden_layers": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
FILE = "model-f16.gguf"
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
# whose GGUF files transformers does not read, or not with such a config
NEWER = {
    "mixtral": FAMILIES["mixtral"],
    "qwen3_moe": Family("qwen3_moe", MIXED, tied=False, begins=None),
    "qwen3_next": Family("qwen3_next", {**MIXED, **NETS}, tied=False, begins=None),
    "qwen3_5": Family("qwen3_5_text", {**WIDE, **NETS}, begins=None),
    "qwen3_5_moe": Family("qwen3_5_moe_text", {**MIXED, **NETS}, tied=False, begins=None),
    "llama4": Family("llama4_text", LLAMA4, tied=False),
    "smollm3": Family("smollm3", {**WIDE, "num_hidden_layers": 4}),
    "phi-2": Family("phi", BROAD, tied=False),
    "gemma4-e2b": Family(
        "gemma4_text",
        {
            **{**GEMMA4, **PER_LAYER, "final_logit_softcapping": 30.0},
            **{"num_kv_shared_layers": 2, "use_double_wide_mlp": True},
        },
    ),
    "gemma4-31b": Family(
        "gemma4_text",
        {
            **{**GEMMA4, "hidden_size_per_layer_input": 0},
            **{"attention_k_eq_v": True, "num_global_key_value_heads": 1},
        },
    ),
    "gemma4-26b": Family(
        "gemma4_text",
        {
            **{**GEMMA4, "hidden_size_per_layer_input": 0, "enable_moe_block": True},
            **{"num_experts": 4, "top_k_experts": 3, "moe_intermediate_size": 24},
        },
    ),
}
LINEARS = (*ATTENTION, "down_proj", "per_layer_input_gate", "per_layer_projection")
ADAPTED = {  # all but what llama.cpp adds no update to
    "gemma4-e2b": AdapterSpec(4, 8, LINEARS),
    "gemma4-26b": AdapterSpec(4, 8, "all-linear", parameters=EXPERTS[:1]),
}
MODELS = {
    "llama": FAMILIES["llama"],
    "mistral": Family("mistral", {**WIDE, "head_dim": 8, "sliding_window": 32}, tied=False),
    "llama3": Family("llama", {**WIDE, "rope_parameters": LLAMA3}),
    "qwen2": Family("qwen2", BROAD, tied=False, begins=None),
    # which transformers assumes
    "qwen3": Family("qwen3", {**WIDE, "head_dim": 128}, tied=False, begins=None),
    "gemma2": scaled("gemma2"),
    "gemma3": scaled("gemma3"),
    # so here
    "gpt2": replace(FAMILIES["gpt2"], config={**FAMILIES["gpt2"].config, "n_positions": 1024}),
    "phi3": Family("phi3", {**BROAD, "sliding_window": 32}, tied=False),
    "phi4": Family("phi3", {**BROAD, "max_position_embeddings": 2048, "rope_parameters": LONG}),
}


def project(root: Path, family: Family, spec: AdapterSpec | None = None) -> Path:
    """An adapter of random numbers on a toy base beside it."""
    base = new_project(root / "project", replace(family, rows=128)) / "base"
    if family.kind == "gemma4_text":  # whose scales of blocks are buffers, 1 in a new model
        weights = load_file(base / "model.safetensors")
        scales = [name for name in weights if name.endswith("layer_scalar")]
        weights |= {name: torch.tensor([1 + number / 4]) for number, name in enumerate(scales)}
        save_file(weights, base / "model.safetensors", {"format": "pt"})
    experts = {"num_experts", "num_local_experts"} & family.config.keys()
    adapts = experts and family.kind != "llama4_text"  # whose experts no adapter is on
    every = AdapterSpec(4, 8, "all-linear", parameters=EXPERTS if adapts else ())
    return adapter(root / "adapter", base, spec or every)


def written(cli: Lora, source: Path, out: Path, form: str = "gguf", *more: str) -> str:
    """Export, whatever it notes; returns the output."""
    code, said, errors = export(cli, form, source, out, *more)
    assert code == 0, errors
    return said


def fields(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Dequantized, by llama.cpp's names."""
    return {
        tensor.name: torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        )
        for tensor in GGUFReader(path).tensors
    }


@pytest.mark.parametrize("form", ["gguf", "gguf-adapter"])
def test_an_export_reads_the_adapter_once_its_comparison_included(
    cli: Lora, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = project(tmp_path, MODELS["llama"])
    weights = source / "adapter_model.safetensors"
    opened = list[str]()

    def count(function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(path: Any, *more: Any, **options: Any) -> Any:
            if path == weights:
                opened.append(what)
            return function(path, *more, **options)

        return counted

    def compare(load: Callable[[], object], *_: object) -> Generator[None, None, dict[str, Any]]:
        load()
        yield from ()
        return {"runner": "llama.cpp", "files": []}

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr("pipeline.export.certificate.compare", compare)
    monkeypatch.setattr("pipeline.models.save.load_file", count(load_file, "tensors"))
    monkeypatch.setattr(io, "open", count(io.open, "bytes"))  # of Path.open

    written(cli, source, tmp_path / "out", form)
    assert opened == ["bytes", "tensors"]  # the header's check, and what safetensors reads


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_from_the_file_every_tensor_of_the_merged_model(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    source = project(tmp_path, MODELS[name])
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "f32")
    exported(cli, "merged", source, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model-f32.gguf", dtype=torch.float32
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    read = theirs.state_dict()
    assert read.keys() == merged.keys()
    for key, value in merged.items():
        torch.testing.assert_close(read[key], value, rtol=0, atol=1e-6)  # 1 + w - 1 rounds


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_the_model_that_transformers_makes_of_the_file_gives_our_logits(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    source = project(tmp_path, MODELS[name])
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model-f32.gguf", dtype=torch.float32
    )
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        logits = theirs.eval()(input_ids=ids).logits

    with torch.no_grad():
        both = load(tmp_path / "project/base", source).model(ids)
    torch.testing.assert_close(logits, both, rtol=0, atol=2e-4)


def test_biases_of_queries_and_keys_are_permuted_with_their_rows(cli: Lora, tmp_path: Path) -> None:
    """transformers' loader knows no biases of a Llama, but its permutation of rows."""
    biased = {**WIDE, "attention_bias": True, "mlp_bias": True}
    source = project(
        tmp_path, replace(FAMILIES["llama"], config=biased), AdapterSpec(4, 8, ("q_proj",))
    )
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "f32")
    base, stored = (
        load_file(tmp_path / "project/base/model.safetensors"),
        tensors(tmp_path / "out/model-f32.gguf"),
    )
    for ours_, theirs_, heads in (
        ("self_attn.q_proj", "attn_q", 4),
        ("self_attn.k_proj", "attn_k", 2),
    ):
        found = LlamaTensorProcessor()._reverse_permute_weights(
            stored[f"blk.1.{theirs_}.bias"].numpy(), heads
        )
        assert np.array_equal(found, base[f"model.layers.1.{ours_}.bias"].numpy())
    for ours_, theirs_ in (("self_attn.o_proj", "attn_output"), ("mlp.down_proj", "ffn_down")):
        assert torch.equal(stored[f"blk.1.{theirs_}.bias"], base[f"model.layers.1.{ours_}.bias"])


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q5_0", "q4_1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_matrix_is_rounded_once_to_the_kind_of_the_file(
    cli: Lora, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    base = new_project(tmp_path / "project", FAMILIES["llama"], dtype) / "base"
    source = adapter(tmp_path / "adapter", base, AdapterSpec(4, 8, ATTENTION))
    written(cli, source, tmp_path / "out", "gguf", "--quantize", kind)
    written(cli, source, tmp_path / "merged", "merged", "--precision", "fp32")
    exact = load_file(tmp_path / "merged/model.safetensors")
    (stored,) = (
        t
        for t in GGUFReader(tmp_path / f"out/model-{kind}.gguf").tensors
        if t.name == "blk.0.attn_v.weight"
    )
    expected = gguf.quants.quantize(
        exact["model.layers.0.self_attn.v_proj.weight"].numpy(), stored.tensor_type
    )
    assert stored.tensor_type.name == kind.upper()
    assert np.array_equal(stored.data.view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])
def test_numbers_become_the_bytes_that_the_gguf_package_makes_of_them(kind: str) -> None:
    from pipeline.export.gguf.writer import quantized

    rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
    rows *= torch.logspace(-9, 3, 40)[:, None]  # with numbers too small for fp16
    rows[0], rows[1, :32] = 0.0, 0.0
    # d is 1: each of these is on the edge of two whole numbers, or next to it
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0)).item()
    rows[2, :8] = torch.tensor([127.0, 0.5, -0.5, 1.5, -2.5, below, -below, 126.5])
    rows[2, 8:] = 0.25
    which = gguf.GGMLQuantizationType[kind.upper()]
    expected = gguf.quants.quantize(rows.numpy(), which)
    assert quantized(rows, which).tobytes() == expected.tobytes()


def test_several_kinds_are_the_files_that_each_would_be_alone(cli: Lora, tmp_path: Path) -> None:
    source = made(tmp_path)
    written(cli, source, tmp_path / "both", "gguf", "--quantize", "q8_0, F16,q8_0")
    assert {path.name for path in (tmp_path / "both").iterdir()} == {
        *("model-f16.gguf", "model-q8_0.gguf", "Modelfile", "README.md", "certificate.json")
    }
    for kind in ("f16", "q8_0"):
        written(cli, source, tmp_path / kind, "gguf", "--quantize", kind)
        name = f"model-{kind}.gguf"
        assert (tmp_path / "both" / name).read_bytes() == (tmp_path / kind / name).read_bytes()
    assert (
        (tmp_path / "both/Modelfile")
        .read_text(encoding="utf-8")
        .startswith("FROM ./model-q8_0.gguf\n")
    )


def test_vectors_stay_in_fp32_and_rows_that_no_block_divides_in_fp16(
    cli: Lora, tmp_path: Path
) -> None:
    source = project(tmp_path, replace(FAMILIES["llama"], config={**WIDE, "intermediate_size": 40}))
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "q4_0")
    types = {
        t.name: t.tensor_type.name for t in GGUFReader(tmp_path / "out/model-q4_0.gguf").tensors
    }
    assert types["blk.0.attn_norm.weight"] == "F32" and types["blk.0.ffn_down.weight"] == "F16"
    assert types["token_embd.weight"] == "Q8_0" and types["blk.0.attn_q.weight"] == "Q4_0"


def test_llama_3s_frequency_factors_are_those_of_transformers(cli: Lora, tmp_path: Path) -> None:
    written(cli, project(tmp_path, MODELS["llama3"]), tmp_path / "out", "gguf", "--quantize", "f32")
    config = LlamaConfig(**MODELS["llama3"].config)
    scaled_frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = tensors(tmp_path / "out/model-f32.gguf")["rope_freqs.weight"]
    torch.testing.assert_close(factors, plain / scaled_frequencies)
    assert len(set(factors.tolist())) > 2  # all three ranges occur


def test_metadata_name_the_shapes_and_the_context_within_which_there_is_no_window(
    cli: Lora, tmp_path: Path
) -> None:
    source = project(tmp_path, MODELS["mistral"])
    (tmp_path / "project/base/README.md").write_text(
        "---\nlicense: apache-2.0\n---\n", encoding="utf-8"
    )
    code, _, noted = export(cli, "gguf", source, tmp_path / "out", "--base-name", "org/toy")
    assert code == 0 and "names a context of 32 tokens" in noted
    found = fields(tmp_path / "out/model-f16.gguf")
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "adapter",
        "general.file_type": 1,
        "general.license": "apache-2.0",
        "general.base_model.0.organization": "org",
        "general.base_model.0.name": "toy",
        "llama.context_length": 32,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 128,
    }
    assert found | expected == found


@pytest.mark.parametrize("name", ["mixtral", "qwen3_5_moe"])
def test_files_with_stacked_experts_and_with_each_expert_apart_give_the_same_export(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    source = project(tmp_path, NEWER[name])
    base = tmp_path / "project/base"
    out = {form: tmp_path / form for form in ("apart", "stacked")}
    written(cli, source, out["apart"])
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(base, save_original_format=False)
    written(cli, source, out["stacked"])
    apart, stacked = ((path / FILE).read_bytes() for path in out.values())
    assert apart == stacked
    ratios = [read_json(path / "certificate.json")["delta_ratios"] for path in out.values()]
    # of each of 4 experts: gate, up, down, not gate_up and down
    layers = model.config.num_hidden_layers
    assert len(ratios[0]) - len(ratios[1]) == layers * (4 * 3 - 2)
    assert all(abs(ratio - 1) < 5e-3 for found in ratios for ratio in found.values())


# The adapter alone

ALONE = [name for name in SPECS if SPECS[name][0] in ("llama", "qwen3", "gpt2")]


@pytest.mark.parametrize("name", ALONE)
def test_what_llama_cpp_adds_is_what_a_merge_adds_to_each_matrix(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    source = made(tmp_path, *SPECS[name])
    base, out = tmp_path / "project/base", tmp_path / "out"
    written(cli, source, out, "gguf-adapter")
    exported(cli, "merged", source, tmp_path / "merged")
    facts, stored = fields(out / "adapter.gguf"), tensors(out / "adapter.gguf")
    assert (facts["general.type"], facts["adapter.type"]) == ("adapter", "lora")
    before, after = (
        load_file(base / "model.safetensors"),
        load_file(tmp_path / "merged/model.safetensors"),
    )
    layers = gguf.get_tensor_name_map(gguf.MODEL_ARCH[SPECS[name][0].upper()], 2)
    changed = 0
    for key, new in after.items():
        target = layers.get_name(key, (".weight", ".bias"))
        delta = new - before[key]
        if f"{target}.lora_a" not in stored:
            assert not delta.any(), key
            continue
        changed += 1
        a, b = stored[f"{target}.lora_a"], stored[f"{target}.lora_b"]
        # as llama.cpp does, whatever the config says
        scale = facts["adapter.lora.alpha"] / b.shape[1]
        if target == "token_embd.weight":
            found = scale * a @ b.T  # (V, D)
        else:
            found = scale * b @ a  # (O, I)
            heads = (
                {"q_proj": 4, "k_proj": config(base)["num_key_value_heads"]}
                if SPECS[name][0] == "llama"
                else {}
            )
            for module, count in heads.items():
                if f".{module}." in key:
                    found = torch.from_numpy(
                        LlamaTensorProcessor()._reverse_permute_weights(found.numpy(), count)
                    )
            found = found.T if found.shape != delta.shape or "c_" in key else found
        torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)
    assert changed


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_adapter_on_experts_in_pefts_earlier_layout_gives_the_same_file(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    spec = AdapterSpec(test_expert_layouts.R, 6.0, (), parameters=EXPERTS)
    source = project(tmp_path, NEWER[name], spec)
    written(cli, source, tmp_path / "today", "gguf-adapter")
    test_expert_layouts.turn_back(source, "0.18.1")
    written(cli, source, tmp_path / "earlier", "gguf-adapter")
    today, earlier = (tmp_path / form / "adapter.gguf" for form in ("today", "earlier"))
    assert today.read_bytes() == earlier.read_bytes()
    assert tensors(today)["blk.1.ffn_up_exps.weight.lora_b"].shape[::2] == (4, spec.rank)


def test_a_checkpoint_that_also_reads_pictures_gives_the_tensors_of_its_text_model(
    cli: Lora, tmp_path: Path
) -> None:
    """As Qwen 3.5 is published: its tensors have another prefix."""
    source = project(tmp_path, NEWER["qwen3_5"])
    base, text, pictures = (tmp_path / name for name in ("project/base", "text", "pictures"))
    written(cli, source, text)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "out_hidden_size"), 32)
    both = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(
            text_config=config(base),
            vision_config={**sizes, "depth": 1, "num_heads": 2},
            tie_word_embeddings=True,
        )
    )
    weights = load_file(base / "model.safetensors")
    both.model.language_model.load_state_dict(
        {key.removeprefix("model."): weight for key, weight in weights.items()}
    )
    both.save_pretrained(base)
    assert "model.visual.pos_embed.weight" in load_file(base / "model.safetensors")
    written(cli, source, pictures)
    expected = tensors(text / FILE)
    read = tensors(pictures / FILE)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("lost", "expected"), [("attn_gate", (0.1, 0.9)), ("attn_", (0, 0))])
def test_a_matrix_that_llama_cpp_splits_is_measured_in_all_its_tensors(
    cli: Lora, lost: str, expected: tuple[float, float], tmp_path: Path
) -> None:
    """In attn_qkv and attn_gate, of which either holds a part of its update."""
    source = project(tmp_path, NEWER["qwen3_next"])
    base, out = tmp_path / "project/base", tmp_path / "out"
    written(cli, source, out, "gguf-adapter")
    damaged = rewritten(
        out / "adapter.gguf",
        tmp_path / "damaged.gguf",
        change=lambda name, data: data * (not name.startswith(f"blk.0.{lost}")),
    )
    updates = low_rank_updates(base, source, experts=True)
    ratio = adapter_ratios(damaged, updates, skeleton(base))[
        "model.layers.0.linear_attn.in_proj_qkvz"
    ]
    assert ratio is not None and expected[0] <= ratio <= expected[1]


def config(base: Path) -> Any:
    return read_json(base / "config.json")


@pytest.mark.parametrize("name", ["rows-tied", "conv1d"])
def test_an_adapter_that_changes_the_embedding_has_its_base_beside_it_with_a_head_of_its_own(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    """llama.cpp applies an update of a tied embedding to the head too, in the wrong layout, and
    stops.
    """
    source = made(tmp_path, *SPECS[name])
    said = written(cli, source, tmp_path / "out", "gguf-adapter")
    assert f"-m {tmp_path / 'out/base-f16.gguf'} --lora {tmp_path / 'out/adapter.gguf'}" in said
    base = tensors(tmp_path / "out/base-f16.gguf")
    assert torch.equal(base["output.weight"], base["token_embd.weight"])
    before = load_file(tmp_path / "project/base/model.safetensors")
    embedding = next(
        value
        for key, value in before.items()
        if key.endswith(("embed_tokens.weight", "wte.weight"))
    )
    assert torch.equal(base["token_embd.weight"], embedding.half().float())


def test_an_adapter_on_a_base_with_added_tokens_has_that_base_beside_it(
    cli: Lora, tmp_path: Path
) -> None:
    source = made(tmp_path)
    written(cli, source, tmp_path / "out", "gguf-adapter")
    assert not (tmp_path / "out/base-f16.gguf").exists()
    write_json(tmp_path / "project/base/manifest.json", {"files": {}, "new_rows": [120, 122]})
    written(cli, source, tmp_path / "out", "gguf-adapter")
    # tied, and the adapter leaves it alone
    assert "output.weight" not in tensors(tmp_path / "out/base-f16.gguf")


# Refused

REFUSED: dict[str, tuple[Family, AdapterSpec | None, tuple[str, ...], str]] = {
    "opt": (
        FAMILIES["opt"],
        None,
        (),
        "does not support model_type opt. Supported: gemma2, gemma3_text, gemma4_text, gpt2, llama",
    ),
    "weights of experts": (
        replace(NEWER["qwen3_moe"], config={**MIXED, "norm_topk_prob": False}),
        None,
        (),
        "norm_topk_prob=False",
    ),
    "heads of nets": (
        replace(
            NEWER["qwen3_5"],
            config={**WIDE, **NETS, "linear_key_head_dim": 8},
        ),
        None,
        (),
        "linear_value_head_dim=16",
    ),
    "scale": (scaled("gemma2", 8), None, (), "query_pre_attn_scalar=8"),
    "activation": (
        replace(MODELS["llama"], config={**WIDE, "hidden_act": "gelu"}),
        None,
        (),
        "hidden_act='gelu'",
    ),
    "dynamic": (
        replace(
            MODELS["llama"],
            config={
                **WIDE,
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
        ),
        None,
        (),
        "rope_type='dynamic'",
    ),
    "pattern": (
        replace(
            scaled("gemma3"),
            config={
                **scaled("gemma3").config,
                "layer_types": ["full_attention", "sliding_attention"],
            },
        ),
        None,
        (),
        "layer_types=",
    ),
    "no windows": (
        replace(
            scaled("gemma2"),
            config={**scaled("gemma2").config, "layer_types": ["full_attention"] * 2},
        ),
        None,
        (),
        "layer_types=['full_attention', 'full_attention']",
    ),
    "head": (
        scaled("gemma2"),
        AdapterSpec(4, 8, ("embed_tokens",)),
        (),
        "llama.cpp reads the head of this model from its embedding",
    ),
    "untied": (
        replace(scaled("gemma2"), tied=False),
        None,
        (),
        "llama.cpp reads the head of this model from its embedding",
    ),
    "yarn": (
        replace(
            MODELS["llama"],
            config={
                **WIDE,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2.0,
                    "rope_theta": 1e4,
                    "original_max_position_embeddings": 32,
                    "attention_factor": 2.0,
                },
            },
        ),
        None,
        (),
        "rope_parameters.attention_factor=2.0",
    ),
    "every block rotated": (
        Family("smollm3", {**WIDE, "no_rope_layers": [1, 1, 1, 1], "num_hidden_layers": 4}),
        None,
        (),
        "no_rope_layers=[1, 1, 1, 1]",
    ),
    "chunks": (
        Family("llama4_text", {**LLAMA4, "attention_chunk_size": 16}, tied=False),
        None,
        (),
        "attention_chunk_size=16",
    ),
    "other blocks with experts": (
        Family("llama4_text", {**LLAMA4, "moe_layers": [0, 3]}, tied=False),
        None,
        (),
        "moe_layers=[0, 3]",
    ),
    "not normalized": (
        Family("llama4_text", {**LLAMA4, "use_qk_norm": False}, tied=False),
        None,
        (),
        "use_qk_norm=False",
    ),
    "biases": (
        replace(NEWER["smollm3"], config={**WIDE, "attention_bias": True}),
        None,
        (),
        "attention_bias=True",
    ),
    "normalized": (
        replace(NEWER["phi-2"], config={**BROAD, "qk_layernorm": True}),
        None,
        (),
        "qk_layernorm=True",
    ),
    "fewer tokens": (
        Family("gemma4_text", {**GEMMA4, **PER_LAYER, "vocab_size_per_layer_input": 64}),
        None,
        (),
        "vocab_size_per_layer_input=64",
    ),
    "no head": (replace(NEWER["phi-2"], tied=True), None, (), "tie_word_embeddings=True"),
    "narrow": (Family("qwen2", WIDE, tied=False, begins=None), None, (), "head_dim=16"),
    "kind": (MODELS["llama"], None, ("--quantize", "f16,q9"), "got 'q9'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_refused_by_name_and_nothing_is_written(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    family, spec, more, message = REFUSED[name]
    source = project(tmp_path, family, spec or AdapterSpec(4, 8, "all-linear"))
    before = folder_bytes(tmp_path)
    assert message in refusal(export(cli, "gguf", source, tmp_path / "out", *more))
    assert folder_bytes(tmp_path) == before and not (tmp_path / "out").exists()


def test_an_adapter_of_a_base_that_llama_cpp_computes_otherwise_is_refused_too(
    cli: Lora, tmp_path: Path
) -> None:
    source = project(tmp_path, scaled("gemma2", 8))
    assert "query_pre_attn_scalar=8" in refusal(
        export(cli, "gguf-adapter", source, tmp_path / "out")
    )


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("gemma4-e2b", AdapterSpec(4, 8, ("q_proj", "per_layer_model_projection"))),
        ("gemma4-26b", AdapterSpec(4, 8, ("q_proj",), parameters=EXPERTS)),
    ],
)
def test_an_update_that_llama_cpp_would_not_add_is_refused(
    cli: Lora, family: str, spec: AdapterSpec, tmp_path: Path
) -> None:
    source = project(tmp_path, NEWER[family], spec)
    said = refusal(export(cli, "gguf-adapter", source, tmp_path / "out"))
    assert "llama.cpp ignores an update of model." in said and "--format gguf" in said
    written(cli, source, tmp_path / "out")


def test_minigpt_is_refused_with_what_to_do(cli: Lora, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", d_model=16)
    source = adapter(tmp_path / "adapter", base, AdapterSpec(1, 1.0, ("q_proj",)))
    for form in ("gguf", "gguf-adapter"):
        said = refusal(export(cli, form, source, tmp_path / "out", "--base", str(base)))
        assert "model_type opt" in said and "Use --format merged." in said


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (AdapterSpec(4, 8, ATTENTION, dora=True), "lora export --format merged or gguf"),
        (AdapterSpec(4, 8, ATTENTION, saved=("embed_tokens", "lm_head")), "trained in full"),
    ],
)
def test_an_adapter_that_is_not_low_rank_is_refused_alone_and_merged_instead(
    cli: Lora, spec: AdapterSpec, message: str, tmp_path: Path
) -> None:
    source = made(tmp_path, spec=spec)
    assert message in refusal(export(cli, "gguf-adapter", source, tmp_path / "out"))
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "f32")
    exported(cli, "merged", source, tmp_path / "merged")
    merged = load_file(tmp_path / "merged/model.safetensors")[
        "model.layers.1.self_attn.v_proj.weight"
    ]
    assert torch.equal(tensors(tmp_path / "out/model-f32.gguf")["blk.1.attn_v.weight"], merged)


def test_without_the_gguf_package_an_export_says_how_to_install_it(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = made(tmp_path)
    monkeypatch.setattr("pipeline.errors.find_spec", lambda _: None)
    for form in ("gguf", "gguf-adapter"):
        assert "pip install 'lora-workbench[gguf]'" in refusal(
            export(cli, form, source, tmp_path / "out")
        )


def test_without_llama_cpp_its_kinds_are_refused_with_those_that_need_none(
    cli: Lora, tmp_path: Path
) -> None:
    said = refusal(
        export(cli, "gguf", made(tmp_path), tmp_path / "out", "--quantize", "f16,q4_k_m")
    )
    assert (
        "pip install 'lora-workbench[llama-cpp]'" in said
        and "Without it: f32, f16, bf16, q8_0" in said
    )


def test_a_value_that_overflows_fp16_is_refused_and_the_earlier_export_stays(
    cli: Lora, tmp_path: Path
) -> None:
    source = made(tmp_path)
    written(cli, source, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    path = tmp_path / "project/base/model.safetensors"
    weights = load_file(path)
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = 1e6
    save_file(weights, path, {"format": "pt"})
    code, _, errors = export(cli, "gguf", source, tmp_path / "out")
    assert code == 1 and errors.endswith("overflows fp16. Use --quantize bf16.\n")
    assert folder_bytes(tmp_path / "out") == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"adapter", "out", "project"}
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "bf16")


# The vocabulary


def with_tokenizer(
    root: Path, template: str | None = None, rows: int = 906, **options: Any
) -> Path:
    """An adapter on a toy Llama with a tokenizer of `folder_with`."""
    source = adapter(
        root / "adapter",
        new_project(root / "project", replace(FAMILIES["llama"], rows=rows)) / "base",
        AdapterSpec(1, 1, ("q_proj",)),
    )
    base = root / "project/base"
    for name in ("chat_template.jinja", "generation_config.json"):
        (base / name).unlink()
    folder_with(base, template, **options)
    return source


def test_tokens_have_their_texts_and_types_and_rows_beyond_them_are_unused(
    cli: Lora, tmp_path: Path
) -> None:
    source = with_tokenizer(tmp_path, MARKED, bos="<s>")
    path = tmp_path / "project/base/tokenizer.json"
    tree = read_json(path)
    added = {
        "single_word": True,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    tree["added_tokens"].append({"id": 900, "content": "Plovdiv", **added})
    write_json(path, tree)
    code, _, noted = export(cli, "gguf", source, tmp_path / "out")
    assert code == 0 and "llama.cpp also finds Plovdiv inside longer words" in noted
    found = fields(tmp_path / "out/model-f16.gguf")
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(types) == 906
    assert {tokens[id_] for id_ in tree["model"]["vocab"].values()} == tree["model"]["vocab"].keys()
    kinds = gguf.TokenType
    assert (
        types[tokens.index("<|im_start|>")] == kinds.CONTROL
        and types[tokens.index("Plovdiv")] == kinds.USER_DEFINED
    )
    assert types[tokens.index("Plovdiv") + 1 :] == [kinds.UNUSED] * (905 - tokens.index("Plovdiv"))
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert found["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tree["model"]["merges"]]


def test_of_many_tokens_that_llama_cpp_finds_otherwise_five_are_named(tmp_path: Path) -> None:
    path = folder_with(tmp_path) / "tokenizer.json"
    tree = read_json(path)
    rules = dict.fromkeys(("single_word", "lstrip", "rstrip"), True)
    for number in range(6):
        token = {"id": 900 + number, "content": f"word{number}", **rules}
        tree["added_tokens"].append({**token, "normalized": False, "special": False})
    write_json(path, tree)
    inside, spaces = read_vocabulary(SubwordTokenizer.load(tmp_path), 906).notes
    assert "word3, word4 … inside longer words" in inside
    assert "beside word0, word1, word2, word3, word4 …, which" in spaces


def test_marks_on_parts_of_words_are_refused_by_their_name(tmp_path: Path) -> None:
    path = folder_with(tmp_path) / "tokenizer.json"
    tree = read_json(path)
    tree["model"]["end_of_word_suffix"] = "</w>"
    write_json(path, tree)
    with pytest.raises(UserError, match="BPE tokenizers without marks on words, got '</w>'"):
        read_vocabulary(SubwordTokenizer.load(tmp_path), 906)


@pytest.mark.parametrize(
    ("template", "writes", "adds", "noted"),
    [
        (None, ("<s>",), True, False),
        (None, (), False, False),
        (INSTRUCTS, ("<s>",), True, False),  # llama.cpp drops the template's, and adds its own
        (INSTRUCTS, (), False, False),  # the template's stays
        (MARKED, ("<s>",), False, True),
        (MARKED, ("<s>", "</s>"), False, True),  # no end is ever added
    ],
)
def test_bos_is_added_exactly_if_a_rendered_chat_then_has_our_ids(
    cli: Lora,
    template: str | None,
    writes: tuple[str, ...],
    adds: bool,
    noted: bool,
    tmp_path: Path,
) -> None:
    source = with_tokenizer(tmp_path, template, bos="<s>", writes=writes)
    _, _, errors = export(cli, "gguf", source, tmp_path / "out")
    found = fields(tmp_path / "out/model-f16.gguf")
    assert (
        found["tokenizer.ggml.add_bos_token"] is adds
        and found["tokenizer.ggml.add_eos_token"] is False
    )
    assert found["tokenizer.ggml.tokens"][found["tokenizer.ggml.bos_token_id"]] == "<s>"
    assert ("begins without the BOS" in errors) is noted


def test_answers_end_where_ours_do_and_the_adapters_template_wins(
    cli: Lora, tmp_path: Path
) -> None:
    # one that is no token
    source = with_tokenizer(tmp_path, TEMPLATE, eos="<|endoftext|>", ends=[4, 2**40])
    (source / "chat_template.jinja").write_bytes(MARKED.encode() + b"{# \n #}\n\n")
    written(cli, source, tmp_path / "out")
    found = fields(tmp_path / "out/model-f16.gguf")
    assert found["tokenizer.chat_template"].encode() == MARKED.encode() + b"{# \n #}\n\n"
    tokens = found["tokenizer.ggml.tokens"]
    ends = [tokens[found[f"tokenizer.ggml.{key}_token_id"]] for key in ("eos", "eot", "eom")]
    assert ends == ["<|endoftext|>", "<|im_end|>", "</s>"]
    modelfile = (tmp_path / "out/Modelfile").read_text(encoding="utf-8")
    assert [line for line in modelfile.splitlines() if line.startswith("PARAMETER")] == [
        f'PARAMETER stop "{end}"' for end in ends
    ]
    assert "ADAPTER" not in modelfile


def test_a_token_cannot_add_lines_to_the_modelfile(cli: Lora, tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path)
    path = tmp_path / "project/base/tokenizer.json"
    for name in (path, path.with_name("tokenizer_config.json")):
        text = name.read_text(encoding="utf-8")
        name.write_text(text.replace("<|im_end|>", "<|\\nADAPTER ./x\\n|>"), encoding="utf-8")
    written(cli, source, tmp_path / "out")
    assert "ADAPTER" not in (tmp_path / "out/Modelfile").read_text(encoding="utf-8")
    found = fields(tmp_path / "out/model-f16.gguf")
    assert "ADAPTER" in found["tokenizer.ggml.tokens"][found["tokenizer.ggml.eos_token_id"]]


def rendered_by_ollama(template: str, messages: list[dict[str, str]], bos: str) -> str:
    """Go's template of a Modelfile with its three branches, carried out by hand."""
    loop, rest = template.split('{{ if eq .Role "system" }}')
    system, rest = rest.split('{{ else if eq .Role "user" }}{{ if eq $i 0 }}')
    first, rest = rest.split("{{ else if and (eq $i 1) $.System }}")
    after_system, rest = rest.split("{{ else }}")
    later, rest = rest.split("{{ end }}{{ .Content }}")
    answer, rest = rest.split('{{ else if eq .Role "assistant" }}')
    assert (loop, rest) == ("{{ range $i, $_ := .Messages }}", "{{ .Content }}{{ end }}{{ end }}")
    told, text = messages[0]["role"] == "system", bos
    for number, message in enumerate(messages):
        if message["role"] == "system":
            text += system.replace("{{ .Content }}", message["content"])
        elif message["role"] == "user":
            text += first if number == 0 else after_system if number == 1 and told else later
            text += message["content"] + answer
        else:
            text += message["content"]
    return text


BEGUN = "{{ bos_token }}" + MARKED
BARE = "{{ bos_token }}{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}"
MERGED = (  # as Gemma 3 does: the system message is part of the first turn
    "{% set told = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + (told if "
    "loop.first else '') }}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "bos"),
    [
        (SMOLLM2, ""),
        (MARKED, ""),
        (THINKS, ""),
        (TEMPLATE, ""),
        (BEGUN, "<s>"),
        (BARE, "<s>"),
        (MERGED, ""),
    ],
)
@pytest.mark.parametrize("system", [True, False])
def test_ollama_renders_a_chat_as_the_chat_template_does(
    template: str, bos: str, system: bool, tmp_path: Path
) -> None:

    tokenizer = SubwordTokenizer.load(folder_with(tmp_path / "t", template, bos=bos or None))
    turns = read_turns(tokenizer)
    assert turns is not None
    go = go_template(turns, bos or None)
    assert go is not None
    messages = [
        {"role": role, "content": f"say {n}"}
        for n, role in enumerate(("user", "assistant") * 2 + ("user",))
    ]
    messages = [{"role": "system", "content": "Be brief."}] * system + messages
    assert rendered_by_ollama(go, messages, bos) == tokenizer.render(
        messages, add_generation_prompt=True
    )


def test_a_template_that_writes_more_than_texts_around_messages_gives_no_template_for_ollama(
    tmp_path: Path,
) -> None:

    counts = (
        "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}{% if "
        "add_generation_prompt %}>{% endif %}"
    )
    deaf = (  # it leaves out system messages, and writes nothing before an answer
        "{% for m in messages if m.role != 'system' %}{{ '\nQ: ' if m.role == 'user' else '' }}"
        "{{ m.content }}{% endfor %}"
    )
    twice = (
        "{% for m in messages %}{{ m.content }}"
        "{% if m.role == 'system' %}{{ ' ' + m.content }}{% endif %}>{% endfor %}"
    )
    templates = {"none": None, "unlike": UNLIKE, "counts": counts, "deaf": deaf, "twice": twice}
    for name, template in templates.items():
        assert read_turns(SubwordTokenizer.load(folder_with(tmp_path / name, template))) is None, (
            name
        )


@pytest.mark.parametrize("text", ['"""', "{{", "<{"])
def test_a_text_that_go_or_ollama_would_read_as_its_own_gives_no_template(text: str) -> None:
    plain = Turns("<s>", "<u>", "<u>", "<a>", "<u>")
    assert go_template(plain, None) is not None
    for field in Turns._fields:
        assert go_template(plain._replace(**{field: text}), None) is None


# change, space before a text
SENTENCEPIECE: dict[str, tuple[Callable[[dict[str, Any]], None], bool | None]] = {
    "llama-2": (lambda _: None, True),
    "gemma": (lambda tree: tree.update(normalizer=tree["normalizer"]["normalizers"][1]), False),
    "mistral": (
        lambda tree: tree.update(
            normalizer=None,
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "first",
                "split": False,
            },
        ),
        True,
    ),
    "another-space": (
        lambda tree: tree.update(
            normalizer=None,
            pre_tokenizer={
                "type": "Metaspace",
                "replacement": "_",
                "prepend_scheme": "always",
                "split": False,
            },
        ),
        None,
    ),
    "lowercase": (
        lambda tree: tree["normalizer"]["normalizers"].append({"type": "Lowercase"}),
        None,
    ),
    "no-bytes": (lambda tree: tree["model"].update(byte_fallback=False), None),
    "merges": (lambda tree: tree["model"]["merges"].pop(7), None),
}


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepieces_merges_become_scores_and_what_llama_cpp_would_merge_otherwise_is_refused(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    source = with_tokenizer(tmp_path, sentencepiece=True)
    tree = sentencepiece_merges(read_json(tmp_path / "project/base/tokenizer.json"))
    change, space = SENTENCEPIECE[name]
    change(tree)
    write_json(tmp_path / "project/base/tokenizer.json", tree)
    if space is None:
        assert "would tokenize differently" in refusal(
            export(cli, "gguf", source, tmp_path / "out")
        )
        return
    written(cli, source, tmp_path / "out")
    found = fields(tmp_path / "out/model-f16.gguf")
    assert (
        found["tokenizer.ggml.model"] == "llama"
        and found["tokenizer.ggml.add_space_prefix"] is space
    )
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    order = [scores[left + right] for left, right in tree["model"]["merges"]]
    assert order == sorted(order, reverse=True)
    types = found["tokenizer.ggml.token_type"]
    assert types.count(gguf.TokenType.BYTE) == 256 and types.count(gguf.TokenType.UNKNOWN) == 1


def sentencepiece_merges(tree: dict[str, Any]) -> dict[str, Any]:
    """As SentencePiece's models are converted: every split of a token into two tokens merges,
    tokens in their order.
    """
    vocabulary, special = (
        tree["model"]["vocab"],
        {token["content"] for token in tree["added_tokens"]},
    )
    tree["model"]["merges"] = [
        [token[:at], token[at:]]
        for token in sorted(vocabulary.keys() - special, key=vocabulary.__getitem__)
        for at in range(1, len(token))
        if token[:at] in vocabulary and token[at:] in vocabulary
    ]
    tree["pre_tokenizer"] = None
    return tree


@pytest.mark.parametrize(
    ("pre", "name"),
    [
        ({"type": "Digits", "individual_digits": True}, "smollm"),
        ({"type": "Digits", "individual_digits": False}, None),
        ({"type": "Punctuation", "behavior": "Isolated"}, None),
    ],
)
def test_the_pre_tokenizer_is_named_by_what_it_does_and_an_unknown_one_is_refused(
    cli: Lora,
    pre: dict[str, Any],
    name: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = with_tokenizer(tmp_path)
    path = tmp_path / "project/base/tokenizer.json"
    tree = read_json(path)
    tree["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [pre, tree["pre_tokenizer"]]}
    write_json(path, tree)
    if name is None:
        assert "llama.cpp has no name for this pre_tokenizer" in refusal(
            export(cli, "gguf", source, tmp_path / "out")
        )
        # the adapter alone holds no vocabulary
        for installed, why in (
            (False, "There is no llama.cpp here"),
            (True, "llama.cpp has no name for this pre_"),
        ):
            monkeypatch.setattr(llama_cpp, "is_installed", lambda installed=installed: installed)
            assert why in written(cli, source, tmp_path / f"alone-{installed}", "gguf-adapter")
    else:
        written(cli, source, tmp_path / "out")
        assert fields(tmp_path / "out/model-f16.gguf")["tokenizer.ggml.pre"] == name

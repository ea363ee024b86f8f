"""llama.cpp reads exported GGUF files as we do: token ids and logits, merged and as base +
adapter.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.template_process import Rendered
from pipeline.errors import UserError
from pipeline.export import llama_cpp
from pipeline.export.certificate import Candidate
from pipeline.export.gguf.vocabulary import PRE_TOKENIZERS, read_vocabulary
from pipeline.export.gguf.writer import Output, describe_model, write_files
from pipeline.files.artifact import write_json
from pipeline.files.base_model import tensor_locations
from pipeline.inference.engine import load
from pipeline.weights.merge_plan import MergePlan
from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.projects import played
from tests.helpers.side_by_side import logits, ours
from tests.helpers.tokenizers import INSTRUCTS, MARKED, TEXT, folder_with
from tests.pipeline.export.test_export import SPECS, made
from tests.pipeline.export.test_gguf import (
    ADAPTED,
    MODELS,
    NEWER,
    project,
    sentencepiece_merges,
    written,
)
from tests.pipeline.stages.test_families import IDS

pytestmark = pytest.mark.filterwarnings("ignore")
TABLES = 5e-3  # llama.cpp looks GELU up in a table of fp16
LETTERS = st.text(
    st.one_of(
        st.sampled_from("aAbE 'stLlvednm1234567890.,!?_-\n\t\r▁()#/<|>"),
        st.characters(exclude_categories=["Cs", "Cn", "Co", "M"], exclude_characters="\0"),
    ),
    max_size=30,
)


def in_llama_cpp(model: Path, adapter: Path | None = None) -> torch.Tensor:
    with llama_cpp.LlamaCpp(model, adapter) as runner:
        logits: torch.Tensor = runner.logits(IDS[0].tolist())
    return logits


@pytest.mark.parametrize("name", [*MODELS, *NEWER])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_llama_cpp_computes_the_merged_model(cli: Lora, name: str, tmp_path: Path) -> None:
    source = project(tmp_path, (MODELS | NEWER)[name])
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "f32")
    both = logits(ours(tmp_path / "project/base", source), IDS)[0]
    assert (in_llama_cpp(tmp_path / "out/model-f32.gguf") - both).abs().max() <= TABLES


@pytest.mark.parametrize("kind", ["linear", "yarn"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.slow
def test_llama_cpp_scales_positions_as_the_model_does(
    cli: Lora, family: str, kind: str, tmp_path: Path
) -> None:
    rope = {
        "rope_type": kind,
        "factor": 4.0,
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 16,
    }
    scaled = replace(MODELS[family], config={**MODELS[family].config, "rope_parameters": rope})
    source = project(tmp_path, scaled)
    written(cli, source, tmp_path / "out", "gguf", "--quantize", "f32")
    both = logits(ours(tmp_path / "project/base", source), IDS)[0]
    assert (in_llama_cpp(tmp_path / "out/model-f32.gguf") - both).abs().max() <= TABLES


@pytest.mark.parametrize("name", ["rows-tied", "rows-untied", "patterns", "rslora", "conv1d"])
@pytest.mark.slow
def test_llama_cpp_computes_base_and_adapter(cli: Lora, name: str, tmp_path: Path) -> None:
    family, tied, spec = SPECS[name]
    source = made(tmp_path, family, tied, spec)
    base, out = tmp_path / "project/base", tmp_path / "out"
    if not spec.rows:  # an adapter of zeros merged is the base
        write_json(base / "manifest.json", {"files": {}, "new_rows": [127, 128]})
    written(cli, source, out, "gguf-adapter")
    found, both = (
        in_llama_cpp(out / "base-f16.gguf", out / "adapter.gguf"),
        logits(ours(base, source), IDS)[0],
    )
    # the base is rounded to fp16
    assert (found - both).abs().max() <= 0.05 < (both - logits(ours(base), IDS)[0]).abs().max()


@pytest.mark.parametrize("name", [*NEWER, "phi3", "phi4"])
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_llama_cpp_computes_base_and_adapter_of_newer_families(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    """On the base in fp32: in fp16, rounding chooses other experts, which is no error. Twice the
    update is.
    """
    source = project(tmp_path, (MODELS | NEWER)[name], ADAPTED.get(name))
    base, out = tmp_path / "project/base", tmp_path / "out"
    written(cli, source, out, "gguf-adapter")
    model = describe_model(MergePlan(base, tensor_locations(base)))
    vocabulary = read_vocabulary(SubwordTokenizer.load(base), model.rows)
    played(write_files({tmp_path / "base.gguf": "f32"}, model, vocabulary.metadata))
    files = tmp_path / "base.gguf", out / "adapter.gguf"
    both = logits(ours(base, source), IDS)[0]
    assert (in_llama_cpp(*files) - both).abs().max() <= TABLES
    twice = Candidate("twice", "f16", 1, lambda: llama_cpp.LlamaCpp(*files, scale=2.0))
    with pytest.raises(UserError, match="rounding to f16 explains"):
        played(llama_cpp.certify(lambda: load(base, source), vocabulary.tokenizer, [twice]))


def vocabulary_file(folder: Path) -> tuple[SubwordTokenizer, Path]:
    """A GGUF file with the vocabulary of the tokenizer in `folder`, and a Llama of one small block
    of zeros.
    """
    tokenizer = SubwordTokenizer.load(folder)
    rows, path = len(tokenizer), folder / "vocabulary.gguf"
    sizes = {
        "context_length": 512,
        "embedding_length": 32,
        "block_count": 1,
        "feed_forward_length": 32,
    }
    sizes |= {"attention.head_count": 1, "rope.dimension_count": 32}
    facts: dict[str, Any] = {f"llama.{key}": value for key, value in sizes.items()}
    facts |= {"general.architecture": "llama", "llama.attention.layer_norm_rms_epsilon": 1e-5}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (rows, 32),
        "output_norm.weight": (32,),
    }
    shapes |= {f"blk.0.{name}.weight": (32,) for name in ("attn_norm", "ffn_norm")}
    shapes |= {f"blk.0.{name}.weight": (32, 32) for name in square}
    from gguf import GGMLQuantizationType

    metadata = {**facts, **read_vocabulary(tokenizer, rows).metadata}
    output = Output(
        path, metadata, [(name, shape, GGMLQuantizationType.F32) for name, shape in shapes.items()]
    )
    output.begin()
    for name, shape in shapes.items():
        output.write(name, torch.zeros(shape))
    output.close()
    return tokenizer, path


def byte_level(folder: Path, steps: tuple[str, ...], ignore_merges: bool) -> Path:
    """A byte-level tokenizer that splits words by `steps` of PRE_TOKENIZERS."""
    inner = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    regex = steps[0] == "bytes" or (steps[1:2] == ("bytes",) and steps[0] == "digits")
    first: list[Any] = (
        [] if steps[0] == "bytes" else [pre_tokenizers.Digits(individual_digits=True)]
    )
    if not regex:
        first = [pre_tokenizers.Split(Regex(steps[0]), "isolated")]
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [*first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)]
    )
    inner.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([TEXT, "don't I'LL we've 12345 snake_case  tabs\n\n\tx"], trainer)
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"},
    )
    return folder


@pytest.mark.parametrize("name", [name for name in PRE_TOKENIZERS.values() if name != "tekken"])
def test_llama_cpp_gives_our_ids_of_any_text(name: str, tmp_path: Path) -> None:
    (steps, ignores) = next(key for key, value in PRE_TOKENIZERS.items() if value == name)
    tokenizer, path = vocabulary_file(byte_level(tmp_path / "t", steps, ignores))
    assert_our_ids(tokenizer, path)


@pytest.mark.parametrize("space", [True, False])
def test_llama_cpp_merges_as_sentencepiece_does(space: bool, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "t", sentencepiece=True, writes=("<s>",), bos="<s>")
    tree = sentencepiece_merges(read_json(folder / "tokenizer.json"))
    if not space:
        tree["normalizer"] = tree["normalizer"]["normalizers"][1]
    write_json(folder / "tokenizer.json", tree)
    tokenizer, path = vocabulary_file(folder)
    assert_our_ids(tokenizer, path)


def test_llama_cpp_merges_by_rank_as_gemma_4_does(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "t", sentencepiece=True, writes=("<s>",), bos="<s>")
    tree = read_json(folder / "tokenizer.json")
    tree["normalizer"], tree["pre_tokenizer"] = tree["normalizer"]["normalizers"][1], None
    merges = [(left + right).strip("\n") for left, right in tree["model"]["merges"]]
    tree["model"]["merges"] = [
        pair
        for pair, text in zip(tree["model"]["merges"], merges, strict=True)
        if text in ("", "".join(pair))
    ]
    write_json(folder / "tokenizer.json", tree)
    tokenizer, path = vocabulary_file(folder)
    assert read_vocabulary(tokenizer, len(tokenizer)).metadata["tokenizer.ggml.model"] == "gemma4"
    assert_our_ids(tokenizer, path)
    with llama_cpp.LlamaCpp(path) as runner:
        for text in ("\n" * 40, "a\n\n\n b\n" * 3):
            assert runner.encode(text) == list(tokenizer.encode(text))


def assert_our_ids(tokenizer: SubwordTokenizer, path: Path) -> None:
    with llama_cpp.LlamaCpp(path) as runner:

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(LETTERS)
        def check(text: str) -> None:
            assert runner.encode(text) == list(tokenizer.encode(text))

        check()


@pytest.mark.parametrize(
    ("template", "writes"),
    [(INSTRUCTS, ("<s>",)), (INSTRUCTS, ()), (MARKED, ("<s>",)), (MARKED, ())],
)
def test_a_rendered_chat_has_our_ids_with_one_bos_or_none(
    template: str, writes: tuple[str, ...], tmp_path: Path
) -> None:
    tokenizer, path = vocabulary_file(
        folder_with(tmp_path / "t", template, bos="<s>", writes=writes)
    )
    chat = tokenizer.render(
        [{"role": "user", "content": "What is 1 + 1?"}], add_generation_prompt=True
    )
    assert isinstance(chat, Rendered)
    with llama_cpp.LlamaCpp(path) as runner:
        assert runner.template == template
        assert runner.encode(chat) == list(tokenizer.encode(chat))
        assert tokenizer.end_ids <= runner.ends

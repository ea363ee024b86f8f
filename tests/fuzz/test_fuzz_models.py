"""Model folders of others: config.json for the calculator and for loading, tokenizers, chat
templates, manifests.
"""

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from pipeline.adapters.folder import origin_of, quantization_of
from pipeline.calc.sources.open_model import BUILT_IN, entry, names, open_model
from pipeline.data.tokenizers import chat_template
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.data.tokenizers.word import load_tokenizer
from pipeline.errors import UserError
from pipeline.files.base_model import license_of, max_positions
from pipeline.models.load import load_base, skeleton
from pipeline.views import models
from tests.conftest import Built
from tests.helpers.bases import TEMPLATE, toy_checkpoint
from tests.helpers.checkpoints import checkpoint, sealed_copies
from tests.helpers.fuzz import (
    NUMBERS,
    ODD,
    PATTERNS,
    as_json,
    damaged,
    fuzz,
    json_files,
    read_or_refuse,
)
from tests.helpers.json_files import read_json
from tests.helpers.tokenizers import MARKED, THINKS, folder_with

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
# one of each family
CONFIGS = {entry(name)["config"]["model_type"]: entry(name)["config"] for name in names()}


@pytest.fixture(scope="module")
def bases(built: Built) -> Path:
    """A Llama of transformers and a MiniGPT, and tokenizers. Read it; do not write to it."""

    def build(root: Path) -> None:
        toy_checkpoint(root / "llama")
        checkpoint(root / "minigpt", d_model=16)
        folder_with(root / "words", MARKED)
        folder_with(root / "pieces", THINKS, bos="<s>", writes=("<s>",), sentencepiece=True)

    return built("fuzz", build)


@fuzz(
    "model configs",
    config=st.sampled_from(sorted(CONFIGS)).flatmap(lambda family: json_files(CONFIGS[family])),
)
def test_configs_of_the_calculator(folder: Path, config: bytes) -> None:
    assert BUILT_IN.is_dir()
    (folder / "config.json").write_bytes(config)

    def look() -> None:
        max_positions(folder)
        open_model(str(folder / "config.json"))

    read_or_refuse(look, folder)


KEYS = (  # of a config that matter to loading, whether the toys have them or not
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *(
        "max_position_embeddings",
        "vocab_size",
        "model_type",
        "hidden_act",
        "tie_word_embeddings",
        "rope_parameters",
    ),
    *(
        "architectures",
        "auto_map",
        "eos_token_id",
        "pad_token_id",
        "text_config",
        "quantization_config",
        "dtype",
    ),
)
SCALES = st.sampled_from(
    ({"rope_type": "yarn", "factor": 1e300}, {"AutoConfig": "evil.Config"}, "fp64", "../x")
)


@pytest.mark.parametrize("kind", ["llama", "minigpt"])
def test_the_toys_are_read(bases: Path, kind: str, tmp_path: Path) -> None:
    assert (
        read_or_refuse(lambda: (skeleton(bases / kind), load_base(bases / kind)), tmp_path) is None
    )


@st.composite
def model_folders(draw: st.DrawFn) -> tuple[str, Any]:
    kind = draw(st.sampled_from(("llama", "llama", "minigpt")))
    values = st.one_of(ODD, SCALES, st.sampled_from(NUMBERS))
    return kind, draw(st.lists(st.tuples(st.integers(0, 40), values), min_size=1, max_size=3))


@fuzz("model folders", drawn=model_folders())
def test_folders(folder: Path, bases: Path, drawn: tuple[str, Any]) -> None:
    kind, edits = drawn
    shutil.copytree(bases / kind, folder / "m")
    config = read_json(folder / "m/config.json")
    keys = sorted({*config, *KEYS})
    for position, value in edits:
        config[keys[position % len(keys)]] = value
    (folder / "m/config.json").write_bytes(as_json(config))
    read_or_refuse(lambda: (skeleton(folder / "m"), load_base(folder / "m")), folder)


def _tree(path: Path) -> Any:
    tree = read_json(path)
    # a short one, so that what is changed is seldom one of a thousand tokens
    if "vocab" in tree.get("model", {}):
        kept = dict(list(tree["model"]["vocab"].items())[:300])
        merges = [pair for pair in tree["model"]["merges"] if {*pair, "".join(pair)} <= kept.keys()]
        tree["model"] |= {"vocab": kept, "merges": merges[:20]}
    return tree


PARTS: list[Any] = [  # of a tokenizer.json, which an attacker may choose
    {"type": "Replace", "pattern": {"Regex": PATTERNS[0]}, "content": "x"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": "aa"},
    {"type": "Split", "pattern": {"Regex": PATTERNS[1]}, "behavior": "Isolated", "invert": False},
    {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 30,
    },
    {"type": "Prepend", "prepend": ""},
    {"type": "Metaspace", "replacement": "", "prepend_scheme": "always"},
    {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    {
        "type": "WordPiece",
        "unk_token": "[UNK]",
        "continuing_subword_prefix": "",
        "max_input_chars_per_word": 2**63,
    },
    {"type": "Unigram", "unk_id": 7, "vocab": [["a", float("nan")]]},
    {"type": "BPE", "vocab": {"a": 2**40}, "merges": []},
]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
)


@st.composite
def tokenizer_files(draw: st.DrawFn) -> tuple[str, str, bytes]:
    """(which tokenizer, which of its files, its new bytes)."""
    which, name = draw(st.sampled_from(("words", "pieces"))), draw(st.sampled_from(TOKENIZER_FILES))
    trees = {name: json.loads(text) for name, text in tokenizers()[which].items()}
    return which, name, draw(json_files(trees[name], st.one_of(ODD, st.sampled_from(PARTS))))


@cache
def tokenizers() -> dict[str, dict[str, str]]:
    """Which → its files' texts."""
    seeds = {}
    with tempfile.TemporaryDirectory() as scratch:
        for which, options in {
            "words": {},
            "pieces": {"sentencepiece": True, "writes": ("<s>",), "bos": "<s>"},
        }.items():
            made = folder_with(Path(scratch, which), MARKED, ends=[1, 2], **options)  # type: ignore[arg-type]
            seeds[which] = {name: json.dumps(_tree(made / name)) for name in {*TOKENIZER_FILES}}
    return seeds


SAMPLES = ("Hello, thank you!", "aaaa" * 20, "", "\U0001f600\u0301", "<|im_end|>")


@fuzz("tokenizers", drawn=tokenizer_files())
def test_tokenizers(folder: Path, drawn: tuple[str, str, bytes]) -> None:
    which, name, data = drawn
    for other, text in tokenizers()[which].items():
        (folder / other).write_text(text, encoding="utf-8")
    (folder / name).write_bytes(data)

    def use() -> None:
        load_tokenizer(folder)
        tokenizer = SubwordTokenizer.load(folder)
        for text in SAMPLES:
            tokenizer.decode(tokenizer.encode(text))
            tokenizer.continuation("a", text)
        len(tokenizer)
        tokenizer.words()

    read_or_refuse(use, folder)


WHATEVER = (
    "{{ 'a' * 10**9 }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% include '/etc/passwd' %}",
    "{{ (10**9)|string * 10**9 }}",
    "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor "
    "%}{{ ns.x }}",
    "{{ raise_exception('\x1b[2J\nerror: ' * 1000) }}",
    "{{ '%0999999999d' % 1 }}",
    "{{ messages|tojson|center(10**10) }}",
    "{{" * 2_000,
    "{% if true %}" * 500,
    "\x00",
)


@st.composite
def templates(draw: st.DrawFn) -> str:
    if draw(st.integers(0, 3)) == 0:
        return draw(st.sampled_from(WHATEVER))
    whole = draw(st.sampled_from((TEMPLATE, MARKED, THINKS))).encode()
    return draw(damaged(whole)).decode("utf-8", "replace")


@fuzz("chat templates", template=templates())
def test_chat_templates(folder: Path, template: str) -> None:
    for name, text in tokenizers()["words"].items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")

    def use() -> None:
        try:
            chat_template.render(folder, "Hello")
        except UserError:
            _ = SubwordTokenizer.load(folder).end_ids
            raise

    read_or_refuse(
        use, folder, may=["subprocess.Popen"], seconds=30
    )  # two requests of 5 s, and the start of the process


@pytest.fixture(scope="module")
def sealed(built: Built) -> Path:
    return built("fuzz-sealed", lambda root: sealed_copies(root, 1))


MANIFEST: dict[str, Any] = {
    "kind": "adapter",
    "method": "lora",
    "stage": "finetune_lora",
    "params": {"rank": 1, "alpha": 1.0, "quantization": "none", "base": "org/name"},
    "base": {"tensors": "0" * 64, "tokenizer": "0" * 64},
    "files": {"adapter_config.json": "0" * 64},
    "inputs": {"artifacts/base": "0" * 64},
    "new_rows": [70, 72],
    "source": "hub",
    "license": {"license": "mit"},
    "commit": None,
    "seed": 0,
}


@fuzz(
    "manifests", manifest=json_files(MANIFEST), card=damaged(b"---\nlicense: mit\n---\n# a model\n")
)
def test_manifests(folder: Path, sealed: Path, manifest: bytes, card: bytes) -> None:
    shutil.copytree(sealed, folder, dirs_exist_ok=True)
    for name in ("base", "a-0"):
        (folder / "artifacts" / name / "manifest.json").write_bytes(manifest)
    (folder / "artifacts/a-0/metrics.json").write_bytes(manifest)
    (folder / "artifacts/base/README.md").write_bytes(card)

    def look() -> None:
        license_of(folder / "artifacts/base")
        models.adapters(folder)
        quantization_of(folder / "artifacts/a-0")
        origin_of(folder / "artifacts/a-0")

    read_or_refuse(look, folder)

"""`lora export`: exports open in PEFT, vLLM and transformers, with the same logits as here."""

import re
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.adapters.config import AdapterSpec
from pipeline.calc.target_modules import matches_suffix
from pipeline.export.formats import FORMATS
from pipeline.files.artifact import seal
from tests.conftest import Lora
from tests.helpers.checkpoints import adapter
from tests.helpers.families import FAMILIES, GENERATION, new_project
from tests.helpers.json_files import read_json, write_json
from tests.helpers.projects import folder_bytes, make, refusal
from tests.helpers.side_by_side import assert_alike, logits, ours, theirs
from tests.pipeline.adapters import test_peft
from tests.pipeline.stages.test_families import IDS

MAX_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?:(?P<linear>[AB])\.weight|embedding_(?P<embedding>[AB]))"
)
FORMS = ("peft", "vllm", "merged")
FOLDERS = (*FORMS, "gguf", "gguf-adapter")  # which write a folder atomically
UNNAMED = "adapter_config.json names the base by a folder of this machine"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SPECS: dict[str, tuple[str, bool, AdapterSpec]] = {  # family, whether it is tied, adapter
    "plain": ("llama", True, AdapterSpec(4, 8, ATTENTION)),
    "all-linear": ("qwen3", False, AdapterSpec(4, 8, "all-linear")),
    "some-blocks": ("llama", True, AdapterSpec(4, 8, ("q_proj",), layers=(1,))),
    "experts-beside": ("mixtral", False, AdapterSpec(3, 6, ATTENTION)),
    "rows-tied": ("llama", True, AdapterSpec(4, 8, ATTENTION, rows={"embed_tokens": (5, 121)})),
    "rows-untied": (
        "qwen3",
        False,
        AdapterSpec(4, 8, ATTENTION, rows={"embed_tokens": (5, 9), "lm_head": (70, 5, 9)}),
    ),
    "rows-scaled": (
        "gemma",
        True,
        AdapterSpec(4, 8, ("down_proj",), rows={"embed_tokens": (121, 3, 5)}),
    ),
    "rows-projected": ("opt", True, AdapterSpec(4, 8, ("fc1",), rows={"embed_tokens": (33,)})),
    "patterns": (
        "qwen3",
        False,
        AdapterSpec(4, 8, ATTENTION, ranks={"q_proj": 2}, alphas={r"1\..*v_proj": 3}),
    ),
    "rslora": ("llama", True, AdapterSpec(4, 8, ATTENTION, ranks={"v_proj": 9}, rslora=True)),
    "conv1d": ("gpt2", True, AdapterSpec(4, 8, ("c_attn", "mlp.c_proj"), rows={"wte": (64, 17)})),
    "ends": ("gemma3", True, AdapterSpec(4, 8, ("q_proj", "embed_tokens", "lm_head"))),
}

pytestmark = pytest.mark.filterwarnings("ignore")


def made(
    root: Path, family: str = "llama", tied: bool = True, spec: AdapterSpec = SPECS["plain"][2]
) -> Path:
    """A toy base and an adapter of random numbers on it."""
    base = new_project(root / "project", replace(FAMILIES[family], tied=tied, rows=128)) / "base"
    return adapter(root / "adapter", base, spec)


def export(cli: Lora, form: str, source: Path, out: Path, *more: str) -> tuple[int, str, str]:
    return cli("export", str(source), "--out", str(out), "--format", form, *more, cwd=source.parent)


def exported(cli: Lora, form: str, source: Path, out: Path, *more: str) -> str:
    """Export successfully, with no note but on the name of the base; returns the output."""
    code, said, errors = export(cli, form, source, out, *more)
    assert (code, [line for line in errors.splitlines() if UNNAMED not in line]) == (0, [])
    return said


def refuse_what_vllm_refuses(folder: Path, max_rank: int) -> None:
    """Its rules for an adapter folder (0.33), one by one."""
    config = read_json(folder / "adapter_config.json")
    assert {"r", "lora_alpha", "target_modules"} <= config.keys()
    assert max_rank in MAX_RANKS
    assert config["bias"] == "none"
    for key in ("use_dora", "use_rslora", "modules_to_save", "trainable_token_indices"):
        assert not config[key], key
    modules = set()
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        match = KEY.fullmatch(key)
        assert match, key
        modules.add(module := match["module"])
        assert any(matches_suffix(module, target) for target in config["target_modules"]), module
        rank = tensor.shape[0 if "A" in (match["linear"], match["embedding"]) else 1]
        assert rank == by_pattern(config["rank_pattern"], module, config["r"]) <= max_rank
        assert by_pattern(config["alpha_pattern"], module, config["lora_alpha"]) > 0
    for pattern in (*config["rank_pattern"], *config["alpha_pattern"]):
        assert any(by_pattern({pattern: 1}, module, 0) for module in modules), pattern


def by_pattern(values: Mapping[str, float], module: str, default: float) -> float:
    return next(
        (value for key, value in values.items() if re.match(rf"(.*\.)?({key})$", module)), default
    )


def max_rank(said: str) -> int:
    """The --max-lora-rank that the command prints."""
    return int(said.partition("--max-lora-rank ")[2].split()[0])


@pytest.mark.parametrize("name", SPECS)
def test_an_export_for_vllm_keeps_its_rules_and_has_our_logits_in_peft(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    source = made(tmp_path, *SPECS[name])
    base, out = tmp_path / "project/base", tmp_path / "out"
    refuse_what_vllm_refuses(out, max_rank(exported(cli, "vllm", source, out)))
    assert not (out / "manifest.json").exists()
    tuned = logits(ours(base, source), IDS)
    assert_alike(tuned, logits(theirs(base, out), IDS))
    assert (tuned - logits(ours(base), IDS)).abs().max() > 0.01


@pytest.mark.parametrize(("rows", "expected"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_the_rank_to_serve_with_is_the_least_that_vllm_offers_for_the_widest_update(
    cli: Lora, rows: int, expected: int, tmp_path: Path
) -> None:
    assert max_rank(exported(cli, "vllm", many_rows(tmp_path, rows), tmp_path / "out")) == expected


@torch.no_grad()
@pytest.mark.parametrize("name", SPECS)
def test_a_server_that_reads_neither_patterns_nor_alpha_has_our_logits(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    """As earlier versions of vLLM and SGLang do, but scaled by 1: W + BA with the tensors as they
    are.
    """
    source, out = made(tmp_path, *SPECS[name]), tmp_path / "out"
    base = tmp_path / "project/base"
    exported(cli, "vllm", source, out)
    config, tensors = (
        read_json(out / "adapter_config.json"),
        load_file(out / "adapter_model.safetensors"),
    )
    assert (
        config["lora_alpha"] == config["r"]
        and not config["rank_pattern"]
        and not config["alpha_pattern"]
    )
    model = theirs(base)
    untie(model)
    for key, a in tensors.items():
        match = KEY.fullmatch(key)
        assert match
        if "A" not in (match["linear"], match["embedding"]):
            continue
        b = tensors[key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")]
        assert a.shape[0] == b.shape[1] == config["r"]
        delta = b @ a  # (O, I); an embedding's weight is (I, O), and so is GPT-2's Conv1D
        weight = model.get_submodule(match["module"]).weight
        turned = (
            match["embedding"] or type(model.get_submodule(match["module"])).__name__ == "Conv1D"
        )
        weight += delta.T if turned else delta
    assert_alike(logits(model, IDS), logits(ours(base, source), IDS))


def untie(model: Any) -> None:
    """Give the head weights of its own, which an update of the embedding does not change."""
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())


def many_rows(root: Path, count: int) -> Path:
    base = new_project(root / "project", replace(FAMILIES["llama"], rows=600)) / "base"
    return adapter(
        root / "adapter",
        base,
        AdapterSpec(4, 8, ATTENTION, rows={"embed_tokens": tuple(range(count))}),
    )


REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "in-full": (
        lambda root: made(
            root, spec=AdapterSpec(4, 8, ATTENTION, saved=("embed_tokens", "lm_head"))
        ),
        "train again with finetune_lora.train_embeddings set to new_rows or none",
    ),
    "too-wide": (
        lambda root: many_rows(root, 513),
        "needs rank 513, but vLLM supports at most 512",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_serve_is_refused_and_nothing_is_written(
    cli: Lora, name: str, tmp_path: Path
) -> None:
    make, message = REFUSED[name]
    source = make(tmp_path)
    before = folder_bytes(tmp_path)
    assert message in refusal(export(cli, "vllm", source, tmp_path / "out"))
    assert folder_bytes(tmp_path) == before and not (tmp_path / "out").exists()


def test_an_export_for_peft_is_the_adapter_with_a_card_and_nothing_of_ours(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    source, out = brief / "artifacts/lora_adapter", tmp_path / "out"
    exported(cli, "peft", source, out)
    assert {path.name for path in source.iterdir()} - {path.name for path in out.iterdir()} == {
        "loss.csv",
        "manifest.json",
    }
    files = folder_bytes(out)
    assert "peft" in files.pop("README.md").decode()
    assert files == {
        name: content for name, content in folder_bytes(source).items() if name in files
    }
    test_peft.assert_same_logits(brief / "artifacts/expanded", out)


@torch.no_grad()
def test_a_merged_export_opens_in_transformers_alone_with_the_logits_of_base_and_adapter(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    source, out = brief / "artifacts/lora_adapter", tmp_path / "out"
    said = exported(cli, "merged", source, out)
    assert re.search(r"8 matrices hold their update 1\.0000 to 1\.0000 times", said)
    shutil.copytree(out, tmp_path / "moved")
    both = logits(ours(brief / "artifacts/expanded", source), test_peft.IDS)
    assert_alike(logits(theirs(tmp_path / "moved"), test_peft.IDS), both)
    assert not (out / "manifest.json").exists()


def test_a_merged_export_says_how_generation_ends_and_keeps_what_the_base_says(
    cli: Lora, brief: Path, tmp_path: Path
) -> None:
    exported(cli, "merged", brief / "artifacts/lora_adapter", tmp_path / "plain")
    config, said = (
        read_json(tmp_path / "plain" / f"{name}.json") for name in ("config", "generation_config")
    )
    assert said == {key: config[key] for key in ("eos_token_id", "pad_token_id")}
    source = made(tmp_path)
    exported(cli, "merged", source, tmp_path / "chat")
    base = tmp_path / "project/base"
    assert (tmp_path / "chat/generation_config.json").read_text() == GENERATION
    assert (tmp_path / "chat/chat_template.jinja").read_bytes() == (
        base / "chat_template.jinja"
    ).read_bytes()
    talk = [{"role": "user", "content": "Two and two?"}]
    there, here = (AutoTokenizer.from_pretrained(folder) for folder in (base, tmp_path / "chat"))
    assert here.apply_chat_template(talk, tokenize=False) == there.apply_chat_template(
        talk, tokenize=False
    )


@pytest.mark.parametrize(
    ("precision", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_a_merged_export_of_another_precision_is_the_merge_rounded_once(
    cli: Lora, precision: str, stored: torch.dtype, tmp_path: Path
) -> None:
    source = made(tmp_path)
    exported(cli, "merged", source, tmp_path / "wide")
    exported(cli, "merged", source, tmp_path / "narrow", "--precision", precision)
    wide, narrow = (load_file(tmp_path / name / "model.safetensors") for name in ("wide", "narrow"))
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert narrow.keys() == wide.keys()
    assert all(torch.equal(narrow[name], value.to(stored)) for name, value in wide.items())
    config = read_json(tmp_path / "narrow/config.json")
    assert config["dtype"] == str(stored).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto").dtype == stored


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_the_card_says_how_it_was_made_what_it_learned_and_what_it_forgot(
    cli: Lora, brief: Path, form: str, tmp_path: Path
) -> None:
    source = brief / "artifacts/lora_adapter"
    exported(cli, form, source, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    for fact in facts(source, brief / "artifacts/evaluation"):
        assert fact in card
    assert ("8 matrices hold their update" in card) is (form == "merged")


def facts(adapter: Path, evaluation: Path) -> list[str]:
    """From the manifest and the evaluation's metrics."""
    manifest, metrics = (
        read_json(adapter / "manifest.json"),
        read_json(evaluation / "metrics.json")["lora"],
    )
    forgetting, params = metrics["forgetting"], manifest["params"]
    data = {name: digest for name, digest in manifest["inputs"].items() if name.startswith("data/")}
    if not params["retention_weight"]:
        del data[params["retention_data"]]
    return [
        f"LoRA, rank {params['rank']}, alpha {params['alpha']:g}",
        *(f"learning rate: {params['learning_rate']}", f"epochs: {params['epochs']}"),
        *(f"`{name}`, sha256 `{digest}`" for name, digest in data.items()),
        f"loss on the new data: {metrics['new_loss']:.4f}",
        f"completed as in the data: {metrics['new_completed']} of {metrics['new_sentences']}",
        f"loss on the old data {forgetting['loss_rise']:+.4f}",
        f"divergence from the base {forgetting['divergence']:.4f}",
        f"{forgetting['answers_kept']:.1%} of the base's first choices kept",
        f"torch {torch.__version__.partition('+')[0]}",
    ]


def occupied(root: Path, what: str) -> Path:
    """A folder with something else in it."""
    out = root / "out"
    if what == "notes":
        out.mkdir()
        (out / "notes.txt").write_text("mine", encoding="utf-8")
    elif what == "file":
        out.write_text("mine", encoding="utf-8")
    elif what == "base":
        shutil.copytree(root / "project/base", out)
    else:
        shutil.copytree(root / "adapter", out)
        if what == "artifact":
            write_json(out / "manifest.json", {"files": {}})
    return out


@pytest.mark.parametrize("what", ["notes", "file", "base", "adapter", "artifact"])
@pytest.mark.parametrize("form", FOLDERS)
def test_a_folder_with_something_else_is_refused_and_stays(
    cli: Lora, form: str, what: str, tmp_path: Path
) -> None:
    source = made(tmp_path)
    out = occupied(tmp_path, what)
    before = folder_bytes(tmp_path)
    assert "exists and holds other files" in refusal(export(cli, form, source, out))
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("form", FOLDERS)
def test_an_adapter_is_never_exported_over_itself(cli: Lora, form: str, tmp_path: Path) -> None:
    source = made(tmp_path)
    before = folder_bytes(tmp_path)
    again = source.parent / "project" / ".." / source.name
    assert "is also an input" in refusal(export(cli, form, source, again))
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("form", FOLDERS)
@pytest.mark.slow
def test_a_second_export_takes_the_place_of_the_first_and_says_so(
    cli: Lora, form: str, tmp_path: Path
) -> None:
    source, out = made(tmp_path), tmp_path / "out"
    out.mkdir()
    code, _, said = export(cli, form, source, out)
    assert code == 0 and "is replaced" not in said
    first = folder_bytes(out)
    (out / "left_over.json").write_text("of an older version", encoding="utf-8")
    code, _, said = export(cli, form, source, out)
    assert code == 0 and f"{out}: the earlier export of adapter was replaced." in said
    assert folder_bytes(out) == first


@pytest.mark.parametrize("form", FOLDERS)
def test_neither_files_of_others_nor_another_adapters_export_are_replaced(
    cli: Lora, form: str, tmp_path: Path
) -> None:
    source, out = made(tmp_path), tmp_path / "out"
    other = Path(shutil.copytree(source, tmp_path / "other"))
    assert export(cli, form, source, out)[0] == 0
    before = folder_bytes(tmp_path)
    assert "holds an export of adapter. Name another folder" in refusal(
        export(cli, form, other, out)
    )
    assert folder_bytes(tmp_path) == before
    for name in ("notes.txt", ".git/config"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine", encoding="utf-8")
        before = folder_bytes(tmp_path)
        assert f"holds {name.partition('/')[0]}, which lora did not write" in refusal(
            export(cli, form, source, out)
        )
        assert folder_bytes(tmp_path) == before
        (out / name).unlink()


@pytest.mark.parametrize(
    ("form", "more"),
    [
        ("peft", ["--precision", "bf16"]),
        ("vllm", ["--prompts", "data/prompts.yaml"]),
        ("peft", ["--trust-remote-code"]),
    ],
)
def test_an_option_that_a_format_does_not_read_is_refused(
    cli: Lora, form: str, more: list[str], tmp_path: Path
) -> None:
    option = more[0].removeprefix("--").replace("-", "_")
    readers = " or ".join(name for name, each in FORMATS.items() if option in each.options)
    assert "merged" in readers
    said = refusal(export(cli, form, made(tmp_path), tmp_path / "out", *more))
    assert f"{more[0]} needs --format {readers}, got {form}" in said


QUANTIZED = {
    "bitsandbytes": (
        "Import it, which dequantizes it: `lora new` or `lora import` with it as the base"
    ),
    "gptq": "Use the 16-bit model.",
}


@pytest.mark.parametrize(
    ("method", "form"),
    [("gptq", "merged"), *(("bitsandbytes", form) for form in FORMATS if form != "peft")],
)
def test_a_base_that_is_quantized_is_refused_as_such(
    cli: Lora, method: str, form: str, tmp_path: Path
) -> None:
    """Not as weights of wrong shapes, which would be copied again in vain."""
    source, base = made(tmp_path), tmp_path / "project/base"
    config = read_json(base / "config.json")
    write_json(base / "config.json", {**config, "quantization_config": {"quant_method": method}})
    weights = load_file(base / "model.safetensors")
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    # two of four bits in each byte
    weights[name] = torch.zeros(weights[name].numel() // 2, 1, dtype=torch.uint8)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    said = refusal(export(cli, form, source, tmp_path / "out"))
    assert (
        f"project/base is quantized ('{method}'); unquantized weights are needed. "
        f"{QUANTIZED[method]}" in said
    )
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_a_wrong_usage_that_lists_the_known_ones(
    cli: Lora, tmp_path: Path
) -> None:
    code, out, err = export(cli, "gptq", tmp_path, tmp_path / "out")
    assert (code, out) == (2, "") and f"'gptq' is not one of {', '.join(FORMATS)}." in err
    assert not (tmp_path / "out").exists()


# What the base is called, and what one must know of it

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def from_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains an adapter on a base of the hub's local cache, without the network."""

    def trained(*overrides: str) -> Path:
        root = new_project(tmp_path / "project", FAMILIES["llama"])
        repository = tmp_path / "hub/models--org--toy"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/v1").write_text(COMMIT, encoding="utf-8")
        (repository / "snapshots").mkdir()
        (root / "base").rename(repository / "snapshots" / COMMIT)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        plain = (
            "base=org/toy@v1",
            "expand_vocab.special_tokens=[]",
            "finetune_lora.train_embeddings=none",
        )
        make(root, ["pretrain", "expand_vocab", "finetune_lora"], [*plain, *overrides])
        return root

    return trained


def base_names(cli: Lora, root: Path, *more: str) -> dict[str, tuple[str | None, ...]]:
    """For each form: adapter_config.json's name and revision of the base, and the card's."""
    found: dict[str, tuple[str | None, ...]] = {}
    for form in FORMS:
        exported(cli, form, root / "artifacts/lora_adapter", root / form, *more)
        config, card = (
            root / form / "adapter_config.json",
            (root / form / "README.md").read_text(encoding="utf-8"),
        )
        named = read_json(config) if form != "merged" else {}
        (of_card,) = re.findall("^base_model: (.*)$", card, flags=re.MULTILINE)
        found[form] = (named.get("base_model_name_or_path"), named.get("revision"), of_card)
    return found


def test_a_base_of_the_hub_is_called_by_its_id(cli: Lora, from_hub: Callable[..., Path]) -> None:
    root = from_hub("expand_vocab.tokens=[]")
    assert base_names(cli, root) == {
        "peft": ("org/toy", COMMIT, "org/toy"),
        "vllm": ("org/toy", COMMIT, "org/toy"),
        "merged": (None, None, "org/toy"),
    }
    code, card, _ = cli("adapters", "card", "artifacts/lora_adapter", cwd=root)
    assert code == 0 and "base_model: org/toy\n" in card and "tokens added" not in card


def test_with_tokens_added_the_hubs_model_is_no_longer_the_base(
    cli: Lora, from_hub: Callable[..., Path]
) -> None:
    """PEFT would attach the adapter to a model without the added rows; the card names the original
    base.
    """
    root = from_hub("expand_vocab.tokens=[zloty, lev]")
    found = base_names(cli, root)
    assert found["peft"] == found["vllm"] == ("artifacts/expanded", None, "org/toy")
    said = export(cli, "peft", root / "artifacts/lora_adapter", root / "peft")[2]
    assert f"{UNNAMED}, artifacts/expanded: its base has" in said
    start, stop = read_json(root / "artifacts/expanded/manifest.json")["new_rows"]
    assert f"its base has {stop - start} tokens more than org/toy. Name the base" in said
    assert f"- on org/toy, tokens added: {stop - start}\n" in (root / "peft/README.md").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_an_export_whose_base_others_cannot_find_says_so(
    cli: Lora, form: str, tmp_path: Path
) -> None:
    source = made(tmp_path)
    code, _, said = export(cli, form, source, tmp_path / form)
    assert code == 0 and said.count(UNNAMED) == 1
    assert (
        "its base was not imported from the hub. Name the base on the hub with --base-name org/name"
        in said
    )
    card = (tmp_path / form / "README.md").read_text(encoding="utf-8")
    assert "`adapter_config.json` names the base by a folder" in card
    code, _, said = export(cli, form, source, tmp_path / form, "--base-name", "org/name")
    card = (tmp_path / form / "README.md").read_text(encoding="utf-8")
    assert code == 0 and UNNAMED not in said and "by a folder" not in card


def test_an_export_of_a_gguf_base_says_what_its_base_is(cli: Lora, tmp_path: Path) -> None:
    source = made(tmp_path)
    base = tmp_path / "project/base"
    facts = {
        "stage": "import",
        "source": "gguf",
        "dequantized": "Q4_1",
        "params": {"base": "../toy.gguf"},
    }
    seal(base, {**facts, "inputs": {}})
    said = export(cli, "peft", source, tmp_path / "peft")[2]
    assert "its base was imported from a GGUF file, not from the hub." in said


def test_a_base_has_the_name_that_is_given(cli: Lora, brief: Path, tmp_path: Path) -> None:
    shutil.copytree(brief / "artifacts", tmp_path / "artifacts")
    code, card, _ = cli(
        "adapters", "card", "artifacts/lora_adapter", "--base-name", "me/minigpt", cwd=tmp_path
    )
    assert code == 0 and "base_model: me/minigpt\n" in card
    for form in ("peft", "merged"):
        exported(
            cli,
            form,
            tmp_path / "artifacts/lora_adapter",
            tmp_path / form,
            "--base-name",
            "me/minigpt",
        )
        assert "base_model: me/minigpt\n" in (tmp_path / form / "README.md").read_text(
            encoding="utf-8"
        )
    config = read_json(tmp_path / "peft/adapter_config.json")
    assert config["base_model_name_or_path"] == "me/minigpt"
    assert config == read_json(tmp_path / "artifacts/lora_adapter/adapter_config.json") | {
        "base_model_name_or_path": "me/minigpt"
    }
    said = exported(
        cli, "vllm", made(tmp_path / "other"), tmp_path / "vllm", "--base-name", "me/llama"
    )
    assert "vllm serve me/llama " in said


@pytest.mark.parametrize("form", ["vllm", "mlx", "gguf", "gguf-adapter"])
def test_the_commands_are_for_a_shell_whatever_the_folders_are_called(
    form: str, cli: Lora, tmp_path: Path
) -> None:
    out = tmp_path / "two words; echo $HOME"
    code, said, _ = export(cli, form, made(tmp_path / "llama"), out)
    assert code == 0
    programs = ("vllm ", "mlx_lm.generate ", "llama-cli ", "ollama ")
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith(programs)]
    assert commands
    for words in commands:
        assert any(str(out) in word for word in words)


def test_an_adapter_of_a_base_in_few_bits_says_so_wherever_it_goes(
    cli: Lora, from_hub: Callable[..., Path]
) -> None:
    root = from_hub("expand_vocab.tokens=[]", "finetune_lora.quantization=nf4-dq")
    note = "trained on {} quantized to nf4-dq; on the unquantized base it answers differently"
    options = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
    for form in ("peft", "vllm"):
        code, _, said = export(cli, form, root / "artifacts/lora_adapter", root / form)
        assert code == 0
        advice = f"Load org/toy in nf4-dq ({options}), or export with --format merged."
        assert f"{note.format('org/toy')}. {advice}" in said
        card = (root / form / "README.md").read_text(encoding="utf-8")
        assert f"- {note.format('its base')}. Load the base in nf4-dq" in card
        assert f"BitsAndBytesConfig({options})" in card
    code, _, said = export(cli, "merged", root / "artifacts/lora_adapter", root / "merged")
    card = (root / "merged/README.md").read_text(encoding="utf-8")
    assert code == 0 and "answers differently" not in said + card and "BitsAndBytes" not in card
    assert "merged into the nf4-dq weights that the adapter was trained on, dequantized" in card


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_retained_data_is_named_where_it_was_used(
    cli: Lora, from_hub: Callable[..., Path], weight: float
) -> None:
    root = from_hub(
        "finetune_lora.retention_data=data/texts.jsonl", f"finetune_lora.retention_weight={weight}"
    )
    card = cli("adapters", "card", "artifacts/lora_adapter", cwd=root)[1]
    assert "`data/all.jsonl`, sha256" in card
    assert (
        ("`data/texts.jsonl`, retained, sha256" in card)
        is ("retention weight: 2.0" in card)
        is (weight > 0)
    )
    assert ("texts.jsonl" in card) is ("retention weight" in card) is (weight > 0)

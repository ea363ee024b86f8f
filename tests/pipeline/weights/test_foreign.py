"""`lora adapters import` of what other tools write: the adapter answers as there, or is refused
with the reason.

mlx-lm is asked itself. What litgpt and torchtune compute is written here as plain mathematics.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline.files.artifact import read_manifest
from tests.conftest import Lora
from tests.helpers import bases
from tests.helpers.bases import WIDE, toy_checkpoint
from tests.helpers.checkpoints import edit_adapter_config
from tests.helpers.foreign import imported, refused
from tests.helpers.json_files import write_json
from tests.helpers.projects import folder_bytes, refusal
from tests.helpers.side_by_side import IDS, logits, ours

R, ALPHA = 4, 6.0
D, H, G, K = 32, 4, 2, 8  # width, heads, groups, head size of the toy Llama
SIZES = {"q": H * K, "k": G * K, "v": G * K}
Weights = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * 0.3


# mlx-lm


def made_by_mlx_lm(
    root: Path, family: str, keys: list[str], blocks: int, dora: bool = False, **base: Any
) -> Tensor:
    """`theirs`, as mlx-lm's training saves it; returns mlx-lm's logits."""
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.tuner.utils")
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_adapters, load_model, save_config

    toy_checkpoint(root / "base", family, **base)
    model, _ = load_model(root / "base")
    model.freeze()
    settings = {"rank": R, "scale": 1.5, "dropout": 0.0, "keys": keys}
    utils.linear_to_lora_layers(model, blocks, settings, use_dora=dora)
    mx.random.seed(1)
    weights = dict(tree_flatten(model.trainable_parameters()))
    weights = {name: value + 0.3 * mx.random.normal(value.shape) for name, value in weights.items()}
    folder = root / "theirs"
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    kind = "dora" if dora else "lora"
    config = {
        "model": "org/toy",
        "num_layers": blocks,
        "lora_parameters": settings,
        "fine_tune_type": kind,
        "iters": 5,
    }
    save_config(config, folder / "adapter_config.json")
    model, _ = load_model(root / "base")
    model = load_adapters(model, str(folder))
    model.eval()
    return torch.tensor(model(mx.array([list(IDS)]))[0].tolist())


MLX: dict[str, tuple[str, list[str], int, bool, dict[str, Any]]] = {
    "attention": ("llama", ["self_attn.q_proj", "self_attn.v_proj"], 2, False, {}),
    "the last block": ("llama", ["self_attn.k_proj", "mlp.down_proj"], 1, False, {}),
    "embedding and head": ("llama", ["model.embed_tokens", "lm_head", "mlp.up_proj"], 2, False, {}),
    "a tied embedding": ("llama", ["model.embed_tokens"], 2, False, {"tie_word_embeddings": True}),
    "a scaled one": ("gemma2", ["model.embed_tokens", "self_attn.o_proj"], 2, False, {}),
    "dora": ("llama", ["self_attn.q_proj", "mlp.gate_proj"], 2, True, {}),
}


@pytest.mark.parametrize("name", MLX)
def test_an_adapter_of_mlx_lm_has_its_logits(cli: Lora, name: str, tmp_path: Path) -> None:
    family, keys, blocks, dora, base = MLX[name]
    there = made_by_mlx_lm(tmp_path, family, keys, blocks, dora, **base)
    imported(cli, tmp_path)
    assert (there - logits(ours(tmp_path / "base"))).abs().max() > 0.1, (
        "the adapter changes nothing"
    )
    torch.testing.assert_close(
        logits(ours(tmp_path / "base", tmp_path / "mine")), there, atol=1e-3, rtol=1e-3
    )
    source = read_manifest(tmp_path / "mine")["source"]
    assert (source["format"], source["base"]) == ("mlx-lm", "org/toy")
    assert source["sha256"].keys() == {"adapters.safetensors", "adapter_config.json"}
    assert cli("adapters", "verify", "mine", cwd=tmp_path)[0] == 0


def test_to_mlx_lm_and_back_is_the_same_adapter(cli: Lora, tmp_path: Path) -> None:
    made_by_mlx_lm(tmp_path, "llama", ["self_attn.q_proj", "mlp.up_proj"], 1)
    imported(cli, tmp_path)
    first = folder_bytes(tmp_path / "mine")
    code, _, _ = cli("export", "mine", "--format", "mlx", "--out", "back", cwd=tmp_path)
    assert code == 0
    there, back = (
        load_file(tmp_path / name / "adapters.safetensors") for name in ("theirs", "back")
    )
    assert there.keys() == back.keys() and all(
        torch.equal(back[key], value) for key, value in there.items()
    )
    cli("adapters", "import", "back", "--base", "base", "--out", "mine", cwd=tmp_path)
    assert (
        folder_bytes(tmp_path / "mine")["adapter_model.safetensors"]
        == first["adapter_model.safetensors"]
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type is 'full': whole weights are trained"),
        (
            {"lora_parameters": {"alpha": 16}},
            "the scale of the update must be a positive number, got None",
        ),
        ({"lora_parameters": [1]}, "must be a positive number"),
        ({"lora_parameters": {"scale": float("inf")}}, "must be a positive number, got inf"),
        ({"fine_tune_type": "dora"}, "dora has lora_a, lora_b, m"),
    ],
)
def test_what_mlx_lms_config_cannot_mean_is_refused(
    cli: Lora, values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    made_by_mlx_lm(tmp_path, "llama", ["self_attn.q_proj"], 2)
    edit_adapter_config(tmp_path / "theirs", **values)
    assert reason in refused(cli, tmp_path)


def test_layers_that_the_base_does_not_have_are_refused(cli: Lora, tmp_path: Path) -> None:
    made_by_mlx_lm(tmp_path, "llama", ["self_attn.q_proj"], 2)
    toy_checkpoint(tmp_path / "base", num_hidden_layers=1)
    assert "the base has no layer model.layers.1.self_attn.q_proj" in refused(cli, tmp_path)
    toy_checkpoint(tmp_path / "base", num_attention_heads=8)
    assert "theirs/adapter_model.safetensors does not fit" in refused(cli, tmp_path)


# litgpt


LITGPT = {"self_attn.o_proj": "attn.proj", "mlp.gate_proj": "mlp.fc_1", "mlp.up_proj": "mlp.fc_2"}
LITGPT |= {"mlp.down_proj": "mlp.proj"}


def litgpt_fused(x: Tensor, a: Tensor, b: Tensor, trained: str) -> dict[str, Tensor]:
    """What litgpt's fused LoRA adds to q, k and v: a convolution with a group for each part that is
    trained.
    """
    inner = F.linear(x, a).mT  # (B, parts·R, T)
    parts = [
        F.conv1d(one, rows[:, :, None])
        for one, rows in zip(
            inner.chunk(len(trained), 1),
            torch.split(b, [SIZES[part] for part in trained]),
            strict=True,
        )
    ]
    return {part: ALPHA / R * one.mT for part, one in zip(trained, parts, strict=True)}


def made_by_litgpt(root: Path, trained: str, others: bool, old: bool = False) -> Tensor:
    """`theirs`, as litgpt saves it; returns the logits of a model that computes as litgpt does."""
    model = toy_checkpoint(root / "base")
    folder = root / "theirs"
    folder.mkdir()
    tensors: Weights = {}
    for block in range(2):
        qkv = f"transformer.h.{block}.attn.{'attn' if old else 'qkv'}"
        a, b = (
            random(len(trained) * R, D, seed=block),
            random(sum(SIZES[part] for part in trained), R, seed=block),
        )
        tensors |= {f"{qkv}.lora_A": a, f"{qkv}.lora_B": b}
        for part in trained:

            def add(
                _: Any, inputs: Any, y: Tensor, part: str = part, a: Tensor = a, b: Tensor = b
            ) -> Tensor:
                return y + litgpt_fused(inputs[0], a, b, trained)[part]

            model.get_submodule(
                f"model.layers.{block}.self_attn.{part}_proj"
            ).register_forward_hook(add)
        for ours_, theirs in LITGPT.items() if others else ():
            linear = model.get_submodule(f"model.layers.{block}.{ours_}")
            a, b = random(R, linear.in_features), random(linear.out_features, R)
            tensors |= {
                f"transformer.h.{block}.{theirs}.lora_A": a,
                f"transformer.h.{block}.{theirs}.lora_B": b,
            }
            linear.weight.data += ALPHA / R * b @ a
    if others:
        a, b = random(R, D), random(512, R)  # rows padded to a multiple of 512
        tensors |= {"lm_head.lora_A": a, "lm_head.lora_B": b}
        model.lm_head.weight.data += ALPHA / R * b[: bases.ROWS] @ a
    torch.save({"model": tensors} if old else tensors, folder / "lit_model.pth.lora")
    names = {"q": "lora_query", "k": "lora_key", "v": "lora_value"}
    settings: dict[str, Any] = {
        "lora_r": R,
        "lora_alpha": ALPHA,
        "precision": "bf16-true",
        "train": {"epochs": 1},
    }
    settings |= {name: part in trained for part, name in names.items()}
    (folder / "hyperparameters.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    return logits(model)


@pytest.mark.parametrize(
    ("trained", "others", "old"), [("qkv", True, False), ("qv", False, True), ("k", False, False)]
)
def test_an_adapter_of_litgpt_has_its_logits(
    cli: Lora, trained: str, others: bool, old: bool, tmp_path: Path
) -> None:
    there = made_by_litgpt(tmp_path, trained, others, old)
    imported(cli, tmp_path)
    assert (there - logits(ours(tmp_path / "base"))).abs().max() > 0.1
    torch.testing.assert_close(
        logits(ours(tmp_path / "base", tmp_path / "mine")), there, atol=1e-4, rtol=1e-4
    )
    assert read_manifest(tmp_path / "mine")["source"]["format"] == "litgpt"


def without_settings(folder: Path) -> None:
    (folder / "hyperparameters.yaml").unlink()


def of_aliases(folder: Path) -> None:
    # 10⁸ values
    levels = [f"k{n}: &k{n} [{', '.join([f'*k{n - 1}' if n else '1'] * 10)}]" for n in range(8)]
    (folder / "hyperparameters.yaml").write_text("\n".join(levels), encoding="utf-8")


def of_other_parts(folder: Path) -> None:
    settings = yaml.safe_load((folder / "hyperparameters.yaml").read_text(encoding="utf-8"))
    (folder / "hyperparameters.yaml").write_text(
        yaml.safe_dump(settings | {"lora_key": False}), encoding="utf-8"
    )


def of_absurd_alpha(folder: Path) -> None:
    settings = yaml.safe_load((folder / "hyperparameters.yaml").read_text(encoding="utf-8"))
    (folder / "hyperparameters.yaml").write_text(
        yaml.safe_dump(settings | {"lora_alpha": 10**400}), encoding="utf-8"
    )


def of_experts(folder: Path) -> None:
    tensors = torch.load(folder / "lit_model.pth.lora", weights_only=True)
    more = {f"transformer.h.0.mlp.experts.0.fc_1.lora_{part}": random(R, R) for part in "AB"}
    torch.save(tensors | more, folder / "lit_model.pth.lora")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            without_settings,
            "hyperparameters.yaml, which litgpt writes beside the adapter: No such file or directory",
        ),
        (of_aliases, "its aliases (*name) stand for more than 1,000,000 values"),
        (of_absurd_alpha, f"must have lora_r and lora_alpha, got 4 and 1{59 * '0'}…"),
        (of_other_parts, "which do not fit the 48 rows of model.layers.0.self_attn.q_proj"),
        (
            of_experts,
            "transformer.h.0.mlp.experts.0.fc_1 is a layer that is not read. Merge it with "
            "`litgpt merge_lora`",
        ),
    ],
)
def test_what_litgpt_does_not_say_or_has_elsewhere_is_refused(
    cli: Lora, damage: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    made_by_litgpt(tmp_path, "qkv", False)
    damage(tmp_path / "theirs")
    assert reason in refused(cli, tmp_path)


# torchtune


def neighbours(heads: int) -> list[int]:
    """Row of transformers that is each row of Meta's: 2i is row i of its head, 2i + 1 row K/2 +
    i.
    """
    return [
        head * K + half * (K // 2) + pair
        for head in range(heads)
        for pair in range(K // 2)
        for half in (0, 1)
    ]


def meta_attention(q: Tensor, k: Tensor) -> Tensor:
    """Scores (H, T, T) of Meta's q (T, H·K) and k (T, G·K): neighbours are complex numbers, turned
    by position.
    """
    tokens = len(q)
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-2 * torch.arange(K // 2) / K)  # (T, K/2)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    turned = [
        torch.view_as_real(torch.view_as_complex(x.view(tokens, -1, K // 2, 2)) * turn).flatten(2)
        for x in (q, k)
    ]
    return torch.einsum("thk,shk->hts", turned[0], turned[1].repeat_interleave(H // G, dim=1))


def halves_attention(q: Tensor, k: Tensor) -> Tensor:
    """Scores of transformers' q and k: a number and that half a head further are turned."""
    return meta_attention(q[:, neighbours(H)], k[:, neighbours(G)])


def made_by_torchtune(
    root: Path, family: str, dora: bool = False, name: str = "adapter_model.pt"
) -> Weights:
    folder = root / "theirs"
    folder.mkdir()
    model = toy_checkpoint(root / "base", family)
    layers = {
        "attn.q_proj": "self_attn.q_proj",
        "attn.k_proj": "self_attn.k_proj",
        "attn.output_proj": "self_attn.o_proj",
    }
    layers |= {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"}
    tensors: Weights = {}
    for block in range(2):
        for theirs, ours_ in layers.items():
            linear = model.get_submodule(f"model.layers.{block}.{ours_}")
            key = f"layers.{block}.{theirs}"
            tensors[f"{key}.lora_a.weight"] = random(R, linear.in_features, seed=block)
            tensors[f"{key}.lora_b.weight"] = random(linear.out_features, R, seed=block)
            if dora:
                tensors[f"{key}.magnitude"] = random(linear.out_features).abs() + 1
    torch.save(tensors, folder / name)
    config = {"r": R, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "peft_type": "LORA"}
    write_json(folder / "adapter_config.json", config | {"base_model_name_or_path": "org/toy"})
    return tensors


def deltas(root: Path) -> Mapping[str, Tensor]:
    """Change of each weight by the imported adapter."""
    plain, tuned = (
        dict(bases.opened(folder).named_parameters()) for folder in (root / "base", root / "merged")
    )
    return {name: tuned[name] - plain[name] for name in plain}


@torch.no_grad()
@pytest.mark.parametrize("dora", [False, True])
def test_queries_and_keys_of_torchtune_attend_as_in_metas_order(
    cli: Lora, dora: bool, tmp_path: Path
) -> None:
    tensors = made_by_torchtune(tmp_path, "llama", dora)
    imported(cli, tmp_path)
    assert (
        cli("merge", "--adapter", "mine", "--out", "merged", "--precision", "fp32", cwd=tmp_path)[0]
        == 0
    )
    plain = dict(bases.opened(tmp_path / "base").named_parameters())
    merged = dict(bases.opened(tmp_path / "merged").named_parameters())
    x = random(7, D)
    theirs = []
    for short, heads in (("q_proj", H), ("k_proj", G)):
        # as torchtune loads it
        weight = plain[f"model.layers.1.self_attn.{short}.weight"][neighbours(heads)]
        key = f"layers.1.attn.{short}"
        weight = (
            weight + ALPHA / R * tensors[f"{key}.lora_b.weight"] @ tensors[f"{key}.lora_a.weight"]
        )
        if dora:
            weight = weight * (tensors[f"{key}.magnitude"] / weight.norm(dim=1))[:, None]
        theirs.append(x @ weight.T)
    here = [
        x @ merged[f"model.layers.1.self_attn.{short}.weight"].T for short in ("q_proj", "k_proj")
    ]
    torch.testing.assert_close(
        halves_attention(*here), meta_attention(*theirs), atol=1e-3, rtol=1e-3
    )
    assert (halves_attention(*here) - meta_attention(*here)).abs().max() > 0.1, (
        "the orders are the same"
    )


@torch.no_grad()
def test_other_layers_of_torchtune_and_all_of_its_qwen2_keep_their_rows(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bases.FAMILIES, "qwen2", WIDE)
    tensors = made_by_torchtune(tmp_path, "qwen2", name="adapter_0.pt")
    imported(cli, tmp_path)
    cli("merge", "--adapter", "mine", "--out", "merged", "--precision", "fp32", cwd=tmp_path)
    found = deltas(tmp_path)
    for theirs, ours_ in (
        ("attn.q_proj", "self_attn.q_proj"),
        ("mlp.w2", "mlp.down_proj"),
        ("mlp.w3", "mlp.up_proj"),
    ):
        key = f"layers.1.{theirs}"
        expected = ALPHA / R * tensors[f"{key}.lora_b.weight"] @ tensors[f"{key}.lora_a.weight"]
        torch.testing.assert_close(
            found[f"model.layers.1.{ours_}.weight"], expected, atol=1e-4, rtol=1e-4
        )


def test_torchtunes_own_file_is_read_and_not_its_conversion_to_peft(
    cli: Lora, tmp_path: Path
) -> None:
    made_by_torchtune(tmp_path, "llama")
    (tmp_path / "theirs/adapter_model.safetensors").write_bytes(b"not read")
    imported(cli, tmp_path)
    source = read_manifest(tmp_path / "mine")["source"]
    assert (source["format"], source["base"]) == ("torchtune", "org/toy")
    assert source["sha256"].keys() == {"adapter_model.pt", "adapter_config.json"}


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        (
            "gemma2",
            lambda _: None,
            "of torchtune, adapters of llama, mistral, gemma, qwen2 are read",
        ),
        (
            "llama",
            lambda folder: (folder / "adapter_config.json").unlink(),
            "torchtune writes it with r and lora_alpha",
        ),
        (
            "llama",
            lambda folder: edit_adapter_config(folder, lora_alpha=None),
            "must have r and lora_alpha, got 4 and None",
        ),
        (
            "llama",
            lambda folder: edit_adapter_config(folder, lora_alpha=10**400),
            f"must have r and lora_alpha, got 4 and 1{59 * '0'}…",
        ),
    ],
)
def test_what_torchtune_does_not_say_is_refused(
    cli: Lora, family: str, change: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    made_by_torchtune(tmp_path, family)
    change(tmp_path / "theirs")
    assert reason in refused(cli, tmp_path)


# Any of them


MAKE: dict[str, Callable[[Path], Any]] = {
    "mlx-lm": lambda root: made_by_mlx_lm(root, "llama", ["self_attn.q_proj"], 2),
    "litgpt": lambda root: made_by_litgpt(root, "qkv", others=True),
    "torchtune": lambda root: made_by_torchtune(root, "llama"),
}
SHAPES = {"none": (), "one": (R,), "three": (1, R, D), "empty": (0, 0), "long": (1, 10**5)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tool", MAKE)
def test_tensors_of_other_shapes_are_one_message(
    cli: Lora, tool: str, shape: str, tmp_path: Path
) -> None:
    MAKE[tool](tmp_path)
    (path,) = [
        path
        for path in (tmp_path / "theirs").iterdir()
        if path.suffix in (".safetensors", ".lora", ".pt")
    ]
    is_pickle = path.suffix != ".safetensors"
    tensors = torch.load(path, weights_only=True) if is_pickle else load_file(path)
    for part in ("a", "b"):
        changed = {
            key: torch.ones(SHAPES[shape]) if f"lora_{part}" in key.lower() else t
            for key, t in tensors.items()
        }
        torch.save(changed, path) if is_pickle else save_file(changed, path)
        refused(cli, tmp_path)


def test_without_a_base_and_without_a_format_it_says_what_to_do(cli: Lora, tmp_path: Path) -> None:
    made_by_torchtune(tmp_path, "llama")
    said = refusal(cli("adapters", "import", "theirs", "--out", "mine", cwd=tmp_path))
    assert "theirs is an adapter of torchtune. Pass the base it was trained on with --base." in said
    (tmp_path / "empty").mkdir()
    said = refusal(
        cli("adapters", "import", "empty", "--base", "base", "--out", "mine", cwd=tmp_path)
    )
    assert "adapter_config.json: No such file or directory" in said
    file = "theirs/adapter_model.pt"
    said = refusal(cli("adapters", "import", file, "--base", "base", "--out", "mine", cwd=tmp_path))
    assert f"{file} is a file. Name the folder that it lies in" in said


def test_the_help_names_every_format(cli: Lora, tmp_path: Path) -> None:
    _, said, _ = cli("adapters", "import", "--help", cwd=tmp_path)
    assert all(name in said for name in ("mlx-lm", "litgpt", "torchtune", "PEFT", "Unsloth"))

"""LoRA on a mixture's experts: PEFT's target_parameters, on a toy Mixtral and a toy Qwen3-MoE."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from pipeline.adapters.attach import AdapterScale, attach, disable_adapter, tensors
from pipeline.adapters.config import WEIGHTS, AdapterSpec, read_config
from pipeline.adapters.low_rank import load_update
from pipeline.adapters.mixed import changed_layers
from pipeline.adapters.peft import load_adapter, save_adapter
from pipeline.calc.families import architecture
from pipeline.calc.method import trainable
from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.models.experts import grouped_product, mixture
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.logs.run_log import read_steps
from pipeline.project.runner import Progress, run
from pipeline.stages.methods.lora import Lora
from pipeline.stages.registry import open_project
from pipeline.weights.combine import low_rank_updates
from pipeline.weights.merge import Merging, merge_to
from tests.helpers import projects
from tests.helpers.checkpoints import token_ids
from tests.helpers.families import MIXTURES, new_project
from tests.helpers.json_files import read_json
from tests.helpers.projects import folder_bytes, make, make_one, played
from tests.helpers.real import ROWS, notes, stock, toy
from tests.helpers.side_by_side import assert_alike, logits, ours, randomized, theirs

BOTH = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
IDS = token_ids(ROWS, 3, 9)
CONFIGS: dict[str, dict[str, Any]] = {  # LoraConfig's arguments
    "both, and linears": {"target_modules": ["q_proj"], "target_parameters": [*BOTH]},
    "one, no linears": {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    "one block's": {
        "target_modules": ["v_proj"],
        "target_parameters": ["layers.1.mlp.experts.gate_up_proj"],
    },
    "patterns and rsLoRA": {
        "target_modules": ["q_proj"],
        "target_parameters": [*BOTH],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {r"layers.0.*gate_up_proj": 7},
        "use_rslora": True,
    },
}
STAGES = ["pretrain", "expand_vocab", "finetune_lora", "merge"]
SETTINGS = [
    f"finetune_lora.target_parameters=[{', '.join(BOTH)}]",
    *("finetune_lora.train_embeddings=new_rows", "finetune_lora.epochs=4"),
]

pytestmark = pytest.mark.filterwarnings("ignore")
each_mixture = pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
each_stack = pytest.mark.parametrize("name", MIXTURES)
each_config = pytest.mark.parametrize("chosen", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A project of each mixture with an adapter on its experts, and the merged model."""
    roots = {
        name: new_project(tmp_path_factory.mktemp("mixture") / name, family)
        for name, family in MIXTURES.items()
        if name != "gpt_oss"
    }
    for root in roots.values():
        make(root, STAGES, SETTINGS)
    yield roots


def seeded(name: str) -> TransformersModel:
    """The same toy each time: gpt-oss' attention sinks are drawn too."""
    torch.manual_seed(0)
    return toy(name, std=0.1)


def from_peft(base: TransformersModel, chosen: dict[str, Any]) -> Any:
    """PEFT's adapter on the same weights, whose A and B are no longer those that it began with."""
    theirs = get_peft_model(
        stock(base), LoraConfig(r=3, task_type="CAUSAL_LM", **{"lora_alpha": 6, **chosen})
    )
    return randomized(theirs, 0.2)


def adapted(name: str, spec: AdapterSpec | None = None, std: float = 0.2) -> TransformersModel:
    """A mixture with LoRA on all experts, of which B is no longer zero."""
    model = seeded(name)
    torch.manual_seed(1)
    attach(model, spec or AdapterSpec(3, 6.0, ("q_proj",), parameters=BOTH))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("lora_B"):
                parameter.normal_(std=std)
    return model.eval()


@each_config
@each_stack
@torch.no_grad()
def test_an_adapter_of_peft_opens_here_and_ours_in_peft_with_the_same_logits(
    name: str, chosen: dict[str, Any], tmp_path: Path
) -> None:
    base = seeded(name)
    theirs = from_peft(base, chosen)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    spec = load_adapter(ours, Path("base"), tmp_path / "theirs")
    found, wanted = logits(ours, IDS), logits(theirs, IDS)
    assert_alike(found, wanted)
    assert (found - logits(base, IDS)).abs().max() > 0.1, "the adapter changes something"
    (tmp_path / "ours").mkdir()
    save_adapter(tmp_path / "ours", ours, spec, "base")
    assert_alike(logits(PeftModel.from_pretrained(stock(base), tmp_path / "ours"), IDS), wanted)
    factors, expected = (load_file(tmp_path / who / WEIGHTS) for who in ("ours", "theirs"))
    assert factors.keys() == expected.keys()
    assert all(torch.equal(factors[key], expected[key]) for key in factors)


@each_stack
def test_gradients_are_those_of_peft(name: str, tmp_path: Path) -> None:
    ours = adapted(name)
    save_adapter(tmp_path, ours, AdapterSpec(3, 6.0, ("q_proj",), parameters=BOTH), "base")
    theirs = PeftModel.from_pretrained(stock(seeded(name)), tmp_path, is_trainable=True).eval()
    for out in (ours(IDS), theirs(IDS).logits):
        torch.autograd.backward(out.log_softmax(-1).gather(-1, IDS[..., None]).mean())
    expected = {
        key.replace(".default.", "."): p.grad
        for key, p in theirs.named_parameters()
        if p.requires_grad
    }
    found = tensors(ours, AdapterSpec(3, 6.0, ("q_proj",), parameters=BOTH))
    assert found.keys() == expected.keys()
    for key, parameter in found.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 1e-5, (
            "each learns something"
        )
        assert_alike(parameter.grad, expected[key])
    assert not [
        key for key, p in ours.named_parameters() if p.requires_grad and ".lora_" not in key
    ]


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The number of elements of the largest floating-point tensor that an operation makes; views
    make none.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for made in (
            t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, Tensor)
        ):
            if made.is_floating_point() and made.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, made.numel())
        return out


@each_mixture
def test_no_update_of_the_experts_size_is_ever_formed(name: str) -> None:
    """PEFT makes W + s·BA of all experts in every forward."""
    model = adapted(name)
    stack = model.get_parameter("model.layers.0.mlp.experts.base.down_proj").numel()
    with Largest() as ours:
        model(IDS[:1, :4]).sum().backward()
    with Largest() as theirs:
        from_peft(seeded(name), CONFIGS["both, and linears"])(
            input_ids=IDS[:1, :4]
        ).logits.sum().backward()
    assert ours.elements < stack <= theirs.elements


@pytest.mark.parametrize("rank", [1, 4])
@each_config
@each_stack
def test_counts_are_those_of_peft(name: str, chosen: dict[str, Any], rank: int) -> None:
    base = toy(name)
    theirs = get_peft_model(stock(base), LoraConfig(**{**chosen, "r": rank}))
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    asked = Lora(
        rank=rank,
        targets=tuple(chosen["target_modules"]),
        target_parameters=tuple(chosen["target_parameters"]),
        rank_pattern=tuple(chosen.get("rank_pattern", {}).items()),
    )
    assert trainable(architecture(base.describe(), "config.json"), asked) == trained


@each_mixture
@pytest.mark.slow
def test_it_learns_opens_in_peft_and_merges_and_leaves_the_base_alone(
    mixtures: dict[str, Path], name: str
) -> None:
    artifacts = mixtures[name] / "artifacts"
    losses = [step.loss for step in read_steps(artifacts / "lora_adapter/loss.csv")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]), "of 5 steps an epoch"
    base, adapter, merged = (
        artifacts / part for part in ("expanded", "lora_adapter", "lora_merged")
    )
    tuned = logits(ours(base, adapter), IDS)
    assert (tuned - logits(ours(base), IDS)).abs().max() > 0.01
    assert_alike(logits(theirs(base, adapter), IDS), tuned)
    assert_alike(logits(theirs(merged), IDS), tuned)
    factors = load_file(adapter / WEIGHTS)
    assert all(t.abs().max() > 0 for key, t in factors.items() if "experts" in key), "B was at zero"
    changed = load_file(merged / "model.safetensors")
    for key, tensor in load_file(base / "model.safetensors").items():
        # two of their rows
        adapts = any(part in key for part in (".experts.", "_proj.", "embed_tokens", "lm_head"))
        assert torch.equal(tensor, changed[key]) is not adapts
    ratios = read_json(merged / "certificate.json")["delta_ratios"]
    assert len([key for key in ratios if ".experts." in key]) == 2 * 4 * 3, (
        "blocks, experts, and gate, up and down"
    )
    assert all(abs(ratio - 1) < 1e-3 for ratio in ratios.values())


@each_mixture
@pytest.mark.slow
def test_interrupted_checkpointed_or_continued_it_is_the_same_adapter(
    mixtures: dict[str, Path], name: str, tmp_path: Path
) -> None:
    root = new_project(tmp_path / "p", MIXTURES[name])
    make(root, STAGES[:2], SETTINGS)
    project, stage = open_project(root / "params.yaml", SETTINGS), "finetune_lora"
    events = run(project, projects.STAGES[stage], projects.WORK[stage], checkpoint_every=1)
    next(event for event in events if isinstance(event, Progress) and event.done == 3)
    events.close()
    _, seen = make_one(root, "finetune_lora", SETTINGS)
    assert any("resumed after step 3" in event.text for event in seen)
    resumed = folder_bytes(root / "artifacts/lora_adapter")
    assert resumed == folder_bytes(mixtures[name] / "artifacts/lora_adapter")
    make(root, ["finetune_lora"], [*SETTINGS, "finetune_lora.gradient_checkpointing=full"])
    for key, tensor in load_file(root / "artifacts/lora_adapter" / WEIGHTS).items():
        assert_alike(
            tensor, load_file(mixtures[name] / "artifacts/lora_adapter" / WEIGHTS)[key], 1e-5
        )
    (root / "artifacts/lora_adapter").rename(root / "first")
    _, seen = make_one(root, "finetune_lora", ["finetune_lora.init_from=first"])
    assert "experts.down_proj" in notes(seen)
    again = load_file(root / "artifacts/lora_adapter" / WEIGHTS)
    assert again.keys() == load_file(root / "first" / WEIGHTS).keys()
    assert read_config(root / "artifacts/lora_adapter")["target_parameters"] == sorted(BOTH)


@each_mixture
@pytest.mark.slow
def test_in_16_bits_it_is_what_peft_computes(name: str, tmp_path: Path) -> None:
    root = new_project(tmp_path / "p", MIXTURES[name], torch.bfloat16)
    # a seed with which no token lies between two experts: 16 bits would then decide by their
    # rounding
    precision = [
        "finetune_lora.precision=bf16",
        "finetune_lora.adapter_precision=bf16",
        "finetune_lora.seed=1",
    ]
    make(root, STAGES, [*SETTINGS, *precision, "merge.max_logit_difference=2"])
    base, adapter = root / "artifacts/expanded", root / "artifacts/lora_adapter"
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter
    ).eval()
    with torch.no_grad():
        assert_alike(logits(ours(base, adapter), IDS), logits(theirs, IDS), 0.5)


@pytest.mark.parametrize("layout", ["an expert's own", "stacked"])
@each_stack
@torch.no_grad()
def test_a_merge_writes_either_layout_of_the_files(name: str, layout: str, tmp_path: Path) -> None:
    base = seeded(name)
    tuned = from_peft(base, CONFIGS["patterns and rsLoRA"])
    tuned.save_pretrained(tmp_path / "adapter")
    stock(base).save_pretrained(tmp_path / "base", save_original_format=layout != "stacked")
    certificate, _ = played(
        merge_to(tmp_path / "out", Merging(tmp_path / "base", tmp_path / "adapter"))
    )
    stored = load_file(tmp_path / "base/model.safetensors")
    apart = layout != "stacked" and name != "gpt_oss"  # whose published files have the stacks
    assert any(".experts.0." in key for key in stored) is apart
    assert len(certificate["delta_ratios"]) == 2 + 2 * (4 * 3 if apart else 2)
    assert load_file(tmp_path / "out/model.safetensors").keys() == stored.keys()
    assert_alike(logits(theirs(tmp_path / "out"), IDS), logits(tuned, IDS))


def test_a_merge_into_files_that_lack_an_expert_names_its_tensor(tmp_path: Path) -> None:
    base = toy("mixtral", std=0.1)
    from_peft(base, CONFIGS["both, and linears"]).save_pretrained(tmp_path / "adapter")
    stock(base).save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    lost = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    save_file(
        {key: value for key, value in load_file(path).items() if key != lost},
        path,
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=f"has no tensor {lost}"):
        played(merge_to(tmp_path / "out", Merging(tmp_path / "base", tmp_path / "adapter")))
    assert not (tmp_path / "out").exists()


@each_stack
@torch.no_grad()
def test_disabled_it_is_the_base_to_the_bit_and_half_its_strength_is_half_the_update(
    name: str,
) -> None:
    base, spec = seeded(name).eval(), AdapterSpec(3, 6.0, ("q_proj",), parameters=BOTH)
    model = adapted(name, spec)
    tuned = logits(model, IDS)
    with disable_adapter(model):
        assert torch.equal(logits(model, IDS), logits(base, IDS))
    assert torch.equal(logits(model, IDS), tuned)
    strength = AdapterScale(model, base, spec)
    strength.set(0.5)
    halved = AdapterSpec(3, 3.0, ("q_proj",), parameters=BOTH)
    assert_alike(logits(model, IDS), logits(adapted(name, halved), IDS), 1e-6)
    strength.set(1)
    assert torch.equal(logits(model, IDS), tuned)
    assert changed_layers(model, base) is None, "rows of other adapters are computed apart from it"


@each_mixture
@pytest.mark.slow
def test_the_methods_of_a_quantized_base_train_its_experts_and_say_that_these_are_not_quantized(
    name: str, tmp_path: Path
) -> None:
    root = new_project(tmp_path / "p", MIXTURES[name])
    make(root, STAGES[:2])
    nf4 = [*SETTINGS, "finetune_lora.quantization=nf4"]
    _, seen = make_one(root, "finetune_lora", nf4)
    assert "nf4 is of linears: the experts keep their precision" in notes(seen)
    assert "experts get no LoRA" not in notes(seen)
    make(root, ["merge"], nf4)
    base, adapter, merged = (
        root / "artifacts" / part for part in ("expanded", "lora_adapter", "lora_merged")
    )
    with torch.no_grad():
        assert_alike(logits(ours(base, adapter), IDS), logits(ours(merged), IDS))
    _, seen = make_one(root, "finetune_lora")
    assert f"finetune_lora.target_parameters=[{', '.join(BOTH)}]" in notes(seen), (
        "all-linear leaves them out"
    )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a router": (
        {"parameters": ("mlp.gate.weight",)},
        r"'mlp.gate.weight' matches model.layers.0.mlp.gate.weight",
    ),
    "a linear": (
        {"parameters": ("q_proj.weight",)},
        "which is no stack of experts' weights. Name mlp.experts.gate",
    ),
    "an older name": (
        {"parameters": (*BOTH, "experts.w1")},
        "'experts.w1' matches no parameter. Name mlp.experts",
    ),
    "half a name": ({"parameters": ("proj",)}, "'proj' matches no parameter"),
    "DoRA": ({"dora": True}, "does not work with dora. Unset it"),
    "dropout": ({"dropout": 0.1}, "does not work with lora_dropout 0.1"),
}


@pytest.mark.parametrize(("options", "why"), WRONG.values(), ids=WRONG)
def test_what_has_no_meaning_on_experts_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        attach(
            toy("qwen3_moe"), AdapterSpec(3, 6.0, ("q_proj",), **{"parameters": BOTH, **options})
        )


def test_pissa_and_a_base_without_experts_are_refused() -> None:
    spec = AdapterSpec(2, 6.0, ("q_proj",), parameters=BOTH)
    with pytest.raises(UserError, match="does not work with init_lora_weights pissa"):
        attach(toy("mixtral"), spec, init="pissa")
    with pytest.raises(
        UserError, match=r"The base has no experts that are stacked. Name its linears"
    ):
        attach(toy("qwen3"), spec)


@pytest.mark.parametrize("init", ["document", "gaussian", "kaiming", "orthogonal"])
@torch.no_grad()
def test_every_initialization_begins_at_the_base(init: Any) -> None:
    base, model = toy("mixtral", std=0.1).eval(), toy("mixtral", std=0.1).eval()
    attach(model, AdapterSpec(2, 6.0, (), parameters=BOTH), init=init)
    assert_alike(logits(model, IDS), logits(base, IDS), 1e-5)
    A = [p for key, p in model.named_parameters() if key.endswith("lora_A")]
    # of 32 inputs, rank 2
    expected = {"document": 0.01, "gaussian": 0.5, "kaiming": (3 * 32) ** -0.5}.get(init)
    assert expected is None or abs(float(A[0].std()) / expected - 1) < 0.2


@pytest.mark.slow
def test_an_adapter_on_experts_trains_alone_and_is_not_combined_or_compared(
    mixtures: dict[str, Path],
) -> None:
    root = mixtures["mixtral"]
    base, adapter = root / "artifacts/expanded", root / "artifacts/lora_adapter"
    for refused in (lambda: load_update(adapter), lambda: low_rank_updates(base, adapter)):
        with pytest.raises(
            UserError, match=r"adapts experts .* Merge it: `lora export --format merged`"
        ):
            refused()
    with pytest.raises(
        UserError, match=r"target_parameters is .*, but adapters on experts train alone"
    ):
        make(root, ["finetune_sweep"], SETTINGS)


def damage(folder: Path, **config: Any) -> None:
    artifact.write_json(folder / "adapter_config.json", {**read_config(folder), **config})


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"r": 10**6}, r"has shape \[?12"),
        ({"target_parameters": ["experts.down_proj"]}, "base_layer.lora_A"),
        ({"target_parameters": [3]}, "target_parameters must be a list of names"),
        ({"target_parameters": [*BOTH, "gate.weight"]}, "which is no stack of experts' weights"),
        ({"target_parameters": [*BOTH], "use_dora": True}, "does not work with dora"),
    ],
    ids=["a rank beyond memory", "fewer than its tensors", "no names", "a router", "DoRA"],
)
def test_a_foreign_adapter_that_does_not_fit_is_refused(
    config: dict[str, Any], why: str, tmp_path: Path
) -> None:
    base = toy("qwen3_moe", std=0.1)
    from_peft(base, CONFIGS["both, and linears"]).save_pretrained(tmp_path)
    damage(tmp_path, **config)
    with pytest.raises(UserError, match=why):
        load_adapter(base, Path("base"), tmp_path)


@pytest.mark.parametrize("rank", [3, 8])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_products_of_all_experts_at_once_are_those_of_each(
    name: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an accelerator computes them: logits and the gradients of A and B, up to the order of
    sums.
    """
    monkeypatch.setattr(grouped_product, "has_kernel_of_torch", lambda _: True)
    model, found = adapted(name, AdapterSpec(rank, 6.0, ("q_proj",), parameters=BOTH)), []
    for grouped in (False, True):
        monkeypatch.setattr(mixture, "runs_grouped_product", lambda _, grouped=grouped: grouped)
        model.zero_grad()
        out = model(IDS)
        torch.autograd.backward(out.logsumexp(-1).sum())
        found.append((out, *(p.grad for p in model.parameters() if p.grad is not None)))
    assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)

"""A rank of a sharded run reads, keeps and moves its own rows of the base, and no others."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation, tensor_locations
from pipeline.models.device import model_bytes
from pipeline.models.load import load_base
from pipeline.models.quantized_linear import QuantizedLinear, quantize
from pipeline.models.save import read_rows
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.logs.run_log import peak_memory
from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import Lora
from pipeline.training.batches import Batches, collate
from pipeline.training.memory.prediction import predicted_peak
from pipeline.training.parallel import sharding
from pipeline.training.step import loss_of
from pipeline.training.task import TrainingTask
from tests.helpers import families
from tests.helpers.fake_ranks import fake_rank
from tests.helpers.ranks import run_ranks
from tests.helpers.real import listed, toy, windows_of, with_lora

ATTENDED = ("q_proj", "v_proj")
CPU = torch.device("cpu")
RANKS = 8


def new_base(folder: Path, **sizes: int) -> Path:
    tokenizer = families.tokenizer()
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            **sizes,
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    # of the inner 100 neurons three ranks have 34, 34 and 32
    return new_base(folder, hidden_size=48, intermediate_size=100, num_hidden_layers=3)


def shard_and_count(folder: Path, precision: str, change: bool) -> tuple[int, dict[str, Any]]:
    """Bytes that this rank reads from files while it shards, and the weights that all ranks have
    together.
    """
    model = load_base(folder, precision).model.requires_grad_(False)
    if change:
        model.blocks[0].get_parameter("mlp.up_proj.weight").zero_()
    read = 0

    def counted(
        location: TensorLocation, start: int, stop: int, dtype: torch.dtype
    ) -> torch.Tensor:
        nonlocal read
        rows = read_rows(location, start, stop, dtype)
        # not the row that is only compared
        read += rows.numel() * rows.element_size() * (stop - start > 1)
        return rows

    sharding.read_rows = counted  # type: ignore[attr-defined]
    sharding.shard(model, torch.device("cpu"))
    whole = {
        name: getattr(p, "full_tensor", lambda p=p: p)() for name, p in model.named_parameters()
    }
    return read, {name: tensor.tolist() for name, tensor in whole.items()}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_ranks_read_each_weight_of_the_blocks_once_and_have_it_together(
    base: Path, count: int
) -> None:
    stored = load_file(base / "model.safetensors")
    blocks = sum(t.numel() * 4 for name, t in stored.items() if ".layers." in name)
    found = run_ranks(count, shard_and_count, base, "fp32", False)
    assert sum(read for read, _ in found) == blocks, "no row is read twice, and none is left out"
    assert max(read for read, _ in found) <= 1.03 * blocks / count
    for _, weights in found:
        assert weights == {name: t.tolist() for name, t in stored.items() if name in weights}
        assert len(weights) >= len(stored) - 1  # a tied head


@pytest.mark.parametrize(
    ("precision", "change"), [("bf16", False), ("fp32", True)], ids=["cast", "changed"]
)
@pytest.mark.slow
def test_a_weight_that_is_not_as_it_is_stored_comes_from_memory(
    base: Path, precision: str, change: bool
) -> None:
    stored = load_file(base / "model.safetensors")
    changed = "model.layers.0.mlp.up_proj.weight"
    if change:
        stored[changed].zero_()
    expected = {
        name: (t.bfloat16() if precision == "bf16" else t).tolist() for name, t in stored.items()
    }
    for read, weights in run_ranks(2, shard_and_count, base, precision, change):
        assert weights == {name: expected[name] for name in weights}
        assert (read == 0) == (precision == "bf16")


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "gemma3"])
def test_other_families_have_the_weights_that_one_process_loads(tmp_path: Path, name: str) -> None:
    """Mixtral's experts come from memory: transformers stacks them. GPT-2's linears are stored as
    (I, O).
    """
    root = families.new_project(tmp_path / "p", families.FAMILIES[name])
    loaded = {
        key: p.tolist() for key, p in load_base(root / "base", "fp32").model.named_parameters()
    }
    for read, weights in run_ranks(2, shard_and_count, root / "base", "fp32", False):
        assert weights == loaded and read


def sharded_where(packs: bool) -> tuple[list[bool], list[int]]:
    """Whether the run is sharded where rank 1 has room for a step, for the weights alone, and for
    none of both; and how often the peak was predicted until then."""
    model, asked = with_lora(toy("llama")), 0
    vars(model)["supports_packing"] = packs
    task = TrainingTask.of_one(
        model, Batches(listed(windows_of((90,) * 8)), 4, 0, 2), Training(), Lora(3, 6.0, ATTENDED)
    )
    weights, found, counts = model_bytes(model), list[bool](), list[int]()
    peak = predicted_peak(task, 0, torch.device("cuda"))
    assert weights < peak

    def predicted() -> int:
        nonlocal asked
        asked += 1
        return peak

    for free in (peak, peak - 1, weights - 1):
        room = free if dist.get_rank() else 2 * peak
        vars(sharding)["free_bytes"] = lambda _, room=room: room
        found.append(sharding.needs_shards(model, torch.device("cuda"), predicted))
        counts.append(asked)
    return found, counts


@pytest.mark.parametrize("packs", [True, False])
def test_a_run_is_sharded_if_a_rank_has_no_room_for_the_weights_or_for_a_step_on_them(
    packs: bool,
) -> None:
    """Without packing a run cannot be sharded: it may still fit, as the peak is a prediction."""
    assert run_ranks(2, sharded_where, packs) == [([False, packs, True], [1, 2, 2])] * 2


def refused(folder: Path) -> str:
    model = load_base(folder, "fp32").model.requires_grad_(False)
    try:
        sharding.shard(model, torch.device("cpu"))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_every_rank_refuses_a_model_that_does_not_support_packing(tmp_path: Path) -> None:
    root = families.new_project(tmp_path / "p", families.OTHERS["bloom"])
    messages = run_ranks(2, refused, root / "base")
    assert all(
        message.startswith("--shard does not work with this model: it does not support")
        for message in messages
    )


def test_a_file_that_was_truncated_is_an_error_in_one_line(base: Path, tmp_path: Path) -> None:
    location = tensor_locations(base)["model.norm.weight"]
    short = tmp_path / "short.safetensors"
    short.write_bytes(location.file.read_bytes()[: location.info.stop - 1])
    with pytest.raises(UserError, match="was truncated while it was read"):
        read_rows(TensorLocation(short, location.info), 0, 48, torch.float32)
    torch.testing.assert_close(
        read_rows(location, 10, 20, torch.float32),
        load_file(base / "model.safetensors")["model.norm.weight"][10:20],
    )


def shard_and_measure(folder: Path) -> int:
    """Bytes by which the resident memory of this process grows at most, while it loads and shards a
    base.
    """
    before = peak_memory()
    model = load_base(folder, "fp32").model.requires_grad_(False)
    sharding.shard(model, torch.device("cpu"))
    return peak_memory() - before


@pytest.mark.slow
def test_each_of_two_ranks_needs_its_half_of_the_base_and_three_whole_blocks(
    tmp_path: Path,
) -> None:
    folder = new_base(
        tmp_path / "base", hidden_size=1024, intermediate_size=2816, num_hidden_layers=16
    )
    size = (folder / "model.safetensors").stat().st_size
    # a fifth of it: pages of the file around the rows that are compared, which the system may drop.
    # 46 to 120 MB were seen, more where other programs run. Ranks that read all of the base first
    # grow by 1.5 times its size.
    assert max(run_ranks(2, shard_and_measure, folder)) < size * (1 / 2 + 3 / 16 + 1 / 5)


def tuned(family: str, kind: Any) -> TransformersModel:
    """A toy with LoRA, quantized unless `kind` is none. Most of its weights have no whole share for
    each of 8 ranks.
    """
    sizes: dict[str, Any] = (
        {} if family == "gpt2" else {"hidden_size": 64, "intermediate_size": 100}
    )
    model = toy(family, **sizes)
    if kind != "none":
        quantize(model, kind, None, CPU)
    return with_lora(model, names=("c_attn",) if family == "gpt2" else ("q_proj", "v_proj"))


def gradients(model: TransformersModel) -> dict[str, Tensor]:
    """Of the loss of two sequences, by name; and the loss."""
    loss = loss_of(model, collate(windows_of([5, 9])))
    torch.autograd.backward(loss)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {**found, "loss": loss.detach()}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "kind"),
    [*itertools.product(["llama", "mixtral", "gpt2"], ["none", "nf4", "nf4-dq", "int8"])],
)
def test_eight_ranks_have_every_row_of_the_blocks_once_and_gather_whole_weights(
    family: str, kind: str
) -> None:
    """Also of weights with fewer rows than ranks: a router's, and the scales of doubly quantized
    scales.
    """
    if kind == "int8":
        pytest.importorskip("bitsandbytes")
    whole = tuned(family, kind)
    stored = dict(whole.named_parameters()) | dict(whole.named_buffers())
    rows: dict[str, list[Tensor]] = {}
    for rank in range(RANKS):
        with fake_rank(rank, RANKS):
            model = tuned(family, kind)
            sharding.shard(model, CPU)
            for _ in range(2):  # the second time with what the first gathered and freed
                found = gradients(model)
        assert found.keys() == {
            *[name for name, p in whole.named_parameters() if p.requires_grad],
            "loss",
        }
        for name, p in model.named_parameters():
            if local := getattr(p, "to_local", None):
                rows.setdefault(name, []).append(local())
    in_blocks = {
        name
        for name, tensor in whole.blocks.state_dict(keep_vars=True).items()
        if not tensor.requires_grad
    }
    assert len(rows) >= len(in_blocks)
    assert kind == "none" or any(name.endswith("scales") for name in rows)
    if kind == "nf4-dq" or family == "mixtral":
        assert any(not len(parts[-1]) for parts in rows.values()), "the last rank has none of some"
    for name, parts in rows.items():
        assert torch.equal(torch.cat(parts), stored[name]), name


def compare_sharded(kind: str, checkpointing: Any) -> None:
    """Losses and gradients of this rank, with bitsandbytes' product that GPUs use, are those of the
    whole model.
    """
    QuantizedLinear.forward = QuantizedLinear.product_4bit  # type: ignore[method-assign]
    results = []
    for is_sharded in (False, True):
        # whole blocks of 64 in a row: bitsandbytes' product on CPUs is wrong for others
        model = toy("llama", hidden_size=64, intermediate_size=128)
        quantize(model, kind, None, CPU)  # type: ignore[arg-type]
        model = with_lora(model)
        model.checkpoint_blocks(checkpointing)
        model.train()
        if is_sharded:
            sharding.shard(model, CPU)
        results.append([gradients(model) for _ in range(2)])
    for whole, sharded in zip(*results, strict=True):
        assert whole["loss"] > 0 and len(whole) > 4
        torch.testing.assert_close(sharded, whole, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_a_sharded_base_is_multiplied_by_bitsandbytes_as_a_whole_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(QuantizedLinear, "forward", QuantizedLinear.forward)  # restored afterwards
    with fake_rank(0, 1):
        compare_sharded(kind, "none")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_ranks_multiply_by_bitsandbytes_what_they_gather(
    count: int, kind: str, checkpointing: str
) -> None:
    """Its backward holds the gathered codes by reference: FSDP frees their storage and fills it
    again.
    """
    pytest.importorskip("bitsandbytes")
    run_ranks(count, compare_sharded, kind, checkpointing)

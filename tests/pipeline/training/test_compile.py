"""`compile: true`: the same training with compiled blocks, under the same names."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.kernels import packed_attention
from pipeline.models.kernels.compiled import Lengths, compile_blocks
from pipeline.models.minigpt import MiniGPT
from pipeline.training.batches import collate
from pipeline.training.step import loss_of
from tests.helpers.families import FAMILIES, new_project
from tests.helpers.projects import make
from tests.helpers.real import toy, windows_of, with_lora


@pytest.mark.slow
@pytest.mark.parametrize("how", ["none", "selective", "full"])
def test_compiled_blocks_give_the_same_gradients_and_compile_once_for_all_lengths(
    how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, attend = list[int](), packed_attention.attend

    def counted(module: Any, *inputs: Any, **options: Any) -> Any:
        calls.append(module.layer_idx)
        return attend(module, *inputs, **options)

    monkeypatch.setattr(packed_attention, "attend", counted)
    plain, compiled = (with_lora(toy("llama")).train() for _ in range(2))
    names = [*compiled.state_dict()]
    for model in (plain, compiled):
        model.checkpoint_blocks(how)
    try:
        compile_blocks(compiled)
        stats, graphs = torch._dynamo.utils.counters["stats"], list[int]()
        before = stats["unique_graphs"]
        for lengths in ((9, 3, 14, 6), (5, 12, 7), (3, 4, 2, 6, 7, 8)):
            for model in (plain, compiled):
                model.zero_grad()
                torch.autograd.backward(loss_of(model, collate(windows_of(lengths))))
            for (name, ours), theirs in zip(
                compiled.named_parameters(), plain.parameters(), strict=True
            ):
                if theirs.grad is not None:
                    torch.testing.assert_close(
                        ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=name
                    )
            graphs.append(stats["unique_graphs"] - before)
        assert graphs[0] and len(set(graphs)) == 1
        steps = 2 * 3  # of both models
        # a block that is recomputed runs twice
        runs = {"none": (1, 1), "selective": (2, 1), "full": (2, 2)}[how]
        assert [calls.count(block) for block in (0, 1)] == [steps * count for count in runs]
        assert [*compiled.state_dict()] == names
    finally:
        packed_attention.register(attend)
        torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_run_says_how_long_it_compiled_and_trains_the_same(tmp_path: Path) -> None:
    root, losses = new_project(tmp_path / "p", FAMILIES["llama"]), list[list[float]]()
    make(root, ["pretrain", "expand_vocab"])
    try:
        for compiles in ("false", "true"):
            make(
                root,
                ["finetune_lora"],
                ["finetune_lora.epochs=1", f"finetune_lora.compile={compiles}"],
            )
            lines = (
                (root / "runs/finetune_lora/loss.csv").read_text(encoding="utf-8").splitlines()[1:]
            )
            losses.append([float(line.split(",")[2]) for line in lines])
    finally:
        packed_attention.register()
        torch._dynamo.reset()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    notes = (root / "runs/finetune_lora/run.json").read_text(encoding="utf-8")
    assert "compiling took" in notes


@pytest.mark.parametrize("stage", ["finetune_lora", "finetune_sweep"])
def test_minigpt_and_sweeps_are_not_compiled(
    project: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if stage == "finetune_sweep":  # of whatever model
        monkeypatch.setattr(MiniGPT, "compiles", True)
    with pytest.raises(
        UserError, match=f"{stage}: compile is true, but only an imported model with one adapter"
    ):
        make(project, [stage], ["finetune_lora.compile=true"], force=True)


def test_the_compiler_sees_no_lengths() -> None:
    assert list(Lengths([3, 4])) == [3, 4] and not isinstance(Lengths([3]), tuple)

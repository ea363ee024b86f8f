"""Many adapters in one pass: each gets the result of training alone, whatever happens to the
others.
"""

import json
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from pipeline.adapters.batched import (
    AdapterRouting,
    BatchedLoRALinear,
    StackedParameters,
    attach_many,
    batched_layers,
    batched_lora_forward,
)
from pipeline.adapters.lora import LoRALinear
from pipeline.errors import UserError
from pipeline.evaluation.selection import beyond
from pipeline.files import artifact
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.logs.run_log import Step, read_steps
from pipeline.project.runner import Note, run
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.stages.methods.sweep import FinetuneSweep, variants
from pipeline.stages.methods.sweep import run as sweep
from pipeline.stages.registry import open_project
from pipeline.training.optimizer import FlatOptimizer
from pipeline.views.models import adapters, check, describe
from tests.helpers.families import FAMILIES
from tests.helpers.families import new_project as family_project
from tests.helpers.process import Forked
from tests.helpers.projects import (
    BRIEF,
    LORA,
    STAGES,
    folder_bytes,
    load,
    make_base,
    make_one,
    new_project,
    played,
)

STAGE = STAGES["finetune_sweep"]
WEIGHTS = "adapter_model.safetensors"
Grid = Mapping[str, Sequence[Any]]


def swept(
    root: Path, grid: Grid, overrides: Sequence[str] = (), **options: Any
) -> tuple[dict[str, Any], list[Any]]:
    """Run the sweep in this process; returns its manifest and its events."""
    given = [*overrides, f"finetune_sweep.grid={json.dumps(grid)}"]
    return played(run(open_project(root / "params.yaml", given), STAGE, sweep, **options))


def alone(root: Path, own: FinetuneLora, overrides: Sequence[str]) -> Path:
    """Train the same adapter with finetune_lora; returns its folder."""
    keys: tuple[str, ...] = (
        "seed",
        "dora",
        "rank",
        "alpha",
        "learning_rate",
        "target_modules",
        "rslora",
        "init_lora_weights",
        "loraplus_ratio",
    )
    keys += (
        "rank_pattern",
        "max_grad_norm",
        "retention_weight",
        "schedule",
        "weight_decay",
        "warmup_ratio",
    )
    keys += ("lora_dropout", "neftune_alpha", "adam_beta1", "adam_beta2", "adam_epsilon")
    keys += ("min_lr_ratio", "num_cycles", "power", "decay_ratio")
    keys += ("layers_to_transform", "exclude_modules")
    values = [f"finetune_lora.{key}={json.dumps(getattr(own, key))}" for key in keys]
    make_one(root, "finetune_lora", [*overrides, *values])
    return root / "artifacts" / "lora_adapter"


def test_on_a_pretrained_base_defaults_follow_what_the_grid_sets(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(
        "base: model.gguf\nfinetune_lora: {}\nfinetune_sweep: {grid: {rank: [2, 16]}}\n",
        encoding="utf-8",
    )

    def swept_over(*overrides: str) -> list[FinetuneLora]:
        params = load(path, overrides)
        return [*variants(params.finetune_lora, params.finetune_sweep, params).values()]

    assert [lora.alpha for lora in swept_over()] == [4, 32]
    assert [lora.alpha for lora in swept_over("finetune_lora.alpha=8")] == [8, 8]
    assert [
        lora.alpha for lora in swept_over("finetune_sweep.grid={rank: [2, 16], alpha: [1]}")
    ] == [1, 1]
    assert [lora.alpha for lora in swept_over("base=minigpt")] == [FinetuneLora().alpha] * 2
    (warmed,) = swept_over("finetune_sweep.grid={warmup_steps: [5]}")
    assert (warmed.warmup_steps, warmed.warmup_ratio) == (5, 0)
    study = load(path).replaced({"finetune_lora": FinetuneLora(rank=4, alpha=8.0)})
    assert not study.following("finetune_lora", {"rank": 2}), "what a study sets is set"


def assert_each_as_alone(
    root: Path, grid: Grid, overrides: Sequence[str] = (), within: float = 1e-5
) -> None:
    """Curves and weights to 1e-5, and the same config, of every adapter of the grid."""
    overrides = ["finetune_lora.learning_rate=1e-3", "finetune_lora.epochs=4", *overrides]
    swept(root, grid, overrides)
    params = load(root / "params.yaml", [*overrides, f"finetune_sweep.grid={json.dumps(grid)}"])
    for name, own in variants(params.finetune_lora, params.finetune_sweep).items():
        mine, other = root / "artifacts" / "sweep" / name, alone(root, own, overrides)
        assert_same_curve(read_steps(mine / "loss.csv"), read_steps(other / "loss.csv"), within)
        found, wanted = load_file(mine / WEIGHTS), load_file(other / WEIGHTS)
        assert found.keys() == wanted.keys()
        for key in wanted:
            # Adam amplifies gradients near zero
            apart = float((found[key].float() - wanted[key].float()).norm())
            assert apart <= within * (1 + 10 * float(wanted[key].float().norm())), (
                f"{name} {key}: {apart}"
            )
        for file in ("adapter_config.json", "tokenizer.json"):
            assert (mine / file).read_bytes() == (other / file).read_bytes()
        told, single = artifact.read_manifest(mine), artifact.read_manifest(other)
        assert {
            key: told[key] for key in ("kind", "method", "seed", "params", "base", "parameters")
        } == {
            key: single[key] for key in ("kind", "method", "seed", "params", "base", "parameters")
        }


def assert_same_curve(found: Sequence[Step], wanted: Sequence[Step], within: float = 1e-5) -> None:
    assert [(s.step, s.epoch, s.tokens) for s in found] == [
        (s.step, s.epoch, s.tokens) for s in wanted
    ]
    for a, b in zip(found, wanted, strict=True):
        for mine, theirs in (
            (a.loss, b.loss),
            (a.eval_loss, b.eval_loss),
            (a.divergence, b.divergence),
        ):
            assert (mine is None) == (theirs is None)
            assert (
                mine is None
                or theirs is None
                or mine == pytest.approx(theirs, rel=within, abs=within)
            )
        assert a.learning_rate == pytest.approx(b.learning_rate, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=10 * within, abs=within)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiniGPT's project up to the expanded base."""
    return make_base(new_project(tmp_path_factory.mktemp("sweep") / "mini"), BRIEF)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(family_project(tmp_path_factory.mktemp("sweep") / "llama", FAMILIES["llama"]))


GRIDS: dict[str, tuple[Grid, list[str]]] = {
    "ranks and seeds": ({"rank": [1, 8], "seed": [0, 3]}, []),
    "targets": (
        {"target_modules": [["q_proj"], ["v_proj", "fc1"], "attention"]},
        ["train_embeddings=none"],
    ),
    "scales": ({"alpha": [1, 32], "rslora": [False, True], "learning_rate": [1e-3, 2e-4]}, []),
    "beginnings": (
        {"init_lora_weights": ["kaiming", "orthogonal", "pissa"]},
        ["train_embeddings=new_rows"],
    ),
    "patterns and LoRA+": ({"rank_pattern": [{}, {"q_proj": 7}], "loraplus_ratio": [1.0, 4.0]}, []),
    "sentences of any length": (
        {"rank": [2, 3], "seed": [0, 1]},
        ["window=0", "gradient_accumulation_steps=2"],
    ),
    "clipped, by schedules": (
        {"max_grad_norm": [0, 0.3], "schedule": ["linear", "cosine"]},
        ["warmup_steps=3"],
    ),
    "one block again in backward": ({"rank": [2, 4]}, ["gradient_checkpointing=full"]),
    "DoRA beside LoRA": ({"dora": [False, True], "rank": [2, 4]}, ["train_embeddings=none"]),
    "four bits": ({"rank": [2, 4]}, ["quantization=nf4-dq", "train_embeddings=none"]),
    "held out": ({"rank": [2, 4]}, ["eval_share=0.3", "eval_steps=3"]),
    "dropout and noise": (
        {"lora_dropout": [0.0, 0.4], "seed": [0, 1]},
        ["neftune_alpha=5", "eval_share=0.3", "gradient_accumulation_steps=2"],
    ),
    "noise of some": ({"neftune_alpha": [0, 5, 50]}, ["window=0", "lora_dropout=0.2"]),
    "dropout of DoRA and PiSSA": (
        {
            "lora_dropout": [0.0, 0.3],
            "dora": [False, True],
            "init_lora_weights": ["kaiming", "pissa"],
        },
        ["train_embeddings=none"],
    ),
    "decay and warm-up": (
        {"weight_decay": [0.0, 0.3], "warmup_ratio": [0.1, 0.4]},
        ["schedule=linear"],
    ),
    "SGD": ({"rank": [2, 4]}, ["optimizer=sgd", "learning_rate=0.1", "max_steps=7"]),
    "blocks and linears": (
        {"layers_to_transform": [[], ["1"]], "exclude_modules": [[], ["k_proj"]]},
        ["train_embeddings=none"],
    ),
    "modules in full": (
        {"rank": [2, 3]},
        ["modules_to_save=[fc1, final_layer_norm]", "train_embeddings=none", "seed=1"],
    ),
    "AdamW's numbers": (
        {"adam_beta1": [0.5, 0.9], "adam_beta2": [0.9, 0.999], "adam_epsilon": [1e-4]},
        [],
    ),
    "restarts": ({"num_cycles": [1, 3]}, ["schedule=cosine_with_restarts"]),
    "stable, then falling": ({"decay_ratio": [0.2, 0.6]}, ["schedule=warmup_stable_decay"]),
    "polynomials": ({"power": [1, 2], "min_lr_ratio": [0.0, 0.3]}, ["schedule=polynomial"]),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.sampled(3)
def test_an_adapter_of_a_sweep_is_the_one_that_trains_alone(mini: Path, name: str) -> None:
    grid, overrides = GRIDS[name]
    assert_each_as_alone(mini, grid, [f"finetune_lora.{override}" for override in overrides])


def test_with_8_bit_moments_it_is_the_one_that_trains_alone_up_to_what_the_code_rounds(
    mini: Path,
) -> None:
    """The last bits of a gradient may decide between two neighbours of the code."""
    overrides = ["finetune_lora.optimizer=adamw-8bit", "finetune_lora.weight_decay=0.1"]
    assert_each_as_alone(mini, {"learning_rate": [1e-3, 2e-4]}, overrides, within=1e-3)


def test_with_muon_it_is_the_one_that_trains_alone_up_to_what_16_bits_round(mini: Path) -> None:
    """Ranks are padded, and an adapter has none in a layer of another."""
    grid: Grid = {"rank": [2, 4], "target_modules": [["q_proj", "fc1"], ["q_proj"]]}
    assert_each_as_alone(mini, grid, ["finetune_lora.optimizer=muon"], within=1e-2)


def test_on_a_base_in_16_bits_it_is_the_one_that_trains_alone_to_16_bits(mini: Path) -> None:
    overrides = ["precision=bf16", "adapter_precision=bf16", "train_embeddings=none"]
    grid = {"rank": [2, 4]}
    assert_each_as_alone(
        mini, grid, [f"finetune_lora.{override}" for override in overrides], within=2e-2
    )


LLAMA = [
    "learning_rate=3e-4",
    "window=0",
    "target_modules=attention",
    "train_embeddings=none",
    "batch_size=3",
]
ON_LLAMA: dict[str, tuple[Grid, list[str]]] = {
    "ranks, seeds, targets": (
        {"rank": [1, 6], "seed": [0, 1], "target_modules": ["attention", ["down_proj"]]},
        [],
    ),
    "PiSSA and DoRA beside others": (
        {"dora": [False, True], "init_lora_weights": ["pissa", "kaiming"]},
        [],
    ),
    "new rows": ({"seed": [0, 1]}, ["train_embeddings=new_rows", "epochs=2"]),
    "everything at the ends": ({"rank": [2, 3]}, ["train_embeddings=all"]),
    "dropout and noise": (
        {"lora_dropout": [0.0, 0.4], "neftune_alpha": [0.0, 5.0]},
        ["retention_data=data/old.jsonl", "retention_weight=0.5", "gradient_checkpointing=full"],
    ),
    "one block again in backward": ({"rank": [2, 4]}, ["gradient_checkpointing=full"]),
    "what is retained": (
        {"retention_weight": [0.0, 0.5, 2.0]},
        ["retention_data=data/old.jsonl", "retention_batch_size=2"],
    ),
    "the best of what is held out": (
        {"rank": [2, 4]},
        ["eval_share=0.4", "eval_steps=1", "patience=1"],
    ),
}


@pytest.mark.parametrize("name", ON_LLAMA)
@pytest.mark.sampled(4)
@pytest.mark.slow
def test_on_a_real_architecture_it_is_the_one_that_trains_alone(llama: Path, name: str) -> None:
    grid, overrides = ON_LLAMA[name]
    assert_each_as_alone(
        llama, grid, [f"finetune_lora.{override}" for override in [*LLAMA, *overrides]]
    )


@pytest.mark.slow
def test_on_a_real_architecture_in_16_bits_too_whose_blocks_are_tried_before(llama: Path) -> None:
    """The kernels for bf16 are compared with the model's own blocks while no adapter has rows."""
    overrides = [*LLAMA, "precision=bf16", "adapter_precision=bf16"]
    assert_each_as_alone(
        llama,
        {"rank": [2, 4]},
        [f"finetune_lora.{override}" for override in overrides],
        within=3e-2,
    )


def test_sequences_of_any_length_of_all_adapters_are_read_in_one_forward(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    run_body = TransformersModel.run_body

    def counted(self: TransformersModel, read: Any, *rest: Any, **options: Any) -> Any:
        reads.append(read.shape[1])
        return run_body(self, read, *rest, **options)

    monkeypatch.setattr(TransformersModel, "run_body", counted)
    found = []
    for ranks in ([2], [2, 4, 8]):
        reads.clear()
        swept(
            llama,
            {"rank": ranks},
            [f"finetune_lora.{override}" for override in (*LLAMA, "epochs=2")],
        )
        found.append(len(reads))
    assert found[0] == found[1]


# Neighbours


def test_an_adapter_that_diverges_is_stopped_and_its_neighbours_do_not_notice(mini: Path) -> None:
    overrides = ["finetune_lora.epochs=4"]
    manifest, _ = swept(mini, {"learning_rate": [1e-3, 2e-3]}, overrides)
    expected = {
        name: folder_bytes(mini / "artifacts" / "sweep" / name) for name in ("lr-0.001", "lr-0.002")
    }
    manifest, events = swept(mini, {"learning_rate": [1e-3, 1e30, 2e-3]}, overrides)
    assert [row["state"] for row in manifest["adapters"].values()] == ["done", "diverged", "done"]
    folder = mini / "artifacts" / "sweep"
    for name, wanted in expected.items():
        found = folder_bytes(folder / name)
        assert_same_curve(read_steps(folder / name / "loss.csv"), steps_in(wanted["loss.csv"]))
        assert found.keys() == wanted.keys()
    assert not (folder / "lr-1e+30").exists()
    said = next(
        event.text for event in events if isinstance(event, Note) and "is stopped" in event.text
    )
    assert (
        "lr-1e+30 is stopped: at step 2, on data/finetune.de.txt:" in said
        and "Lower its learning_rate" in said
    )
    assert len(read_steps(mini / "runs" / "finetune_sweep" / "lr-1e+30" / "loss.csv")) == 1


def steps_in(text: bytes) -> list[Step]:
    found = [line.split(",") for line in text.decode().splitlines()[1:]]
    return [
        Step(int(s), int(e), float(x), float(r), float(g), int(t)) for s, e, x, r, g, t in found
    ]


def test_where_sequences_share_a_row_what_is_not_finite_is_still_only_its_own(llama: Path) -> None:
    overrides = [f"finetune_lora.{override}" for override in (*LLAMA, "epochs=3")]
    swept(llama, {"rank": [2], "learning_rate": [3e-4]}, overrides)
    wanted = read_steps(llama / "artifacts" / "sweep" / "rank-2_lr-0.0003" / "loss.csv")
    manifest, _ = swept(llama, {"rank": [2], "learning_rate": [1e25, 3e-4]}, overrides)
    assert {name: row["state"] for name, row in manifest["adapters"].items()} == {
        "rank-2_lr-1e+25": "diverged",
        "rank-2_lr-0.0003": "done",
    }
    assert_same_curve(
        read_steps(llama / "artifacts" / "sweep" / "rank-2_lr-0.0003" / "loss.csv"), wanted
    )


def test_where_all_diverge_it_says_so_and_what_was_there_stays(mini: Path) -> None:
    swept(mini, {"rank": [1]}, BRIEF)
    before = folder_bytes(mini / "artifacts" / "sweep")
    with pytest.raises(
        UserError, match=r"finetune_sweep: all adapters diverged.*Lower learning_rate"
    ):
        swept(mini, {"learning_rate": [1e28, 1e30]}, BRIEF)
    assert folder_bytes(mini / "artifacts" / "sweep") == before


@pytest.mark.slow
def test_one_that_finds_nothing_better_stops_early_and_keeps_its_best(llama: Path) -> None:
    overrides = [*LLAMA, "eval_share=0.4", "eval_steps=1", "patience=2", "epochs=40"]
    manifest, events = swept(
        llama, {"learning_rate": [1e-5, 3e-2]}, [f"finetune_lora.{o}" for o in overrides]
    )
    slow, quick = manifest["adapters"].values()
    assert quick["state"] == "stopped early" and quick["steps"] < slow["steps"]
    held_out = [
        s.eval_loss for s in read_steps(llama / "artifacts" / "sweep" / "lr-0.03" / "loss.csv")
    ]
    assert quick["eval_loss"] == min(loss for loss in held_out if loss is not None)
    assert any(
        "lr-0.03 stopped after step" in event.text for event in events if isinstance(event, Note)
    )


# A run like any other


@pytest.mark.parametrize("step", [3, 9, 14])
@pytest.mark.slow
def test_killed_it_goes_on_and_ends_with_the_same_bytes(mini: Path, step: int) -> None:
    grid = "finetune_sweep.grid={rank: [1, 4], learning_rate: [1.0e-3, 1.0e+30], seed: [0, 1]}"
    command = [
        LORA,
        "finetune",
        "sweep",
        "--set",
        grid,
        "--set",
        "finetune_lora.epochs=5",
        "--force",
    ]
    command += ["--checkpoint-every", "4", "--set", "finetune_lora.eval_share=0.3"]
    assert Forked(command, mini).end()[0] == 0
    expected = folder_bytes(mini / "artifacts" / "sweep")
    dies = ("pipeline.training.optimizer.FlatOptimizer.step", step)
    code, _ = Forked(command, mini, dies).end()
    assert code == -signal.SIGKILL
    assert folder_bytes(mini / "artifacts" / "sweep") == expected
    code, errors = Forked(command, mini).end()
    assert code == 0 and ("resumed after step" in errors) == (step > 4)
    assert folder_bytes(mini / "artifacts" / "sweep") == expected


def test_a_second_run_is_taken_from_the_cache_whole(mini: Path) -> None:
    swept(mini, {"rank": [1, 2]}, BRIEF)
    before = folder_bytes(mini / "artifacts" / "sweep")
    for path in sorted((mini / "artifacts" / "sweep").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    _, events = swept(mini, {"rank": [1, 2]}, BRIEF)
    assert "taken from the cache" in "".join(event.text for event in events)
    assert folder_bytes(mini / "artifacts" / "sweep") == before


def test_its_adapters_are_adapters_like_any_other(mini: Path) -> None:
    swept(mini, {"rank": [1, 2]}, BRIEF)
    found = {str(each.path.relative_to(mini)): each for each in adapters(mini)}
    assert (
        found["artifacts/sweep/rank-2"].rank == 2
        and found["artifacts/sweep/rank-2"].problem is None
    )
    verdict = check(describe(mini / "artifacts" / "sweep" / "rank-1"), mini)
    assert (verdict.state, verdict.reason) == ("verified", None)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            "{rank: 4}",
            "finetune_sweep.grid.rank must be a list of values, such as [1, 2], or a range such as "
            "{low: 1, high: 8}, got 4. Change it in --set.",
        ),
        (
            "{rank: [4, 0]}",
            "finetune_sweep.grid.rank must be at least 1, got 0. Change it in --set.",
        ),
        (
            "{batch_size: [4]}",
            "finetune_sweep.grid.batch_size: adapters that train together can differ in seed",
        ),
        ("{rank: [1, 1]}", "finetune_sweep.grid has rank-1 twice. Remove one of them."),
        ("[{}, {}]", "finetune_sweep.grid has {} twice. Remove one of them."),
        ("[1]", "finetune_sweep.grid must be a mapping of keys to lists of values"),
        (
            "{rank: [1], alpha: " + str(list(range(1, 300))) + "}",
            "has 299 combinations; at most 256 adapters",
        ),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_one_line(
    cli: Any, mini: Path, grid: str, message: str
) -> None:
    code, out, err = cli("finetune", "sweep", "--set", f"finetune_sweep.grid={grid}", cwd=mini)
    assert (code, out) == (1, "") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (
            {"rank": [2, 3], "init_lora_weights": ["orthogonal"]},
            "rank-3_init-orthogonal: .*even rank, got 3",
        ),
        (
            {"target_modules": [["q_proj"], ["nope"]]},
            "targets-nope: .*'nope' matches no linear layer",
        ),
    ],
)
def test_what_fits_no_layer_is_refused_by_the_name_of_its_adapter(
    mini: Path, grid: Grid, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        swept(mini, grid)


def test_a_rank_that_is_wider_than_a_matrix_is_noted_once(mini: Path) -> None:
    _, events = swept(mini, {"rank": [2, 65], "seed": [0, 1]}, ["finetune_lora.epochs=1"])
    notes = [
        event.text for event in events if isinstance(event, Note) and "more than" in event.text
    ]
    assert len(notes) == 1 and "finetune_lora.rank 65 is more than" in notes[0]


def test_names_say_what_differs_and_fit_a_folder() -> None:
    grid = {
        "rank": (1,),
        "learning_rate": (1e-3,),
        "target_modules": (("q_proj", "v_proj"),),
        "rank_pattern": ({"a|b": 2},),
    }
    (name,) = variants(FinetuneLora(), FinetuneSweep(grid=grid))
    assert name == "rank-1_lr-0.001_targets-q_proj+v_proj_rank_pattern-a~b=2"
    long = variants(
        FinetuneLora(), FinetuneSweep(grid={"target_modules": tuple(("x" * 120, c) for c in "ab")})
    )
    assert len(long) == 2 and max(map(len, long)) <= 110


# The pieces


def test_the_gradient_of_many_updates_is_autograd_s() -> None:
    torch.manual_seed(0)
    base = nn.Linear(5, 7).double().requires_grad_(False)
    A, B = torch.randn(3, 2, 5).double(), torch.randn(3, 7, 2).double()
    x, scales = torch.randn(12, 5).double(), torch.tensor([0.5, 1.0, 3.0]).double()[:, None, None]
    wanted = torch.autograd.gradcheck(
        lambda x, A, B: batched_lora_forward(x, base, A, B, scales),
        [t.requires_grad_() for t in (x, A, B)],
    )
    assert wanted
    plain = torch.cat(
        [
            base(rows) + s * rows @ a.T @ b.T
            for rows, a, b, s in zip(torch.split(x, 4), A, B, scales.flatten(), strict=True)
        ]
    )
    assert_close(batched_lora_forward(x, base, A, B, scales), plain)


def test_a_scale_that_16_bits_do_not_hold_is_the_same_in_a_sweep_of_16_bit_adapters() -> None:
    torch.manual_seed(0)
    base = nn.Linear(8, 6).requires_grad_(False)
    parts = [LoRALinear(base, 2, scale, torch.bfloat16) for scale in (0.3, 3**-0.5)]
    for part in parts:
        nn.init.normal_(part.lora_B, std=10)
    share, x = AdapterRouting(2), torch.randn(2, 5, 8)
    many = BatchedLoRALinear(base, parts, share, StackedParameters())
    with share.route((5, 5)):
        assert_close(
            many(x), torch.stack([part(rows) for part, rows in zip(parts, x, strict=True)])
        )


@settings(max_examples=30)
@given(
    st.lists(st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=2), min_size=1, max_size=5),
    st.data(),
)
def test_adam_on_rows_is_adam_on_each_row(starts: list[list[float]], data: st.DataObject) -> None:
    rates = data.draw(st.lists(st.floats(1e-4, 0.1), min_size=len(starts), max_size=len(starts)))
    ratios = data.draw(st.lists(st.floats(0.1, 10), min_size=len(starts), max_size=len(starts)))
    both = nn.Parameter(torch.tensor(starts))
    other = nn.Parameter(torch.tensor(starts)[:, :1].clone())
    model = nn.Module()
    model.register_parameter("both", both)
    model.linear = nn.Module()
    model.linear.register_parameter("lora_B", other)
    many = FlatOptimizer(model, ratios=ratios)
    single = [
        [nn.Parameter(p[n].detach().clone()) for p in (both, other)] for n in range(len(starts))
    ]
    adams = [
        torch.optim.Adam([{"params": [a], "lr": r}, {"params": [b], "lr": r * ratio}])
        for (a, b), r, ratio in zip(single, rates, ratios, strict=True)
    ]
    for step in range(4):
        gradients = [
            torch.randn(len(starts), width, generator=torch.Generator().manual_seed(step))
            for width in (2, 1)
        ]
        torch.autograd.backward([both, other], gradients)
        assert_close(many.collect_gradients(), torch.cat(gradients, 1).norm(dim=1))
        many.step(*rates)
        for n, adam in enumerate(adams):
            for p, g in zip(single[n], gradients, strict=True):
                p.grad = g[n].clone()
            adam.step()
            assert_close(both[n], single[n][0], rtol=1e-5, atol=1e-6)
            assert_close(other[n], single[n][1], rtol=1e-5, atol=1e-6)


def test_what_an_adapter_has_not_stays_zero(mini: Path) -> None:
    """Rows of a lower rank and layers that are not targeted: training must leave them zero."""
    from pipeline.models.load import load_base
    from pipeline.stages.methods.lora import lora_spec
    from pipeline.training.batched import ManyAdapters
    from pipeline.training.batches import Batches
    from pipeline.training.loop import steps
    from pipeline.training.step import Learner
    from pipeline.training.task import TrainingTask, build_optimizer
    from tests.helpers.real import listed, windows_of

    model = load_base(mini / "artifacts" / "expanded").model
    own = [
        FinetuneLora(rank=1, epochs=3),
        FinetuneLora(rank=3, target_modules=("v_proj",), epochs=3),
    ]
    ways = [lambda own=own: attach_one(model, lora_spec(model, own, ())) for own in own]
    share = attach_many(model, ways)
    data = listed(windows_of([4, 4, 4, 4, 4]))
    learners = [Learner(settings, Batches(data, 2, 0)) for settings in own]
    list(
        steps(
            TrainingTask(model, learners, ManyAdapters(model, share)), build_optimizer(model, *own)
        )
    )
    for layer in batched_layers(model).values():
        if "lora_A" in layer.trained:
            A, B = layer.trained["lora_A"], layer.trained["lora_B"]
            assert not A[0, 1:].any() and not B[0, :, 1:].any()
            assert B[0, :, 0].any()
    k_proj = next(
        layer
        for layer in batched_layers(model).values()
        if "lora_A" in layer.trained and not layer.shapes[1]
    )
    assert not k_proj.trained["lora_A"][1].any() and not k_proj.trained["lora_B"][1].any()


def attach_one(model: Any, spec: Any) -> None:
    from pipeline.adapters.attach import attach

    torch.manual_seed(0)
    attach(model, spec)


def rows_of(best: object, *others: object) -> dict[str, object]:
    values = [best, *others]
    return {
        str(n): {"values": {"rank": value} if isinstance(value, int) else value}
        for n, value in enumerate(values)
    }


@pytest.mark.parametrize(
    ("rows", "grid", "found"),
    [
        (rows_of(8, 4, 2), {"rank": [2, 4, 8]}, {"rank": ("highest", [8, 16, 32])}),
        (rows_of(2, 4, 8), {"rank": [2, 4, 8]}, {"rank": ("lowest", [2, 1])}),
        (rows_of(4, 2, 8), {"rank": [2, 4, 8]}, {}),
        (rows_of(1, 4, 8), {"rank": [1, 4, 8]}, {}),  # there is no rank below 1
        (rows_of(8), {"rank": [8]}, {}),
        (rows_of({"seed": 2}, {"seed": 1}), {"seed": [1, 2]}, {}),
        (rows_of({"dora": True}, {"dora": False}), {"dora": [False, True]}, {}),
        (
            rows_of({"target_modules": ["a"]}, {"target_modules": ["b"]}),
            {"target_modules": [["a"], ["b"]]},
            {},
        ),
        (rows_of({"lora_dropout": 0.0}, {"lora_dropout": 0.1}), {"lora_dropout": [0.0, 0.1]}, {}),
        (
            rows_of(6, 5, 4),
            {"rank": {"low": 1, "high": 100, "log": False}},
            {"rank": ("highest", [6, 7, 9])},
        ),
        # in two digits, the next numbers are lower
        (
            rows_of({"learning_rate": 0.0102}, {"learning_rate": 0.0101}),
            {"learning_rate": [0.0101, 0.0102]},
            {},
        ),
        # chance: 100 could be drawn
        (rows_of(60, 50, 40), {"rank": {"low": 1, "high": 100, "log": False}}, {}),
        (
            rows_of(90, 50, 9),
            {"rank": {"low": 1, "high": 100, "log": True}},
            {"rank": ("highest", [90, 162, 292])},
        ),
    ],
)
def test_the_best_of_a_sweep_at_the_edge_of_what_was_tried_says_how_to_go_on(
    rows: dict[str, dict[str, object]], grid: dict[str, object], found: dict[str, object]
) -> None:
    assert beyond(rows, "0", grid, FinetuneLora) == found

"""Figure 1: which neurons full fine-tuning changes, how concentrated the change is, and what LoRA trains (§2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.document.figures.data.changes import (
    Changed,
    Trained,
    block_and_name,
    changes,
    held_by,
    held_if_normal,
    matrices,
    needed_for,
    needed_if_normal,
    neurons,
    trained_by,
)
from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.network import Module, draw_network, heights
from pipeline.document.figures.draw.style import WIDE
from pipeline.document.tables import Row, Table, mean, shown
from pipeline.inference import engine
from pipeline.models.base import CausalLM
from pipeline.project.runner import Job

NAME = "finetuning_subspace"
TENTH, MOST = 0.1, 0.9  # of the parameters, and of ‖ΔW‖²
FORMATS = {"part": "", "moved": ".1%", "top_1": ".0%", "top_10": ".0%", "needed_for_90": ".1%"}


@dataclass(frozen=True)
class Measured:
    """`squares`: the squared changes of all weights, of the blocks' weights, and summed by neuron; (n,) each."""

    changed: list[Changed]
    squares: dict[str, Tensor]

    @classmethod
    def of(cls, changed: list[Changed], model: CausalLM) -> "Measured":
        squares = {parameter.name: parameter.change.flatten().square() for parameter in changed}
        in_blocks = [squares[p.name] for p in changed if block_and_name(p.module, model)[0] is not None]
        rows = [matrix.change.square().sum(1) for matrix in matrices(changed)]  # (O, I) → (O,)
        parts = {"weights": [*squares.values()], "weights of the blocks": in_blocks, "neurons": rows}
        return cls(changed, {name: torch.cat(tensors) for name, tensors in parts.items()})

    @property
    def weights(self) -> Tensor:
        return self.squares["weights"]


def finetuning_subspace(job: Job) -> RenderedFigure:
    """Figure 1. Raises UserError."""
    model = engine.load(job.project.artifact("expand_vocab")).model
    measured, trained = Measured.of(changes(job), model), trained_by(job, model)
    modules = _module_table(measured, trained, model)
    concentration = _concentration_table(measured)
    drawn = [_drawn_module(matrix, trained, model) for matrix in matrices(measured.changed)]
    return RenderedFigure(
        NAME,
        "Figure 1, §2",
        "From observation to strategy",
        _summary(concentration),
        _caption(concentration, modules, trained, model),
        (concentration, modules, _neuron_table(measured.changed, model)),
        lambda figure: draw_network(figure, drawn, measured.squares, modules),
        (WIDE, sum(heights(drawn))),
    )


def _neuron_table(changed: list[Changed], model: CausalLM) -> Table:
    rows: list[Row] = []
    for matrix, row, size, relative in neurons(changed):
        block, name = block_and_name(matrix.module, model)
        rows.append({"block": block, "module": name, "neuron": row, "change": size, "relative_change": relative})
    return Table(NAME, "Every neuron: ‖Δw‖ and ‖Δw‖/‖w‖ of its row", rows)


def _concentration_table(measured: Measured) -> Table:
    rows: list[Row] = [
        {
            "part": name,
            "count": len(squares),
            "moved": float((squares > 0).double().mean()),
            "top_1": held_by(squares, 0.01),
            "top_10": held_by(squares, TENTH),
            "needed_for_90": needed_for(squares, MOST),
        }
        for name, squares in measured.squares.items()
    ]
    normal: Row = {
        "part": "normal",
        "count": None,
        "moved": 1.0,
        "top_1": held_if_normal(0.01),
        "top_10": held_if_normal(TENTH),
        "needed_for_90": needed_if_normal(MOST),
    }
    title = "Share of ‖ΔW‖² in those that change most; *normal*: if all changes followed one normal distribution"
    return Table(f"{NAME}_concentration", title, [*rows, normal], FORMATS)


def _module_table(measured: Measured, trained: Trained, model: CausalLM) -> Table:
    """One row per matrix; the last row is all vectors (biases and norms) together."""
    total = float(measured.weights.sum())
    rows: list[Row] = [
        _module_row(matrix, trained, model, total, len(measured.weights)) for matrix in matrices(measured.changed)
    ]
    vectors = [parameter for parameter in measured.changed if parameter.change.ndim == 1]
    change, before = (torch.cat([getattr(vector, key) for vector in vectors]) for key in ("change", "before"))
    rows.append(
        {
            **dict.fromkeys(rows[0]),
            "module": "biases and norms",
            "weights": len(change),
            "share_of_weights": len(change) / len(measured.weights),
            "share_of_change": float(change.square().sum()) / total,
            "relative_change": float(change.norm() / before.norm()),
            "moved": float((change != 0).double().mean()),
            "lora_rank": 0,
            "rows_in_full": 0,
        }
    )
    formats = {"share_of_weights": ".1%", "share_of_change": ".1%", "relative_change": ".3f", "moved": ".1%"}
    return Table(
        f"{NAME}_modules", "Each matrix: its change by full fine-tuning, and what the adapter trains", rows, formats
    )


def _module_row(matrix: Changed, trained: Trained, model: CausalLM, total: float, weights: int) -> Row:
    block, name = block_and_name(matrix.module, model)
    return {
        "block": block,
        "module": name,
        "weights": matrix.change.numel(),
        "share_of_weights": matrix.change.numel() / weights,
        "share_of_change": float(matrix.change.square().sum()) / total,
        "relative_change": float(matrix.change.norm() / matrix.before.norm()),
        "moved": float((matrix.change != 0).double().mean()),
        "lora_rank": trained.rank(matrix.module),
        "rows_in_full": len(trained.rows(matrix.module, len(matrix.change))),
    }


def _drawn_module(matrix: Changed, trained: Trained, model: CausalLM) -> Module:
    block, name = block_and_name(matrix.module, model)
    in_full = frozenset(trained.rows(matrix.module, len(matrix.change)))
    return Module(block, name, tuple(matrix.relative.tolist()), trained.rank(matrix.module), in_full)


def _by_part(table: Table) -> dict[str, Row]:
    return {str(row["part"]): row for row in table.rows}


def _summary(concentration: Table) -> str:
    rows = _by_part(concentration)
    weights, of_neurons, normal = (shown(rows[part]["top_10"], ".0%") for part in ("weights", "neurons", "normal"))
    moved = shown(rows["weights"]["moved"], ".0%")
    return (
        f"{moved} of all weights move; the tenth that moves most has {weights} of ‖ΔW‖² ({normal} if normal), "
        f"of neurons {of_neurons}"
    )


def _caption(concentration: Table, modules: Table, trained: Trained, model: CausalLM) -> str:
    rows = _by_part(concentration)
    weights, of_neurons, normal = rows["weights"], rows["neurons"], rows["normal"]
    most = max(modules.rows, key=lambda row: mean(row["share_of_change"]))
    in_full = [name for name in model.embedding_and_head if trained.rows(name, model.shape.rows)]
    also = (
        f" It also trains rows of {' and '.join(in_full)} in full: the base is not entirely frozen." if in_full else ""
    )
    return "\n\n".join(
        [
            "Left: every neuron of MiniGPT (a row of a matrix), colored by its relative change ‖Δw‖/‖w‖ in full "
            "fine-tuning. Right: what the adapter trains instead, according to its config.",
            "The document says that only a small subset changes significantly. Measured: "
            f"{shown(weights['moved'], '.1%')} of the weights change, because Adam moves every weight with a gradient. "
            f"They do not change equally: the top tenth has {shown(weights['top_10'], '.0%')} of ‖ΔW‖², against "
            f"{shown(normal['top_10'], '.0%')} if all changes followed one normal distribution; the top tenth of the "
            f"neurons has {shown(of_neurons['top_10'], '.0%')}. 90% of ‖ΔW‖² takes "
            f"{shown(weights['needed_for_90'], '.0%')} of the weights "
            f"(normal: {shown(normal['needed_for_90'], '.0%')}). The module with the largest share is "
            f"{_module_name(most)}, with "
            f"{shown(most['share_of_weights'], '.0%')} of the weights and {shown(most['share_of_change'], '.0%')} of "
            "‖ΔW‖². Among the weights of the blocks, where LoRA is applied, the top tenth has "
            f"{shown(rows['weights of the blocks']['top_10'], '.0%')} of their ‖ΔW‖².",
            f"The adapter has A and B of rank {_ranks(modules.rows)} on {len(trained.adapted)} matrices.{also}",
        ]
    )


def _module_name(row: Row) -> str:
    return str(row["module"]) if row["block"] is None else f"{row['module']} of block {row['block']}"


def _ranks(rows: Sequence[Row]) -> str:
    ranks = sorted({int(str(row["lora_rank"])) for row in rows} - {0})
    return " and ".join(map(str, ranks))

"""Figure 1: which neurons full fine-tuning moves, how concentrated that is, and what LoRA trains instead (§2)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.document.figures.data.changes import (
    Changed,
    Trained,
    changes,
    held_by,
    held_if_normal,
    last_names,
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
TENTH, MOST = 0.1, 0.9
FORMS = {"part": "", "moved": ".1%", "top_1": ".0%", "top_10": ".0%", "needed_for_90": ".1%"}


@dataclass(frozen=True)
class Measured:
    """Squares of the changes, of all that is named: every weight, those in the blocks, and every neuron's together."""

    changed: list[Changed]
    squares: dict[str, Tensor]

    @classmethod
    def of(cls, changed: list[Changed], model: CausalLM) -> "Measured":
        squares = {one.name: one.change.flatten().square() for one in changed}
        inside = [squares[one.name] for one in changed if last_names(one.module, model)[0] is not None]
        rows = [one.change.square().sum(1) for one in matrices(changed)]
        parts = {"weights": [*squares.values()], "weights of the blocks": inside, "neurons": rows}
        return cls(changed, {name: torch.cat(of) for name, of in parts.items()})

    @property
    def weights(self) -> Tensor:
        return self.squares["weights"]


def finetuning_subspace(job: Job) -> RenderedFigure:
    """Figure 1. Raises UserError."""
    model = engine.load(job.project.artifact("expand_vocab")).model
    measured, trained = Measured.of(changes(job), model), trained_by(job, model)
    modules = _modules(measured, trained, model)
    concentration = _concentration(measured)
    placed = [_placed(one, trained, model) for one in matrices(measured.changed)]
    return RenderedFigure(
        NAME,
        "Figure 1, §2",
        "From observation to strategy",
        _shows(concentration),
        _caption(concentration, modules, trained, model),
        (concentration, modules, _neurons(measured.changed, model)),
        lambda figure: draw_network(figure, placed, measured.squares, modules),
        (WIDE, sum(heights(placed))),
    )


def _neurons(changed: list[Changed], model: CausalLM) -> Table:
    rows: list[Row] = []
    for one, row, size, relative in neurons(changed):
        block, name = last_names(one.module, model)
        rows.append({"block": block, "module": name, "neuron": row, "change": size, "relative_change": relative})
    return Table(NAME, "Every neuron: ‖Δw‖ and ‖Δw‖/‖w‖ of its row", rows)


def _concentration(measured: Measured) -> Table:
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
    title = "Share of ‖ΔW‖² in those that change most; *normal*: if all changes were of one normal distribution"
    return Table(f"{NAME}_concentration", title, [*rows, normal], FORMS)


def _modules(measured: Measured, trained: Trained, model: CausalLM) -> Table:
    """Matrices one by one, all vectors (biases and norms) together in a last row."""
    total = float(measured.weights.sum())
    rows: list[Row] = [_module(one, trained, model, total, len(measured.weights)) for one in matrices(measured.changed)]
    vectors = [one for one in measured.changed if one.change.ndim == 1]
    change, before = (torch.cat([getattr(one, key) for one in vectors]) for key in ("change", "before"))
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
    forms = {"share_of_weights": ".1%", "share_of_change": ".1%", "relative_change": ".3f", "moved": ".1%"}
    return Table(f"{NAME}_modules", "Each matrix: what full fine-tuning changes, what the adapter trains", rows, forms)


def _module(one: Changed, trained: Trained, model: CausalLM, total: float, weights: int) -> Row:
    block, name = last_names(one.module, model)
    return {
        "block": block,
        "module": name,
        "weights": one.change.numel(),
        "share_of_weights": one.change.numel() / weights,
        "share_of_change": float(one.change.square().sum()) / total,
        "relative_change": float(one.change.norm() / one.before.norm()),
        "moved": float((one.change != 0).double().mean()),
        "lora_rank": trained.rank(one.module),
        "rows_in_full": len(trained.rows(one.module, len(one.change))),
    }


def _placed(one: Changed, trained: Trained, model: CausalLM) -> Module:
    block, name = last_names(one.module, model)
    in_full = frozenset(trained.rows(one.module, len(one.change)))
    return Module(block, name, tuple(one.relative.tolist()), trained.rank(one.module), in_full)


def _by_part(table: Table) -> dict[str, Row]:
    return {str(row["part"]): row for row in table.rows}


def _shows(concentration: Table) -> str:
    rows = _by_part(concentration)
    weights, neurons_, normal = (shown(rows[part]["top_10"], ".0%") for part in ("weights", "neurons", "normal"))
    moved = shown(rows["weights"]["moved"], ".0%")
    return (
        f"{moved} of all weights move; the tenth that moves most has {weights} of ‖ΔW‖² ({normal} if normal), "
        f"of neurons {neurons_}"
    )


def _caption(concentration: Table, modules: Table, trained: Trained, model: CausalLM) -> str:
    rows = _by_part(concentration)
    weights, each, normal = rows["weights"], rows["neurons"], rows["normal"]
    most = max(modules.rows, key=lambda row: mean(row["share_of_change"]))
    ends = [name for name in model.embedding_and_head if trained.rows(name, model.shape.rows)]
    besides = (
        f" Of {' and '.join(ends)} it trains rows in full besides: not everything of the base is frozen."
        if ends
        else ""
    )
    return "\n\n".join(
        [
            "Left: every neuron of MiniGPT, a row of a matrix, coloured by how far full fine-tuning moves it, relative "
            "to its length. Right: what the adapter trains instead, where its own config puts it.",
            "The document says that only a small subset changes significantly. Measured: "
            f"{shown(weights['moved'], '.1%')} of the weights move at all, since Adam moves whatever has a gradient. "
            f"But not equally: the tenth that moves most has {shown(weights['top_10'], '.0%')} of ‖ΔW‖², against "
            f"{shown(normal['top_10'], '.0%')} if all changes were of one normal distribution; of whole neurons the "
            "first tenth has "
            f"{shown(each['top_10'], '.0%')}. For 90% of ‖ΔW‖² {shown(weights['needed_for_90'], '.0%')} of the weights "
            f"are needed (normal: {shown(normal['needed_for_90'], '.0%')}). Most of it is in one module: "
            f"{_called(most)} has {shown(most['share_of_weights'], '.0%')} of the weights and "
            f"{shown(most['share_of_change'], '.0%')} of ‖ΔW‖². Of the weights of the blocks alone, to which LoRA is "
            f"applied, the first tenth has {shown(rows['weights of the blocks']['top_10'], '.0%')} of their ‖ΔW‖².",
            f"The adapter has A and B of rank {_ranks(modules.rows)} on {len(trained.adapted)} matrices.{besides}",
        ]
    )


def _called(row: Row) -> str:
    return str(row["module"]) if row["block"] is None else f"{row['module']} of block {row['block']}"


def _ranks(rows: Sequence[Row]) -> str:
    ranks = sorted({int(str(row["lora_rank"])) for row in rows} - {0})
    return " and ".join(map(str, ranks))

"""study_learning_rate: what LoRA Without Regret says of learning rate, rank and targets, on the
project's own base.

Schulman et al., Thinking Machines Lab 2025, thinkingmachines.ai/blog/lora.
"""

from collections.abc import Generator, Sequence
from typing import Annotated

from msgspec.structs import replace

from lab.report import COLORS, Figure, Findings, error_bars
from lab.runner import Run, Trained, full_runs, sweep_run, train
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.project.logs.run_log import LOSS, read_steps
from pipeline.project.params.schema import Count, File, Rate, Section, Seed
from pipeline.project.params.sections import Training
from pipeline.project.runner import Event, Job
from pipeline.stages.methods.full import FinetuneFull
from pipeline.stages.methods.lora import FinetuneLora

PLACE = "§5, LoRA Without Regret"
FULL, ALL, ATTENTION, FEED_FORWARD = "full", "all-linear", "attention", "feed_forward"
MARKERS = "osv^D<>ph*"


class StudyLearningRate(Section, frozen=True, kw_only=True):
    """Learning rate × rank × targets in one pass, and full fine-tuning. Trains as finetune_lora,
    except for these.
    """

    data: Annotated[File, "examples to train on; empty: the project does not have this study"] = ""
    eval_data: Annotated[str, "examples whose loss is compared"] = "data/finetune.de.txt"
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1, 2)
    epochs: Annotated[Count, "times that every example is seen"] = 20
    learning_rates: Annotated[tuple[Rate, ...], "of LoRA"] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    full_rates: Annotated[tuple[Rate, ...], "of full fine-tuning"] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    ranks: Annotated[tuple[Count, ...], "of LoRA on all linears"] = (1, 4, 16, 64)
    attention_rank: Annotated[Count, "of LoRA on attention alone"] = 5
    feed_forward_rank: Annotated[
        Count, "of LoRA on feed-forward alone, with about as many parameters"
    ] = 4
    alpha: Annotated[Rate, "of LoRA, at every rank"] = 32.0


STAGE = study_stage(
    __name__,
    PLACE,
    title="Learning rate, rank and targets",
    about="the claims of LoRA Without Regret, on any base",
    settings=StudyLearningRate,
    data=("data", "eval_data"),
    extra_sections=("finetune_lora",),
    minigpt_only=False,
)


def measure(job: Job, settings: StudyLearningRate) -> Generator[Event, None, Findings]:
    """Train every combination, all adapters in one pass, and full fine-tuning at each rate → two
    tables.
    """
    made = yield from train(
        job, runs_of(settings, job.project.params.finetune_lora), diverging=True
    )
    groups: list[tuple[str, int | None]] = [(ALL, rank) for rank in settings.ranks]
    groups += [
        (ATTENTION, settings.attention_rank),
        (FEED_FORWARD, settings.feed_forward_rank),
        (FULL, None),
    ]
    losses, best = list[Row](), list[Row]()
    for targets, rank in groups:
        own = [one for one in made if _group(one) == (targets, rank)]
        if not own:
            raise UserError(
                f"{job.stage.name}: {targets}, rank {rank}, diverged at each rate. Add lower rates."
            )
        trained = read_manifest(own[0].folder)["parameters"]["trainable"]
        rows = list[Row]()
        for rate in settings.full_rates if targets == FULL else settings.learning_rates:
            by_seed = [_loss(one) for one in own if one.settings.learning_rate == rate]
            loss = Spread.of(by_seed) if by_seed else None
            diverged = len(settings.seeds) - len(by_seed)
            rows.append(
                {
                    "targets": targets,
                    "rank": rank,
                    "learning_rate": rate,
                    "loss": loss,
                    "diverged": diverged,
                }
            )
        losses += rows
        least = min(
            (row for row in rows if row["loss"] is not None), key=lambda row: float(row["loss"])
        )
        at_edge = least["learning_rate"] in (rows[0]["learning_rate"], rows[-1]["learning_rate"])
        best.append(
            {
                **{key: least[key] for key in ("targets", "rank", "learning_rate", "loss")},
                "trained": trained,
            }
        )
        best[-1]["at_edge"] = at_edge  # type: ignore[index]
    formats = {"learning_rate": "g", "loss": ".4f"}
    tables = (
        Table(
            "best", "The best learning rate of each, and the evaluation loss there", best, formats
        ),
        Table("losses", "Evaluation loss by learning rate", losses, formats),
    )
    return Findings(_text(best), tables, lambda figure: _draw(figure, losses), (9, 4.5))


def runs_of(settings: StudyLearningRate, lora: FinetuneLora) -> list[Run]:
    """One sweep of all adapters, then full fine-tuning; at constant rates, as the blog post has
    them.
    """
    common = {
        "data": settings.data,
        "eval_data": settings.eval_data,
        "epochs": settings.epochs,
        "max_steps": 0,
        "eval_share": 0.0,
        "eval_steps": 0,
        "patience": 0,
        "columns": {},
        "schedule": "constant",
        "warmup_steps": 0,
        "warmup_ratio": 0.0,
    }
    base = replace(
        lora,
        **common,
        alpha=settings.alpha,
        rank_pattern={},
        alpha_pattern={},
        train_embeddings="none" if lora.train_embeddings == "none" else "new_rows",
        retention_weight=0.0,
        init_from="",
    )
    shared = {"learning_rate": settings.learning_rates, "seed": settings.seeds}
    ranks = {
        ALL: settings.ranks,
        ATTENTION: (settings.attention_rank,),
        FEED_FORWARD: (settings.feed_forward_rank,),
    }
    grids = [
        {**shared, "rank": of, "target_modules": ((targets,),)} for targets, of in ranks.items()
    ]
    runs = [sweep_run("adapters", base, *grids)]
    full = FinetuneFull(**{key: getattr(base, key) for key in Training.__struct_fields__})
    for rate in settings.full_rates:
        runs += full_runs(f"full, rate {rate:g}", replace(full, learning_rate=rate), settings.seeds)
    return runs


def _group(one: Trained) -> tuple[str, int | None]:
    """Targets and rank; full fine-tuning has no rank."""
    own = one.settings
    return (own.target_modules[0], own.rank) if isinstance(own, FinetuneLora) else (FULL, None)


def _loss(one: Trained) -> float:
    """The evaluation loss after the last step, nats per token."""
    (*_, last) = read_steps(one.folder / LOSS)
    # there is evaluation data, and a last step is always evaluated
    assert last.eval_loss is not None
    return last.eval_loss


def _name(row: Row) -> str:
    return "full fine-tuning" if row["rank"] is None else f"{row['targets']}, rank {row['rank']}"


def _text(best: Sequence[Row]) -> str:
    each = "; ".join(
        f"{_name(row)}: {row['learning_rate']:g}, where the loss is {shown(row['loss'], '.4f')}"
        f"{' (the last rate tried on this side)' if row['at_edge'] else ''}"
        for row in best
    )
    return (
        f"The best of the learning rates tried: {each}. The loss is the mean cross-entropy on the "
        "evaluation examples after the last step, in nats per token. All adapters trained in one "
        "pass, with the same alpha at each rank."
    )


def _draw(figure: Figure, losses: Sequence[Row]) -> None:
    """Evaluation loss over learning rate: a line for each rank and set of targets."""
    axis = figure.subplots()
    names = list(dict.fromkeys(map(_name, losses)))
    colors = [COLORS[name] for name in ("lora", "prefix", "freeze", "prompt", "scratch")]
    for number, name in enumerate(names):
        cells = {
            r["learning_rate"]: r["loss"]
            for r in losses
            if _name(r) == name and r["loss"] is not None
        }
        color = COLORS["full"] if number == len(names) - 1 else colors[number % len(colors)]
        error_bars(
            axis,
            cells,
            list(cells.values()),
            label=name,
            color=color,
            marker=MARKERS[number % len(MARKERS)],
        )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="learning rate",
        ylabel="evaluation loss (nats per token)",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)

"""study_fact_correction: §6's tables (V only against all projections), and the effect of training
embeddings and head.

The document gives rank and epochs but not learning rate, alpha and window. So a small grid of those
is trained, and the tables show the setting that comes nearest to the document's numbers.
"""

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from msgspec.structs import replace

from lab.measures import NextTokenAnswers, ask, check_words, document, prompts_of
from lab.report import COLORS, Figure, Findings, min_max
from lab.runner import (
    DOCUMENT,
    Run,
    Trained,
    by,
    checkpoints,
    describe_window,
    sweep_run,
    train,
    wider_base,
)
from lab.studies import study_stage
from lab.tables import Row, Spread, Table, shown
from pipeline.data.answers.prompts import Prompt
from pipeline.data.formats import read_examples
from pipeline.errors import UserError
from pipeline.files.artifact import read_manifest
from pipeline.project.params.schema import Count, Rate, Section, Seed, Steps
from pipeline.project.params.sections import change_paths
from pipeline.project.runner import Event, Job
from pipeline.stages.methods.lora import FinetuneLora

if TYPE_CHECKING:
    from pipeline.inference.engine import LoadedModel

PLACE = "§6"
GROUP = "fact_correction"
PROJECTIONS = {  # name → target modules; "attention" are the document's four projections
    **{name: (name,) for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
    "feed_forward": ("fc1", "fc2"),
    "q_proj+v_proj": ("q_proj", "v_proj"),
    "attention": DOCUMENT.target_modules,
    "all": (*DOCUMENT.target_modules, "fc1", "fc2"),
}
# of new rows (§9.1)
STARTS = {"mean_noise": "mean and noise", "zeros": "zeros", "copy": "copies of an old row"}
NEW_ROW_EPOCHS = 10  # later the losses are small whatever the rows began with
TARGETS = {"v_proj": ("v_proj",), "all": DOCUMENT.target_modules}
EMBEDDINGS: Mapping[Literal["all", "new_rows", "none"], str] = {
    "all": "embeddings and head in full",
    "new_rows": "only their new rows",
    "none": "neither",
}
POINTS = 0.15  # a probability this close to the document's counts as equal
PERCENT = ".0%"
Pair = tuple[str, str]  # a prompt and the next word


class StudyFactCorrection(Section, frozen=True, kw_only=True):
    """§6: V only against all projections, over the settings the document leaves open, and without
    full embeddings.
    """

    data: Annotated[str, "the sentences that it trains or measures on"] = (
        "data/fact_correction.de.txt"
    )
    retention_data: Annotated[str, "texts on which answers must stay the base's"] = (
        "data/retain.de.txt"
    )
    prompts: Annotated[str, "prompts with the answers they must keep, change or learn"] = (
        "data/prompts.yaml"
    )
    document: Annotated[str, "the document's answers to the prompts"] = "data/document.yaml"
    seeds: Annotated[tuple[Seed, ...], "each is a run of its own"] = (0, 1, 2)
    epochs: Annotated[Count, "times that every example is seen"] = 80
    rank: Annotated[Count, "LoRA's rank"] = 4
    alphas: Annotated[tuple[Rate, ...], "every combination of these and the next two is tried"] = (
        0.5,
        1.0,
        8.0,
    )
    learning_rates: Annotated[tuple[Rate, ...], "learning rates that are tried"] = (1e-3, 2e-3)
    windows: Annotated[tuple[Steps, ...], "tokens per training window; 0: whole sentences"] = (4, 0)
    retention_weight: Annotated[Rate, "weight of the divergence from the base"] = 5.0
    top_k: Annotated[Count, "likeliest next words that are kept"] = 5
    d_model: Annotated[
        Count, "width of another base, pretrained here: whether the correction bleeds less (§6)"
    ] = 256
    new_data: Annotated[str, "sentences of the new words (§9.1)"] = "data/finetune.de.txt"


STAGE = study_stage(
    __name__,
    PLACE,
    title="Fact correction",
    about="V-only against all projections, what else trains, and what retaining keeps",
    settings=StudyFactCorrection,
    data=("data", "retention_data", "prompts", "document", "new_data"),
)


class Cell(NamedTuple):
    """A cell of the document's tables: `model`'s first choice after `prompt`, and its
    probability.
    """

    prompt: str
    model: str  # original, v_proj or all
    word: str
    probability: float


class Setting(NamedTuple):
    """What the document leaves open."""

    window: int
    learning_rate: float
    alpha: float

    def __str__(self) -> str:
        return (
            f"{describe_window(self.window)}, learning rate {self.learning_rate:g}, alpha "
            f"{self.alpha:g}"
        )


class Tuned(NamedTuple):
    """An adapter and its answers to the prompts."""

    made: Trained
    answers: NextTokenAnswers

    @property
    def setting(self) -> Setting:
        return Setting(
            self.made.settings.window, self.made.settings.learning_rate, self.made.settings.alpha
        )

    @property
    def targets(self) -> str:
        return next(
            name
            for name, modules in TARGETS.items()
            if modules == self.made.settings.target_modules
        )


def measure(job: Job, settings: StudyFactCorrection) -> Generator[Event, None, Findings]:
    """Train the grid and the variants of embeddings with all seeds → five tables; and three more
    for §6 and §9.1.
    """
    from pipeline.inference import engine

    # What is asked, and what the document's models answered.
    prompts = prompts_of(job, settings.prompts, GROUP)
    rules = {prompt.prompt: prompt.rule for prompt in prompts}
    # sofa, wald, ... himmel, garten
    expected = [(prompt.prompt, prompt.corrected) for prompt in prompts]
    cells = []
    for row in document(job, settings.document, GROUP):
        if row["prompt"] not in rules:
            raise UserError(
                f"{settings.document}: {row['prompt']!r} is not in {settings.prompts}. Add it "
                "there."
            )
        cells += [
            Cell(row["prompt"], model, *pair)
            for model in ("original", *TARGETS)
            for pair in row[model].items()
        ]
    base = job.artifact("expand_vocab")
    before = ask(engine.load(base), list(rules))
    check_words(before.loaded, expected, settings.prompts)
    check_words(before.loaded, [(cell.prompt, cell.word) for cell in cells], settings.document)

    # The grid of what the document leaves open, embeddings and head in full as in §9.2.
    targets, seeds = list(TARGETS.values()), settings.seeds
    lora = replace(DOCUMENT, data=settings.data, epochs=settings.epochs, rank=settings.rank)
    values = {
        "target_modules": targets,
        "learning_rate": settings.learning_rates,
        "alpha": settings.alphas,
    }
    grid = [
        sweep_run(describe_window(n), replace(lora, window=n), values | {"seed": seeds})
        for n in settings.windows
    ]
    # Embeddings and head trained in full, in their new rows, or not at all; with and without retain
    # texts.
    other = replace(lora, alpha=float(settings.rank), retention_data=settings.retention_data)
    values = {
        "target_modules": targets,
        "retention_weight": (0.0, settings.retention_weight),
        "seed": seeds,
    }
    variants = [
        sweep_run(f"embeddings {kind}", replace(other, train_embeddings=kind), values)
        for kind in EMBEDDINGS
    ]
    made = yield from train(job, [*grid, *variants])
    tuned = [Tuned(one, ask(one.load(base), list(rules))) for one in made]
    in_grid = {run.name for run in grid}
    of_grid, others = (
        [one for one in tuned if (one.made.run in in_grid) == inside] for inside in (True, False)
    )
    by_setting = by(lambda one: one.setting, of_grid)
    nearest, rows, tried = _compare_settings(by_setting, before, cells, rules)
    of_nearest = by_setting[nearest]

    # The expected words, each followed by the answers of the document's corrected models to the
    # same prompt.
    said = [(cell.prompt, cell.word) for cell in cells if cell.model in TARGETS]
    every = [
        pair for own in expected for pair in (own, *(pair for pair in said if pair[0] == own[0]))
    ]
    columns = column_names(every)

    def probabilities(pairs: Iterable[Pair], answers: Sequence[NextTokenAnswers]) -> Row:
        return {
            columns[pair]: Spread.of(each.probability(*pair) for each in answers) for pair in pairs
        }

    original = {"train_embeddings": "", "retain": False, "model": "original"}
    embeddings: list[Row] = [{**original, **probabilities(expected, [before])}]
    for (kind, retain, model), group in by(
        lambda one: (
            one.made.settings.train_embeddings,
            one.made.settings.retention_weight > 0,
            one.targets,
        ),
        others,
    ).items():
        own = {"train_embeddings": kind, "retain": retain, "model": model}
        embeddings.append({**own, **probabilities(expected, [one.answers for one in group])})
    alone = [part for one in of_nearest for part in _parts(one, before.loaded, list(rules))]
    parts: list[Row] = [
        {
            "model": model,
            "trained": part,
            **probabilities(columns, [answers for _, _, answers in group]),
        }
        for (model, part), group in by(lambda part: part[:2], alone).items()
    ]

    first_seed = {
        name: next(one.answers for one in of_nearest if one.targets == name) for name in TARGETS
    }
    top = [
        {
            "prompt": prompt,
            "model": model,
            **{
                f"top_{n}": f"{c.token} {c.probability:.0%}"
                for n, c in enumerate(one.top(prompt, settings.top_k), 1)
            },
        }
        for prompt in rules
        for model, one in {"original": before, **first_seed}.items()
    ]
    v_only = replace(lora, **nearest._asdict(), target_modules=TARGETS["v_proj"])
    of_v = [one for one in of_nearest if one.targets == "v_proj"]
    widths = yield from _widths(job, settings, of_v, v_only, prompts)
    projections = yield from _projections(job, settings, lora, prompts)
    new_rows = yield from _new_rows(job, settings)
    formats = dict.fromkeys(("document", "measured", "least", "greatest", "distance"), PERCENT)
    formats |= {"learning_rate": "g", "alpha": "g", "first_choices": ".1f"}
    losses = dict.fromkeys(("new_loss", "new_loss_before", "new_loss_after"), ".3f")
    shares = dict.fromkeys(("probability_target", "share_moved", "probability_kept"), PERCENT)
    percents = {"d_model": "", **shares, **losses}
    title = "Effect of training embeddings and head, and of retain texts"
    tables = (
        Table(
            "rows", f"§6's two tables, trained on {nearest}", rows, formats, ("kind", "same_first")
        ),
        Table(
            "settings",
            f"Settings that §6 leaves open, {len(said)} cells each",
            tried,
            formats,
            ("window",),
        ),
        Table("embeddings", title, embeddings, dict.fromkeys(embeddings[0], PERCENT)),
        Table(
            "parts", "Effect of each trained part alone", parts, dict.fromkeys(parts[0], PERCENT)
        ),
        Table("top", f"The top {settings.top_k} words, first seed", top),
        Table("widths", "V only on a wider base", widths, percents),
        Table(
            "projections",
            "Single projections, with neither embeddings nor head",
            projections,
            percents,
        ),
        Table(
            "new_rows",
            f"How rows of new words begin; loss after {NEW_ROW_EPOCHS} epochs",
            new_rows,
            percents,
        ),
    )
    changing, staying = (
        [columns[pair] for pair in expected if rules[pair[0]] == f"must_{r}"]
        for r in ("change", "keep")
    )
    text = _text(rows, len(tried), embeddings, parts, changing, staying)
    text = f"{text}\n\n{_describe_others(widths, projections, new_rows)}"
    return Findings(text, tables, lambda figure: _draw(figure, rows), (10, 4.4))


def _corrected(answers: NextTokenAnswers, prompts: Sequence[Prompt]) -> Row:
    """The mean probability of the corrected words, the share of them that is first, and of words
    that should stay.
    """
    changing, staying = (
        [(p.prompt, p.corrected) for p in prompts if p.rule == rule]
        for rule in ("must_change", "must_keep")
    )
    return {
        "probability_target": fmean(answers.probability(*pair) for pair in changing),
        "share_moved": fmean(answers.first(prompt) == word for prompt, word in changing),
        "probability_kept": fmean(answers.probability(*pair) for pair in staying),
    }


def _widths(
    job: Job,
    settings: StudyFactCorrection,
    of_base: Sequence[Tuned],
    lora: FinetuneLora,
    prompts: Sequence[Prompt],
) -> Generator[Event, None, list[Row]]:
    """§6, why not simply increase d_model: V only at the nearest setting, on the base and on a
    wider one.

    One wider base is pretrained, with a feed-forward network wider by the same factor; the
    correction has all seeds.
    """
    shape, texts = job.project.params.pretrain, [prompt.prompt for prompt in prompts]
    wide = replace(
        shape,
        d_model=settings.d_model,
        feed_forward=shape.feed_forward * settings.d_model // shape.d_model,
    )
    other = yield from wider_base(job, wide)
    lora = replace(
        lora, data=change_paths(lora.data, lambda name: str(job.path(name)))
    )  # absolute, since the wider base is in another folder
    run = sweep_run("wider base, V only", lora, {"seed": settings.seeds})
    made = yield from train(other, [run])
    asked = [(shape.d_model, one.made, one.answers) for one in of_base]
    asked += [
        (wide.d_model, one, ask(one.load(other.artifact("expand_vocab")), texts)) for one in made
    ]
    return [
        {"d_model": d_model, "seed": one.settings.seed, **_corrected(answers, prompts)}
        for d_model, one, answers in asked
    ]


def _projections(
    job: Job, settings: StudyFactCorrection, lora: FinetuneLora, prompts: Sequence[Prompt]
) -> Generator[Event, None, list[Row]]:
    """§6, §9.2: which projections learn the correction, if neither embeddings nor head train."""
    from pipeline.inference.score import score

    own = replace(lora, alpha=float(settings.rank), train_embeddings="none")
    values = {"target_modules": PROJECTIONS.values(), "seed": settings.seeds}
    made, base = (
        (yield from train(job, [sweep_run("projections", own, values)])),
        job.artifact("expand_vocab"),
    )
    names = {modules: name for name, modules in PROJECTIONS.items()}
    examples, rows = read_examples(job.path(settings.data), settings.data), list[Row]()
    for one in made:
        loaded = one.load(base)
        target = _corrected(ask(loaded, [prompt.prompt for prompt in prompts]), prompts)[
            "probability_target"
        ]
        measured = {"probability_target": target, "new_loss": score(loaded, examples).loss}
        rows.append(
            {"targets": names[one.settings.target_modules], "seed": one.settings.seed, **measured}
        )
    return rows


def _new_rows(job: Job, settings: StudyFactCorrection) -> Generator[Event, None, list[Row]]:
    """§9.1: how the rows of new words begin, with the losses on the new sentences before and after
    some epochs.
    """
    import torch

    from pipeline.adapters.lora import weight_of
    from pipeline.inference.score import score
    from pipeline.models.base import CausalLM

    first, stop = read_manifest(job.artifact("expand_vocab"))["new_rows"]
    examples, rows = read_examples(job.path(settings.new_data), settings.new_data), list[Row]()
    for start, seed in product(STARTS, settings.seeds):

        def begin(model: CausalLM, start: str = start, seed: int = seed) -> None:
            old = int(torch.randint(first, (1,), generator=torch.Generator().manual_seed(seed)))
            # (V, D)
            for weight in (weight_of(module).data for module in (model.embeddings, model.head)):
                if start != "mean_noise":  # expand_vocab's own
                    weight[first:stop] = 0 if start == "zeros" else weight[old]

        lora = replace(DOCUMENT, data=settings.new_data, seed=seed, epochs=NEW_ROW_EPOCHS)
        run = Run(f"new rows, {start}, seed {seed}", "finetune_lora", {"finetune_lora": lora})
        losses = yield from checkpoints(
            job,
            run,
            lambda task: (0, task.total),
            lambda loaded: score(loaded, examples).loss,
            begin,
        )
        before, after = losses.values()
        rows.append(
            {"start": start, "seed": seed, "new_loss_before": before, "new_loss_after": after}
        )
    return rows


def column_names(pairs: Iterable[Pair]) -> dict[Pair, str]:
    """The column of each pair: katze_sofa, or with the full prompt if that name is ambiguous."""
    # The second word is the noun: die katze sitzt auf dem.
    short = {(prompt, word): f"{prompt.split()[:2][-1]}_{word}" for prompt, word in pairs}
    times = Counter(short.values())
    return {
        pair: name if times[name] == 1 else f"{'_'.join(pair[0].split())}_{pair[1]}"
        for pair, name in short.items()
    }


def _parts(
    tuned: Tuned, base: "LoadedModel", prompts: Sequence[str]
) -> list[tuple[str, str, NextTokenAnswers]]:
    """The answers with all that was trained, and with only one trained part, the other reset to the
    base.
    """
    from pipeline.adapters.attach import disable_adapter

    loaded = tuned.made.load(base.base)
    with disable_adapter(loaded.model):
        without_ab = ask(loaded, prompts)
    loaded.model.embeddings.load_state_dict(base.model.embeddings.state_dict())
    loaded.model.head.load_state_dict(base.model.head.state_dict())
    answers = {
        "both": tuned.answers,
        "embeddings and head": without_ab,
        "A and B": ask(loaded, prompts),
    }
    return [(tuned.targets, part, of_part) for part, of_part in answers.items()]


def _compare_settings(
    by_setting: Mapping[Setting, Sequence[Tuned]],
    before: NextTokenAnswers,
    cells: Sequence[Cell],
    rules: Mapping[str, str],
) -> tuple[Setting, list[Row], list[Row]]:
    """The setting nearest to the document's tables, their cells measured there, and how close each
    setting comes.
    """
    measured: dict[Setting, dict[Cell, Spread]] = {}
    firsts: dict[Setting, dict[Cell, list[str]]] = {}  # by seed
    for setting, tuned in by_setting.items():
        # The base has no seeds here: one answer.
        answers = {
            cell: [one.answers for one in tuned if one.targets == cell.model] or [before]
            for cell in cells
        }
        measured[setting] = {
            cell: Spread.of(each.probability(cell.prompt, cell.word) for each in by_seed)
            for cell, by_seed in answers.items()
        }
        firsts[setting] = {
            cell: [each.first(cell.prompt) for each in by_seed] for cell, by_seed in answers.items()
        }

    tried: dict[Setting, Row] = {}
    corrected = [cell for cell in cells if cell.model in TARGETS]
    for setting, probabilities in measured.items():
        distances = [abs(probabilities[cell] - cell.probability) for cell in corrected]
        same = sum(
            fmean(first == cell.word for first in firsts[setting][cell]) for cell in corrected
        )
        tried[setting] = {
            "trains_on": describe_window(setting.window),
            **setting._asdict(),
            "first_choices": float(same),
            "within_15": sum(distance <= POINTS for distance in distances),
            "distance": fmean(distances),
        }
    # The most first choices equal to the document's; ties go to the smallest mean distance.
    nearest = min(
        tried, key=lambda setting: (-tried[setting]["first_choices"], tried[setting]["distance"])
    )

    rows: list[Row] = []
    for cell, probability in measured[nearest].items():
        everywhere = [float(probabilities[cell]) for probabilities in measured.values()]
        ours = firsts[nearest][cell]
        rows.append(
            {
                "prompt": cell.prompt,
                "kind": "corrected" if rules[cell.prompt] == "must_change" else "unchanged",
                "model": cell.model,
                "first_choice": cell.word,
                "document": cell.probability,
                "measured": probability,
                "ours": "/".join(dict.fromkeys(ours)),
                "same_first": set(ours) == {cell.word},
                "within_15": abs(probability - cell.probability) <= POINTS,
                "least": min(everywhere),
                "greatest": max(everywhere),
            }
        )
    return nearest, rows, [{**row, "nearest": setting == nearest} for setting, row in tried.items()]


def _text(
    rows: Sequence[Row],
    settings: int,
    embeddings: Sequence[Row],
    parts: Sequence[Row],
    changing: Sequence[str],
    staying: Sequence[str],
) -> str:
    def mean_of(row: Row, columns: Sequence[str]) -> str:
        return f"{fmean(row[name] for name in columns):.0%}" if columns else "–"

    near, same = (sum(row[key] for row in rows) for key in ("within_15", "same_first"))
    far = []
    for row in (row for row in rows if not row["within_15"]):
        reached = row["least"] - POINTS <= row["document"] <= row["greatest"] + POINTS
        far.append(
            f"*{row['prompt']}* → {row['first_choice']} ({row['model']}): "
            f"{shown(row['measured'], PERCENT)}, the document has {row['document']:.0%}; over all "
            f"settings {row['least']:.0%} to {row['greatest']:.0%}, "
            + ("so it depends on the setting" if reached else "so no setting reaches it")
        )
    by_kind = {
        (row["train_embeddings"], row["retain"]): row for row in embeddings if row["model"] == "all"
    }
    variants = "; ".join(
        f"{trained}{', with retain texts' if retain else ''}: corrected "
        f"{mean_of(by_kind[kind, retain], changing)}, "
        f"unrelated {mean_of(by_kind[kind, retain], staying)}"
        for kind, trained in EMBEDDINGS.items()
        for retain in (False, True)
    )
    by_part = "; ".join(
        f"{row['model']}, {row['trained']}: {mean_of(row, staying)}" for row in parts
    )
    paragraphs = (
        f"Of the {len(rows)} cells of the document's two tables, {same} have the same first choice "
        f"with every seed, and {near} a probability within 15 points of the document's. This is at "
        f"the closest of {settings} settings tried: the document gives rank and epochs, but not "
        "window, learning rate and alpha. *Least* and *greatest* are over all settings.",
        f"Cells further off: {'; '.join(far)}." if far else "No cell is further off.",
        "Mean probability of the expected words, LoRA on all four projections, training "
        f"{variants}.",
        "To see which part changes the unrelated answers, the other part is reset to the base. "
        f"Mean probability of the {len(staying)} words that should stay: {by_part}.",
    )
    return "\n\n".join(paragraphs)


def _describe_others(
    widths: Sequence[Row], projections: Sequence[Row], new_rows: Sequence[Row]
) -> str:
    def means(rows: Sequence[Row], key: str, column: str, form: str) -> str:
        groups = by(lambda row: row[key], rows)
        return ", ".join(
            f"{STARTS.get(n, n)} {fmean(r[column] for r in group):{form}}"
            for n, group in groups.items()
        )

    return (
        "*Why not a larger d_model?* V only at the closest setting. Mean probability of the "
        f"corrected words by d_model: {means(widths, 'd_model', 'probability_target', '.0%')}; of "
        f"the words that should stay: {means(widths, 'd_model', 'probability_kept', '.0%')}.\n"
        "\n"
        "Mean probability of the corrected words if only these modules train, and neither "
        f"embeddings nor head: {means(projections, 'targets', 'probability_target', '.0%')}.\n"
        "\n"
        "Loss on the new sentences by how the rows of new words begin (§9.1), before training: "
        f"{means(new_rows, 'start', 'new_loss_before', '.2f')}; after {NEW_ROW_EPOCHS} epochs of "
        f"LoRA: {means(new_rows, 'start', 'new_loss_after', '.2f')}."
    )


def _draw(figure: Figure, rows: Sequence[Row]) -> None:
    """One bar per prompt and model; a black stroke is the document's number."""
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(4, 3))
    looks = {"original": ("scratch", ""), "v_proj": ("freeze", "//"), "all": ("lora", "..")}
    for axis, kind, title in zip(
        axes, ("corrected", "unchanged"), ("Corrected facts", "Unchanged knowledge"), strict=True
    ):
        of_kind = [row for row in rows if row["kind"] == kind]
        prompts = list(dict.fromkeys(row["prompt"] for row in of_kind))
        for number, (model, (color, hatch)) in enumerate(looks.items()):
            of_model = [row for row in of_kind if row["model"] == model]
            x = [prompts.index(row["prompt"]) + 0.27 * (number - 1) for row in of_model]
            cells = [row["measured"] for row in of_model]
            style = {"color": COLORS[color], "hatch": hatch, "edgecolor": "white", "label": model}
            axis.bar(x, cells, 0.24, yerr=min_max(cells), **style)
            document_values = [row["document"] for row in of_model]
            axis.hlines(
                document_values, [at - 0.13 for at in x], [at + 0.13 for at in x], color="black"
            )
            for at, row in zip(x, of_model, strict=True):
                box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
                axis.annotate(
                    row["first_choice"], (at, 0.02), rotation=90, ha="center", fontsize=7, bbox=box
                )
        axis.set_xticks(
            range(len(prompts)), [prompt.replace(" ", "\n", 2) for prompt in prompts], fontsize=8
        )
        axis.set_title(title)
    axes[0].set_ylabel("probability of the document's first choice")
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=8,
        title="stroke: the document",
    )

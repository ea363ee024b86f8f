"""§2.1's example: the attention weights of every head on the document's sentence, for base and adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import EDGE, INK, SMALL, WIDE, ink_on
from pipeline.document.params import StudyTrajectory
from pipeline.document.studies.shared.next_token import document
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Row, Table
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.engine import LoadedModel, layer_attention
from pipeline.project.runner import Job

NAME = SECTION = "attention"
DOCUMENT, BASE, ADAPTER = "document", "base", "LoRA"
HEADS_PER_ROW = 4  # as many as fit into half a page's width
COLORMAP = "Blues"
TITLES = {BASE: "(a) Expanded base", ADAPTER: "(b) With the LoRA adapter"}


@dataclass(frozen=True)
class ModelAttention:
    """A model's attention weights: (H, T, T) for each layer; row t is token t's."""

    name: str
    layers: Sequence[Tensor]

    def rows(self, token: int) -> dict[tuple[int, int], Tensor]:
        """(layer, head) → the attention weights (T,) of one token."""
        return {(n, h): weights[h, token] for n, weights in enumerate(self.layers) for h in range(len(weights))}


@dataclass(frozen=True)
class Example:
    """The sentence, the index of the token of interest, the document's weights for it, and the models' weights."""

    words: Sequence[str]
    token: int
    claimed: Mapping[str, float]
    models: Sequence[ModelAttention]

    @property
    def document_weights(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([self.claimed.get(word, 0.0) for word in self.words])

    def distance(self, weights: Tensor) -> float:
        """The total variation distance ½Σ|p − q| from the document's weights."""
        return float(np.abs(weights.double().numpy() - self.document_weights).sum() / 2)


def attention(job: Job) -> RenderedFigure:
    """§2.1's figure. Raises UserError if the document's sentence cannot be tokenized as expected."""
    example = _read_example(job)
    return RenderedFigure(
        NAME,
        "§2.1",
        f"What *{example.words[example.token]}* attends to",
        _summary(example),
        _caption(example),
        (_token_table(example), _weight_table(example)),
        lambda figure: _draw(figure, example),
        (WIDE, sum(_heights(example))),
    )


def _read_example(job: Job) -> Example:
    file = job.project.params.of(StudyTrajectory).document
    claimed = document(job.path(file), file, SECTION)
    folder = job.project.artifact("expand_vocab")
    models = {BASE: engine.load(folder), ADAPTER: engine.load(folder, job.project.artifact("finetune_lora"))}
    ids = engine.encode(models[BASE], claimed["prompt"])
    words = [models[BASE].tokenizer.word(id_) for id_ in ids]
    if words.count(claimed["token"]) != 1 or len(set(words)) < len(words):
        raise UserError(
            f"{file}: attention.prompt must contain each word once, including attention.token, got "
            f"{claimed['prompt']!r} and {claimed['token']!r}. Restore the file: it holds the document's tables."
        )
    attention = [_attention(name, loaded, ids) for name, loaded in models.items()]
    return Example(words, words.index(claimed["token"]), claimed["weights"], attention)


def _attention(name: str, loaded: LoadedModel, ids: Sequence[int]) -> ModelAttention:
    model = loaded.model
    batch = torch.tensor([ids], device=model.device)  # (1, T)
    return ModelAttention(
        name, [layer_attention(model, batch, layer)[0].float().cpu() for layer in range(len(model.blocks))]
    )


def _weight_table(example: Example) -> Table:
    rows: list[Row] = [
        {"model": model.name, "layer": n, "head": h, "query": query, "key": key, "weight": float(weights[h, t, s])}
        for model in example.models
        for n, weights in enumerate(model.layers)
        for h in range(len(weights))
        for t, query in enumerate(example.words)
        for s, key in enumerate(example.words[: t + 1])
    ]
    return Table(NAME, "Every attention weight, by query and key", rows)


def _token_table(example: Example) -> Table:
    """The token's weights: the document's row first, then every head's with its distance from the document."""
    rows: list[Row] = [_row(DOCUMENT, None, None, torch.tensor(example.document_weights), example)]
    for model in example.models:
        rows += [_row(model.name, n, h, weights, example) for (n, h), weights in model.rows(example.token).items()]
        mean = torch.stack(list(model.rows(example.token).values())).mean(0)
        rows.append(_row(f"{model.name}, mean", None, None, mean, example))
    formats = {**dict.fromkeys(example.words, ".0%"), "distance": ".2f"}
    token = example.words[example.token]
    title = f"Attention weights of *{token}*; *distance*: the share of the weight on other words than in the document"
    return Table(f"{NAME}_row", title, rows, formats)


def _row(model: str, layer: int | None, head: int | None, weights: Tensor, example: Example) -> Row:
    shares = {word: float(weights[n]) for n, word in enumerate(example.words)}
    most = max(shares, key=lambda word: shares[word])
    return {"model": model, "layer": layer, "head": head, **shares, "most": most, "distance": example.distance(weights)}


def _count_top_word(example: Example) -> tuple[str, int, int]:
    """The document's top word, the number of base heads that attend to it most, and the number of heads."""
    word = max(example.claimed, key=lambda name: example.claimed[name])
    rows = example.models[0].rows(example.token)
    return word, sum(example.words[int(weights.argmax())] == word for weights in rows.values()), len(rows)


def _nearest_head(example: Example) -> tuple[tuple[int, int], float]:
    """The base's head, as (layer, head), with the smallest distance from the document's row, and that distance."""
    rows = example.models[0].rows(example.token)
    nearest = min(rows, key=lambda head: example.distance(rows[head]))
    return nearest, example.distance(rows[nearest])


def _largest_shift(example: Example) -> float:
    """The largest difference between base and adapter in one of the token's weights."""
    base, adapter = (model.rows(example.token) for model in example.models)
    return max(float((base[head] - adapter[head]).abs().max()) for head in base)


def _summary(example: Example) -> str:
    word, count, heads = _count_top_word(example)
    return f"{example.words[example.token]} attends most to {word} in {count} of {heads} heads of the base"


def _caption(example: Example) -> str:
    token = example.words[example.token]
    word, count, heads = _count_top_word(example)
    (layer, head), distance = _nearest_head(example)
    mean = torch.stack(list(example.models[0].rows(example.token).values())).mean(0)
    return "\n\n".join(
        [
            f"Top: the measured attention weights of every head for *{' '.join(example.words)}*. Rows are queries, "
            f"columns are keys; later tokens are masked. Bottom: the row of *{token}* in each head, below the "
            "document's.",
            f"The document gives {_format_weights(example.claimed)} as a possible pattern. "
            f"Measured: *{word}* has the most weight in {count} of {heads} heads of the base; the mean over all heads "
            f"is {_format_weights(dict(zip(example.words, mean.tolist(), strict=True)))}. "
            f"The nearest to the document's row is head {head} of layer {layer}, with {distance:.0%} of the weight on "
            f"other words. A weight of this row differs by up to {_largest_shift(example):.2f} between base and "
            f"adapter, and by up to {_head_difference(example):.2f} between heads of the base.",
        ]
    )


def _format_weights(shares: Mapping[str, float]) -> str:
    """Such as "katze 0.45, sitzt 0.30", the largest first."""
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{word} {share:.2f}" for word, share in ordered)


def _head_difference(example: Example) -> float:
    """The largest difference between two heads of the base in one of the token's weights."""
    rows = torch.stack(list(example.models[0].rows(example.token).values()))
    return float((rows.max(0).values - rows.min(0).values).max())


def _grid_shape(example: Example) -> tuple[int, int, int]:
    """Rows and columns of heads per layer, and the number of rows of the panel below."""
    heads = len(example.models[0].layers[0])
    return -(-heads // HEADS_PER_ROW), min(heads, HEADS_PER_ROW), 1 + len(example.models[0].layers) * heads


def _heights(example: Example) -> tuple[float, float]:
    """Heights in inches of the heads' maps and of the panel below them."""
    rows, _, lines = _grid_shape(example)
    return 0.85 * len(example.models[0].layers) * rows + 0.6, 0.17 * lines + 0.5


def _draw(figure: Figure, example: Example) -> None:
    above, below = figure.subfigures(2, 1, height_ratios=_heights(example))
    for side, model in zip(above.subfigures(1, 2), example.models, strict=True):
        side.suptitle(TITLES[model.name])
        _draw_heads(side, example, model)
    for axis, model in zip(below.subplots(1, 2), example.models, strict=True):
        _draw_rows(axis, example, model)


def _draw_heads(side: Figure, example: Example, model: ModelAttention) -> None:
    """The heads layer by layer, `HEADS_PER_ROW` in a row."""
    rows, columns, _ = _grid_shape(example)
    grid = side.subplots(len(model.layers) * rows, columns, sharex=True, sharey=True, squeeze=False)
    for n, weights in enumerate(model.layers):
        cells = grid[n * rows : (n + 1) * rows].flatten()
        for h, axis in enumerate(cells):
            if h >= len(weights):
                axis.set_axis_off()
                continue
            _draw_head(axis, weights[h], example.words)
            if n == 0 or rows > 1:
                axis.set_title(f"head {h}", fontsize=SMALL, loc="center")
        cells[0].set_ylabel(f"layer {n}")


def _draw_head(axis: Any, weights: Tensor, words: Sequence[str]) -> None:
    """The attention map of one head, the first query at the top; masked keys stay white."""
    count = len(words)
    visible = np.ma.masked_where(~np.tri(count, dtype=bool), weights.numpy())
    axis.pcolormesh(visible, cmap=COLORMAP, vmin=0, vmax=1, edgecolor="white", linewidth=0.4)
    axis.set(aspect="equal", ylim=(count, 0))
    axis.set_xticks(np.arange(count) + 0.5, words, rotation=90)
    axis.set_yticks(np.arange(count) + 0.5, words)
    axis.tick_params(length=0, pad=1.5)


def _draw_rows(axis: Any, example: Example, model: ModelAttention) -> None:
    """The token's weights as numbers on a heat map: the document's row, then every head's."""
    rows = {DOCUMENT: example.document_weights} | {
        f"{n}.{h}": w.numpy() for (n, h), w in model.rows(example.token).items()
    }
    values = np.stack([np.asarray(row, dtype=float) for row in rows.values()])
    axis.pcolormesh(values, cmap=COLORMAP, vmin=0, vmax=1, edgecolor="white", linewidth=0.6)
    axis.set_ylim(len(values), 0)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            style = {"ha": "center", "va": "center", "fontsize": SMALL, "color": ink_on(float(value))}
            axis.text(x + 0.5, y + 0.5, f"{value:.2f}", **style)
    axis.axhline(1, color=INK, linewidth=1.2)
    axis.set_xticks(np.arange(len(example.words)) + 0.5, example.words)
    axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_color(EDGE)
    axis.set_ylabel(f"layer.head, row of “{example.words[example.token]}”")

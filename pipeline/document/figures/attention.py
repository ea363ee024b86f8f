"""§2.1's walk-through: what each head attends to while it reads the document's sentence, in base and adapter."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.document.figures.draw.figure import RenderedFigure
from pipeline.document.figures.draw.style import EDGE, INK, SMALL, WIDE, on
from pipeline.document.params import StudyTrajectory
from pipeline.document.studies.shared.next_token import document
from pipeline.document.studies.shared.report import Figure
from pipeline.document.tables import Row, Table
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.inference.attention_weights import layer_attention
from pipeline.inference.engine import LoadedModel
from pipeline.project.runner import Job

NAME = SECTION = "attention"
DOCUMENT, BASE, ADAPTER = "document", "base", "LoRA"
ABREAST = 4  # heads beside each other, for which half a page has room
MAP = "Blues"  # from light to dark


@dataclass(frozen=True)
class Read:
    """What a model attends to: by layer (H, T, T), of which row t is token t's."""

    name: str
    layers: Sequence[Tensor]

    def rows(self, token: int) -> dict[tuple[int, int], Tensor]:
        """(layer, head) → the weights (T,) of one token."""
        return {(n, h): weights[h, token] for n, weights in enumerate(self.layers) for h in range(len(weights))}


@dataclass(frozen=True)
class Walk:
    """The sentence, the place of the token that is looked at, what the document says of it, what the models do."""

    words: Sequence[str]
    token: int
    claimed: Mapping[str, float]
    read: Sequence[Read]

    @property
    def told(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([self.claimed.get(word, 0.0) for word in self.words])

    def distance(self, weights: Tensor) -> float:
        """Half of Σ|p − q|: how much weight lies elsewhere than the document says."""
        return float(np.abs(weights.double().numpy() - self.told).sum() / 2)


def attention(job: Job) -> RenderedFigure:
    """§2.1's figure. Raises UserError where the document's sentence cannot be read."""
    walk = _walk(job)
    return RenderedFigure(
        NAME,
        "§2.1",
        f"What *{walk.words[walk.token]}* attends to",
        _shows(walk),
        _caption(walk),
        (_rows(walk), _all(walk)),
        lambda figure: _draw(figure, walk),
        (WIDE, sum(_heights(walk))),
    )


def _walk(job: Job) -> Walk:
    name = job.project.params.of(StudyTrajectory).document
    claimed = document(job.path(name), name, SECTION)
    folder = job.project.artifact("expand_vocab")
    models = {BASE: engine.load(folder), ADAPTER: engine.load(folder, job.project.artifact("finetune_lora"))}
    ids = engine.encode(models[BASE], claimed["prompt"])
    words = [models[BASE].tokenizer.word(id_) for id_ in ids]
    if words.count(claimed["token"]) != 1 or len(set(words)) < len(words):
        raise UserError(
            f"{name}: attention.prompt must have each word once, attention.token among them, got "
            f"{claimed['prompt']!r} and {claimed['token']!r}. Restore the file: it holds the document's tables."
        )
    read = [_read(which, loaded, ids) for which, loaded in models.items()]
    return Walk(words, words.index(claimed["token"]), claimed["weights"], read)


def _read(name: str, loaded: LoadedModel, ids: Sequence[int]) -> Read:
    model = loaded.model
    seen = torch.tensor([ids], device=model.device)
    return Read(name, [layer_attention(model, seen, layer)[0].float().cpu() for layer in range(len(model.blocks))])


def _all(walk: Walk) -> Table:
    rows: list[Row] = [
        {"model": read.name, "layer": n, "head": h, "query": query, "key": key, "weight": float(weights[h, t, s])}
        for read in walk.read
        for n, weights in enumerate(read.layers)
        for h in range(len(weights))
        for t, query in enumerate(walk.words)
        for s, key in enumerate(walk.words[: t + 1])
    ]
    return Table(NAME, "Every weight: how much of a key each query takes", rows)


def _rows(walk: Walk) -> Table:
    """The document's row first; `distance` from it."""
    found: list[Row] = [_row(DOCUMENT, None, None, torch.tensor(walk.told), walk)]
    for read in walk.read:
        found += [_row(read.name, n, h, weights, walk) for (n, h), weights in read.rows(walk.token).items()]
        mean = torch.stack(list(read.rows(walk.token).values())).mean(0)
        found.append(_row(f"{read.name}, mean", None, None, mean, walk))
    forms = {**dict.fromkeys(walk.words, ".0%"), "distance": ".2f"}
    token = walk.words[walk.token]
    title = f"What *{token}* attends to; *distance*: how much of the weight lies elsewhere than in the document"
    return Table(f"{NAME}_row", title, found, forms)


def _row(model: str, layer: int | None, head: int | None, weights: Tensor, walk: Walk) -> Row:
    shares = {word: float(weights[n]) for n, word in enumerate(walk.words)}
    most = max(shares, key=lambda word: shares[word])
    return {"model": model, "layer": layer, "head": head, **shares, "most": most, "distance": walk.distance(weights)}


def _first_of(walk: Walk) -> tuple[str, int, int]:
    """The document's likeliest word, in how many of the base's heads it has the most weight, and of how many."""
    word = max(walk.claimed, key=lambda each: walk.claimed[each])
    rows = walk.read[0].rows(walk.token)
    return word, sum(walk.words[int(weights.argmax())] == word for weights in rows.values()), len(rows)


def _nearest(walk: Walk) -> tuple[tuple[int, int], float]:
    rows = walk.read[0].rows(walk.token)
    place = min(rows, key=lambda each: walk.distance(rows[each]))
    return place, walk.distance(rows[place])


def _moved(walk: Walk) -> float:
    """The largest difference of a weight of that token between base and adapter."""
    base, adapter = (read.rows(walk.token) for read in walk.read)
    return max(float((base[place] - adapter[place]).abs().max()) for place in base)


def _shows(walk: Walk) -> str:
    word, count, of = _first_of(walk)
    return f"{word} has the most of {walk.words[walk.token]}'s weight in {count} of {of} heads of the base"


def _caption(walk: Walk) -> str:
    token = walk.words[walk.token]
    word, count, of = _first_of(walk)
    (layer, head), distance = _nearest(walk)
    mean = torch.stack(list(walk.read[0].rows(walk.token).values())).mean(0)
    return "\n\n".join(
        [
            f"Above: the measured attention weights of every head while *{' '.join(walk.words)}* is read. Rows are "
            "queries, columns keys; what comes later is not seen. "
            f"Below: the row of *{token}* of each head, beside the document's.",
            f"The document gives {_listed(walk.claimed)} as what the pattern might look like. "
            f"Measured: *{word}* has the most weight in {count} of {of} heads of the base; the mean over all heads is "
            f"{_listed(dict(zip(walk.words, mean.tolist(), strict=True)))}. "
            f"Nearest to the document's row is head {head} of layer {layer}, where {distance:.0%} of the weight lies "
            f"elsewhere. Between base and adapter a weight of this row differs by up to {_moved(walk):.2f}, between "
            f"heads of the base by up to {_apart(walk):.2f}.",
        ]
    )


def _listed(shares: Mapping[str, float]) -> str:
    """The largest first."""
    ordered = sorted(shares.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{word} {share:.2f}" for word, share in ordered)


def _apart(walk: Walk) -> float:
    """The largest difference of a weight between two heads of the base."""
    rows = torch.stack(list(walk.read[0].rows(walk.token).values()))
    return float((rows.max(0).values - rows.min(0).values).max())


def _shape(walk: Walk) -> tuple[int, int, int]:
    """Rows of heads that a layer takes, columns, and rows of the table below."""
    heads = len(walk.read[0].layers[0])
    return -(-heads // ABREAST), min(heads, ABREAST), 1 + len(walk.read[0].layers) * heads


def _heights(walk: Walk) -> tuple[float, float]:
    """Inches of the heads' maps, and of the table below them."""
    rows, _, lines = _shape(walk)
    return 0.85 * len(walk.read[0].layers) * rows + 0.6, 0.17 * lines + 0.5


def _draw(figure: Figure, walk: Walk) -> None:
    above, below = figure.subfigures(2, 1, height_ratios=_heights(walk))
    for side, read in zip(above.subfigures(1, 2), walk.read, strict=True):
        side.suptitle(_title(read))
        _draw_heads(side, walk, read)
    for axis, read in zip(below.subplots(1, 2), walk.read, strict=True):
        _draw_rows(axis, walk, read)


def _draw_heads(side: Figure, walk: Walk, read: Read) -> None:
    """A layer after the other, its heads in rows of `ABREAST`."""
    rows, columns, _ = _shape(walk)
    grid = side.subplots(len(read.layers) * rows, columns, sharex=True, sharey=True, squeeze=False)
    for n, weights in enumerate(read.layers):
        cells = grid[n * rows : (n + 1) * rows].flatten()
        for h, axis in enumerate(cells):
            if h >= len(weights):
                axis.set_axis_off()
                continue
            _draw_head(axis, weights[h], walk.words)
            if n == 0 or rows > 1:
                axis.set_title(f"head {h}", fontsize=SMALL, loc="center")
        cells[0].set_ylabel(f"layer {n}")


def _title(read: Read) -> str:
    return {BASE: "(a) Expanded base", ADAPTER: "(b) The same with the LoRA adapter"}[read.name]


def _draw_head(axis: Any, weights: Tensor, words: Sequence[str]) -> None:
    """The first query on top; what comes later than a query is left white."""
    count = len(words)
    seen = np.ma.masked_where(~np.tri(count, dtype=bool), weights.numpy())
    axis.pcolormesh(seen, cmap=MAP, vmin=0, vmax=1, edgecolor="white", linewidth=0.4)
    axis.set(aspect="equal", ylim=(count, 0))
    axis.set_xticks(np.arange(count) + 0.5, words, rotation=90)
    axis.set_yticks(np.arange(count) + 0.5, words)
    axis.tick_params(length=0, pad=1.5)


def _draw_rows(axis: Any, walk: Walk, read: Read) -> None:
    """Numbers on their colours: the document's row, then every head's."""
    rows = {DOCUMENT: walk.told} | {f"{n}.{h}": w.numpy() for (n, h), w in read.rows(walk.token).items()}
    values = np.stack([np.asarray(row, dtype=float) for row in rows.values()])
    axis.pcolormesh(values, cmap=MAP, vmin=0, vmax=1, edgecolor="white", linewidth=0.6)
    axis.set_ylim(len(values), 0)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            look = {"ha": "center", "va": "center", "fontsize": SMALL, "color": on(float(value))}
            axis.text(x + 0.5, y + 0.5, f"{value:.2f}", **look)
    axis.axhline(1, color=INK, linewidth=1.2)
    axis.set_xticks(np.arange(len(walk.words)) + 0.5, walk.words)
    axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_color(EDGE)
    axis.set_ylabel(f"layer.head, row of “{walk.words[walk.token]}”")

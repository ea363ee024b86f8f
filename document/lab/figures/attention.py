"""§2.1's example: the attention weights of every head on the document's sentence, for base and
adapter.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab.measures import document
from lab.report import EDGE, INK, SMALL, WIDE, Axis, Figure, Findings
from lab.studies.trajectory import StudyTrajectory
from lab.tables import Row, Table
from pipeline.errors import UserError
from pipeline.inference import engine
from pipeline.models.base import CausalLM
from pipeline.models.minigpt import Attention
from pipeline.project.runner import Job

PLACE = "§2.1"
DOCUMENT, BASE, ADAPTER = "document", "base", "LoRA"
HEADS_PER_ROW = 4  # as many as fit into half a page's width
COLORMAP = "Blues"
PANELS = {BASE: "(a) Expanded base", ADAPTER: "(b) With the LoRA adapter"}
Layers = Sequence[Tensor]  # the attention weights (H, T, T) of each layer; row t is token t's


def render(job: Job) -> Findings:
    """Raises UserError if the document's sentence cannot be tokenized as expected."""
    file = job.project.params.of(StudyTrajectory).document
    claimed = document(job, file, "attention")
    folder, token, weights = (
        job.project.artifact("expand_vocab"),
        claimed["token"],
        claimed["weights"],
    )
    loaded = {
        BASE: engine.load(folder),
        ADAPTER: engine.load(folder, job.project.artifact("finetune_lora")),
    }
    ids = engine.encode(loaded[BASE], claimed["prompt"])
    words = [loaded[BASE].tokenizer.word(id_) for id_ in ids]
    if words.count(token) != 1 or len(set(words)) < len(words):
        raise UserError(
            f"{file}: attention.prompt must contain each word once, including attention.token, got "
            f"{claimed['prompt']!r} and {token!r}. Restore the file: it holds the document's "
            "tables."
        )
    models: dict[str, Layers] = {}
    for name, one in loaded.items():
        batch = torch.tensor([ids], device=one.model.device)  # (1, T)
        models[name] = [
            layer_attention(one.model, batch, n)[0].float().cpu()
            for n in range(len(one.model.blocks))
        ]
    every: list[Row] = [
        {
            "model": name,
            "layer": n,
            "head": h,
            "query": query,
            "key": key,
            "weight": float(weights_[h, t, s]),
        }
        for name, layers in models.items()
        for n, weights_ in enumerate(layers)
        for h in range(len(weights_))
        for t, query in enumerate(words)
        for s, key in enumerate(words[: t + 1])
    ]

    # The token's weights: the document's row first, then every head's with its distance from the
    # document.
    told = torch.tensor([weights.get(word, 0.0) for word in words], dtype=torch.float64)

    def row(model: str, layer: int | None, head: int | None, of_token: Tensor) -> Row:
        """`distance`: the total variation ½Σ|p − q|, the share of the weight on other words than in
        the document.
        """
        shares = dict(zip(words, map(float, of_token), strict=True))
        own = {"model": model, "layer": layer, "head": head, **shares}
        distance = float((of_token.cpu().double() - told).abs().sum() / 2)
        return {**own, "most": max(shares, key=lambda word: shares[word]), "distance": distance}

    at = words.index(token)
    # (N·H, T)
    of_token = {
        name: torch.cat([layer[:, at] for layer in layers]) for name, layers in models.items()
    }
    rows = [row(DOCUMENT, None, None, told)]
    for name, layers in models.items():
        rows += [
            row(name, n, h, layer[h, at])
            for n, layer in enumerate(layers)
            for h in range(len(layer))
        ]
        rows.append(row(f"{name}, mean", None, None, of_token[name].mean(0)))
    title = (
        f"Attention weights of *{token}*; *distance*: the share of the weight on other words than "
        "in the document"
    )
    tables = (
        Table("attention_row", title, rows, {**dict.fromkeys(words, ".0%"), "distance": ".2f"}),
        Table("attention", "Every attention weight, by query and key", every),
    )

    # In words: the document's top word, the head nearest to its row, and how much heads and models
    # differ.
    word = max(weights, key=lambda name: weights[name])
    of_base = [row for row in rows if row["model"] == BASE]
    count = f"{sum(row['most'] == word for row in of_base)} of {len(of_base)} heads of the base"
    nearest = min(of_base, key=lambda row: row["distance"])
    mean = dict(zip(words, of_token[BASE].mean(0).tolist(), strict=True))
    shift = float((of_token[BASE] - of_token[ADAPTER]).abs().max())
    between = float((of_token[BASE].max(0).values - of_token[BASE].min(0).values).max())
    text = (
        f"Top: the measured attention weights of every head for *{' '.join(words)}*. Rows are "
        f"queries, columns are keys; later tokens are masked. Bottom: the row of *{token}* in each "
        "head, below the document's.\n"
        "\n"
        f"The document gives {_format_weights(weights)} as a possible pattern. Measured: *{word}* "
        f"has the most weight in {count}; the mean over all heads is {_format_weights(mean)}. The "
        f"nearest to the document's row is head {nearest['head']} of layer {nearest['layer']}, "
        f"with {nearest['distance']:.0%} of the weight on other words. A weight of this row "
        f"differs by up to {shift:.2f} between base and adapter, and by up to {between:.2f} "
        "between heads of the base."
    )
    heights = _heights(models[BASE])

    def draw(figure: Figure) -> None:
        above, below = figure.subfigures(2, 1, height_ratios=heights)
        for side, (name, layers) in zip(above.subfigures(1, 2), models.items(), strict=True):
            side.suptitle(PANELS[name])
            _draw_heads(side, layers, words)
        for axis, name in zip(below.subplots(1, 2), models, strict=True):
            of_model = {
                f"{row['layer']}.{row['head']}": row for row in rows if row["model"] == name
            }
            _draw_rows(axis, {DOCUMENT: rows[0], **of_model}, words)
            axis.set_ylabel(f"layer.head, row of “{token}”")

    shows, title = f"{token} attends most to {word} in {count}", f"What *{token}* attends to"
    return Findings(text, tables, draw, (WIDE, sum(heights)), shows, title)


def _format_weights(shares: Mapping[str, float]) -> str:
    """Such as "katze 0.45, sitzt 0.30", the largest first."""
    return ", ".join(
        f"{word} {share:.2f}" for word, share in sorted(shares.items(), key=lambda pair: -pair[1])
    )


def _heights(layers: Layers) -> tuple[float, float]:
    """Heights in inches of the heads' maps and of the panel below them, which has a line for each
    head.
    """
    heads = len(layers[0])
    return 0.85 * len(layers) * -(-heads // HEADS_PER_ROW) + 0.6, 0.17 * (
        1 + len(layers) * heads
    ) + 0.5


def _draw_heads(side: Figure, layers: Layers, words: Sequence[str]) -> None:
    """The heads layer by layer, `HEADS_PER_ROW` in a row, the first query at the top; masked keys
    stay white.
    """
    heads, size = len(layers[0]), len(words)
    rows, columns = -(-heads // HEADS_PER_ROW), min(heads, HEADS_PER_ROW)
    grid = side.subplots(len(layers) * rows, columns, sharex=True, sharey=True, squeeze=False)
    for n, weights in enumerate(layers):
        cells = grid[n * rows : (n + 1) * rows].flatten()
        for h, axis in enumerate(cells):
            if h >= heads:
                axis.set_axis_off()
                continue
            visible = np.ma.masked_where(~np.tri(size, dtype=bool), weights[h].numpy())
            axis.pcolormesh(
                visible, cmap=COLORMAP, vmin=0, vmax=1, edgecolor="white", linewidth=0.4
            )
            axis.set(aspect="equal", ylim=(size, 0))
            axis.set_xticks(np.arange(size) + 0.5, words, rotation=90)
            axis.set_yticks(np.arange(size) + 0.5, words)
            axis.tick_params(length=0, pad=1.5)
            if n == 0 or rows > 1:
                axis.set_title(f"head {h}", fontsize=SMALL, loc="center")
        cells[0].set_ylabel(f"layer {n}")


def _draw_rows(axis: Axis, rows: Mapping[str, Row], words: Sequence[str]) -> None:
    """The token's weights as numbers on a heat map: the document's row, then every head's."""
    values = np.array([[row[word] for word in words] for row in rows.values()])
    axis.pcolormesh(values, cmap=COLORMAP, vmin=0, vmax=1, edgecolor="white", linewidth=0.6)
    axis.set_ylim(len(values), 0)
    for (y, x), value in np.ndenumerate(values):
        style: dict[str, Any] = {
            "ha": "center",
            "va": "center",
            "fontsize": SMALL,
            "color": ink_on(float(value)),
        }
        axis.text(x + 0.5, y + 0.5, f"{value:.2f}", **style)
    axis.axhline(1, color=INK, linewidth=1.2)
    axis.set_xticks(np.arange(len(words)) + 0.5, words)
    axis.set_yticks(np.arange(len(rows)) + 0.5, list(rows))
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[:].set_color(EDGE)


def ink_on(share: float) -> str:
    """The text color with the better contrast on matplotlib's map Blues at `share`; white from 0.68
    on.
    """
    return "white" if share > 0.68 else INK


@torch.no_grad()
def layer_attention(model: CausalLM, ids: Tensor, layer: int) -> Tensor:
    """softmax(QKᵀ/√K + causal mask), (B, H, T, T), of one of MiniGPT's layers for ids (B, T)."""
    attention = model.blocks[layer].self_attn
    assert isinstance(attention, Attention)
    inputs: list[tuple[Any, ...]] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args))
    try:
        model.hidden_states(ids)
    finally:
        hook.remove()
    x = inputs[-1][0]
    B, T, _ = x.shape
    H, K = attention.n_heads, attention.head_size
    q = attention.q_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
    k = attention.k_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(K)).masked_fill(later, -torch.inf)  # (B, H, T, T)
    weights: Tensor = scores.softmax(-1)
    return weights

"""A sweep: a row for each adapter, and its loss by each key that was swept."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.widget import Widget
from textual.widgets import Static

from pipeline.evaluation.comparison import MISSING
from pipeline.files.text import natural_sort_key
from pipeline.views.sweeps import Sweep, Trial, value_text
from tui.screens.results.rows import Column, RowsPane
from tui.widgets.colors import method_look, method_style
from tui.widgets.pane import Pane
from tui.widgets.plot.scatter import Axis, Point, draw

NOTHING = (
    "No sweep yet. `lora finetune sweep --over learning_rate` makes one; so does R, with a section "
    "of params.yaml such as finetune_sweep: {grid: {rank: [1, 4, 16]}}."
)
FRONT, BEST = "◆", "◂"
MAX_NAME = 28  # cells
LEAST_HEIGHT, LEAST_WIDTH = 9, 36  # of a plot


class SweepPane(RowsPane[Trial]):
    """A row for each adapter: its values, loss, divergence from the base."""

    TITLE = "Sweep"
    HELP = f"""\
A row for each adapter of `finetune_sweep`. **loss**: on held-out data; without any, of the last
epoch of training (nats per token). **divergence**: KL from the base on `finetune_sweep.old_data`,
else `evaluate.old_data` (nats per token). Less is better of both.

- `{BEST}` has the lowest loss. `{FRONT}` is on the **Pareto front**: no other has a lower loss
  without diverging more.
- *best at the edge*: it has the highest or lowest value that was tried, so a better one may be
  beyond it.
- An adapter that diverged, or that the search stopped early, has no loss.

`c` or Enter prompts it beside the base, `o` shows its loss curve. `E` evaluates it: **kept** is
then the share of old answers that are still the base's.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "ask('chat')", "chat", id="results.chat_sweep"),
        Binding("o", "ask('open')", "curve", id="results.open_sweep"),
        Binding("E", "ask('evaluate')", "evaluate", id="results.evaluate_sweep"),
        Binding("x", "ask('ship')", "ship", id="results.ship_sweep"),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.sorted_by = "loss"

    def key_of(self, row: Trial) -> str:
        return row.name

    def show(self, sweep: Sweep | str | None) -> None:
        """Show a sweep, or a text that says why there is none."""
        if not isinstance(sweep, Sweep):
            self.say(sweep or NOTHING)
            return
        loss = "held-out loss" if sweep.held_out else "training loss: no data is held out"
        self.fill(
            sweep.trials,
            self._columns(sweep),
            next((trial.name for trial in sweep.trials if trial.best), ""),
        )
        edge = f"best at the edge: {', '.join(sweep.edges)}" if sweep.edges else ""
        self.show_title(*filter(None, (edge, f"{len(sweep.trials)} adapters", loss)))

    def _columns(self, sweep: Sweep) -> Iterable[Column]:
        yield Column("adapter", self._name_cell, lambda trial: natural_sort_key(trial.name))
        yield Column("loss", lambda trial: _number(trial.loss), lambda trial: trial.loss)
        if sweep.diverges:
            yield Column(
                "divergence",
                lambda trial: _number(trial.divergence),
                lambda trial: trial.divergence,
            )
        for key in sweep.keys:
            yield Column(
                key,
                lambda trial, key=key: Text(value_text(trial.values.get(key)), justify="right"),  # type: ignore[misc]
                lambda trial, key=key: _order(trial.values.get(key)),  # type: ignore[misc]
            )
        if any(trial.kept is not None for trial in sweep.trials):
            yield Column("kept", _kept, lambda trial: None if trial.kept is None else -trial.kept)
        yield Column(
            "trained",
            lambda trial: Text(f"{trial.trainable:,}", justify="right"),
            lambda t: t.trainable,
        )
        yield Column("state", self._state_cell, lambda trial: trial.state)

    def _name_cell(self, trial: Trial) -> Text:
        variables, name = self.app.theme_variables, Text(trial.name, no_wrap=True)
        name.truncate(MAX_NAME, overflow="ellipsis")  # its values stand beside it
        if trial.front:
            name.append(f" {FRONT}", variables["accent"])
        return name.append(f" {BEST}", f"bold {variables['success']}") if trial.best else name

    def _state_cell(self, trial: Trial) -> Text:
        return Text(
            trial.state, self.app.theme_variables["error"] if trial.state == "diverged" else ""
        )


def _kept(trial: Trial) -> Text:
    return Text(MISSING if trial.kept is None else f"{trial.kept:.0%}", justify="right")


def _number(value: float | None) -> Text:
    return Text(MISSING if value is None else f"{value:.4f}", justify="right")


def _order(value: Any) -> Any:
    """Numbers by size, else texts; a column never mixes them, as a key has one type."""
    return value if isinstance(value, int | float) else value_text(value)


class PlotsPane(Pane):
    """Loss against divergence, and loss by each swept key: small plots, as many as there is room
    for.
    """

    TITLE = "Loss by key"
    HELP = f"""\
A plot for each key that the sweep varied: its values to the right, the loss upwards. Values that
span a decade have a logarithmic axis. With `finetune_sweep.old_data`, the first plot is the loss
against the divergence from the base, and `{FRONT}` are the Pareto front: the adapters that no
other beats in both. The adapter that the table's cursor is on has its name beside it.

`+` enlarges the pane: it then has room for more plots.
"""
    can_focus = True
    DEFAULT_CSS = """
    PlotsPane > Static { height: 1fr; }
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._sweep: Sweep | None = None
        self._pointed = ""

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def show(self, sweep: Sweep | None) -> None:
        self._sweep = sweep
        self.redraw()

    def point(self, name: str) -> None:
        if name != self._pointed:
            self._pointed = name
            self.redraw()

    def on_resize(self, event: Any) -> None:
        super().on_resize(event)
        self.redraw()

    def redraw(self) -> None:
        static = self.query_one(Static)
        width, height = static.size
        if not width or self._sweep is None:
            static.update("")
            return
        trials = [trial for trial in self._sweep.trials if trial.loss is not None]
        trials.sort(
            key=lambda trial: (trial.name != self._pointed, not trial.best, not trial.front)
        )
        plots = [*["divergence"] * self._sweep.diverges, *self._sweep.keys]
        if not trials or not plots:
            static.update(
                Text(
                    "No adapter has a loss to draw."
                    if plots
                    else "All adapters have the same settings."
                )
            )
            return
        across = max(min(width // LEAST_WIDTH, len(plots)), 1)
        down = max(min(height // LEAST_HEIGHT, -(-len(plots) // across)), 1)
        shown = plots[: across * down]
        hidden = plots[len(shown) :]
        wide, high = width // across - (across > 1), (height - bool(hidden)) // down
        drawn = [self._plot(key, trials, wide, high) for key in shown]
        lines = [
            Text("  ").join(_padded(row, wide) for row in rows)
            for start in range(0, len(drawn), across)
            for rows in zip(*drawn[start : start + across], strict=True)
        ]
        if hidden:
            lines.append(Text(f"+ has room for {len(hidden)} more: {', '.join(hidden)}", "dim"))
        static.update(Text("\n").join(lines), layout=False)

    def _plot(self, key: str, trials: Sequence[Trial], width: int, height: int) -> list[Text]:
        values = [
            trial.divergence if key == "divergence" else trial.values.get(key) for trial in trials
        ]
        known = [
            (trial, value) for trial, value in zip(trials, values, strict=True) if value is not None
        ]
        numeric = all(
            isinstance(value, int | float) and not isinstance(value, bool) for _, value in known
        )
        names = list(dict.fromkeys(sorted(value_text(value) for _, value in known)))
        if key == "divergence":
            x = Axis.around(
                "divergence from the base", [float(value) for _, value in known], falls=True
            )
        elif numeric:
            tried = sorted({float(value) for _, value in known})
            x = Axis.around(key, tried, marks=[(value, value_text(value)) for value in tried])
        else:
            x = Axis(key, (-0.5, len(names) - 0.5), marks=list(enumerate(names)))
        y = Axis.around(
            "loss, less is better", [trial.loss or 0.0 for trial, _ in known], falls=True
        )
        points = [
            self._point(trial, float(value) if numeric else names.index(value_text(value)))
            for trial, value in known
        ]
        return draw(points, x, y, width, height, Style(dim=True))

    def _point(self, trial: Trial, x: float) -> Point:
        pointed = trial.name == self._pointed
        color = method_style("sweep", self.background_colors[1])
        style = Style.parse(color) + Style(
            bold=trial.best, dim=not (pointed or trial.front or trial.best)
        )
        sign = method_look("sweep").sign if trial.best else "●"
        if trial.front:
            sign = FRONT
        return Point(x, trial.loss or 0.0, sign, trial.name if pointed else "", style, pointed)


def _padded(line: Text, width: int) -> Text:
    line = line.copy()
    line.truncate(width, pad=True)
    return line

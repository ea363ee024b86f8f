"""Runs in words: a line in the list, the details of one, what it answered."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from math import isfinite
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text
from textual.color import Color

from pipeline.data.answers.match import match
from pipeline.files.text import in_units, printable
from pipeline.project.logs.run_log import DIVERGED, STOPPED
from pipeline.project.stage_graph import Look
from tui.screens.curves.metrics import HELD_OUT, METRICS
from tui.screens.curves.runs import CurveLog, RunView
from tui.screens.curves.selection import Drawn, Runs
from tui.widgets.colors import readable
from tui.widgets.plot.scale import number
from tui.widgets.text import LEVELS, bar, pad_or_truncate

DIED = "the process died (no error recorded). Run again to resume from the last checkpoint"
MAX_NAMES = 2  # adapters named in a list of those that ended
SIGNS = {"running": "▶", "stopped": "‖", "failed": "✗", "died": "✗", "finished": " "}
# variables of the theme
COLORS = {"running": "accent", "stopped": "warning", "failed": "error", "died": "error"}
# cells of the loss and of the bar; of the list from which there is room for a bar
VALUE, BAR, WIDE = 7, 8, 44
OFF = "·"  # in place of the sign of a run that is not drawn


class Paint(NamedTuple):
    """What the words of a run depend on beside the run: the background, the theme's colours, cells
    in a line.
    """

    background: Color
    variables: dict[str, str]
    width: int

    def of(self, look: Look) -> str:
        return readable(Color.parse(look.color), self.background).hex6

    def state(self, view: RunView) -> str:
        return self.variables.get(COLORS.get(view.state, ""), "")


def run_line(runs: Runs, key: str, paint: Paint, expanded: bool = False) -> Text:
    """`■ lora 0.0158 ▆ 73%`: sign, name, loss, and how much was kept or how far it is. One that is
    off is dim.
    """
    view, look, on = runs.views[key], runs.looks[key], key in runs.shown
    fold = "▾ " if expanded else "▸ "
    name = fold * view.run.sweeps + view.name
    # one that is off is not read, so its numbers would be old
    loss = view.loss_of(view.best)[1] if on else None
    value = "" if on else _when(view)
    if loss is not None:
        value = number(float(f"{loss:.3g}"))
    line = _columns(
        Text(look.sign if on else OFF, paint.of(look) if on else ""),
        name,
        value,
        _end(view, paint),
        paint,
    )
    line.stylize("" if on else "dim")
    return line


def adapter_line(view: RunView, curve_log: CurveLog, look: Look, paint: Paint) -> Text:
    """The line of an adapter below its sweep: how it ended, if that was early."""
    loss = view.loss_of(curve_log)[1]
    end = {DIVERGED: Text("diverged"), STOPPED: Text("stopped")}.get(curve_log.outcome, Text())
    sign = Text(f"  {look.sign if curve_log is view.best else ' '}", paint.of(look))
    return _columns(
        sign, curve_log.name, "" if loss is None else number(float(f"{loss:.3g}")), end, paint
    )


def _columns(sign: Text, name: str, value: str, end: Text, paint: Paint) -> Text:
    room = (
        paint.width
        - sign.cell_len
        - 1
        - max(VALUE, cell_len(value))
        - 1
        - (BAR + 5 if paint.width >= WIDE else 6)
    )
    line = Text.assemble(
        sign, " ", pad_or_truncate(printable(name), max(room, 1)), " ", value.rjust(VALUE), " "
    )
    return line.append(end)


def _end(view: RunView, paint: Paint) -> Text:
    """A finished run's share of old answers that it kept, as a bar; of another run its state and
    progress.
    """
    if view.state == "finished":
        if view.kept is None:
            return Text()
        shape = (
            bar(view.kept, BAR)
            if paint.width >= WIDE
            else LEVELS[round(view.kept * (len(LEVELS) - 1))]
        )
        return Text(f"{shape} {view.kept:>3.0%}")
    done, total = view.steps
    return Text(
        f"{SIGNS[view.state]} {f'{done / total:.0%}' if total else '':>3}", paint.state(view)
    )


def _when(view: RunView) -> str:
    """The day of the last change, or of today's the time."""
    then = datetime.fromtimestamp(view.run.when)
    return f"{then:%H:%M}" if then.date() == datetime.now().date() else f"{then:%d %b}"


def details(line: Drawn, cursor: float | None, paint: Paint) -> Text:
    """What is known of a run, or of an adapter of a sweep: state, values, what it cost."""
    name = printable(line.view.run.curve_label(line.curve_log.name))
    text = Text.assemble((line.look.sign, paint.of(line.look)), " ", (name, "bold"))
    for fact in (
        *_progress(line.view, paint),
        *_values(line, cursor),
        *_cost(line),
        *_trouble(line.view, paint),
    ):
        text.append("\n").append(fact)
    return text


def _progress(view: RunView, paint: Paint) -> Iterator[str | Text]:
    done, total = view.steps
    state = Text(f"{SIGNS[view.state]} {view.state}".strip(), paint.state(view))
    if view.state == "finished":
        state.append(f" {_when(view)}")
    state.append(f" · {done:,} of {total:,} steps" if done < total else f" · {done:,} steps")
    yield state
    if (left := view.seconds_left) is not None:
        yield Text(f"{roughly(left)} left", "bold")
    epochs = view.best.log.columns["epoch"]
    flat = view.best.log.flat(view.alive)
    if epochs:
        yield f"epoch {epochs[-1]:.0f}" + (f" · » flat from epoch {flat[0]:.0f}" if flat else "")


def _values(line: Drawn, cursor: float | None) -> Iterator[str]:
    """The values at the cursor, or the newest; the small plots have the others."""
    log = line.curve_log.log
    index = log.index_at(cursor) if cursor is not None else len(log.steps) - 1
    if (
        index is None
        or index < 0
        or (cursor is not None and not log.steps[0] <= cursor <= log.steps[-1])
    ):
        if cursor is not None:
            yield f"nothing logged at step {cursor:,.0f}"
        return
    step, loss = log.steps[index], log.series["loss"]
    yield f"loss {_four(loss.y[index])} at step {step:,.0f}"
    yield f"smoothed {_four(loss.smooth[index])}"
    for name, held_out in HELD_OUT.items():
        if (value := log.series[held_out].value_at(step)) is not None:
            yield f"held-out {METRICS[name].short} {_four(value)}"


def _cost(line: Drawn) -> Iterator[str]:
    view = line.view
    if view.kept is not None:
        yield f"kept {view.kept:.0%} of the old answers"
    if view.run.sweeps:
        yield from _sweep(view)
    if recent := view.timed.cost.recent:
        last = recent[-1]
        if last.predicted or last.measured:
            measured = in_units(last.measured) if last.measured else "not measured yet"
            yield f"memory {measured}" + (
                f", predicted {in_units(last.predicted)}" if last.predicted else ""
            )
        yield f"process {in_units(last.resident)}"
    rate = view.timed.cost.series["tokens_per_second"].smooth
    if rate and isfinite(rate[-1]):
        adapters = sum(not curve_log.outcome for curve_log in view.curve_logs.values())
        yield f"{f'{adapters} × ' if adapters > 1 else ''}{rate[-1]:,.0f} tokens/s"


def _sweep(view: RunView) -> Iterator[str]:
    name, loss = view.loss_of(view.best)
    if loss is not None and view.best.outcome != DIVERGED:
        yield f"best {printable(view.best.name)}: {name} {_four(loss)}"
    for outcome in (DIVERGED, STOPPED):
        if names := [
            curve_log.name for curve_log in view.curve_logs.values() if curve_log.outcome == outcome
        ]:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            yield f"{len(names)} {outcome}: {printable(', '.join(names[:MAX_NAMES]))}{more}"


def _trouble(view: RunView, paint: Paint) -> Iterator[str | Text]:
    if view.change:
        yield f"log {view.change} since it was opened"
    if skipped := sum(curve_log.skipped for curve_log in view.curve_logs.values()):
        yield f"{skipped:,} foreign lines skipped"
    if view.journal and (message := view.journal.message or (DIED if view.state == "died" else "")):
        yield Text(printable(message), paint.state(view))


def _four(value: float) -> str:
    return f"{value:.4g}"


def roughly(seconds: float) -> str:
    """An estimate, no more precise than it is: a few seconds, about 40 s, about 5 min, about 2 h 10
    min.
    """
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {round(seconds, -1):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"about {minutes} min"
    hours, minutes = divmod(round(minutes, -1), 60)
    return f"about {hours} h" + (f" {minutes} min" if minutes and hours < 10 else "")


def answers(shown: Sequence[Drawn], cursor: float | None, paint: Paint) -> Text:
    """What each run answered, and of a sweep its best and the pointed one: at the cursor, or the
    newest.
    """
    text = Text()
    for line in reversed(shown):  # the pointed one first
        samples = [] if line.quiet else line.curve_log.answers_at(cursor)
        if not samples:
            continue
        text.append(f"{line.look.sign} ", paint.of(line.look)).append(printable(line.name), "bold")
        text.append(f"  step {samples[0].step:,}\n")
        for sample in samples:
            answer = "(not finite)" if sample.answer is None else printable(sample.answer)
            text.append(f"  {printable(sample.prompt)}\n", "dim")
            if sample.expected is None:
                text.append(f"  → {answer}\n")
                continue
            compared = match(sample.answer or "", sample.expected)
            text.append(f"  {compared.sign} {answer}\n")
            if not compared.as_expected:
                text.append(f"    expected {printable(sample.expected)}\n", "dim")
    text.rstrip()
    return text

"""Runs in words: the columns of their table, the details of a run, what it answered."""

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from datetime import datetime
from math import isfinite

from textual.content import Content

from pipeline.data.answers.match import match
from pipeline.files.text import in_units
from pipeline.project.logs.run_log import DIVERGED, STOPPED
from pipeline.views.curves import Curve, RunView
from pipeline.views.series import HELD_OUT, METRICS, three_digits
from tui.panes.table import Column
from tui.screens.curves.lines import Drawn
from tui.widgets.cells import LEVELS, bar
from tui.widgets.colors import look_style

Row = RunView | Curve  # an adapter of a sweep is a curve
DIED = "the process died (no error recorded). Run again to resume from the last checkpoint"
MAX_NAMES = 2  # adapters named in a list of those that ended
SIGNS = {"running": "▶", "stopped": "‖", "failed": "✗", "died": "✗", "finished": " "}
STYLES = {"running": "$accent", "stopped": "$warning", "failed": "$error", "died": "$error"}
BAR = 8  # cells, where there is room
OFF = "·"  # in place of the sign of a run that is not drawn
ENDS = {DIVERGED: "diverged", STOPPED: "stopped"}


def rows(views: Iterable[RunView]) -> list[Row]:
    """Each run, and below a sweep its adapters."""
    found = list[Row]()
    for view in views:
        found += [view, *(view.curves.values() if view.run.sweeps else ())]
    return found


def parent(row: Row) -> str | None:
    """The key of the sweep that an adapter is listed below."""
    return row.view.key if isinstance(row, Curve) else None


def columns(on: Collection[RunView], folded: Collection[Hashable], wide: bool) -> list[Column[Row]]:
    """`■ lora 0.0158 ▆ 73%`: sign and name, loss, how much was kept or how far it is. What is off
    is dim.
    """

    def name(row: Row) -> Content:
        if isinstance(row, Curve):
            is_best = row is row.view.best
            sign, label = f"  {row.view.look.sign if is_best else ' '}", row.name
        else:
            sign, label = row.look.sign if row in on else OFF, row.name
            if row.run.sweeps:
                label = f"{'▸' if row.key in folded else '▾'} {label}"
        look = (row.view if isinstance(row, Curve) else row).look
        return dim(row, Content.assemble((sign, look_style(look)), f" {label}"))

    def value(row: Row) -> Content:
        if isinstance(row, RunView) and row not in on:  # it is not read, so its loss would be old
            return dim(row, Content(_when(row)))
        _, loss = (row if isinstance(row, Curve) else row.best).loss
        return Content("" if loss is None else three_digits(loss))

    def dim(row: Row, content: Content) -> Content:
        is_off = isinstance(row, RunView) and row not in on
        return content.stylize("dim") if is_off else content

    return [
        Column("run", name, fills=True),
        Column("loss", value, right=True),
        Column("kept", lambda row: dim(row, _end(row, wide))),
    ]


def _end(row: Row, wide: bool) -> Content:
    """How an adapter ended, if that was early. A finished run's share of old answers that it kept;
    of another run its state and progress.
    """
    if isinstance(row, Curve):
        return Content(ENDS.get(row.outcome, ""))
    if row.state != "finished":
        done, total = row.steps
        progress = f"{done / total:.0%}" if total else ""
        return Content.styled(f"{SIGNS[row.state]} {progress:>3}", STYLES[row.state])
    if row.kept is None:
        return Content()
    level = LEVELS[round(row.kept * (len(LEVELS) - 1))]
    return Content(f"{bar(row.kept, BAR) if wide else level} {row.kept:>3.0%}")


def _when(view: RunView) -> str:
    """The day of the last change, or of today's the time."""
    then = datetime.fromtimestamp(view.run.when)
    return f"{then:%H:%M}" if then.date() == datetime.now().date() else f"{then:%d %b}"


def details(curve: Curve, step: float | None) -> Iterator[Content]:
    """What is known of a run, or of an adapter of a sweep: state, values, what it cost."""
    view = curve.view
    sign = (view.look.sign, look_style(view.look))
    yield Content.assemble(sign, " ", (view.run.curve_label(curve.name), "bold"))
    yield _state(view)
    if (left := view.seconds_left) is not None:
        yield Content.styled(f"{roughly(left)} left", "bold")
    yield from map(Content, (*_epochs(view), *_values(curve, step), *_cost(view), *_trouble(view)))
    message = view.journal.message if view.journal else ""
    if message or view.state == "died":
        yield Content.styled(message or DIED, STYLES.get(view.state, ""))


def everything(curve: Curve, step: float | None) -> list[Content]:
    """The details of a run, and its settings."""
    params = curve.view.run.params
    parts = [*details(curve, step)]
    parts += [Content(), Content.styled("Settings", "bold")] * bool(params)
    return [*parts, *(Content(f"{key}  {value}") for key, value in params.items())]


def _state(view: RunView) -> Content:
    done, total = view.steps
    style = STYLES.get(view.state, "")
    state = Content.styled(f"{SIGNS[view.state]} {view.state}".strip(), style)
    if view.state == "finished":
        state += f" {_when(view)}"
    return state + (f" · {done:,} of {total:,} steps" if done < total else f" · {done:,} steps")


def _epochs(view: RunView) -> Iterator[str]:
    epochs, flat = view.best.log.columns["epoch"], view.best.flat()
    if epochs:
        note = f" · » flat from epoch {flat[0]:.0f}" if flat else ""
        yield f"epoch {epochs[-1]:.0f}{note}"


def _values(curve: Curve, at: float | None) -> Iterator[str]:
    """The values at a step, or the newest; the small plots have the others."""
    steps, loss = curve.log.steps, curve.log.series["loss"]
    if at is not None and not (steps and steps[0] <= at <= steps[-1]):
        yield f"nothing logged at step {at:,.0f}"
    elif steps:
        index = len(steps) - 1 if at is None else curve.log.index_at(at) or 0
        yield f"loss {loss.y[index]:.4g} at step {steps[index]:,.0f}"
        yield f"smoothed {loss.smooth[index]:.4g}"
        for name, held_out in HELD_OUT.items():
            value = curve.log.series[held_out].value_at(steps[index])
            if value is not None:
                yield f"held-out {METRICS[name].short} {value:.4g}"


def _cost(view: RunView) -> Iterator[str]:
    if view.kept is not None:
        yield f"kept {view.kept:.0%} of the old answers"
    if view.run.sweeps:
        yield from _sweep(view)
    cost = view.timed.cost
    if cost.recent:
        last = cost.recent[-1]
        measured = in_units(last.measured) if last.measured else "not measured yet"
        predicted = f", predicted {in_units(last.predicted)}" if last.predicted else ""
        if last.measured or last.predicted:
            yield f"memory {measured}{predicted}"
        yield f"process {in_units(last.resident)}"
    rate = cost.series["tokens_per_second"].smooth
    if rate and isfinite(rate[-1]):
        adapters = sum(not curve.outcome for curve in view.curves.values())
        yield f"{f'{adapters} × ' if adapters > 1 else ''}{rate[-1]:,.0f} tokens/s"


def _sweep(view: RunView) -> Iterator[str]:
    name, loss = view.best.loss
    if loss is not None and view.best.outcome != DIVERGED:
        yield f"best {view.best.name}: {name} {loss:.4g}"
    for outcome in ENDS:
        names = [curve.name for curve in view.curves.values() if curve.outcome == outcome]
        more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
        if names:
            yield f"{len(names)} {outcome}: {', '.join(names[:MAX_NAMES])}{more}"


def _trouble(view: RunView) -> Iterator[str]:
    if view.change:
        yield f"log {view.change} since it was opened"
    if skipped := sum(curve.skipped for curve in view.curves.values()):
        yield f"{skipped:,} foreign lines skipped"


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


def answers(lines: Sequence[Drawn], step: float | None) -> Content:
    """What each run answered, and of a sweep its best and the pointed one: at a step, or the
    newest.
    """
    parts: list[str | tuple[str, str]] = []
    for line in reversed(lines):  # the pointed one first
        samples = [] if line.quiet else line.curve.answers_at(step)
        for number, sample in enumerate(samples):
            if number == 0:
                head = (f"{line.curve.view.look.sign} ", line.style), (line.curve.label, "bold")
                parts += [*head, f"  step {sample.step:,}\n"]
            answer = "(not finite)" if sample.answer is None else sample.answer
            parts.append((f"  {sample.prompt}\n", "dim"))
            if sample.expected is None:
                parts.append(f"  → {answer}\n")
                continue
            compared = match(sample.answer or "", sample.expected)
            parts.append(f"  {compared.sign} {answer}\n")
            if not compared.as_expected:
                parts.append((f"    expected {sample.expected}\n", "dim"))
    return Content.assemble(*parts).rstrip()

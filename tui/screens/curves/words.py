"""Runs in words: the columns of their table, the details of a run, what it answered."""

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime

from textual.content import Content

from pipeline.data.answers.match import match
from pipeline.views.curves import ENDS, Curve, RunView, in_words
from pipeline.views.series import three_digits
from tui.widgets.cells import LEVELS, duration
from tui.widgets.colors import look_style

Row = RunView | Curve  # an adapter of a sweep is a curve
DIED = "the process died (no error recorded). Run again to resume from the last checkpoint"
SIGNS = {  # and their styles
    "running": ("▶", "$accent"),
    "stopped": ("‖", "$warning"),
    "failed": ("✗", "$error"),
    "died": ("✗", "$error"),
    "finished": ("", ""),
}
OFF = "·"  # in place of the sign of a run that is not drawn


def best_of(row: Row | None) -> Curve | None:
    """A curve itself, of a run its best."""
    return row.best if isinstance(row, RunView) else row


def rows(views: Iterable[RunView]) -> list[Row]:
    """Each run, and below a sweep its adapters."""
    found = list[Row]()
    for view in views:
        found += [view, *(view.curves.values() if view.run.sweeps else ())]
    return found


def parent(row: Row) -> str | None:
    """The key of the sweep that an adapter is listed below."""
    return row.view.key if isinstance(row, Curve) else None


def cells(row: Row, on: Collection[RunView], folded: Collection[object]) -> list[Content]:
    """`■ lora`, `0.0158`, `▆ 73%`: sign and name, loss, how much was kept or how far it is. What is
    off is dim, and has the time of its last change.
    """
    if isinstance(row, Curve):
        sign = row.view.look.sign if row is row.view.best else " "
        end = ENDS.get(row.outcome, "")
        return [_named(f"  {sign}", row.view, row.name), _loss(row), Content(end)]
    name = row.name
    if row.run.sweeps:
        name = f"{'▸' if row.key in folded else '▾'} {name}"
    if row in on:
        return [_named(row.look.sign, row, name), _loss(row.best), _end(row)]
    parts = [_named(OFF, row, name), Content(_when(row)), _end(row)]
    return [part.stylize("dim") for part in parts]


def _named(sign: str, view: RunView, name: str) -> Content:
    return Content.assemble((sign, look_style(view.look)), f" {name}")


def _loss(curve: Curve) -> Content:
    _, loss = curve.loss
    return Content("" if loss is None else three_digits(loss))


def _end(view: RunView) -> Content:
    """The share of old answers that a finished run kept; of another run its state and progress."""
    if view.state != "finished":
        sign, style = SIGNS[view.state]
        done, total = view.steps
        progress = f"{done / total:.0%}" if total else ""
        return Content.styled(f"{sign} {progress:>3}", style)
    if view.kept is None:
        return Content()
    return Content(f"{LEVELS[round(view.kept * (len(LEVELS) - 1))]} {view.kept:>3.0%}")


def _when(view: RunView) -> str:
    """The day of the last change, or of today's the time."""
    then = datetime.fromtimestamp(view.run.when)
    return f"{then:%H:%M}" if then.date() == datetime.now().date() else f"{then:%d %b}"


def details(curve: Curve, step: float | None) -> Iterator[Content]:
    """What is known of a run, or of an adapter of a sweep: state, values, what it cost."""
    view = curve.view
    sign, style = SIGNS[view.state]
    look = view.look.sign, look_style(view.look)
    yield Content.assemble(look, " ", (view.run.curve_label(curve.name), "bold"))
    done, total = view.steps
    of_all = f" of {total:,}" if done < total else ""
    when = f" {_when(view)}" if view.state == "finished" else ""
    state = f"{sign} {view.state}".strip(), style
    yield Content.assemble(state, f"{when} · {done:,}{of_all} steps")
    if (left := view.seconds_left) is not None:
        yield Content.styled(f"{duration(left)} left", "bold")
    if view.run.checkpoints:
        steps = ", ".join(f"{at:,}{' ★' * (at == view.run.best)}" for at in view.run.checkpoints)
        yield Content(f"checkpoints {steps}")
    yield from map(Content, in_words(curve, step))
    message = view.journal.message if view.journal else ""
    if message or view.state == "died":
        yield Content.styled(message or DIED, style)


def answers(curves: Iterable[Curve], step: float | None) -> Content:
    """What each curve's run answered, at a step or the newest."""
    parts: list[str | tuple[str, str]] = []
    for curve in curves:
        samples, look = curve.answers_at(step), curve.view.look
        for sample in samples[:1]:
            parts += [(look.sign, look_style(look)), " ", (curve.label, "bold")]
            parts.append(f"  step {sample.step:,}\n")
        for sample in samples:
            answer = "(not finite)" if sample.answer is None else sample.answer
            compared = match(answer, sample.expected) if sample.expected is not None else None
            sign_of_answer = compared.sign if compared else "→"
            parts += [(f"  {sample.prompt}\n", "dim"), f"  {sign_of_answer} {answer}\n"]
            if compared and not compared.as_expected:
                parts.append((f"    expected {sample.expected}\n", "dim"))
    return Content.assemble(*parts).rstrip()

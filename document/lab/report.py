"""What a study or a figure gives: tables as CSV, a picture, and words. Nothing heavy is imported
before it is drawn.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lab.tables import Spread, Table, read_table
from pipeline.project.runner import Facts, Job
from pipeline.stages.registry import METHODS

REPORT = "report.md"
COLORS: Mapping[str, str] = {
    name: stage.look.color for name, stage in METHODS.items() if stage.look
}
Figure = Any  # matplotlib's, which has no types
Axis = Any
DIGITS = 5  # of positions, as a fraction of the figure's size

# The style of printed figures: text of at least 7 points, colors that differ in grayscale and for
# the color-blind. If two colors are similar in grayscale, a marker, dash or hatch distinguishes
# them as well.
SMALL = 7  # points; no text is smaller
WIDE = 7.2  # inches: a page's two columns
PRINT: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "figure.dpi": 200,
    "figure.titlesize": 9,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.5,
    "patch.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.handlelength": 2.6,
    "axes.titlelocation": "left",
}
# the document's colors
BLUE, RED, GREEN, ORANGE = COLORS["lora"], COLORS["full"], COLORS["prefix"], COLORS["freeze"]
FROZEN, EDGE, INK = "#DCE8F2", "#5B6B7A", "#1A1A1A"
# bars of what is frozen
HATCHED: dict[str, Any] = {"color": FROZEN, "edgecolor": EDGE, "hatch": "///////"}


@dataclass(frozen=True)
class Findings:
    """`text`: paragraphs of Markdown that describe the measurements. `draw` fills a matplotlib
    figure of `size` inches.

    Of a figure: `shows` is its main result in one line, and `title` its title; a study's is its
    stage's.
    """

    text: str
    tables: Sequence[Table]
    draw: Callable[[Figure], None]
    size: tuple[float, float] = (9, 4)
    shows: str = ""
    title: str = ""


def write_study(job: Job, place: str, findings: Findings) -> Facts:
    """Write tables, picture and report to `job.out`. Returns the manifest's entries: texts, and
    each table's formats.

    The report shows the tables as read back from the CSV files, so that it has the same digits as
    later readers.
    """
    name, title, text = job.stage.method, job.stage.title, findings.text.strip()
    for table in findings.tables:
        table.write(job.out)
    tables = [
        replace(table, rows=read_table(job.out / f"{table.name}.csv")) for table in findings.tables
    ]
    save(job.out / name, findings.draw, findings.size)
    parts = [
        f"# {title} ({place})\n",
        f"{text}\n",
        *map(_section, tables),
        f"![{title}]({name}.png)\n",
    ]
    (job.out / REPORT).write_text("\n".join(parts), encoding="utf-8")
    options = {
        t.name: {"title": t.title, "formats": dict(t.formats), "hidden": list(t.hidden)}
        for t in tables
    }
    return {"title": title, "section": place, "text": text, "tables": options}


def figure_section(name: str, place: str, findings: Findings, max_rows: int = 20) -> str:
    """A figure's section of the report: picture, caption, and the tables that are short enough to
    read.
    """
    short = [table for table in findings.tables if len(table.rows) <= max_rows]
    long = [f"`{table.name}.csv`" for table in findings.tables if table not in short]
    title = findings.title
    parts = [f"## {title} ({place})\n", f"![{title}]({name}.png)\n", f"{findings.text.strip()}\n"]
    return "\n".join(
        [*parts, *map(_section, short), *([f"Further data: {', '.join(long)}.\n"] if long else [])]
    )


def _section(table: Table) -> str:
    return f"**{table.title}**\n\n{table.markdown()}"


def save(
    path: Path,
    draw: Callable[[Figure], None],
    size: tuple[float, float],
    endings: Sequence[str] = (".png",),
    style: Mapping[str, Any] | None = None,
) -> None:
    """Draw once and write `path` + each ending, as PNG or SVG. The same drawing gives the same
    bytes.

    `style`: rcParams that override matplotlib's defaults.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as MatplotlibFigure

    # Ids in an SVG are random without a salt, and its text would be outlines. Ticks are 0.3, not 3
    # × 10⁻¹.
    fixed = {"svg.hashsalt": path.name, "svg.fonttype": "none", "axes.formatter.min_exponent": 4}
    with matplotlib.rc_context({**(style or {}), **fixed}):
        figure = MatplotlibFigure(figsize=size, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        _fix_layout(figure)
        for ending in endings:
            file = path.with_name(path.name + ending)
            if ending == ".svg":
                FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
            else:
                canvas.print_png(file, metadata={"Software": None})


def _fix_layout(figure: Figure) -> None:
    """Compute the layout and round all positions.

    The layout solver's last digits depend on memory addresses. They would change the ids in an SVG
    and move a line in a PNG to a neighbouring pixel.
    """
    from matplotlib.transforms import Bbox

    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    parts = [figure]
    for part in parts:
        parts += part.subfigs
        for text in part.texts:
            text.set_position([round(at, DIGITS) for at in text.get_position()])
    for part in parts[1:]:
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(DIGITS))
    for axis in figure.axes:
        axis.set_position(Bbox(axis.get_position(original=True).get_points().round(DIGITS)))


def min_max(cells: Iterable[Spread]) -> list[list[float]]:
    """matplotlib's error bars: the distances from each mean down to the minimum and up to the
    maximum.
    """
    spreads = list(cells)
    return [[c - c.low for c in spreads], [c.high - c for c in spreads]]


def error_bars(axis: Axis, x: Collection[Any], cells: Sequence[Spread], **style: Any) -> None:
    """A line through the means with a bar from minimum to maximum at each point."""
    axis.errorbar(list(x), cells, yerr=min_max(cells), **style)


def legend_beside(axis: Axis) -> None:
    """A legend to the right of the axes, for more entries than fit inside."""
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))


def signed(number: float, form: str = "+.3f") -> str:
    """Format with a sign, the minus as − instead of a hyphen."""
    return f"{number:{form}}".replace("-", "−")

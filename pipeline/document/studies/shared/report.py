"""The output of a study: tables as CSV, a picture, and a text."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.document.tables import Table, read_table
from pipeline.project.runner import Facts, Job

REPORT = "report.md"
DIGITS = 5  # of positions, as a fraction of the figure's size
Figure = Any  # matplotlib's, which has no types


@dataclass(frozen=True)
class Findings:
    """`section`: of the document, such as §2.3. `text`: Markdown paragraphs that describe the measurements."""

    title: str
    section: str
    text: str
    tables: tuple[Table, ...]


def write_report(
    job: Job, findings: Findings, draw: Callable[[Figure], None], size: tuple[float, float] = (9, 4)
) -> Facts:
    """Write tables, picture and report to `job.out`. Returns the manifest's entries: texts, and each table's formats.

    `draw` fills a matplotlib figure of `size` inches, which becomes NAME.png. The report shows the tables as read back
    from the CSV files, so that it has the same digits as later readers.
    """
    name = job.stage.method
    for table in findings.tables:
        table.write(job.out)
    tables = [replace(table, rows=read_table(job.out / f"{table.name}.csv")) for table in findings.tables]
    save(job.out / name, draw, size)
    parts = [
        f"# {findings.title} ({findings.section})\n",
        findings.text.strip() + "\n",
        *(f"**{table.title}**\n\n{table.markdown()}" for table in tables),
        f"![{findings.title}]({name}.png)\n",
    ]
    (job.out / REPORT).write_text("\n".join(parts), encoding="utf-8")
    texts = {"title": findings.title, "section": findings.section, "text": findings.text.strip()}
    return {**texts, "tables": {table.name: _display_options(table) for table in findings.tables}}


def _display_options(table: Table) -> dict[str, Any]:
    return {"title": table.title, "formats": dict(table.formats), "hidden": list(table.hidden)}


def save(
    path: Path,
    draw: Callable[[Figure], None],
    size: tuple[float, float],
    endings: Sequence[str] = (".png",),
    style: Mapping[str, Any] | None = None,
) -> None:
    """Draw once and write `path` + each ending, as PNG or SVG. The same drawing gives the same bytes.

    `style`: rcParams that override matplotlib's defaults.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as MatplotlibFigure

    fixed = {"svg.hashsalt": path.name, "svg.fonttype": "none", "axes.formatter.min_exponent": 4}  # 0.3, not 3 × 10⁻¹
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

    The layout solver's last digits depend on memory addresses. They would change the ids in an SVG and move a line in
    a PNG to a neighbouring pixel.
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

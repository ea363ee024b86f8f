"""What a study found: tables as CSV, a picture, and a paragraph that says it in words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.document.tables import Table, read_table
from pipeline.project.runner import Facts, Job

REPORT = "report.md"
DIGITS = 5  # of a place, as a share of the picture
Figure = Any  # matplotlib's, which has no types


@dataclass(frozen=True)
class Findings:
    """`section`: of the document, such as §2.3. `text`: paragraphs in Markdown, with what was measured in words."""

    title: str
    section: str
    text: str
    tables: tuple[Table, ...]


def write_report(
    job: Job, found: Findings, draw: Callable[[Figure], None], size: tuple[float, float] = (9, 4)
) -> Facts:
    """Write everything to `job.out`; returns what the manifest says: the words, and each table's title and form.

    The report shows the tables as the files have them, as all do that read them later.

    `draw` fills a figure of `size` inches, which becomes NAME.png.
    """
    name = job.stage.method
    for table in found.tables:
        table.write(job.out)
    read = [replace(table, rows=read_table(job.out / f"{table.name}.csv")) for table in found.tables]
    save(job.out / name, draw, size)
    parts = [
        f"# {found.title} ({found.section})\n",
        found.text.strip() + "\n",
        *(f"**{table.title}**\n\n{table.markdown()}" for table in read),
        f"![{found.title}]({name}.png)\n",
    ]
    (job.out / REPORT).write_text("\n".join(parts), encoding="utf-8")
    told = {"title": found.title, "section": found.section, "text": found.text.strip()}
    return {**told, "tables": {table.name: _described(table) for table in found.tables}}


def _described(table: Table) -> dict[str, Any]:
    return {"title": table.title, "formats": dict(table.formats), "hidden": list(table.hidden)}


def save(
    path: Path,
    draw: Callable[[Figure], None],
    size: tuple[float, float],
    endings: Sequence[str] = (".png",),
    style: Mapping[str, Any] | None = None,
) -> None:
    """A picture at `path` + each ending, as PNG or SVG; the same drawing gives the same bytes.

    `style`: matplotlib's rcParams, where they are to be others than its own.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Drawn

    ours = {"svg.hashsalt": path.name, "svg.fonttype": "none", "axes.formatter.min_exponent": 4}  # 0.3, not 3 × 10⁻¹
    with matplotlib.rc_context({**(style or {}), **ours}):
        figure = Drawn(figsize=size, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        _settle(figure)
        for ending in endings:
            file = path.with_name(path.name + ending)
            if ending == ".svg":
                FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
            else:
                canvas.print_png(file, metadata={"Software": None})


def _settle(figure: Figure) -> None:
    """Lay out, and round all places: the solver's last digits follow from where its objects lie in memory.

    By them an SVG names its parts, and a line falls on one pixel or its neighbour.
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

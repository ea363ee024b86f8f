"""The stage figures: the document's Figures 1 to 5 and its attention example, drawn from the project's artifacts."""

from collections.abc import Callable, Generator

from pipeline.document.figures.attention import attention
from pipeline.document.figures.draw.figure import RenderedFigure, write_report
from pipeline.document.figures.gradient import gradient_example
from pipeline.document.figures.intuition import lora_intuition
from pipeline.document.figures.loss_curves import loss_curves
from pipeline.document.figures.placement import placement
from pipeline.document.figures.subspace import finetuning_subspace
from pipeline.project.runner import Event, Facts, Job, Progress

MEASURED: tuple[Callable[[Job], RenderedFigure], ...] = (
    *(finetuning_subspace, loss_curves, lora_intuition),  # Figures 1, 2 and 4
    *(placement, attention),  # Figure 5, §2.1
)
GRADIENT_INDEX = 2  # of Figure 3 in the document's order; it is separate because it trains


def run(job: Job) -> Generator[Event, None, Facts]:
    """Write every figure as PNG and SVG, its numbers as CSV, and a report. Raises UserError."""
    for stage in job.stage.needs:
        job.artifact(stage)
    drawn = [make(job) for make in MEASURED]
    drawn.insert(GRADIENT_INDEX, (yield from gradient_example(job)))
    for number, figure in enumerate(drawn, 1):
        figure.write(job.out)
        yield Progress(number, len(drawn), figure.name)
    write_report(job.out, drawn)
    return {"figures": {figure.name: figure.facts() for figure in drawn}}

"""`python -m pipeline.stages.charts`: a chart's description as JSON from stdin → SVG or PNG.

It runs in a separate process, so that the terminal UI never loads matplotlib. It is no part of
`report.py`, where a change makes evaluate's artifact out of date.
"""

import json
import sys
from collections.abc import Mapping
from io import BytesIO
from typing import Any

MARKERS = dict(zip("●▲■◈◆▼○△□◇▽◀▶◁▷★☆", "o^sPDvo^sDv<><>**", strict=True))
HOLLOW = "○△□◇▽◁▷☆"
DASHES = ("-", "--", "-.", ":")
WIDTH, HEIGHT, PANEL = 8.0, 4.2, 1.8  # inches; PANEL: height of each further panel


def draw(picture: Mapping[str, Any]) -> bytes:
    """The file's bytes; the Curves screen makes `picture` (`tui.screens.curves.export`)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    panels = picture["panels"]
    size = (WIDTH, HEIGHT + PANEL * (len(panels) - 1))
    figure = Figure(figsize=size, layout="constrained")
    heights = [HEIGHT, *[PANEL] * (len(panels) - 1)]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        _draw_panel(axis, panel)
    axes[0].set(xlim=panels[0]["x"], title=picture["title"])
    axes[0].legend(fontsize="small")
    axes[-1].set(xlabel="step")
    file = BytesIO()
    if picture["format"] == "svg":
        with matplotlib.rc_context({"svg.hashsalt": "curves"}):
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})
    else:
        FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _draw_panel(axis: Any, panel: Mapping[str, Any]) -> None:
    curves = [curve for curve in panel["curves"] if curve["columns"]]
    for curve in (curve for curve in curves if not curve["label"]):
        x, _, _, mean = zip(*curve["columns"], strict=True)
        axis.plot(x, mean, color=curve["color"], alpha=0.5, linewidth=0.8)
    for number, curve in enumerate(curve for curve in curves if curve["label"]):
        _draw_curve(axis, curve, number)
    axis.set(ylabel=panel["title"], yscale="log" if panel["log"] else "linear")
    if panel["y"]:
        axis.set(ylim=panel["y"])
    axis.grid(alpha=0.3)


def _draw_curve(axis: Any, curve: Mapping[str, Any], number: int) -> None:
    """Raw and smoothed values, evaluations, and a stroke where the curve becomes flat."""
    color, (x, low, high, mean) = curve["color"], zip(*curve["columns"], strict=True)
    marker = MARKERS.get(curve["sign"], "o")  # an extension's sign may be any
    label = curve["label"].replace("$", r"\$")  # a formula would begin there
    raw = [value for pair in zip(low, high, strict=True) for value in pair]
    axis.plot([value for value in x for _ in range(2)], raw, color=color, alpha=0.3, linewidth=0.6)
    axis.plot(
        x,
        mean,
        DASHES[number % len(DASHES)],
        color=color,
        label=label,
        marker=marker,
        markerfacecolor="white" if curve["sign"] in HOLLOW else color,
        markevery=(0.05 + 0.03 * number, 0.15),
        linewidth=1.6,
    )
    if curve["marks"]:
        at, held_out = zip(*curve["marks"], strict=True)
        axis.plot(at, held_out, ":", marker="x", color=color, label=f"{label}, held out")
    if curve["flat"]:
        flat = {"marker": "|", "markersize": 16, "markeredgewidth": 2}
        axis.plot(*curve["flat"], **flat, color=color, label=f"{label}, flat from here")


def main() -> None:
    """Read stdin, write the picture to stdout."""
    sys.stdout.buffer.write(draw(json.load(sys.stdin)))


if __name__ == "__main__":
    main()

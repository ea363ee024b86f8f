"""How figures look in print: type of 7 points and more, colours that stay apart in grey and for every reader.

Where two colours are near each other in grey, a shape, a dash or a hatch tells the things apart besides.
"""

from typing import Any

from pipeline.project.palette import COLORS

PRINT: dict[str, Any] = {
    **{"font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7, "legend.title_fontsize": 7},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "figure.dpi": 200, "figure.titlesize": 9},
    **{"axes.linewidth": 0.6, "lines.linewidth": 1.4, "hatch.linewidth": 0.5, "patch.linewidth": 0.6},
    **{"xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.handlelength": 2.6, "axes.titlelocation": "left"},
}
SMALL = 7  # points; no text is smaller
WIDE = 7.2  # inches: a page's two columns

BLUE, RED, GREEN, ORANGE = COLORS["lora"], COLORS["full"], COLORS["prefix"], COLORS["freeze"]  # the document's colours
FROZEN, EDGE, INK = "#DCE8F2", "#5B6B7A", "#1A1A1A"
HATCH = "///////"
LITTLE_TO_MUCH = ("#D5E4F0", "#E69F00", "#7A1B00")  # light to dark, so that grey says the same


def ramp() -> Any:
    """matplotlib's colour map of little to much: blue, orange, red, darker all the way."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("little to much", LITTLE_TO_MUCH)


def on(share: float) -> str:
    """The ink to write with on Blues, matplotlib's map, of which 0 is the light end; white is read better from 0.68."""
    return "white" if share > 0.68 else INK


def signed(number: float, form: str = "+.3f") -> str:
    """With its sign as it is written in print."""
    return f"{number:{form}}".replace("-", "−")

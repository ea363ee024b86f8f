"""The style of printed figures: text of at least 7 points, colors that differ in grayscale and for the color-blind.

If two colors are similar in grayscale, a marker, dash or hatch distinguishes them as well.
"""

from typing import Any

from pipeline.stages.registry import COLORS

PRINT: dict[str, Any] = {
    **{"font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7, "legend.title_fontsize": 7},
    **{"xtick.labelsize": 7, "ytick.labelsize": 7, "figure.dpi": 200, "figure.titlesize": 9},
    **{"axes.linewidth": 0.6, "lines.linewidth": 1.4, "hatch.linewidth": 0.5, "patch.linewidth": 0.6},
    **{"xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.handlelength": 2.6, "axes.titlelocation": "left"},
}
SMALL = 7  # points; no text is smaller
WIDE = 7.2  # inches: a page's two columns

BLUE, RED, GREEN, ORANGE = COLORS["lora"], COLORS["full"], COLORS["prefix"], COLORS["freeze"]  # the document's colors
FROZEN, EDGE, INK = "#DCE8F2", "#5B6B7A", "#1A1A1A"
HATCH = "///////"
LITTLE_TO_MUCH = ("#D5E4F0", "#E69F00", "#7A1B00")  # light to dark, so that it works in grayscale


def ramp() -> Any:
    """matplotlib's color map from light blue over orange to dark red."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("little to much", LITTLE_TO_MUCH)


def ink_on(share: float) -> str:
    """The text color with the better contrast on matplotlib's map Blues at `share`; white from 0.68 on."""
    return "white" if share > 0.68 else INK


def signed(number: float, form: str = "+.3f") -> str:
    """Format with a sign, the minus as − instead of a hyphen."""
    return f"{number:{form}}".replace("-", "−")

"""Every run's colour is readable on the backgrounds of Textual's default themes, on black and on
white.
"""

import pytest
from textual.color import Color

from pipeline.stages.registry import STAGES
from pipeline.views.looks import other_look
from tui.widgets.colors import CONTRAST, contrast, readable

COLORS = sorted(
    {
        look.color
        for look in (*(stage.look for stage in STAGES.values()), *map(other_look, range(20)))
        if look
    }
)


def test_contrast_is_wcags() -> None:
    assert contrast(Color.parse("#000000"), Color.parse("#ffffff")) == pytest.approx(21)
    assert contrast(Color.parse("#767676"), Color.parse("#ffffff")) == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("background", ["#121212", "#e0e0e0", "#000000", "#ffffff"])
@pytest.mark.parametrize("color", COLORS)
def test_a_colour_stands_out(color: str, background: str) -> None:
    assert (
        contrast(readable(Color.parse(color), Color.parse(background)), Color.parse(background))
        >= CONTRAST
    )

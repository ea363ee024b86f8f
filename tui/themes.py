"""Three themes of our own beside Textual's: dark, light, and one of high contrast. Colour means
state or magnitude.
"""

from textual.cache import LRUCache
from textual.css.stylesheet import Stylesheet
from textual.theme import Theme


def _variables(
    cursor: str, resting: str, scrollbar: str, background: str, foreground: str
) -> dict[str, str]:
    """The cursor of lists, dimmer where the focus is elsewhere, and thin scroll bars that do not
    draw the eye.
    """
    return {
        "block-cursor-background": cursor,
        "block-cursor-foreground": foreground,
        "block-cursor-text-style": "bold",
        "block-cursor-blurred-background": resting,
        "block-cursor-blurred-foreground": foreground,
        "block-cursor-blurred-text-style": "none",
        "scrollbar": scrollbar,
        "scrollbar-hover": scrollbar,
        "scrollbar-active": foreground,
        "scrollbar-background": background,
        "scrollbar-background-hover": background,
        "scrollbar-background-active": background,
        "scrollbar-corner-color": background,
    }


DARK = Theme(
    "lora-dark",
    primary="#5B8DEF",
    secondary="#7A88A8",
    accent="#4FC1E9",
    warning="#E9B44C",
    error="#F0616D",
    success="#5FC48B",
    foreground="#D8DEE9",
    background="#12151C",
    surface="#171B24",
    panel="#1F2530",
    boost="#242B38",
    variables=_variables("#2B4A6F", "#232B39", "#3A4556", "#12151C", "#F2F5FA"),
)
LIGHT = Theme(
    "lora-light",
    primary="#2459B8",
    secondary="#5A6478",
    accent="#00698C",
    warning="#8A5A00",
    error="#B3213B",
    success="#1E7A45",
    foreground="#1C2430",
    background="#FAFAF7",
    surface="#F3F3EE",
    panel="#E7E8E2",
    boost="#E9ECF2",
    dark=False,
    variables=_variables("#BFD9EE", "#E1E5EA", "#B9BDC4", "#FAFAF7", "#0B1420"),
)
CONTRAST = Theme(
    "lora-contrast",
    primary="#FFFFFF",
    secondary="#C0C0C0",
    accent="#00FFFF",
    warning="#FFFF00",
    error="#FF8080",
    success="#00FF80",
    foreground="#FFFFFF",
    background="#000000",
    surface="#000000",
    panel="#202020",
    boost="#303030",
    text_alpha=1.0,
    variables=_variables("#0000C0", "#404040", "#FFFFFF", "#000000", "#FFFFFF"),
)
THEMES = {theme.name: theme for theme in (DARK, LIGHT, CONTRAST)}


class ParsedOnce(Stylesheet):
    """Parses each source of styles once per theme.

    Textual parses all of them again for every screen and dialog that opens, and three times before
    the first paint.
    """

    def __init__(self, variables: dict[str, str]) -> None:
        super().__init__(variables=variables)
        self._parse_cache = LRUCache(4096)  # Textual's holds 64, fewer than the widgets here

    def set_variables(self, variables: dict[str, str]) -> None:
        if variables != self._variables:
            super().set_variables(variables)

    def reparse(self) -> None:
        self.parse()

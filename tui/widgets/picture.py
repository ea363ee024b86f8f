"""A picture in the terminal: as its pixels where the terminal can (kitty's protocol, sixel), else
in half blocks.

`textual-image` draws it. Imported, that library asks the terminal what it can and reads the answer
from the keyboard, which Textual reads already: keys would be lost, and the answer would arrive as
keys. So it is imported as if there were no terminal, when a picture is first shown, and what the
terminal can is told by the variables that it sets.
"""

import fcntl
import io
import os
import struct
import sys
import termios
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image
    from textual.widget import Widget

KINDS = {"blocks": "half blocks", "sixel": "sixel", "kitty": "kitty's protocol"}
SIXEL_PROGRAMS = ("WezTerm", "iTerm.app", "mintty", "contour")  # values of TERM_PROGRAM
HOSTS = {"TMUX", "TEXTUAL_DRIVER"}  # variables of what passes no pixels on
MOST = 50_000_000  # bytes, and pixels, of a file that is opened
# pixels; larger pictures are made smaller once, rather than each time they are drawn
MAX_SIDE = 2000
CELL = 10, 20  # pixels, where the terminal does not say


def kind_of_terminal(environment: Mapping[str, str] = os.environ) -> str:
    """The best of KINDS that this terminal draws for certain. Within tmux and a browser: half
    blocks.
    """
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    is_within = term.startswith(("tmux", "screen")) or not HOSTS.isdisjoint(environment)
    if is_within:
        return "blocks"
    if term in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    names = program in SIXEL_PROGRAMS or term.startswith(("foot", "mlterm"))
    return "sixel" if names or "WT_SESSION" in environment else "blocks"


def read_picture(path: Path) -> "Image":
    """A PNG file on white, at most MAX_SIDE pixels a side. Raises UserError. Takes some 50 ms, and
    at first 50 more to load what draws it: for a thread.
    """
    from PIL import Image

    _library()
    try:
        with Image.open(path, formats=["PNG"]) as file:
            if max(path.stat().st_size, file.width * file.height) > MOST:
                raise UserError(f"{path.name} is too large. Open it with another program.")
            picture = file.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or "it is damaged, or no PNG"
        raise UserError(f"{path.name} cannot be shown: {why}. Make it again.") from None
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    page = Image.new("RGBA", picture.size, "white")
    page.alpha_composite(picture)
    return page.convert("RGB")


def widget_for(picture: "Image", kind: str) -> "Widget":
    """The widget that draws a picture by one of KINDS; its size keeps the proportions."""
    makers = {"blocks": "HalfcellImage", "sixel": "SixelImage", "kitty": "TGPImage"}
    widget: Widget = getattr(_library(), makers[kind])(picture)
    return widget


@cache
def _library() -> Any:
    """The library's widgets."""
    terminal, sys.__stdout__ = sys.__stdout__, io.StringIO()  # type: ignore[assignment, misc]
    try:
        from textual_image import _terminal, widget
    finally:
        sys.__stdout__ = terminal  # type: ignore[misc]
    _terminal.get_cell_size._result = _terminal.CellSize(*_cell_size())  # its cache
    _keep_control_codes()
    return widget


def _cell_size() -> tuple[int, int]:
    """Pixels of a cell, as the terminal's driver knows them."""
    with suppress(OSError, ValueError, AttributeError):
        size = fcntl.ioctl(sys.__stderr__.fileno(), termios.TIOCGWINSZ, b"\0" * 8)  # type: ignore[union-attr]
        rows, columns, width, height = struct.unpack("HHHH", size)
        if rows and columns and width and height:
            return width // columns, height // rows
    return CELL


def _keep_control_codes() -> None:
    """Mark the codes that place a sixel picture as such: the app removes those in what counts as
    text.
    """
    from rich.segment import ControlType, Segment
    from textual_image.widget import sixel

    plain = sixel._ImageSixelImpl._get_sixel_segments

    def marked(widget: Any, data: str) -> list[Segment]:
        moves = [(ControlType.CURSOR_FORWARD, 0)]
        return [Segment(part.text, part.style, moves) for part in plain(widget, data)]

    sixel._ImageSixelImpl._get_sixel_segments = marked

"""Pictures in the terminal."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import UserError
from tui.app import CONTROL_CHARACTER_FILTER
from tui.widgets import picture
from tui.widgets.picture import KINDS, kind_of_terminal, read_picture, widget_for


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        pytest.param({"TERM": "xterm-256color"}, "blocks", id="xterm"),
        pytest.param({"TERM": "xterm-kitty"}, "kitty", id="kitty"),
        pytest.param({"TERM": "xterm-ghostty"}, "kitty", id="ghostty"),
        pytest.param({"TERM": "foot"}, "sixel", id="foot"),
        pytest.param({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "sixel", id="wezterm"),
        pytest.param({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux"}, "blocks", id="kitty in tmux"),
        pytest.param({"TERM": "xterm-kitty", "TEXTUAL_DRIVER": "web"}, "blocks", id="browser"),
        pytest.param({}, "blocks", id="nothing"),
    ],
)
def test_only_a_terminal_that_draws_pixels_for_certain_gets_them(
    environment: dict[str, str], kind: str
) -> None:
    assert kind_of_terminal(environment) == kind


def test_the_library_never_asks_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        """What a terminal is to the library; writing to it would be a question."""

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "__stdout__", Terminal())
    for name in [name for name in sys.modules if name.startswith("textual_image")]:
        monkeypatch.delitem(sys.modules, name)
    picture._library.cache_clear()
    picture._library()
    assert isinstance(sys.__stdout__, Terminal)
    picture._library.cache_clear()


def test_a_transparent_picture_is_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4000, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    image = read_picture(tmp_path / "a.png")
    assert image.size == (picture.MAX_SIDE, 5)
    assert image.getpixel((0, 0)) == (255, 255, 255)
    for kind in KINDS:
        widget_for(image, kind)


def test_codes_that_place_a_sixel_picture_pass_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.segment import Segment
    from textual.color import Color
    from textual_image.widget import sixel

    monkeypatch.setattr(
        sixel._ImageSixelImpl, "_get_sixel_segments", lambda *_: [Segment("\x1b[3;4H")]
    )
    picture._keep_control_codes()
    segments = sixel._ImageSixelImpl._get_sixel_segments(None, "data")
    assert [s.text for s in CONTROL_CHARACTER_FILTER.apply(segments, Color(0, 0, 0))] == [
        "\x1b[3;4H"
    ]


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"], ids=["empty", "cut", "other"]
)
def test_what_is_no_picture_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        UserError, match=r"a\.png cannot be shown: it is damaged, or no PNG\. Make it again\."
    ):
        read_picture(tmp_path / "a.png")


def test_a_missing_or_huge_picture_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="No such file or directory"):
        read_picture(tmp_path / "a.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(picture, "MOST", 9_999)
    with pytest.raises(UserError, match=r"a\.png is too large"):
        read_picture(tmp_path / "a.png")

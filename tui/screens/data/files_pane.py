"""The list of data files."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.widget import Widget

from pipeline.views.data_files import DataFile, flat
from tui.widgets.pane import Pane
from tui.widgets.text import KeyedList


class FilesPane(Pane):
    """The project's data files, then others in `data/`."""

    TITLE = "Files"
    HELP = """\
The data files of the project with what reads them, then other files in `data/`. Enter opens one;
`o` asks for any other: .txt, .jsonl, .json, .csv, .tsv (also .gz, .zst), .parquet, .arrow, a
folder of `save_to_disk`, a hub id."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "screen.open_file", "other file", id="data.open")
    ]

    def __init__(self) -> None:
        super().__init__(id="files")
        self._shown: tuple[Mapping[str, DataFile], str] = ({}, "")

    def contents(self) -> Iterable[Widget]:
        yield KeyedList(markup=False)

    def show_files(self, files: Mapping[str, DataFile], opened: str) -> None:
        self._shown, width, lines = (files, opened), self.content_size.width - 1, {}
        for name, file in files.items():
            mark = "● " if name == opened else "  "
            line = Text.assemble(
                mark, (flat(name.removeprefix("data/")), "" if file.uses else "dim")
            )
            line.append(f"  {file.readers}", "dim")
            line.truncate(max(width, 8), overflow="ellipsis")
            lines[name] = line
        self.query_one(KeyedList).show(lines)

    def on_resize(self, event: Resize) -> None:
        super().on_resize(event)
        self.show_files(*self._shown)

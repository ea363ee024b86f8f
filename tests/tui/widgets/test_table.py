"""The table of the screens has room for its rows whatever else is laid out meanwhile."""

from rich.text import Text
from textual.app import App, ComposeResult
from textual.containers import Vertical

from tui.widgets.table import Table


class Page(App[None]):
    CSS = "Table { height: auto; max-height: 100%; }"

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Table()


async def test_a_table_is_as_high_as_its_rows_though_a_layout_came_before_it_counted_them() -> None:
    app = Page()
    async with app.run_test(size=(80, 24)) as pilot:
        table = app.query_one(Table)
        assert table.size.height == 0
        table.add_column(Text("model"), width=9)
        for name in ("full", "lora"):
            table.add_row(Text(name))
        table.refresh(layout=True)
        # a layout for another widget, before the table is idle
        app.query_one(Vertical)._clear_arrangement_cache()
        app.screen._refresh_layout(app.size)
        await pilot.pause()
        assert table.size.height == 3

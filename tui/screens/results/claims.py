"""The document's claims beside what was measured: narrowed by section, verdict and words, each with
its numbers.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import natural_sort_key
from tui.dialogs import Menu
from tui.screens.results.rows import Column, RowsPane
from tui.widgets.pane import Pane

Claim = Mapping[str, Any]  # a row of claims.json, with its section's title and its verdict's mark
NOTHING = (
    "This project measures no claims. The document's project does: `lora new document`, then R "
    "there."
)
COLORS = {"holds": "success", "differs": "error", "depends": "warning"}  # verdict → theme variable
ALL = "all"


class ClaimsPane(RowsPane[Claim]):
    """A row for each claim."""

    TITLE = "Claims"
    HELP = """\
What the document says, beside what this project measured. Every verdict is computed by the claim's rule.

- `✓ holds`: they agree within the claim's tolerance. `✗ differs`: under none of the conditions tried.
- `◐ depends`: under some of them only. `– not run`: press R to measure what is missing.

`p` shows one section and its subsections, `u` one verdict, `/` the claims with all words that are typed. Enter or
`o` opens the numbers that a claim is measured on.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "ask('open')", "numbers", id="results.claim_numbers"),
        Binding("p", "section", "part", id="results.section"),
        Binding("u", "verdict", "verdict", id="results.verdict"),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.section, self.verdict = ALL, ALL
        self._width = 0
        self._wanted = ""  # the claim to point at once the table is filled
        self._summary, self._claims = "", list[Claim]()

    def key_of(self, row: Claim) -> str:
        return str(row["id"])

    def words_of(self, row: Claim) -> str:
        return f"{row['title']} {row['quote']} {row['mark']} {row['id']}"

    def show(self, claims: tuple[str, Sequence[Claim]] | str | None) -> None:
        """Show the claims with their summary, or a text that says why there are none."""
        if claims is None or isinstance(claims, str):
            self._claims = []
            self.say(claims or NOTHING)
            return
        self._summary, rows = claims
        self._claims = list(rows)
        self._narrow()

    def _narrow(self) -> None:
        self._width = self.size.width
        # it is filled once it has a width: with hundreds of claims that takes a tenth of a second
        if not self._width:
            return
        rows = [
            row
            for row in self._claims
            if _in_section(row, self.section) and self.verdict in (ALL, row["verdict"])
        ]
        self.fill(rows, self._columns(), self._wanted)
        parts = [
            f"{name} {value}"
            for name, value in (("§", self.section), ("", self.verdict))
            if value != ALL
        ]
        self.show_title(
            self._summary if not parts else f"{len(rows)} of {self._summary}",
            *map(str.strip, parts),
        )

    def _columns(self) -> Iterable[Column]:
        # three texts share what verdict and part leave; the pane below has them in full
        room = max(self.size.width - 40, 48)
        claim, says, measured = room * 5 // 10, room * 2 // 10, room * 3 // 10
        yield Column("verdict", self._mark, lambda row: str(row["verdict"]))
        yield Column(
            "part",
            lambda row: _cell(row["title"], 14),
            lambda row: natural_sort_key(str(row["section"])),
        )
        yield Column("claim", lambda row: _cell(row["quote"], claim), lambda row: str(row["quote"]))
        yield Column(
            "document",
            lambda row: _cell(row["shown"]["says"], says),
            lambda row: str(row["shown"]["says"]),
        )
        yield Column(
            "measured",
            lambda row: _cell(row["shown"]["measured"], measured),
            lambda row: row["shown"]["measured"],
        )

    def on_resize(self, event: Resize) -> None:
        super().on_resize(event)
        if self._claims and self._width != self.size.width:
            self._narrow()

    def _mark(self, row: Claim) -> Text:
        return Text(
            row["mark"], self.app.theme_variables.get(COLORS.get(row["verdict"], ""), "dim")
        )

    def point(self, key: str) -> None:
        self._wanted = key
        super().point(key)

    def choose(self, section: str | None = None, verdict: str | None = None) -> None:
        """Show one section with its subsections, one verdict, or `ALL` of them."""
        self.section, self.verdict = section or self.section, verdict or self.verdict
        self._narrow()

    def action_section(self) -> None:
        counts = Counter(str(row["section"]) for row in self._claims)
        titles = {str(row["section"]): str(row["title"]) for row in self._claims}
        choices = {ALL: "all parts"} | {
            name: f"{titles[name]}  {count}" for name, count in counts.items()
        }
        self.app.push_screen(
            Menu("Part of the document", choices, self.section),
            lambda key: self.choose(section=key),
        )

    def action_verdict(self) -> None:
        counts = Counter(str(row["verdict"]) for row in self._claims)
        marks = {str(row["verdict"]): str(row["mark"]) for row in self._claims}
        choices = {ALL: "all verdicts"} | {
            name: f"{marks[name]}  {count}" for name, count in counts.items()
        }
        self.app.push_screen(
            Menu("Verdict", choices, self.verdict), lambda key: self.choose(verdict=key)
        )


def _in_section(row: Claim, section: str) -> bool:
    """Whether a claim is of a section or its subsections."""
    return section == ALL or f"{row['section']}.".casefold().startswith(f"{section}.".casefold())


def _cell(text: Any, most: int) -> Text:
    """A text in one line."""
    cell = Text(" ".join(str(text).split()), no_wrap=True)
    cell.truncate(most, overflow="ellipsis")
    return cell


class ClaimPane(Pane):
    """The claim that the cursor is on, in full."""

    TITLE = "Claim"
    HELP = "The claim in full: what the document says, what was measured, and why it comes out so."
    can_focus = True
    DEFAULT_CSS = """
    ClaimPane { overflow-y: auto; }
    ClaimPane > Static { height: auto; }
    """

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def show(self, row: Claim) -> None:
        said, color = row["shown"], self.app.theme_variables.get(COLORS.get(row["verdict"], ""), "")
        self.query_one(Static).update(
            Text.assemble(
                (str(row["quote"]), "bold"),
                f"\ndocument  {said['says']}\nmeasured  {said['measured'] or '–'}   ",
                (str(row["mark"]), color),
                f"\nbecause   {row['why']}",
            )
        )
        self.show_title(str(row["title"]))

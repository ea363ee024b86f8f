"""Thoughts of reasoning models, and text wrapped as it arrives: each piece costs the same however
long the text is.
"""

from rich.cells import cell_len, get_character_cell_size

from pipeline.files.text import printable

OPEN, CLOSE = "<think>", "</think>"
TAB = "    "


class ThoughtSplitter:
    """Divides a text that arrives in pieces into thoughts, `<think>…</think>` at its beginning, and
    the answer.

    A piece may end in the middle of a tag, which is held back until it is known.
    """

    def __init__(self) -> None:
        self._held = ""
        self._begun = self._answering = False

    @property
    def thinking(self) -> bool:
        return self._begun and not self._answering

    def feed(self, piece: str) -> tuple[str, str]:
        """What a piece adds to the thoughts, and to the answer."""
        if self._answering:
            return "", piece
        text = self._held + piece
        if not self._begun:
            start = text.lstrip()
            if OPEN.startswith(start[: len(OPEN)]) and len(start) < len(OPEN):
                self._held = text
                return "", ""
            if not start.startswith(OPEN):
                self._answering, self._held = True, ""
                return "", text
            self._begun, text = True, start.removeprefix(OPEN)
        thought, closed, answer = text.partition(CLOSE)
        if closed:
            self._answering, self._held = True, ""
            return thought, answer
        held = next((n for n in range(len(CLOSE) - 1, 0, -1) if text.endswith(CLOSE[:n])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], ""

    def finish(self) -> tuple[str, str]:
        """What was held back, once no piece follows."""
        held, self._held = self._held, ""
        return (held, "") if self.thinking else ("", held)


def split_thoughts(text: str) -> tuple[str, str]:
    """Thoughts and answer of a whole text."""
    splitter = ThoughtSplitter()
    (thought, answer), (last_thought, last_answer) = splitter.feed(text), splitter.finish()
    return thought + last_thought, answer + last_answer


class WrappedText:
    """Lines of at most `width` cells of a text that grows at its end. White space before its first
    word is dropped.

    Words are kept whole where they fit. Control characters become visible signs, tabs four spaces.
    """

    def __init__(self, width: int, text: str = "") -> None:
        self.width = max(width, 2)  # a character of two cells must fit
        self.lines: list[str] = []
        self._begun = False
        self.append(text)

    @property
    def height(self) -> int:
        """Number of lines without empty ones at the end: more text may follow them."""
        height = len(self.lines)
        while height and not self.lines[height - 1].strip():
            height -= 1
        return height

    def append(self, text: str) -> None:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        if not text:
            return
        # All lines but the last are final: where they break depends on nothing that follows.
        last = self.lines.pop() if self.lines else ""
        for number, paragraph in enumerate((last + printable(text.replace("\t", TAB))).split("\n")):
            if number or not paragraph or cell_len(paragraph) > self.width:
                self.lines += self._wrap(paragraph)
            else:
                self.lines.append(paragraph)

    def _wrap(self, paragraph: str) -> list[str]:
        lines, start = list[str](), 0
        while (stop := self._fitting(paragraph, start)) < len(paragraph):
            space = paragraph.rfind(" ", start, stop + 1)
            # one long word, perhaps after an indent
            if space < 0 or not paragraph[start:space].strip():
                lines.append(paragraph[start:stop])
                start = stop
            else:
                lines.append(paragraph[start:space])
                start = space + 1
        return [*lines, paragraph[start:]]

    def _fitting(self, paragraph: str, start: int) -> int:
        """The first character from `start` on that is not on the line any more."""
        stop = min(start + self.width, len(paragraph))
        if paragraph[start:stop].isascii():
            # an accent of the last one
            while stop < len(paragraph) and get_character_cell_size(paragraph[stop]) == 0:
                stop += 1
            return stop
        cells = 0
        for index in range(start, len(paragraph)):
            cells += get_character_cell_size(paragraph[index])
            if cells > self.width:
                return index
        return len(paragraph)

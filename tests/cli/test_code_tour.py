"""docs/explanation/code-tour.md: its quotations stand in the source, and its links lead to what
they name.
"""

import re
from textwrap import dedent

from docs.generators.code_tour import LINK, PAGE

PARTS = re.compile(rf"{LINK.pattern}|^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINE = re.compile(r"\[`([\w.]+)`\]\(([\w./-]+)#L(\d+)\)")


def test_each_quotation_stands_in_the_file_that_was_linked_last() -> None:
    path, quoted = "", 0
    for part in PARTS.finditer(PAGE.read_text(encoding="utf-8")):
        code = part["code"]
        if code is None:
            path = part[2]
            continue
        lines, source = (
            code.splitlines(),
            (PAGE.parent / path).read_text(encoding="utf-8").splitlines(),
        )
        starts = range(len(source) - len(lines) + 1)
        here = [
            start
            for start in starts
            if dedent("\n".join(source[start : start + len(lines)])) == code.rstrip("\n")
        ]
        assert here, f"not in {path}:\n{code}"
        assert len(lines) <= 10, "a quotation is short: the link leads to the rest"
        quoted += 1
    assert quoted > 10


def test_each_link_leads_to_the_line_that_defines_what_it_names() -> None:
    links = LINE.findall(PAGE.read_text(encoding="utf-8"))
    for name, path, number in links:
        source = (PAGE.parent / path).read_text(encoding="utf-8").splitlines()
        last = name.rpartition(".")[2]
        line = source[int(number) - 1]
        assert re.match(rf"\s*(def|class) {last}\b|{last}\b.* = ", line), (
            f"{path}#L{number} is not {name}: {line}"
        )
    assert len(links) > 40


def test_the_tour_is_about_200_lines() -> None:
    assert 150 <= len(PAGE.read_text(encoding="utf-8").splitlines()) <= 250

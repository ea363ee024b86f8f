"""What the documentation states can be run."""

import re

from bench.published import published, table
from tests.support import ROOT


def test_the_published_peaks_stand_in_the_docs_as_they_are_predicted_now() -> None:
    assert table() in (ROOT / "docs/memory.md").read_text(encoding="utf-8")


def test_every_error_above_15_percent_is_explained() -> None:
    found = published()
    assert len(found) >= 20
    assert all(one.why for one in found if abs(one.error) > 0.15)
    best = [one for one in found if one.case.startswith("fms-acceleration")]
    assert all(abs(one.error) < 0.02 for one in best), "the rows whose every setting is published"


def test_no_link_of_the_documentation_is_dead() -> None:
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"

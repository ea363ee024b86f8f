"""The docs site: `make docs` reports what is dead, what is built leads nowhere else, and its search
finds.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

from docs.hooks import rewrite
from docs.pictures import FOLDER, without_fonts
from tests.helpers.projects import ROOT

pytestmark = pytest.mark.xdist_group("site")  # one worker builds it
TAG = re.compile(r"<[a-z][^>]*>")
ATTRIBUTE = re.compile(r'\s(id|href|src|srcset|data|action|poster)="?([^"\s>]*)')


def build(config: Path, site: Path) -> tuple[int, list[str]]:
    """The exit code of a strict build, and its warnings."""
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "-f",
        str(config),
        "-d",
        str(site),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    _, *warnings = re.split(r"^WARNING\s+-\s+", ran.stderr, flags=re.MULTILINE)
    return ran.returncode, warnings


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    assert build(ROOT / "mkdocs.yml", folder) == (0, [])
    return folder


def attributes(page: Path) -> Iterator[tuple[str, str]]:
    for tag in TAG.findall(page.read_text(encoding="utf-8")):
        yield from ((name, unescape(value)) for name, value in ATTRIBUTE.findall(tag))


@pytest.mark.slow
def test_every_link_and_anchor_of_the_site_is_in_it_and_nothing_comes_from_a_network(
    site: Path,
) -> None:
    pages = {page: list(attributes(page)) for page in site.rglob("*.html")}
    anchors = {page: {value for name, value in own if name == "id"} for page, own in pages.items()}
    links = 0
    for page, own in pages.items():
        if page.name == "404.html":  # for a server, which shows it in any folder
            continue
        for name, target in own:
            if name == "id" or target.startswith(("javascript:", "data:")):
                continue
            path, _, anchor = unquote(target).partition("#")
            other = (page.parent / path).resolve() if path else page
            assert not re.match(r"(\w+:)?//", target) or name == "href", (
                f"{page.name} loads {target}"
            )
            if not re.match(r"\w+:", target):
                assert other.is_file(), f"{page.relative_to(site)}: {target}"
                assert (
                    not anchor or other not in anchors or anchor in anchors[other] | {"__skip"}
                ), f"{page}: {target}"
                links += 1
    assert len(pages) > 150 and links > 10_000
    for style in site.rglob("*.css"):
        assert not re.search(
            r"(url\(|@import )[\"']?(https?:)?//", style.read_text(encoding="utf-8")
        ), style


@pytest.mark.slow
def test_a_page_links_to_source_files_by_line_and_by_name_and_to_folders(site: Path) -> None:
    errors = (site / "reference/errors.html").read_text(encoding="utf-8")
    assert 'href="../project/pipeline/data/containers/__init__.py.html#read_rows"' in errors
    source = dict.fromkeys(attributes(site / "project/pipeline/data/containers/rows.py.html"))
    assert {("id", "Row"), ("id", "Reading.refuse"), ("id", "L1")} <= source.keys()
    assert ("href", "params.yaml.html") in set(attributes(site / "project/document/index.html"))
    assert (
        rewrite("docs/how-to/a.md", "[a](../../pipeline/errors.py#L3)")
        == "[a](../project/pipeline/errors.py.md#L3)"
    )
    assert rewrite("CONTRIBUTING.md", "[a](docs/benchmarks.md)") == "[a](../benchmarks.md)"
    unchanged = "[a](b.md#c) [d](#e) [f](https://example.org/g)"
    assert rewrite("docs/how-to/a.md", unchanged) == unchanged


@pytest.mark.slow
def test_the_strict_build_names_what_is_dead_and_what_the_navigation_lacks(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    dead = "[b](missing.md) [c](other.md#missing) [d](../nowhere.py) [e](/other.md)"
    (tmp_path / "docs/index.md").write_text(f"# A\n{dead}\n")
    (tmp_path / "docs/other.md").write_text("# B\n")
    config = (
        f"INHERIT: {ROOT / 'mkdocs.yml'}\ndocs_dir: docs\nhooks: [{ROOT / 'docs/hooks.py'}]\nnav: "
        "[index.md]\n"
    )
    (tmp_path / "mkdocs.yml").write_text(config)
    code, warnings = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert code == 1 and len(warnings) == 5
    for words in (
        "link 'missing.md'",
        "anchor '#missing'",
        "nowhere.py",
        "absolute link '/other.md'",
        "  - other.md",
    ):
        assert words in "".join(warnings), words


def test_pictures_take_no_font_from_a_network() -> None:
    pictures = list(FOLDER.glob("*.svg"))
    assert pictures and not any(
        "@font-face" in picture.read_text(encoding="utf-8") for picture in pictures
    )
    rich = '<style>\n  @font-face {\n    src: url("https://fonts/a.woff2");\n  }\n  .a { fill: red }\n</style>'
    assert without_fonts(rich) == "<style>\n  .a { fill: red }\n</style>"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
@pytest.mark.parametrize(
    ("words", "page"),
    [("out of memory", "reference/errors.html"), ("rank_pattern", "reference/params.html")],
)
def test_the_search_of_a_site_on_the_disk_finds(
    site: Path, tmp_path: Path, words: str, page: str
) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    url = f"{(site / 'index.html').as_uri()}?q={quote(words)}"
    command = ["chromium", *options, "--virtual-time-budget=20000", "--dump-dom", url]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    assert f"{page}?h=" in shown

"""The project's own files in the docs site: what a page links to outside docs/ gets a page below
project/.

There `../../pipeline/errors.py#UserError` and `../../params.yaml#L3` work as in a checkout: each
line of a file is an anchor, and so is each name that a Python file defines. A folder becomes a list
of its files. A notebook becomes a page too.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound

from docs.generators.errors import definitions

ROOT = Path(__file__).resolve().parents[1]
# the navigation names them
ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "docs/decisions")
LINK = re.compile(r"(?<=\]\()(?![\w+.-]+:|[#/])([^)#\s]+)")  # relative, without its fragment
SOURCE = "---\nsource: {name}\nhide: [toc]\nsearch: {{exclude: true}}\n---\n# `{name}`\n"
UNLISTED = re.compile(r"[._].*|artifacts|runs|dvc\.lock")  # of a folder: hidden, or made by a run


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds a page for each file or folder that a page links to, and for those that these link
    to.
    """
    waiting = [name for name in ALWAYS if (ROOT / name).exists()]
    for file in files.documentation_pages():
        waiting += _linked(f"docs/{file.src_uri}", file.content_string)
    for file in [file for file in files if file.src_uri.endswith(".ipynb")]:
        name, text = f"docs/{file.src_uri}", "\n\n".join(_cells(file.content_string))
        waiting += _linked(name, text)
        uri = f"{file.src_uri.removesuffix('.ipynb')}.md"
        files.append(File.generated(config, uri, content=rewrite(name, text)))
    for name in waiting:  # which grows
        path, uri = ROOT / name, in_site(name)
        if uri in files.src_uris or not path.exists():
            continue  # MkDocs reports what is missing
        if path.is_dir() or path.suffix == ".md":
            text = _list(path) if path.is_dir() else path.read_text(encoding="utf-8")
            own = f"{name}/index.md" if path.is_dir() else name
            waiting += _linked(own, text)
            content = rewrite(own, text)
        else:
            content = SOURCE.format(name=name)
        # MkDocs reports a page that the navigation lacks, but not of these
        listed = InclusionLevel.UNDEFINED if name in ALWAYS else InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, uri, content=content, inclusion=listed))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """The page's text, with links to where the project's files are in the site."""
    if page.file.src_uri.startswith(("decisions/", "project/")):
        # what holds today is in the other pages
        page.meta["search"] = {"boost": 0.5, **page.meta.get("search", {})}
    return markdown if page.file.generated_by else rewrite(f"docs/{page.file.src_uri}", markdown)


def on_page_content(html: str, page: Page, **_: object) -> str:
    """A source page gets its code here: Markdown would take as long for it as for all else."""
    if "source" not in page.meta:
        return html
    code, anchors = _code(page.meta["source"])
    page.present_anchor_ids = (page.present_anchor_ids or set()) | anchors
    return html + code


def in_site(name: str) -> str:
    """The path below docs/ by which MkDocs knows a file or folder of the project."""
    page = f"{name}/index.md" if (ROOT / name).is_dir() else name
    if page.startswith("docs/") and not name.endswith(".py"):
        return page.removeprefix("docs/")
    return f"project/{page}" if page.endswith(".md") else f"project/{page}.md"


def rewrite(name: str, markdown: str) -> str:
    """The text of the page `name`, a path of the project, with its links as they are in the
    site.
    """
    here = dirname(in_site(name)) or "."
    return LINK.sub(
        lambda link: relpath(in_site(normpath(join(dirname(name), link[1]))), here), markdown
    )


def _linked(name: str, markdown: str) -> Iterator[str]:
    """The files and folders that a page links to, as paths of the project."""
    return (normpath(join(dirname(name), target)) for target in LINK.findall(markdown))


def _cells(notebook: str) -> Iterator[str]:
    """The cells of a notebook as Markdown, each with what it printed."""
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            yield source
            continue
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            yield f"```text\n{''.join(output['text'])}```"


def _list(folder: Path) -> str:
    """A folder's page: links to its files, the names of its folders."""
    shown = [path for path in sorted(folder.iterdir()) if not UNLISTED.fullmatch(path.name)]
    lines = [
        f"- `{path.name}/`" if path.is_dir() else f"- [{_title(path)}]({path.name})"
        for path in shown
    ]
    name = folder.relative_to(ROOT).as_posix()
    title = folder.name.capitalize() if name.startswith("docs/") else name  # of pages, or of code
    return "\n".join((f"# {title}\n", *lines))


def _title(path: Path) -> str:
    """The title of a page, the name of another file."""
    return (
        path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
        if path.suffix == ".md"
        else path.name
    )


def _code(name: str) -> tuple[str, set[str]]:
    """A file's lines, coloured, and the anchors in them."""
    text = (ROOT / name).read_text(encoding="utf-8")
    try:
        lexer = get_lexer_for_filename(name, stripnl=False)
    except ClassNotFound:
        lexer = TextLexer(stripnl=False)
    names: dict[int, str] = {}
    if name.endswith(".py"):
        names = {node.lineno: defined for defined, node in definitions(ast.parse(text))}
    lines = highlight(text, lexer, HtmlFormatter(nowrap=True)).rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        defined = f'<a id="{names[number]}"></a>' if number in names else ""
        lines[number - 1] = (
            f'{defined}<a id="L{number}" href="#L{number}" data-line="{number}"></a>{line}'
        )
    code = "\n".join(lines)
    anchors = {*names.values(), *(f"L{number}" for number in range(1, len(lines) + 1))}
    return f'<div class="highlight source"><pre><code>{code}\n</code></pre></div>', anchors

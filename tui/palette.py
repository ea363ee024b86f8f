"""The palette over everything: commands of all screens, stages, models, params, recent prompts,
pages of the docs.
"""

import asyncio
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from textual.binding import Binding
from textual.command import DiscoveryHit, Hit, Hits, Provider

from pipeline.files.home import expand
from pipeline.inference.catalog import model_folders
from pipeline.project.new_project import DEFAULTS
from pipeline.project.stage_graph import ARTIFACTS
from tui.dialogs import Reader, read_page
from tui.panes.fields import format_value
from tui.panes.pane import Pane
from tui.registry import SCREENS

Workbench = Any  # `tui.app` has it, and imports this module
MAX_PROMPTS, MAX_MODELS = 50, 2000
DOCS = DEFAULTS / "docs"


class Command(NamedTuple):
    """A line of the palette."""

    text: str
    help: str
    run: Callable[[], Any]


class Everything(Provider):
    """Searches all commands; before a letter is typed, it offers those of the screen."""

    async def startup(self) -> None:
        app: Workbench = self.app
        here = {app.base_screen.NAME} & {*SCREENS}
        self._first = [*_screens(app, here), *_app_commands(app)]
        # not before the palette is shown: it reads models and pages
        self._others = asyncio.create_task(asyncio.to_thread(_others, app, {*SCREENS} - here))

    async def shutdown(self) -> None:
        self._others.cancel()

    async def discover(self) -> Hits:
        for command in self._first:
            yield DiscoveryHit(command.text, command.run, help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        # Each letter cancels the search of the letter before, and what it waits for: here only the
        # waiting may end.
        others = await asyncio.shield(self._others)
        for number, command in enumerate([*self._first, *others]):
            if score := matcher.match(command.text):
                # an earlier group first where the match is as good
                yield Hit(
                    score - number / 1e6,
                    matcher.highlight(command.text),
                    command.run,
                    help=command.help,
                )
            if number % 200 == 199:
                await asyncio.sleep(0)


def _app_commands(app: Workbench) -> Iterator[Command]:
    for binding in _named(type(app).BINDINGS):
        if binding.id != "app.palette":
            run = partial(app.run_action, binding.action)
            yield Command(binding.description, f"key {app.get_key_display(binding)}", run)
    for theme in app.available_themes:
        yield Command(f"Theme: {theme}", "colours of all screens", partial(app.choose_theme, theme))


def _named(bindings: Iterable[Any]) -> list[Binding]:
    """Those with a name of their own: movements and the like are no commands."""
    return [binding for binding in bindings if isinstance(binding, Binding) and binding.id]


def _others(app: Workbench, screens: Collection[str]) -> list[Command]:
    """All but the first. Called in another thread."""
    kinds = _screens(app, screens), _stages(app), _prompts(app), _models(app), _docs(app)
    return [command for kind in kinds for command in kind]


def _screens(app: Workbench, names: Collection[str]) -> Iterator[Command]:
    """The commands of screens and of their panes."""
    for name, entry in SCREENS.items():
        if name not in names:
            continue
        panes = {pane: about.keys for pane, about in entry.kind.PANES.items()}
        for pane, bindings in {"": entry.kind.own_bindings(), **panes}.items():
            for binding in _named(bindings):
                label = f"{entry.label}: {binding.description}"
                run = partial(_run_there, app, name, pane, binding.action)
                yield Command(label, f"key {app.get_key_display(binding)}", run)


async def _run_there(app: Workbench, name: str, pane: str, action: str) -> None:
    """Show a screen, give the focus to a pane, and run an action as if its key was pressed."""
    node: Any = await app.shown(name)
    for found in node.query(f"#{pane}").results(Pane) if pane else ():
        node.set_focus(found.first_focus())
        node = found
    await app.run_action(action, default_namespace=node)


def _stages(app: Workbench) -> Iterator[Command]:
    """The stages, and the params of those that can be read."""
    watch = app.project_watch
    for name, stage in watch.stages.items():
        yield Command(f"Stage {name}", stage.summary, partial(app.go, "pipeline", stage=name))
    for name, stage in watch.stages.items() if watch.project else ():
        section = watch.project.home(name).section(stage)
        for key in section.__struct_fields__:
            text = f"{name}.{key}: {format_value(getattr(section, key))}"
            yield Command(text, "param", partial(app.go, "pipeline", stage=name, param=key))


def _prompts(app: Workbench) -> Iterator[Command]:
    for prompt in reversed(app.state.prompts[-MAX_PROMPTS:]):
        run = partial(app.go, "models", prompt=prompt)
        yield Command(f"Prompt: {prompt[:200]}", "ask it again", run)


def _models(app: Workbench) -> Iterator[Command]:
    project = app.project_watch.project
    folders = [owner.root / ARTIFACTS for owner in (project, project and project.parent) if owner]
    folders += [expand(folder) for folder in (*app.config.folders, *app.state.folders)]
    for folder in folders:
        for path in sorted(model_folders(folder))[:MAX_MODELS]:
            name = f"Model {path.relative_to(folder.parent)}"
            yield Command(name, str(path), partial(app.go, "models", select=path))


def _docs(app: Workbench) -> Iterator[Command]:
    """Each page by its title, each section by its own."""
    pages = (page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "decisions")
    for page in pages:
        first, *lines = read_page(page).splitlines()
        title = first.removeprefix("# ")
        headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
        for text in (title, *(f"{title}: {heading}" for heading in headings)):
            yield Command(f"Docs: {text}", page.name, partial(_read, app, page))


def _read(app: Workbench, page: Path) -> None:
    app.push_screen(Reader(read_page(page), page.name))

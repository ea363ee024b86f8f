"""`lora chat`: several turns with a model of the project, in the terminal."""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, NamedTuple

from typer import Option

from cli.inference.prompt import (
    Adapter,
    PromptBase,
    Seed,
    Temperature,
    chosen_model,
    validate_utf8,
)
from cli.options import DeviceOption, finite, group
from pipeline.errors import UserError, explain
from pipeline.files.text import printable

if TYPE_CHECKING:
    from pipeline.inference.chat import Conversation
    from pipeline.inference.engine import LoadedModel

app = group()
BASE = "base"  # what /adapter and /compare call the model without an adapter


@app.command()
def chat(
    base: PromptBase = None,
    adapter: Adapter = None,
    system: Annotated[str, Option(callback=validate_utf8, help="System prompt.")] = "",
    strength: Annotated[
        float,
        Option(
            min=0,
            max=2,
            callback=finite,
            help="Strength of the adapter; 0: the base, 1: as trained.",
        ),
    ] = 1.0,
    max_tokens: Annotated[int, Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Temperature = 0.0,
    sample_top_p: Annotated[
        float, Option("--top-p", help="Smallest set of tokens with this probability.")
    ] = 1.0,
    seed: Seed = 0,
    _device: DeviceOption = None,
) -> None:
    """Talk with a model over several turns.

    By default the model trained last in this project, not merged. A base without a chat template
    completes texts. In it, /help lists the commands.
    """
    from cli.console import print_note
    from pipeline.inference.chat import Conversation
    from pipeline.models.generate import Sampling

    base, adapter = chosen_model(base, adapter, merged=False)
    conversation = Conversation(system, Sampling(temperature, 0, sample_top_p, seed), max_tokens)
    session = Session(base, conversation, strength)
    name = str(adapter) if adapter else BASE
    # on this base, even if the adapter names another
    session.pool.load(name, base, _adapter(name) if adapter else None)
    session.choose(name)
    print_note(f"model: {f'{adapter} on {base}' if adapter else base}")
    if not session.model().tokenizer.has_template:
        print_note("It has no chat template: it completes each text by itself.")
    print_note("/help shows the commands, Ctrl+C stops an answer, Ctrl+D ends.")
    session.run()


class Session:
    """Reads lines and answers them: a line that begins with / is a command."""

    def __init__(self, base: Path, conversation: "Conversation", strength: float) -> None:
        from pipeline.inference.model_pool import ModelPool

        self.base, self.conversation, self.strength = base, conversation, strength
        self.pool, self.name, self.other = ModelPool(parks=True), BASE, ""

    def run(self) -> None:
        """Until the input ends, or /quit."""
        from cli.console import stderr

        interactive = sys.stdin.isatty()
        if interactive:
            with suppress(ImportError):  # keys that edit the line, and earlier lines
                import readline  # noqa: F401
        while True:
            try:
                line = input("> " if interactive else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                print(file=sys.stderr)
                continue
            command, _, rest = line.partition(" ")
            try:
                if command in ("/quit", "/exit"):
                    return
                if command.startswith("/"):
                    self.obey(command, rest.strip())
                elif line:
                    self.reply(line)
            except (UserError, OSError) as error:
                message = explain(error) if isinstance(error, OSError) else error
                stderr.print(f"error: {message}", markup=False, soft_wrap=True)
            except KeyboardInterrupt:  # while a model was loaded; an answer handles it itself
                print(file=sys.stderr)

    def obey(self, command: str, argument: str) -> None:
        """Carry out one of COMMANDS. Raises UserError."""
        if command not in COMMANDS:
            raise UserError(f"{command} is no command. Commands: {', '.join(COMMANDS)}, /quit.")
        if COMMANDS[command].argument and not argument and not COMMANDS[command].optional:
            raise UserError(f"{command} needs {COMMANDS[command].argument}, got nothing.")
        COMMANDS[command].run(self, argument)

    def reply(self, text: str) -> None:
        """Answer a text, with both models if two are compared; the first one's answer is kept."""
        self.conversation.ask(text)
        kept = ""
        try:
            kept = self._say(self.name)
            if self.other:
                self._say(self.other)
        finally:
            self.conversation.keep(kept)

    def _say(self, name: str) -> str:
        """Print a model's answer as it comes; returns what was said, also if Ctrl+C stopped it."""
        from cli.console import print_note

        said, start, tokens = "", time.perf_counter(), 0
        if self.other:
            sys.stdout.write(f"{printable(self._label(name))}:\n")
        try:
            for piece in self.conversation.answer(self.model(name)):
                said, tokens = said + piece, tokens + 1
                sys.stdout.write(printable(piece))
                sys.stdout.flush()
        except KeyboardInterrupt:
            sys.stdout.write(" …")
        finally:
            sys.stdout.write("\n")
            sys.stdout.flush()
        if sys.stdin.isatty() and tokens:
            cut = ", cut at --max-tokens" * (tokens >= self.conversation.limit)
            print_note(
                f"  {tokens} tokens, {tokens / (time.perf_counter() - start):.0f} a second{cut}"
            )
        return said.strip()

    def model(self, name: str | None = None) -> "LoadedModel":
        """A loaded model at the strength that is set."""
        name = name or self.name
        return self.pool.get(name).at(1.0 if name == BASE else self.strength)

    def choose(self, name: str) -> None:
        """Answer with this adapter from now on. Raises UserError."""
        self._load(name)
        self.name = name

    def _load(self, name: str) -> None:
        """Load an adapter on the base that it names: a project may have adapters of several."""
        from pipeline.inference.catalog import find_base

        if name in self.pool.names:
            return
        base, adapter = self.base, None
        if name != BASE:
            adapter = _adapter(name)
            with suppress(UserError):  # if its base is not here, the session's is tried
                base = find_base(adapter, Path())
        self.pool.load(name, base, adapter)

    def _label(self, name: str) -> str:
        return str(self.base) if name == BASE else name

    def compare(self, name: str) -> None:
        """Show another adapter's answer below each; not with an empty name. Raises UserError."""
        if name:
            self._load(name)
        self.other = name

    def set_strength(self, text: str) -> None:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 2:
            raise UserError(f"/strength must be a number from 0 to 2, got {text!r}.")
        before, self.strength = self.strength, value
        try:
            self.model()  # virtual tokens take 0 and 1 only
        except UserError:
            self.strength = before
            raise

    def set_system(self, text: str) -> None:
        self.conversation.system = text

    def retry(self, _argument: str) -> None:
        """Answer the last question again; sampled, with the next seed."""
        from dataclasses import replace

        question = self.conversation.undo()
        if not question:
            raise UserError("/retry needs a question to answer again: there is none yet.")
        sampling = self.conversation.sampling
        self.conversation.sampling = replace(sampling, seed=sampling.seed + 1)
        self.reply(question)

    def undo(self, _argument: str) -> None:
        from cli.console import print_note

        question = self.conversation.undo()
        print_note(f"taken back: {question}" if question else "nothing to take back")

    def reset(self, _argument: str) -> None:
        self.conversation.turns.clear()

    def save(self, text: str) -> None:
        """Append the conversation to a file of examples. Raises UserError."""
        from cli.console import print_note

        path = Path(text)
        if path.suffix != ".jsonl":
            raise UserError(
                f"/save needs a file that ends in .jsonl, got {text}. Name a data file."
            )
        if not self.conversation.turns:
            raise UserError("/save needs a conversation: nothing was said yet.")
        rows = self.conversation.examples(self.model().tokenizer.has_template)
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except (OSError, ValueError) as error:  # ValueError: a zero character in the name
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"/save {path}: {reason}.") from None
        print_note(
            f"{len(rows)} examples were added to {path}; `lora train --data {quote(text)}` reads "
            "them"
        )

    def help(self, _argument: str) -> None:
        from cli.console import print_line

        for name, command in COMMANDS.items():
            print_line(f"{f'{name} {command.argument}':18}{command.about}")
        print_line(f"{'/quit':18}End; so does Ctrl+D.")
        other = self._label(self.other) if self.other else "none"
        print_line(
            f"now: {self._label(self.name)}, strength {self.strength:g}, compared with {other}"
        )


def _adapter(name: str) -> Path:
    """The adapter folder of a path, or of a name that `lora adapters` shows. Raises UserError."""
    from pipeline.adapters.config import CONFIG
    from pipeline.inference.catalog import model_folders
    from pipeline.project.stage_graph import ARTIFACTS

    folder = Path(ARTIFACTS)
    found = next((path for path in (Path(name), folder / name) if (path / CONFIG).is_file()), None)
    if found is None:
        names = [
            str(path.relative_to(folder))
            for path in model_folders(folder)
            if (path / CONFIG).is_file()
        ]
        raise UserError(
            f"{name} is not an adapter. Adapters here: {', '.join(names) or 'none'}; or {BASE}, "
            "or a path."
        )
    return found


class Command(NamedTuple):
    """`argument`: its name in the help, or empty; `optional`: whether it may be missing."""

    argument: str
    about: str
    run: Callable[[Session, str], None]
    optional: bool = False


COMMANDS = {
    "/adapter": Command(
        "NAME", f"Answer with an adapter: a listed name, a path, or {BASE}.", Session.choose
    ),
    "/compare": Command(
        "NAME", "Show its answers too; without a name, no longer.", Session.compare, True
    ),
    "/strength": Command(
        "X", "Strength of adapters: 0 the base, 1 as trained, up to 2.", Session.set_strength
    ),
    "/system": Command(
        "TEXT", "Another system prompt; without a text, none.", Session.set_system, True
    ),
    "/retry": Command("", "Answer the last question again, with the next seed.", Session.retry),
    "/undo": Command("", "Take back the last question and its answer.", Session.undo),
    "/reset": Command("", "Forget the turns; the system prompt stays.", Session.reset),
    "/save": Command(
        "FILE", "Add the conversation to a .jsonl file, for `lora train`.", Session.save
    ),
    "/help": Command("", "Show this.", Session.help),
}

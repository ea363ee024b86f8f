"""`lora-tui`: reads the arguments, and starts the app, the web server or the demo."""

import gc
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path


def main() -> None:
    """`lora-tui`. Exit codes as for `lora`: 0 success, 1 UserError, 2 wrong usage."""
    gc.disable()  # until the first paint, which takes a tenth longer with it
    from pipeline.project.process import open_streams, require_current_folder

    open_streams()
    from pipeline.errors import UserError, require
    from tui.app import PARAMS, Workbench
    from tui.config import config_path, load_config

    arguments = _read_arguments()
    try:
        require_current_folder()
        config = load_config(config_path())
        params, greeting = arguments.params or Path(PARAMS), ""
        if arguments.demo and arguments.params:
            raise UserError(
                "--demo opens a project of its own, so it takes no --params. Leave out one of them."
            )
        if not params.parent.is_dir():
            raise UserError(f"{params.parent} is not a folder. Name a params file with --params.")
        if arguments.web:
            require("lora-tui --web")
            from tui.services.web.server import serve

            serve(
                ["--demo", arguments.demo] if arguments.demo else ["--params", str(params)],
                arguments.port,
            )
            return
        _require_terminal()
        if arguments.demo:
            from tui.services.projects.demo import greet, open_demo

            params = open_demo(arguments.demo)
            greeting = greet(params.parent)
    except UserError as error:
        sys.exit(f"error: {error}")
    app = Workbench(params, config, greeting)
    app.run()
    sys.exit(app.return_code or 0)


def _require_terminal() -> None:
    """Raises UserError if keys cannot be read, or nothing can be shown.

    Textual draws on stderr and asks stdout for the size. One in the environment would hide that a
    window was resized.
    """
    if os.environ.get("TEXTUAL_DRIVER"):  # --web: a browser is the terminal
        return
    for variable in ("COLUMNS", "LINES"):
        os.environ.pop(variable, None)
    streams = {"input": sys.stdin, "output": sys.stdout, "error output": sys.stderr}
    for name, stream in streams.items():
        if not stream.isatty():
            from pipeline.errors import UserError

            raise UserError(
                f"lora-tui needs a terminal, but its {name} is none. Run it in a terminal without "
                "redirecting it, or use `lora-tui --web` for a browser."
            )


def _read_arguments() -> Namespace:
    from importlib.metadata import version

    def port(text: str) -> int:
        if not (text.isdecimal() and 1 <= int(text) <= 65535):
            raise ArgumentTypeError(f"must be a number from 1 to 65535, got {text!r}")
        return int(text)

    parser = ArgumentParser("lora-tui", description="Watch, calculate, prompt: the LoRA workbench.")
    parser.add_argument("--params", type=Path, help="params file of the project (params.yaml)")
    parser.add_argument(
        "--demo",
        nargs="?",
        const="chat",
        choices=("chat", "minigpt"),
        metavar="chat|minigpt",
        help="open a finished project that comes with the program: chat (the default), a language "
        "model adapted to chats, or minigpt, one so small that it trains in a minute",
    )
    parser.add_argument(
        "--web", action="store_true", help="serve the app to a browser on this machine"
    )
    parser.add_argument("--port", type=port, default=8000, help="port of --web")
    parser.add_argument(
        "--version", action="version", version=f"lora-tui {version('lora-workbench')}"
    )
    return parser.parse_args()

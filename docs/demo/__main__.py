"""`python -m docs.demo [NAME…]`: makes these demos, or all.

Seeds are fixed: a new demo of the same code differs in times alone. DEMO_FOLDER keeps the projects
there, and goes on with what is made; by default they are removed.
"""

import os
import sys
import tempfile
from pathlib import Path

from docs.demo import chat, minigpt
from docs.demo.archive import pack
from tui.services.projects.demo import ARCHIVES

BUILDS = {"chat": chat.build, "minigpt": minigpt.build}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(os.environ.get("DEMO_FOLDER") or folder)
        for name in sys.argv[1:] or BUILDS:
            project = BUILDS[name](root / name)
            ARCHIVES[name].write_bytes(pack(project))
            print(f"{ARCHIVES[name]}: {ARCHIVES[name].stat().st_size:,} bytes")


if __name__ == "__main__":
    main()

"""`python -m pipeline.stages.gpu_checks NAME FILE`: one check, its lines as JSON in the file."""

import json
import sys
from pathlib import Path

from pipeline.models.device import best_device
from pipeline.stages.gpu_checks.checks import CHECKS, Seen, failed


def main(name: str, path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:

        def tell(seen: Seen) -> None:
            file.write(json.dumps(seen) + "\n")
            file.flush()

        try:
            for seen in CHECKS[name].run(best_device()):
                tell(seen)
        except Exception as error:  # which is a result too
            tell(failed("", error))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

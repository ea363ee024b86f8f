"""DVCLive's files, which `dvc exp show`, `dvc plots` and VS Code's DVC extension read."""

import logging
from collections.abc import Mapping, Sequence

from pipeline.errors import UserError
from pipeline.project.logs.run_log import Sample
from pipeline.project.logs.trackers import TrackedRun

LIBRARY, FOLDER, VIEW = "dvclive", "dvclive", "dvc exp show, or dvc plots show"


class Tracker:
    """A folder for each stage, with its last run's values: DVC compares revisions of a file."""

    def __init__(self, run: TrackedRun) -> None:
        from dvclive import Live

        folder = run.folder / run.place
        if not any((parent / ".dvc").is_dir() for parent in folder.absolute().parents):
            raise UserError(
                f"{run.folder} is in no DVC project. Run `lora new .` or `dvc init` first."
            )
        logging.getLogger("dvclive").setLevel(logging.WARNING)
        self._live = Live(
            dir=str(folder),
            resume=not run.is_new,
            save_dvc_exp=False,  # it would commit; `dvc exp run` does, if that is wanted
            dvcyaml=str(folder / "dvc.yaml"),
            monitor_system=False,
        )
        self._live.log_params(dict(run.params))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._live.step = step
        for name, value in values.items():
            self._live.log_metric(name, value)

    def log_text(self, step: int, samples: Sequence[Sample]) -> None:
        """Nothing: DVC shows no texts. They are in the run's samples.jsonl."""

    def flush(self) -> None:
        self._live.make_summary()
        self._live.make_dvcyaml()

    def finish(self, state: str) -> None:  # noqa: ARG002  # it has no state of a run
        self._live.end()

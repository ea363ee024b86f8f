"""MLflow: its SQLite file in the project, or the server of MLFLOW_TRACKING_URI."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.project.logs.run_log import Sample
from pipeline.project.logs.trackers import TrackedRun

LIBRARY, FOLDER = "mlflow", "runs/mlflow"
VIEW = "mlflow ui --backend-store-uri sqlite:///{folder}/mlflow.db"
MOST = 1000  # metrics in a request
STATES = {"done": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Tracker:
    """A run of the project's experiment, found again by its name."""

    def __init__(self, run: TrackedRun) -> None:
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        run.folder.mkdir(parents=True, exist_ok=True)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or f"sqlite:///{run.folder / 'mlflow.db'}")
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or run.project
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            files = None if uri else (run.folder / "artifacts").as_uri()
            number = self._client.create_experiment(name, artifact_location=files)
        else:
            number = experiment.experiment_id
        self._metrics = list[Any]()
        same: list[Any] = []
        if not run.is_new:
            same = self._client.search_runs([number], f"tags.mlflow.runName = '{run.name}'")
        if same:
            self._id = same[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._id = self._client.create_run(number, run_name=run.name).info.run_id
            params = [Param(key, str(value)) for key, value in run.params.items()]
            self._client.log_batch(self._id, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._metrics += [Metric(name, value, now, step) for name, value in values.items()]
        if len(self._metrics) >= MOST - 100:  # a step has fewer than 100 values
            self.flush()

    def log_text(self, step: int, samples: Sequence[Sample]) -> None:
        text = "\n\n".join(f"{sample.prompt}\n→ {sample.answer}" for sample in samples)
        self._client.log_text(self._id, text + "\n", f"samples/step-{step:09d}.txt")

    def flush(self) -> None:
        if self._metrics:
            self._client.log_batch(self._id, metrics=self._metrics)
            self._metrics = []

    def finish(self, state: str) -> None:
        self._client.set_terminated(self._id, STATES.get(state, "FAILED"))

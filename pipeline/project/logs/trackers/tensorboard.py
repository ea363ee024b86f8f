"""TensorBoard: event files, written by tensorboard's own writer, without TensorFlow or torch."""

import time
from collections.abc import Mapping, Sequence
from textwrap import indent

from pipeline.project.logs.run_log import Sample
from pipeline.project.logs.trackers import TrackedRun

LIBRARY, FOLDER, VIEW = "tensorboard", "runs/tensorboard", "tensorboard --logdir {folder}"


class Tracker:
    """A folder of event files: a resumed run adds one."""

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(run.folder / run.name))
        if run.is_new:
            self._add(0, hparams_pb(dict(run.params), trial_id=run.name))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        parts = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add(step, Summary(value=parts))

    def log_text(self, step: int, samples: Sequence[Sample]) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        for number, sample in enumerate(samples, 1):
            # Markdown takes an indented text as it is
            text = indent(f"{sample.prompt}\n→ {sample.answer}", "    ")
            self._add(step, text_pb(f"samples/{number}", text))

    def flush(self) -> None:
        self._writer.flush()

    def finish(self, state: str) -> None:  # noqa: ARG002  # an event file does not say how its run ended
        self._writer.close()

    def _add(self, step: int, summary: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))

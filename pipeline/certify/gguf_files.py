"""The GGUF files that llama.cpp opens, written as our exports write them."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from pipeline.certify.kinds import Checked
from pipeline.certify.kinds.gguf import file_of, rounding
from pipeline.errors import require
from pipeline.export import llama_cpp
from pipeline.export.formats.gguf import KINDS
from pipeline.export.gguf.adapter import write_adapter
from pipeline.export.gguf.folder import general, tokenizer_of
from pipeline.export.gguf.vocabulary import read_vocabulary
from pipeline.export.gguf.writer import Model, describe_model, write_files
from pipeline.files.base_model import tensor_locations
from pipeline.models.load import skeleton
from pipeline.weights.combine import Updates, low_rank_updates
from pipeline.weights.merge_plan import MergePlan, plan_merge

WIDEST = "f16"  # from which llama.cpp quantizes, as an export does
MEASURES = ("codes_changed", "rows_changed", "share_of_step")  # of `survival`


class GGUFFiles:
    """A base in a kind of GGUF, and adapters or models beside it: `engines.Opens`."""

    def __init__(self, checked: Checked, kind: str, room: Path) -> None:
        require("lora export --format gguf")
        self._checked, self._room = checked, room
        self._kind = rounding(checked.folder) if checked.kind_name == "gguf" else kind
        self._base: Path | None = None
        self._number = 0
        self._latest: Path | None = None

    def __call__(self, path: Path | None) -> tuple[Path, Path | None]:
        """Raises UserError for what has no GGUF."""
        checked = self._checked
        is_adapter = checked.kind.is_adapter(path or checked.folder)
        if path is None:
            return self._of_base(), None
        if checked.kind_name == "gguf":
            file = file_of(path)
            return (self._of_base(), file) if is_adapter else (file, None)
        if is_adapter:
            base, file = self._of_base(), self._new("adapter")
            model = skeleton(checked.base, checked.trust_remote_code)
            write_adapter(file, self._updates(path), model, general(path, checked.base, None))
            return base, file
        merge = MergePlan(path, tensor_locations(path))
        file = self._new("model")
        self._write(file, describe_model(merge, checked.trust_remote_code), path)
        return file, None

    def if_merged(self) -> dict[str, float]:
        """What of the adapter's update would be left in a merge of this kind: medians of matrices.

        Raises UserError for an adapter that cannot be merged.
        """
        from pipeline.export.into.gguf import survivals

        checked = self._checked
        merge = plan_merge(checked.base, checked.folder, checked.trust_remote_code)
        merged = describe_model(merge, checked.trust_remote_code)
        unchanged = replace(merge, edits={}, copies={}, unties=False)
        plain = describe_model(unchanged, checked.trust_remote_code, own_head=merge.unties)
        with self._scratch() as (before, after):
            self._write(before, plain, checked.base)
            self._write(after, merged, checked.base)
            matrices = [found for _, found in survivals(merged, plain, before, after)]
        values = {key: [m[key] for m in matrices if m[key] is not None] for key in MEASURES}
        return {key: median(known) for key, known in values.items() if known}

    @contextmanager
    def _scratch(self) -> Iterator[tuple[Path, Path]]:
        files = self._room / "before.gguf", self._room / "after.gguf"
        try:
            yield files
        finally:
            for file in files:
                file.unlink(missing_ok=True)

    def _new(self, stem: str) -> Path:
        """Another name each time: a program maps the file that it has open."""
        if self._latest:
            self._latest.unlink(missing_ok=True)
        self._number += 1
        self._latest = self._room / f"{stem}{self._number}.gguf"
        return self._latest

    def _of_base(self) -> Path:
        if self._base is None:
            checked = self._checked
            merge = MergePlan(checked.base, tensor_locations(checked.base))
            described = describe_model(merge, checked.trust_remote_code, self._has_own_head())
            path = self._room / "base.gguf"
            self._write(path, described, checked.base)
            self._base = path
        return self._base

    def _has_own_head(self) -> bool:
        """With a tied head llama.cpp would apply the embedding's update to the head too."""
        if self._checked.kind_name != "adapter":
            return False
        model = skeleton(self._checked.base, self._checked.trust_remote_code)
        names = {model.embedding_name, model.head_name}
        return bool(names & self._updates(self._checked.folder).keys())

    def _updates(self, adapter: Path) -> Updates:
        checked = self._checked
        return low_rank_updates(checked.base, adapter, checked.trust_remote_code, experts=True)

    def _write(self, path: Path, model: Model, tokenizer: Path) -> None:
        """A model in this kind, with the tokenizer of a folder."""
        template = self._checked.folder
        if not template.is_dir():
            template = tokenizer
        vocabulary = read_vocabulary(tokenizer_of(tokenizer, template), model.rows)
        facts = {"general.type": "model", "general.name": "model", **vocabulary.metadata}
        if self._kind in KINDS:
            _finish(write_files({path: self._kind}, model, facts))
            return
        wide = path.with_suffix(".wide")
        _finish(write_files({wide: WIDEST}, model, facts))
        _finish(llama_cpp.quantize(wide, path, self._kind))
        wide.unlink()


def _finish(steps: Iterator[Any]) -> None:
    deque(steps, maxlen=0)

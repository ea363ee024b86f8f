"""The adapter alone as a GGUF file for llama.cpp's --lora, with its base beside it if needed."""

from collections.abc import Generator, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError, require
from pipeline.export import llama_cpp
from pipeline.export.formats import Export, Format, note_on_quantization
from pipeline.files import artifact
from pipeline.project.runner import Event, Note

if TYPE_CHECKING:
    from pipeline.adapters.peft import Reading
    from pipeline.export.gguf.writer import Model


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Write the updates, and say how to use them. Raises UserError."""
    from pipeline.adapters.peft import Reading
    from pipeline.export.gguf.families import family_of
    from pipeline.export.gguf.folder import general, is_earlier_export
    from pipeline.export.model_card import card, write_card
    from pipeline.files.base_model import tensor_locations
    from pipeline.models.load import skeleton
    from pipeline.weights.combine import low_rank_updates
    from pipeline.weights.merge import CERTIFICATE
    from pipeline.weights.merge_check import describe
    from pipeline.weights.merge_plan import MergePlan

    require("lora export --format gguf")
    from pipeline.export.gguf.adapter import adapter_ratios, write_adapter
    from pipeline.export.gguf.writer import describe_model

    base, trust = export.find_base(), export.trust_remote_code
    export = export._replace(base=base)
    artifact.refuse_other(out, is_earlier_export(out), (base, export.adapter))
    yield from note_on_quantization(export)
    model = skeleton(base, trust)
    # a model that llama.cpp does not have is an error before the adapter is read
    family_of(model.describe())
    reading = Reading.once()
    updates = low_rank_updates(base, export.adapter, trust, reading=reading, experts=True)
    # With a tied head, llama.cpp would apply the embedding's update to the head too. There its
    # layout is another, and llama.cpp stops. So the base for such an adapter has its own head.
    own_head = bool({model.embedding_name, model.head_name} & updates.keys())
    unchanged = MergePlan(base, tensor_locations(base))
    described = describe_model(unchanged, trust, own_head)
    yield from map(Note, described.notes)
    facts = general(export.adapter, base, export.base_name)
    beside = own_head or _is_expanded(base)

    with artifact.writing(out) as folder:
        path, base_path = folder / "adapter.gguf", folder / "base-f16.gguf"
        write_adapter(path, updates, model, facts)
        ratios = adapter_ratios(path, updates, model)
        for module, ratio in ratios.items():
            if ratio is not None and abs(ratio - 1) > 1e-4:
                raise UserError(
                    f"export rejected: {module} has {ratio:.4f} times its update. Please report "
                    "this."
                )
        compared, table = yield from _compared(
            export, base, described, facts, path, base_path, beside, reading
        )
        if not beside:
            base_path.unlink(missing_ok=True)
        artifact.write_json(folder / CERTIFICATE, {"delta_ratios": ratios, **compared})
        used_on = base_path.name if beside else "BASE.gguf"
        commands = [f"llama-cli -m {used_on} --lora {path.name}"]
        text = card(export.adapter, None, base, export.base_name, library="gguf", commands=commands)
        write_card(folder, text)
    written = ["  ".join((str(out), *describe({"delta_ratios": ratios}))), *table]
    if beside:
        return [
            *written,
            "The adapter changes tokens or their embeddings: use it with the base beside it, and "
            "with no other file of that model.",
            f"llama-cli -m {quote(str(out / base_path.name))} --lora {quote(str(out / path.name))}",
        ]
    return [
        *written,
        f"llama-cli -m BASE.gguf --lora {quote(str(out / path.name))}    (BASE.gguf: "
        f"{base.resolve().name} as GGUF)",
    ]


def _compared(
    export: Export,
    base: Path,
    described: "Model",
    facts: Mapping[str, Any],
    path: Path,
    base_path: Path,
    needed: bool,
    reading: "Reading",
) -> Generator[Event, None, tuple[dict[str, Any], list[str]]]:
    """Write the base to `base_path`, if it is `needed` or llama.cpp is here, and compare on it.

    Returns the certificate's entries, and lines. Raises UserError if a base that is needed cannot
    be written, and if the adapter in `path` on it is not the model.
    """
    from pipeline.export.gguf.folder import tokenizer_of
    from pipeline.export.gguf.vocabulary import read_vocabulary
    from pipeline.export.gguf.writer import write_files
    from pipeline.inference.engine import load

    if not needed and not llama_cpp.is_installed():
        return {}, [llama_cpp.NOT_COMPARED]
    try:
        vocabulary = read_vocabulary(tokenizer_of(base, export.adapter), described.rows)
    except UserError as error:
        if needed:
            raise
        return {}, [f"Nothing was compared, as the base cannot be written beside it. {error}"]
    yield from map(Note, vocabulary.notes)
    metadata = {**facts, "general.name": base.resolve().name, **vocabulary.metadata}
    yield from write_files({base_path: "f16"}, described, metadata)
    candidate = llama_cpp.candidate("f16", base_path, path, "adapter on f16")
    return (
        yield from llama_cpp.certify(
            lambda: load(
                base,
                export.adapter,
                # the base as it is stored: in this file it is not quantized
                quantization="none",
                trust_remote_code=export.trust_remote_code,
                reading=reading,
            ),
            vocabulary.tokenizer,
            [candidate],
            export.prompts,
        )
    )


def _is_expanded(base: Path) -> bool:
    """Whether tokens were added to the base, so that no GGUF file elsewhere has them."""
    if not (base / artifact.MANIFEST).exists():
        return False
    start, stop = artifact.read_manifest(base).get("new_rows") or (0, 0)
    return bool(stop > start)


OPTIONS = ("base", "base_name", "prompts", "trust_remote_code")
FORMAT = Format(4, "the adapter for llama.cpp's --lora", OPTIONS, write, "adapter")

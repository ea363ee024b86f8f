"""The merged model as GGUF files for llama.cpp, Ollama and LM Studio, which hold the tokenizer.

An export is refused if a setting differs in llama.cpp (`export/gguf/families/`), or a tensor
(`weights/merge_check.py`), or tokens, template or logits (`export/certificate.py`).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.errors import UserError, require
from pipeline.export import llama_cpp
from pipeline.export.formats import Export, Format
from pipeline.files import artifact
from pipeline.project.runner import Event, Note

if TYPE_CHECKING:
    from pipeline.adapters.peft import Reading
    from pipeline.export.gguf.writer import Model

# the gguf package quantizes to these
KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BY_LLAMA_CPP = tuple(kind for kind in llama_cpp.KINDS if kind not in KINDS)
# For a base in bf16 too: fp16 keeps 11 bits of a weight and bf16 8, and a merge needs more of them
# than the base did. What overflows fp16 is an error that names --quantize bf16.
DEFAULT = "f16"


class Files(NamedTuple):
    """The merged model's files before they are compared, and what they were made of."""

    base: Path
    model: "Model"
    metadata: Mapping[str, Any]
    paths: Mapping[str, Path]  # by kind
    widest: str  # kind of the file from which the others are quantized
    reading: "Reading"


# may edit the quantized files; returns entries of the certificate
Finish = Callable[[Files], Generator[Event, None, dict[str, Any]]]


def write(
    export: Export, out: Path, finish: Finish | None = None
) -> Generator[Event, None, list[str]]:
    """Write a file of each kind, and what Ollama needs. Raises UserError."""
    from pipeline.adapters.peft import Reading
    from pipeline.export.gguf.folder import general, is_earlier_export, tokenizer_of
    from pipeline.export.gguf.modelfile import modelfile
    from pipeline.export.gguf.vocabulary import read_vocabulary
    from pipeline.export.model_card import card, write_card
    from pipeline.inference.engine import load
    from pipeline.weights.merge import CERTIFICATE
    from pipeline.weights.merge_check import check_merge, describe
    from pipeline.weights.merge_plan import plan_merge

    kinds = kinds_of(export.quantize)
    require("lora export --format gguf")
    from pipeline.export.gguf.writer import describe_model, write_files, written_matrices

    base, trust = export.find_base(), export.trust_remote_code
    name = export.adapter.resolve().name
    reading = Reading.once()
    artifact.refuse_other(out, is_earlier_export(out), (base, export.adapter))
    merge = plan_merge(base, export.adapter, trust, reading=reading)
    model = describe_model(merge, trust)
    vocabulary = read_vocabulary(tokenizer_of(base, export.adapter), model.rows)
    yield from map(Note, (*model.notes, *vocabulary.notes))

    widest = _widest(kinds)
    files = {kind: f"model-{kind}.gguf" for kind in (*kinds, widest)}
    with artifact.writing(out) as folder:
        paths = {kind: folder / file for kind, file in files.items()}
        written = {path: kind for kind, path in paths.items() if kind in KINDS}
        facts = general(export.adapter, base, export.base_name) | vocabulary.metadata
        yield from write_files(written, model, facts)
        matrices = written_matrices(paths[widest], model)
        certificate = yield from check_merge(merge, matrices, "--quantize f32")
        for kind in kinds:
            if kind not in KINDS:
                yield from llama_cpp.quantize(paths[widest], paths[kind], kind)
        if finish:
            made = Files(base, model, facts, paths, widest, reading)
            certificate |= yield from finish(made)

        candidates = [llama_cpp.candidate(kind, paths[kind]) for kind in kinds]
        if widest not in kinds:
            label = f"{widest} (not kept)"
            candidates.insert(0, llama_cpp.candidate(widest, paths[widest], label=label))
        compared, table = yield from llama_cpp.certify(
            lambda: load(base, export.adapter, trust_remote_code=trust, reading=reading),
            vocabulary.tokenizer,
            candidates,
            export.prompts,
        )
        if widest not in kinds:
            paths[widest].unlink()

        artifact.write_json(folder / CERTIFICATE, certificate | compared)
        text = modelfile(files[kinds[0]], vocabulary)
        (folder / "Modelfile").write_text(text, encoding="utf-8")
        commands = [f"llama-cli -m {files[kind]}" for kind in kinds]
        commands.append(f"ollama create {quote(name)} -f Modelfile")
        text = card(
            export.adapter, certificate, base, export.base_name, library="gguf", commands=commands
        )
        write_card(folder, text)
    return [
        "  ".join((str(out), *describe(certificate))),
        *table,
        *(f"llama-cli -m {quote(str(out / files[kind]))}" for kind in kinds),
        f"ollama create {quote(name)} -f {quote(str(out / 'Modelfile'))}",
    ]


def _widest(kinds: Sequence[str]) -> str:
    """The kind of the file in which the merge is measured, and from which llama.cpp quantizes."""
    for kind in ("f32", "f16", "bf16"):
        if kind in kinds:
            return kind
    # quantized files need no wider one beside them, unless llama.cpp is here: it compares that too
    return DEFAULT if llama_cpp.is_installed() else kinds[0]


def kinds_of(quantize: str | None) -> list[str]:
    """The kinds that `--quantize` names, each once.

    Raises UserError for an unknown kind, and for one that needs llama.cpp without it.
    """
    kinds = list(dict.fromkeys(kind.strip().lower() for kind in (quantize or DEFAULT).split(",")))
    for kind in kinds:
        if kind not in (*KINDS, *BY_LLAMA_CPP):
            raise UserError(
                f"--quantize must name kinds of {', '.join(KINDS)}, or, with llama.cpp, "
                f"{', '.join(BY_LLAMA_CPP)}; got {kind!r}."
            )
    if set(kinds) - set(KINDS) and not llama_cpp.is_installed():
        raise UserError(
            f"--quantize {', '.join(BY_LLAMA_CPP)} need llama.cpp: {llama_cpp.INSTALL}. Without "
            f"it: {', '.join(KINDS)}."
        )
    return kinds


OPTIONS = ("base", "base_name", "prompts", "trust_remote_code", "quantize")
FORMAT = Format(3, "the merged model for llama.cpp and Ollama", OPTIONS, write)

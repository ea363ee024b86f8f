"""The merged model as GGUF files for llama.cpp, Ollama and LM Studio, with tokenizer and chat
template inside.
"""

from collections.abc import Generator
from pathlib import Path

from pipeline.errors import UserError, require
from pipeline.export import llama_cpp
from pipeline.export.formats import Export, Format
from pipeline.files import artifact
from pipeline.project.runner import Event, Note

# the gguf package quantizes to these
KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
BY_LLAMA_CPP = tuple(kind for kind in llama_cpp.KINDS if kind not in KINDS)
# Of a base in bf16 too: fp16 keeps 11 bits of a weight and bf16 8, of which a merge needs more than
# the base did. What overflows fp16 is an error that names --quantize bf16.
DEFAULT = "f16"


def write(export: Export, out: Path) -> Generator[Event, None, list[str]]:
    """Write a file of each kind, and what Ollama needs. Raises UserError."""
    from pipeline.adapters.folder import base_of
    from pipeline.export.gguf.folder import general, is_earlier_export, tokenizer_of
    from pipeline.export.gguf.modelfile import modelfile
    from pipeline.export.gguf.vocabulary import read_vocabulary
    from pipeline.export.model_card import card
    from pipeline.files.base_model import CARD
    from pipeline.inference.engine import load
    from pipeline.weights.merge import CERTIFICATE
    from pipeline.weights.merge_check import check_merge, describe
    from pipeline.weights.merge_plan import plan_merge

    kinds = kinds_of(export.quantize)
    require("lora export --format gguf")
    from pipeline.export.gguf.writer import describe_model, write_files, written_matrices

    base, name = export.base or base_of(export.adapter), export.adapter.resolve().name
    artifact.refuse_other(out, is_earlier_export(out), (base, export.adapter))
    merge = plan_merge(base, export.adapter, export.trust_remote_code)
    model = describe_model(merge, export.trust_remote_code)
    vocabulary = read_vocabulary(tokenizer_of(base, export.adapter), model.rows)
    yield from map(Note, (*model.notes, *vocabulary.notes))
    with artifact.writing(out) as folder:

        def path(kind: str) -> Path:
            return folder / f"model-{kind}.gguf"

        own = [kind for kind in kinds if kind in KINDS]
        # llama.cpp quantizes from the most precise file, in which the merge is measured
        precise = [kind for kind in ("f32", "f16", "bf16") if kind in own]
        widest = precise[0] if precise else DEFAULT if llama_cpp.is_installed() else own[0]
        files = {path(kind): kind for kind in dict.fromkeys((*own, widest))}
        facts = general(name, export.adapter, base, export.base_name)
        yield from write_files(files, merge, model, {**facts, **vocabulary.metadata})
        certificate = yield from check_merge(
            merge, written_matrices(path(widest), model), "--quantize f32"
        )
        for kind in kinds:
            if kind not in KINDS:
                yield from llama_cpp.quantize(path(widest), path(kind), kind)
        candidates = [llama_cpp.candidate(kind, path(kind)) for kind in kinds]
        if widest not in kinds:
            candidates.insert(
                0, llama_cpp.candidate(widest, path(widest), label=f"{widest} (not kept)")
            )
        compared, table = yield from llama_cpp.certify(
            lambda: load(base, export.adapter, trust_remote_code=export.trust_remote_code),
            vocabulary.tokenizer,
            candidates,
            export.prompts,
        )
        if widest not in kinds:
            path(widest).unlink()
        artifact.write_json(folder / CERTIFICATE, certificate | compared)
        (folder / "Modelfile").write_text(
            modelfile(path(kinds[0]).name, vocabulary), encoding="utf-8"
        )
        commands = [
            *(f"llama-cli -m {path(kind).name}" for kind in kinds),
            f"ollama create {name} -f Modelfile",
        ]
        text = card(
            export.adapter, certificate, base, export.base_name, library="gguf", commands=commands
        )
        (folder / CARD).write_text(text, encoding="utf-8")
    return [
        "  ".join((str(out), *describe(certificate))),
        *table,
        *(f"llama-cli -m {out / path(kind).name}" for kind in kinds),
        f"ollama create {name} -f {out / 'Modelfile'}",
    ]


def kinds_of(quantize: str | None) -> list[str]:
    """The kinds that `--quantize` names, each once. Raises UserError for an unknown one, and
    without llama.cpp for one that needs it."""
    kinds = list(dict.fromkeys(kind.strip().lower() for kind in (quantize or DEFAULT).split(",")))
    for kind in kinds:
        if kind not in (*KINDS, *BY_LLAMA_CPP):
            raise UserError(
                f"--quantize must name kinds of {', '.join(KINDS)}, or, with llama.cpp, "
                f"{', '.join(BY_LLAMA_CPP)}; "
                f"got {kind!r}."
            )
    if set(kinds) - set(KINDS) and not llama_cpp.is_installed():
        raise UserError(
            f"--quantize {', '.join(BY_LLAMA_CPP)} need llama.cpp: {llama_cpp.INSTALL}. Without "
            f"it: {', '.join(KINDS)}."
        )
    return kinds


OPTIONS = ("base", "base_name", "prompts", "trust_remote_code", "quantize")
FORMAT = Format(3, "the merged model for llama.cpp and Ollama", OPTIONS, write)

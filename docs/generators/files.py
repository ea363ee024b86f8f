"""docs/reference/files.md: what projects, artifacts, logs, data files, tasks, adapters and exports
consist of.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module

from docs.generators import cell, table
from pipeline.adapters.config import CONFIG, WEIGHTS
from pipeline.data.containers import COMPRESSED, READERS, TABLES
from pipeline.data.formats import FORMATS as DATA
from pipeline.evaluation.kinds import KINDS
from pipeline.export.formats import FORMATS as EXPORTS
from pipeline.files.artifact import MANIFEST
from pipeline.project.foreign import FORMATS as CONFIGS
from pipeline.project.logs.run_log import (
    COLUMNS,
    LOSS,
    OPTIONAL,
    SAMPLES,
    TABLE,
    TELEMETRY,
    TELEMETRY_COLUMNS,
    Sample,
)
from pipeline.project.logs.run_state import JOURNAL, Journal
from pipeline.project.logs.trackers import TRACKERS
from pipeline.project.stage_graph import ARTIFACTS, CACHE, RUNS
from pipeline.stages.registry import GRAPH
from pipeline.weights.foreign import FORMATS as ADAPTERS
from pipeline.weights.merge import CERTIFICATE

PROJECT = {
    "params.yaml": "every setting that differs from its default ([its keys](params.md))",
    "dvc.yaml": "the stages, for `dvc repro`; `lora new` writes it from params.yaml",
    "code.yaml": "a digest of each stage's code: DVC runs a stage again when it changes",
    "data/": "data files, prompts and tasks",
    f"{ARTIFACTS}/": "a folder for each stage's result; DVC tracks it",
    f"{RUNS}/": (
        "a folder for each stage's run: logs, state, checkpoints, tokens; untracked, and may be "
        "deleted"
    ),
    "fleet.yaml": "the clusters that `--on` takes ([fleet](../how-to/fleet.md)); personal",
    f"{CACHE}/": (
        "finished artifacts by a digest of what determines them (`lora cache`); `LORA_CACHE` "
        "names another"
    ),
}
MANIFEST_KEYS = {
    "kind": "what it is: checkpoint, adapter, adapters, evaluation, study, figures or claims",
    "method": "the method that made it",
    "stage": "the stage that made it",
    "seed": "its seed, or null",
    "params": "the settings that it was made with, defaults included",
    "inputs": "sha256 of each artifact and data file that was read",
    "code": "sha256 of the modules that the stage imports",
    "versions": "versions of Python and of the libraries that affect its bytes; of torch 2.9.0+cu128 and "
    "2.9.0+cpu, 2.9.0 is compared",
    "commit": "the last git commit that changed this code, or null",
    "files": "sha256 of each file beside the manifest; `lora adapters verify` compares",
    "base": (
        "of an adapter: sha256 of the base's tensors and of its tokenizer; on another base it is "
        "rejected"
    ),
    "parameters": "total and trainable",
}
LOGGED = {
    "step": "optimizer step, from 1",
    "epoch": "epoch, from 1",
    "loss": "mean over the step's labelled tokens, nats per token",
    "learning_rate": "of this step",
    "grad_norm": "norm of all gradients before clipping",
    "tokens": "labelled tokens so far",
    "eval_loss": "on held-out examples, where an evaluation followed the step; nats per token",
    "divergence": "from the base on retention_data, nats per token",
    "reward_chosen": "preference training: mean reward of the chosen answers",
    "reward_rejected": "preference training: mean reward of the rejected answers",
    "reward_margin": "preference training: mean of chosen minus rejected",
    "reward_accuracy": (
        "preference training: share of pairs whose chosen answer has the greater reward"
    ),
    "eval_accuracy": "reward_accuracy of the held-out pairs",
    "eval_answers": (
        "share of the held-out answers that are as expected; a long text counts its ROUGE-L"
    ),
    "seconds": "of training, those before a resume too",
    "tokens_per_second": "labelled tokens, since the log was opened",
    "peak_memory_bytes": "peak resident memory of the process",
    "device": "such as cpu or cuda:0",
    "predicted_tensor_bytes": "the calculator's peak of tensors",
    "measured_tensor_bytes": "the measured peak of tensors; 0: not yet measured",
}
EXPORTED = {
    "peft": f"{CONFIG}, {WEIGHTS}, tokenizer, README.md",
    "vllm": f"{CONFIG}, {WEIGHTS}, tokenizer, README.md",
    "merged": f"config.json, the base's safetensors files, tokenizer, {CERTIFICATE}, README.md",
    "gguf": f"model-KIND.gguf for each kind, Modelfile, {CERTIFICATE}, README.md",
    "gguf-adapter": f"adapter.gguf, {CERTIFICATE}, README.md",
    "mlx": f"{CONFIG}, adapters.safetensors, README.md",
}
ABOUT_ARTIFACTS = f"""`{ARTIFACTS}/NAME` is written beside its place and renamed: it exists whole or not at all. Two
runs with the same settings on one machine write the same bytes. All weights are safetensors.
"""
CONTENTS = f"""A checkpoint has `config.json`, `model.safetensors`, `tokenizer.json` and `tokenizer_config.json`, as
transformers writes them. An adapter has `{CONFIG}`, `{WEIGHTS}` in PEFT's format, and the tokenizer. What was trained
also has `{LOSS}`, and `{SAMPLES}` if `samples` is set. A sweep has a folder for each combination, and `{TABLE}`: how
each ended. A merge has `{CERTIFICATE}`: how many times each matrix received its update, and how far the answers differ.
`evaluation` has `metrics.json`, `predictions.json`, `report.md` and a picture.
"""
ABOUT_LOGS = f"""In `{RUNS}/STAGE`; a sweep has a folder for each adapter. While the training runs, the last line may be
unfinished; after a resume from a checkpoint the file may be shorter than before.
"""


def pages() -> dict[str, str]:
    return {"reference/files.md": "\n".join(_lines()).rstrip() + "\n"}


def _lines() -> Iterator[str]:
    yield "# Files\n"
    yield "Written by `python -m docs` from the code that reads and writes them.\n"
    yield "## A project\n"
    yield from _table("file", PROJECT)
    yield "## Artifacts\n"
    yield ABOUT_ARTIFACTS
    rows = [
        (f"`{each.output}`", f"`{name}`", each.kind, cell(each.summary))
        for name, each in GRAPH.stages.items()
    ]
    yield from table(("folder", "stage", "kind", "the stage"), rows)
    yield CONTENTS
    yield f"### {MANIFEST}\n"
    yield "In every artifact. It holds no time, host name or path.\n"
    yield from _table("key", MANIFEST_KEYS)
    yield "## Logs of a run\n"
    yield ABOUT_LOGS
    yield f"### {LOSS}\n"
    yield (
        f"A line for each step; part of the artifact. The last {len(OPTIONAL)} columns exist only "
        "where measured.\n"
    )
    yield from _table("column", {name: LOGGED[name] for name in (*COLUMNS, *OPTIONAL)})
    yield f"### {TELEMETRY}\n"
    yield "What differs between two runs of the same settings.\n"
    yield from _table("column", {name: LOGGED[name] for name in TELEMETRY_COLUMNS})
    yield f"### {SAMPLES}\n"
    yield (
        f"A JSON object a line: {_names(Sample._fields)}. `answer` is null where the outputs were "
        "not finite.\n"
    )
    yield f"### {JOURNAL}\n"
    yield f"State and progress of the last run: {_names(Journal.__dataclass_fields__)}.\n"
    yield "Times are seconds since 1970. `lora runs` and `lora-tui` read it while the stage runs.\n"
    yield "### For trackers\n"
    yield "`report_to` of params.yaml names them ([trackers](../how-to/trackers.md)).\n"
    followed = dict(TRACKERS)
    yield from table(
        ("tracker", "folder", "shown by"),
        [
            (f"`{name}`", f"`{each.FOLDER}`", f"`{each.VIEW.format(folder=each.FOLDER)}`")
            for name, each in followed.items()
        ],
    )
    yield "## Data files\n"
    yield (
        f"Read from {_names((*READERS, *TABLES))}; text also compressed as {_names(COMPRESSED)}.\n"
    )
    yield "The keys of a row say what it is ([data](../how-to/data.md)).\n"
    yield from table(
        ("format", "a row", "keys that are read", "trained on"),
        [
            (f"`{each.name}`", f"`{each.shape}`", _names(sorted(each.keys)), each.trained)
            for each in DATA.values()
        ],
    )
    yield "## Tasks\n"
    yield (
        "A list in YAML, each with `name`, `kind` and `examples` or `file` "
        "([evaluation](../how-to/evaluation.md)).\n"
    )
    yield from table(
        ("kind", "right is an answer where", "its own options"),
        [(f"`{name}`", cell(kind.about), _names(kind.options)) for name, kind in KINDS.items()],
    )
    yield "## Exports\n"
    yield (
        "Of `lora export ADAPTER --format FORMAT --out DIR` ([shipping](../how-to/shipping.md)):\n"
    )
    yield from table(
        ("format", "what it is", "files", "options"),
        [
            (
                f"`{name}`",
                cell(each.about),
                EXPORTED[name],
                _names(f"--{o.replace('_', '-')}" for o in each.options),
            )
            for name, each in EXPORTS.items()
        ],
    )
    yield "## Adapters of other tools\n"
    yield "`lora adapters import DIR --base BASE --out OUT` reads:\n"
    yield from table(
        ("tool", "files"), [(each.name, cell(each.about)) for each in ADAPTERS.values()]
    )
    yield "## Configs of other tools\n"
    yield "`lora new DIR --from FILE` reads ([coming from other tools](../coming-from/index.md)):\n"
    about = [
        (each.name, cell(import_module(each.read.__module__).__doc__ or ""))
        for each in CONFIGS.values()
    ]
    yield from table(("tool", "what is read"), about)


def _table(head: str, meanings: dict[str, str]) -> Iterator[str]:
    yield from table(
        (head, "meaning"), [(f"`{name}`", meaning) for name, meaning in meanings.items()]
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)

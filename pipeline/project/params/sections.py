"""The sections that every project has, and what training stages share. A method's own section is in
its file, `pipeline/stages/methods/NAME.py`."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from msgspec import Meta, field

from pipeline.errors import UserError
from pipeline.project.params.schema import (
    ALLOW_EMPTY,
    Because,
    Count,
    File,
    Names,
    Pretrained,
    Rate,
    ReadBy,
    Section,
    Seed,
    Share,
    Steps,
    ValueSource,
    Weight,
    check_value,
    duplicate,
    reject_unknown_keys,
)
from pipeline.project.process import AUTO, RULE, is_valid

Precision = Literal["fp32", "bf16", "fp16"]
Trained = Annotated[
    Literal["fp32", "bf16"],
    Because("gradients of fp16 weights cannot be unscaled, and an fp16 base takes fp32 adapters"),
]
Quantization = Literal["none", "int8", "nf4", "nf4-dq"]  # names as in the calculator
# see `training/optimizer/__init__.py`
Optimizer = Literal["adamw", "adamw-8bit", "paged-adamw-8bit", "sgd", "muon"]
Schedule = Literal[
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
Init = Literal["document", "gaussian", "kaiming", "orthogonal", "pissa"]  # see `adapters/lora.py`


# What every training takes on a pretrained base, unless its method has a default of its own
# (`Section.PRETRAINED`). `lora train` begins with the same, and chooses what depends on data and
# memory.
PRETRAINED: Mapping[str, Any] = {
    "epochs": 3,  # with more, a few hundred examples would be memorized
    "window": 0,
    "schedule": "linear",
    "warmup_ratio": 0.03,
    "max_grad_norm": 1.0,
    "precision": "bf16",
}
ADAM = ("optimizer", ("adamw", "adamw-8bit", "paged-adamw-8bit", "muon"))
READ_WITH: Mapping[str, tuple[str, tuple[str, ...]]] = {  # key → the key and values that read it
    "adam_beta1": ADAM,
    "adam_beta2": ADAM,
    "adam_epsilon": ADAM,
    "min_lr_ratio": (
        "schedule",
        ("linear", "cosine", "cosine_with_restarts", "polynomial", "warmup_stable_decay"),
    ),
    "num_cycles": ("schedule", ("cosine_with_restarts",)),
    "power": ("schedule", ("polynomial",)),
    "decay_ratio": ("schedule", ("warmup_stable_decay",)),
}
# everyday English, packaged: answers on it stay the base's until there is better
RETAIN = "data/retain.en.jsonl"
# everyday English, packaged: on it forgetting is measured until there is better
GENERAL = "data/heldout.en.txt"


class DataFile(NamedTuple):
    """A file or folder to train on."""

    path: str
    weight: float = 1.0  # how often each example is seen per epoch
    columns: Mapping[str, str] = {}  # key → the file's name for it


def _read_columns(value: Any, _key: str, _origin: ValueSource) -> Mapping[str, str] | None:
    if not isinstance(value, dict):
        return None
    names = [*value, *value.values()]
    return value if all(isinstance(name, str) and name for name in names) else None


# a path, or several, each with its weight and columns
DataValue = str | tuple[str | Mapping[str, Any], ...]


def _read_data(value: Any, key: str, origin: ValueSource) -> DataValue | None:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        return None
    files = tuple(
        _read_data_file(entry, f"{key}[{number}]", origin) for number, entry in enumerate(value)
    )
    twice = duplicate([file.path for file in data_files(files)])
    if twice:
        raise UserError(f"{key} has {twice!r} twice. Give it a weight instead. {origin.edit(key)}")
    return files


def _read_data_file(entry: Any, key: str, origin: ValueSource) -> Any:
    path = entry
    if isinstance(entry, dict):
        reject_unknown_keys(entry, DataFile._fields, f"{key}.", origin)
        entry = {
            part: check_value(DATA_FILE[part], value, f"{key}.{part}", origin)
            for part, value in entry.items()
        }
        path = entry.get("path")
    if not isinstance(path, str) or not path:
        raise UserError(
            f"{key} must be a path, or {{path: …, weight: …}}, got {entry!r}. {origin.edit(key)}"
        )
    return entry


def data_files(data: DataValue) -> tuple[DataFile, ...]:
    """What a value of `data` names, one after the other."""
    entries = (data,) if isinstance(data, str) else data
    return tuple(
        DataFile(entry) if isinstance(entry, str) else DataFile(**entry) for entry in entries
    )


def change_paths(data: Any, change: Callable[[str], str]) -> Any:
    """A value that names files, one or several, with each path changed."""
    if isinstance(data, tuple):
        return tuple(change_paths(entry, change) for entry in data)
    if isinstance(data, Mapping):
        return {**data, "path": change(data["path"])}
    return change(data)


def _read_samples(value: Any, key: str, origin: ValueSource) -> Mapping[str, Any] | None:
    if not isinstance(value, dict) or not value.keys() & {"prompts", "held_out"}:
        return None
    reject_unknown_keys(value, ["prompts", *SAMPLE_NUMBERS], f"{key}.", origin)
    for name, kind in SAMPLE_NUMBERS.items():
        if name in value:
            check_value(kind, value[name], f"{key}.{name}", origin)
    # without the key, a value that passes the checks below
    prompts = value.get("prompts", ["none"])
    if not isinstance(prompts, list) or not prompts:
        raise UserError(
            f"{key}.prompts must be a list of prompts, got {prompts!r}. {origin.edit(key)}"
        )
    for number, prompt in enumerate(prompts):
        if not _is_prompt(prompt):
            raise UserError(
                f"{key}.prompts[{number}] must be a text, or a list of messages such as "
                f"{{role: user, content: …}}, got {prompt!r}. {origin.edit(key)}"
            )
    return value


def _is_prompt(value: Any) -> bool:
    """Whether it is a text or a chat's messages: not empty, of whole characters."""
    if isinstance(value, str):
        return bool(value.strip()) and value == value.encode(errors="ignore").decode()
    if not isinstance(value, list) or not value:
        return False
    return all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and all(isinstance(part, str) and _is_prompt(part) for part in turn.values())
        for turn in value
    )


COLUMNS_RULE = (
    "a mapping of keys to columns of the file, such as {prompt: question, completion: answer}"
)
DATA_RULE = "a file or folder, or a list of them, each a path or {path: …, weight: …, columns: …}"
Columns = Annotated[Mapping[str, str], ALLOW_EMPTY, ReadBy(_read_columns, COLUMNS_RULE)]
SAMPLES_RULE = (
    "a mapping such as {held_out: 20} or {prompts: [der hund], every: 50, max_tokens: 20}"
)
SAMPLE_NUMBERS = {"every": Steps, "max_tokens": Count, "held_out": Steps}
Samples = Annotated[Mapping[str, Any], ALLOW_EMPTY, ReadBy(_read_samples, SAMPLES_RULE)]
DATA_FILE = {"path": str, "weight": Annotated[float, Meta(gt=0, le=1000)], "columns": Columns}
Data = Annotated[DataValue, ReadBy(_read_data, DATA_RULE)]


def _read_files(value: Any, key: str, origin: ValueSource) -> str | tuple[str, ...] | None:
    files = [value] if isinstance(value, str) else value
    if not isinstance(files, list) or not files:
        return None
    if not all(isinstance(file, str) and file for file in files):
        return None
    if twice := duplicate(files):
        raise UserError(f"{key} has {twice!r} twice. Remove one of them from {origin.of(key)}.")
    return value if isinstance(value, str) else tuple(files)


def _read_limits(value: Any, key: str, origin: ValueSource) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(
            f"{key} must be a mapping of limits, such as {LIMITS_EXAMPLE}, got {value!r}. "
            f"{origin.edit(key)}"
        )
    reject_unknown_keys(value, list(LIMITS), f"{key}.", origin)
    return {
        name: check_value(LIMITS[name], limit, f"{key}.{name}", origin)
        for name, limit in value.items()
    }


def _read_scores(value: Any, key: str, origin: ValueSource) -> dict[str, float] | None:
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return None
    return {
        name: check_value(Score, score, f"{key}.{name}", origin) for name, score in value.items()
    }


FILES_RULE = "a file, or a list of files"
Files = Annotated[str | tuple[str, ...], ALLOW_EMPTY, ReadBy(_read_files, FILES_RULE)]
Score = Annotated[float, Meta(ge=0, le=1)]
LIMITS: Mapping[str, Any] = {  # as metrics.json has the numbers; see `evaluation/limits.py`
    "new_loss": Annotated[Weight, "most loss on the new sentences, in nats per token"],
    "old_loss_rise": Annotated[
        float, "most that the loss on old_data may rise above the base's, in nats per token"
    ],
    "answers_kept": Annotated[
        Score, "least share of the base's first choices on old_data that stay"
    ],
    "divergence": Annotated[
        Weight, "most KL divergence from the base on old_data, in nats per token"
    ],
    "answers": Annotated[Score, "least share of the sample answers that are as the data expects"],
    "must_keep": Annotated[Score, "least share of the must_keep prompts that keep their answer"],
    "tasks": Annotated[
        Mapping[str, float],
        ReadBy(_read_scores, "a mapping of tasks to scores, such as {capitals: 0.8}"),
        "least score of each task",
    ],
    "task_drop": Annotated[Score, "most that any task's score may be below the base's"],
    "variants": Annotated[
        tuple[str, ...], "the variants that must keep the limits; without it all that are trained"
    ],
}
LIMITS_EXAMPLE = "{old_loss_rise: 0.1, tasks: {capitals: 0.8}}"
LIMITS_RULE = "a mapping of limits: " + "; ".join(
    f"{name}, {note.__metadata__[-1]}" for name, note in LIMITS.items()
)
Limits = Annotated[Mapping[str, Any], ALLOW_EMPTY, ReadBy(_read_limits, LIMITS_RULE)]
MEASURED_ON = {  # limit → the key of evaluate without which it is not measured
    **dict.fromkeys(("old_loss_rise", "answers_kept", "divergence"), "old_data"),
    "must_keep": "prompts",
    "tasks": "tasks",
    "task_drop": "tasks",
}


def _read_device(value: Any, _key: str, _origin: ValueSource) -> str | None:
    return value if isinstance(value, str) and is_valid(value) else None


class Running(Section, frozen=True, kw_only=True):
    """Where runs are shown and computed. It stands above the sections, as it changes nothing that
    is made.
    """

    report_to: Annotated[
        Names,
        "trackers that follow the run's log: dvclive, mlflow, tensorboard, trackio, wandb "
        "(how-to/trackers.md)",
    ] = ()
    device: Annotated[
        str,
        ReadBy(_read_device, RULE),
        "where models live and numbers are computed; --device and LORA_DEVICE win "
        "(how-to/devices.md)",
    ] = AUTO


class Training(Section, frozen=True, kw_only=True):
    """What every training stage needs."""

    # keys that the training block does not set for this section
    NOT_SHARED: ClassVar[frozenset[str]] = frozenset()
    # whether it learns from answers that are compared, not from examples to predict
    COMPARES: ClassVar[bool] = False

    seed: Annotated[Seed, "of initial weights, batches and the data held out"] = 0
    data: Annotated[
        Data, "the examples to train on; a weight of 2: seen twice per epoch, 0.5: half of them"
    ] = "data/finetune.de.txt"
    columns: Annotated[Columns, "names in the data files for the keys of a format"] = field(
        default_factory=dict
    )
    chat_template: Annotated[
        Literal["auto", "none"],
        "how a plain prompt and its completion are read: auto, as the turns of a user and the "
        "assistant where the base has a chat template; none, as they are",
    ] = "auto"
    epochs: Annotated[Count, "times that every example is seen"] = 50
    max_steps: Annotated[
        Steps, "number of steps, whatever epochs is (as in transformers); 0: epochs decide"
    ] = 0
    batch_size: Annotated[Count, "examples a batch"] = 4
    tokens_per_batch: Annotated[
        Steps,
        "the batch_size × gradient_accumulation_steps examples of a step are computed in as few "
        "batches of at most this many tokens as they need, on each device; 0: in batches of "
        "batch_size. It changes memory and speed, not the loss (of kto its estimate of the "
        "divergence, which is a batch's)",
    ] = 0
    window: Annotated[
        Steps, "tokens per training window, at its position in the sentence; 0: whole examples"
    ] = 4
    learning_rate: Annotated[Rate, "of the optimizer, after warm-up"] = 1e-3
    optimizer: Annotated[
        Optimizer,
        "adamw; adamw-8bit, with its moments in a byte each; paged-adamw-8bit, with those in the "
        "host's memory (on a CPU the same); sgd, without momentum; or muon, on matrices, with "
        "adamw on all else. Leave it unless the optimizer's state is what does not fit",
    ] = "adamw"
    adam_beta1: Annotated[Share, "decay of AdamW's mean of gradients"] = 0.9
    adam_beta2: Annotated[Share, "decay of AdamW's mean of squared gradients"] = 0.999
    adam_epsilon: Annotated[Rate, "added to the root that AdamW divides by"] = 1e-8
    weight_decay: Annotated[
        Weight,
        "of all that trains, decoupled as in AdamW; leave it at 0 where few parameters train for "
        "few epochs",
    ] = 0.0
    neftune_alpha: Annotated[
        Weight,
        "uniform noise of ±alpha/√(tokens · width) on the embeddings in training (NEFTune), often "
        "5; leave it at 0 unless long answers are taught",
    ] = 0.0
    schedule: Annotated[
        Schedule,
        "learning rate after warm-up, by transformers' names: constant, or falling, so that it "
        "would be at its end in the step after the last",
    ] = "constant"
    min_lr_ratio: Annotated[
        Share, "share of the learning rate at which the decay ends; inverse_sqrt has no end"
    ] = 0.0
    num_cycles: Annotated[Count, "times that cosine_with_restarts falls"] = 1
    power: Annotated[Rate, "of polynomial; 1 is linear"] = 1.0
    decay_ratio: Annotated[
        float,
        Meta(gt=0, le=1),
        "share of all steps, rounded up, in which warmup_stable_decay falls, as a cosine",
    ] = 0.1
    warmup_steps: Annotated[Steps, "steps in which the learning rate rises to its value"] = 0
    warmup_ratio: Annotated[
        Share, "the same as a share of all steps, rounded up; 0 where warmup_steps is set"
    ] = 0.0
    max_grad_norm: Annotated[Weight, "gradients are clipped to this norm; 0: never"] = 0.0
    gradient_accumulation_steps: Annotated[
        Count, "batches of batch_size examples per optimizer step"
    ] = 1
    max_length: Annotated[Steps, "examples are truncated to this many tokens; 0: never"] = 0
    precision: Annotated[Precision, "dtype of the weights, trained or frozen"] = "fp32"
    gradient_checkpointing: Annotated[
        Literal["none", "selective", "full"],
        "recompute blocks in backward to save memory: none, every second, all",
    ] = "none"
    compile: Annotated[
        bool,
        "torch.compile the blocks of an imported model, which takes a minute before the first "
        "step; worth it on a GPU, for runs of hours",
    ] = False
    eval_share: Annotated[
        Share, "share of the examples held out for evaluation, selected by hash"
    ] = 0.0
    eval_data: Annotated[
        File, "examples to evaluate on, in a file of their own, instead of eval_share"
    ] = ""
    eval_steps: Annotated[Steps, "steps between evaluations; 0: once per epoch"] = 0
    patience: Annotated[
        Steps,
        "evaluations without improvement before training stops and takes the best weights; 0: "
        "never",
    ] = 0
    load_best: Annotated[
        bool, "take the weights of the best evaluation, also where training does not stop early"
    ] = False
    metric_for_best_model: Annotated[
        Literal["eval_loss", "eval_answers"],
        "what is best: a lower held-out loss, or more held-out answers as expected (with "
        "samples.held_out) and then a lower loss",
    ] = "eval_loss"
    samples: Annotated[
        Samples,
        "what the model answers greedily while it trains, in samples.jsonl. held_out: so many "
        "held-out examples, at each evaluation, compared with the expected answers. prompts: texts "
        "or chat messages; every: steps between answers (0: at each evaluation, else at the end of "
        "an epoch); max_tokens: of an answer (20)",
    ] = field(default_factory=dict)
    save_steps: Annotated[
        Steps,
        "steps between the models that the artifact keeps in folders checkpoint-N, each evaluated; "
        "0: none. A sweep keeps none. A killed run resumes without them",
    ] = 0
    save_total_limit: Annotated[
        Steps, "of these, how many of the last are kept, beside the best; 0: all"
    ] = 0

    @classmethod
    def pretrained(cls, base: Pretrained, given: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        defaults = {**PRETRAINED, **cls.PRETRAINED}
        if "warmup_steps" in given:  # the same in another unit
            del defaults["warmup_ratio"]
        return defaults

    def __post_init__(self) -> None:
        """Raises UserError for keys that contradict each other."""
        if self.warmup_steps and self.warmup_ratio:
            raise UserError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio:g}, but "
                "only one of them may be set. Set the other to 0."
            )
        defaults = dict(zip(self.__struct_fields__, self.__struct_defaults__, strict=True))
        for key, (chooser, readers) in READ_WITH.items():
            value, chosen = getattr(self, key), getattr(self, chooser)
            if value != defaults[key] and chosen not in readers:
                raise UserError(
                    f"{key} is {value:g}, but {chooser} {chosen} does not read it. Remove it, or "
                    f"set {chooser} to {' or '.join(readers)}."
                )
        if self.metric_for_best_model == "eval_answers" and not self.samples.get("held_out"):
            raise UserError(
                "metric_for_best_model is eval_answers, but samples.held_out does not say how "
                "many answers to compare. Set samples={held_out: 20}."
            )
        if self.metric_for_best_model == "eval_answers" and not (
            self.takes_best or self.save_steps
        ):
            raise UserError(
                "metric_for_best_model is eval_answers, but no best model is chosen. Set load_best "
                "to true, or patience to the evaluations to wait for a better one."
            )
        if self.save_total_limit and not self.save_steps:
            raise UserError(
                f"save_total_limit is {self.save_total_limit}, but save_steps is 0, so that "
                "nothing is kept. Set save_steps to the steps between two checkpoints."
            )

    @property
    def takes_best(self) -> bool:
        """Whether training ends with the weights of its best evaluation."""
        return self.load_best or self.patience > 0

    @property
    def templated(self) -> bool:
        """Whether plain prompts and completions are turns where the base has a chat template."""
        return self.chat_template == "auto"

    def total_steps(self, per_epoch: int) -> int:
        """Number of steps without early stopping."""
        return self.max_steps or self.epochs * per_epoch

    def warmup(self, total: int) -> int:
        """Steps of warm-up, of `total`."""
        return self.warmup_steps or math.ceil(total * self.warmup_ratio)

    @property
    def data_files(self) -> tuple[DataFile, ...]:
        """The data files, one after the other, each with the columns that count for it."""
        return tuple(
            file._replace(columns=file.columns or self.columns) for file in data_files(self.data)
        )

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of the data files."""
        return tuple(file.path for file in self.data_files)


class AdapterTraining(Training, frozen=True, kw_only=True):
    """What training an adapter on a frozen base needs."""

    adapter_precision: Annotated[Trained, "dtype of what trains"] = "fp32"
    quantization: Annotated[
        Quantization,
        "of the frozen linears of the blocks: none, int8, nf4, nf4-dq (double quantization)",
    ] = "none"


class Import(Section, frozen=True, kw_only=True):
    """The base model, imported as a plain checkpoint: all that is fine-tuned starts from it."""

    base: Annotated[
        str, "minigpt, which is trained; or a checkpoint folder, GGUF file or hub id to import"
    ] = "minigpt"
    dtype: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        "of an imported base's weights; auto: as they are stored",
    ] = "auto"
    trust_remote_code: Annotated[bool, "run the code that comes with a base"] = False

    @property
    def imports(self) -> bool:
        """Whether a base is taken from elsewhere."""
        return self.base != "minigpt"


class Pretrain(Training, frozen=True, kw_only=True):
    """MiniGPT's shape and its training."""

    data: Annotated[Data, "the sentences to train on, whose words are the vocabulary"] = (
        "data/pretrain.de.txt"
    )
    epochs: Annotated[Count, "times that every sentence is seen"] = 60
    d_model: Annotated[Count, "MiniGPT's width"] = 64
    layers: Annotated[Count, "MiniGPT's blocks"] = 2
    heads: Annotated[Count, "MiniGPT's attention heads"] = 4
    feed_forward: Annotated[Count, "width inside MiniGPT's feed-forward layers"] = 256
    max_positions: Annotated[Count, "longest sentence or prompt of MiniGPT, in tokens"] = 32
    tie_embeddings: Annotated[bool, "one matrix for MiniGPT's embedding and head"] = False

    @classmethod
    def pretrained(cls, base: Pretrained, given: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG003
        """No defaults: an imported base is not trained."""
        return {}

    def __post_init__(self) -> None:
        Training.__post_init__(self)
        if self.d_model % (2 * self.heads):
            raise UserError(
                f"d_model must be a multiple of 2 × heads = {2 * self.heads} "
                f"(an even head size), got {self.d_model}. Change d_model or heads."
            )


class ExpandVocab(Section, frozen=True, kw_only=True):
    """New words: which files they come from, and how their rows start."""

    # subword tokenizers know every word
    PRETRAINED: ClassVar[Mapping[str, Any]] = {"data": (), "audit_data": GENERAL}

    seed: Annotated[Seed, "of the noise in new rows"] = 0
    data: Annotated[Names, "files whose new words get a row, for a word tokenizer"] = (
        "data/finetune.de.txt",
    )
    tokens: Annotated[Names, "new words by name, for any base"] = ()
    special_tokens: Annotated[Names, "such as <tool>, for subword bases; not shown in answers"] = ()
    noise_std: Annotated[
        Weight, "new row = mean of the old rows + Gaussian noise of this deviation"
    ] = 0.02
    audit_data: Annotated[str, "sentences whose logits must not change"] = "data/pretrain.de.txt"


class Merge(Section, frozen=True, kw_only=True):
    """The merged model's logits on these prompts must be those of base + adapter within this
    difference.
    """

    # A 16-bit base rounds; the certificate has the difference.
    PRETRAINED: ClassVar[Mapping[str, Any]] = {"max_logit_difference": 1.0}

    prompts: Annotated[
        File,
        "prompts on which merged and unmerged model are compared; empty: examples of the "
        "evaluation",
    ] = ""
    max_logit_difference: Annotated[
        Rate, "largest difference from base + adapter; above it the merge is rejected"
    ] = 1e-5


class Evaluate(Section, frozen=True, kw_only=True):
    """The data and prompts on which every variant is compared."""

    old_data: Annotated[
        File, "texts that are not trained on, on which forgetting is measured; empty: it is not"
    ] = ""
    new_data: Annotated[
        File,
        "the sentences trained on; empty: what training holds out (eval_data, eval_share), else "
        "its data",
    ] = ""
    columns: Annotated[Columns, "names in new_data for the keys of a format"] = field(
        default_factory=dict
    )
    prompts: Annotated[
        File, "prompts with the answers they must keep, change or learn; empty: none"
    ] = ""
    max_examples: Annotated[
        Steps, "most examples that are scored where new_data is empty; 0: all"
    ] = 200
    sample_answers: Annotated[
        Steps,
        "prompts of new_data that every variant answers, greedily; answers as the data expects "
        "are counted",
    ] = 20
    tasks: Annotated[
        Files,
        "tasks of your own, and the data and scorer files that they name (a scorer's code is "
        "run); empty: none",
    ] = ""
    limits: Annotated[
        Limits, "what trained models must keep to; where one does not, `lora evaluate` exits with 1"
    ] = field(default_factory=dict)
    top_k: Annotated[Count, "likeliest next words that predictions.json keeps per prompt"] = 5
    prompt_words: Annotated[Count, "words of a new sentence given as its prompt"] = 2

    def __post_init__(self) -> None:
        """Raises UserError for a limit on what is not measured."""
        for limit in self.limits:
            if (key := MEASURED_ON.get(limit)) and not getattr(self, key):
                raise UserError(
                    f"limits.{limit} is set, but evaluate.{key} names no file to measure it on. "
                    "Name one, or remove the limit."
                )

    @property
    def task_files(self) -> tuple[str, ...]:
        """The paths of `tasks`."""
        files = (self.tasks,) if isinstance(self.tasks, str) else self.tasks
        return tuple(filter(None, files))

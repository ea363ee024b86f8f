"""What published experiments and our own advise for the settings of a fine-tuning; none of it
blocks a run.

A rule is one function with its source, and says nothing where a fact that it needs is not known.
"""

from collections.abc import Callable
from math import ceil, inf
from typing import Any, NamedTuple

from pipeline.project.params.load import key_path
from pipeline.project.params.schema import Pretrained
from pipeline.project.stage_graph import Project

REGRET = "LoRA Without Regret, thinkingmachines.ai/blog/lora"
TOLERANCE = 5  # the curve of loss over rate is flat near its minimum: within this factor is near
SHORT = 64  # tokens of a window that has next to no context
BATCH = 32
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2, 1
MANY = 1000  # examples
EPOCHS, EPOCHS_OF_FEW = 4, 15  # on at least `MANY` examples, and on fewer
HIGH_RANK, FIXED_ALPHA = 64, 32
CUT = 0.05  # share of the examples
SMALL_BASE = 10**9  # parameters
SLOWER = 8  # products in bf16 take so many times as long as in fp32, on a CPU with AVX2
# from the adapter that init_from names
TAKEN_OVER = ("rank", "alpha", "target_modules", "train_embeddings")


class Facts(NamedTuple):
    """What is known of a run beside its section's settings; None where it is not.

    `base` and `trained`: parameters. `adapted`: share of the blocks' linear weights that get LoRA.
    `examples`, and `tokens` with a label, once each; `more`: there are more than these. `cut`:
    share that max_length truncates. `left`: the rank is changed by --set, and alpha stays as a file
    sets it. `measured`: the swept keys, if the settings are those of the best adapter of the
    project's sweep. `precision`: the fastest of the device. `width`: of an imported base's hidden
    states.
    """

    section: str
    base: int | None = None
    trained: int | None = None
    adapted: float | None = None
    examples: int | None = None
    tokens: int | None = None
    cut: float | None = None
    more: bool = False
    left: bool = False
    measured: tuple[str, ...] = ()
    precision: str | None = None
    width: int | None = None


class Advice(NamedTuple):
    """A setting that a rule disagrees with: `key` as in params.yaml, its value, and what is
    advised, why, by whom.
    """

    key: str
    yours: Any
    advised: str
    why: str
    source: str


class Answer(NamedTuple):
    """What is advised, and why; `times`: how many times too high or too low the setting is."""

    advised: str
    why: str
    times: float


# None where the settings agree, or a fact is not known
Rule = Callable[[Any, Facts], Answer | None]
RULES: list[tuple[tuple[str, ...], bool, str, Rule]] = []


def rule(*keys: str, source: str, imported_only: bool = False) -> Callable[[Rule], Rule]:
    """Registers a rule on the first of `keys`; it is asked about sections that have all of them.

    `imported_only`: its source measured large models, so it holds for an imported base only.
    """

    def register(function: Rule) -> Rule:
        RULES.append((keys, imported_only, source, function))
        return function

    return register


def advise(project: Project, facts: Facts) -> list[Advice]:
    """What the rules advise for a section's settings, the furthest from it first.

    Where training goes on from an adapter, its rank, alpha, targets and trained embeddings are
    kept: nothing is said of these.
    """
    settings = project.params.section(facts.section)
    imports = project.params.origin.imports
    facts = facts._replace(width=project.params.width)
    continues = bool(getattr(settings, "init_from", ""))
    answers: list[tuple[float, Advice]] = []
    for keys, imported_only, source, function in RULES:
        # what was measured here counts more
        applies = (imports or not imported_only) and keys[0] not in facts.measured
        if not applies or (continues and keys[0] in TAKEN_OVER):
            continue
        if all(hasattr(settings, key) for key in keys) and (answer := function(settings, facts)):
            key, yours = key_path(facts.section, keys[0]), getattr(settings, keys[0])
            answers.append((answer.times, Advice(key, yours, answer.advised, answer.why, source)))
    return [advice for _, advice in sorted(answers, key=lambda pair: -pair[0])]


def advised_learning_rate(project: Project) -> float:
    """The rate to sweep around: the advised one on an imported base with Adam, elsewhere the
    project's own.
    """
    settings = project.params.section("finetune_lora")
    advised: Any = project.params.default("finetune_lora")
    # the rates compared are Adam's
    known = project.params.origin.imports and settings.optimizer != "sgd"
    return float((advised if known else settings).learning_rate)


@rule("window", source="docs/how-to/new-project.md", imported_only=True)
def window(settings: Any, _: Facts) -> Answer | None:
    """A pretrained model reads whole texts: trained on windows of a few tokens, it learns
    fragments.
    """
    if not 0 < settings.window < SHORT:
        return None
    why = f"a pretrained model would see {settings.window} tokens at a time, whatever else is set"
    return Answer("0 (whole examples)", why, inf)


@rule("precision", source="docs/how-to/new-project.md", imported_only=True)
def precision(settings: Any, facts: Facts) -> Answer | None:
    """A CPU without instructions for bf16 computes in it several times more slowly than in fp32, a
    GPU than in fp16.
    """
    if settings.precision != "bf16" or facts.precision in (None, "bf16"):
        return None
    return Answer(
        "fp16" if facts.precision == "fp16" else "fp32, if the memory suffices",
        "this device has no instructions for bf16, and is slower in it",
        SLOWER,
    )


@rule("train_embeddings", "rank", source="docs/how-to/new-project.md", imported_only=True)
def train_embeddings(settings: Any, _: Facts) -> Answer | None:
    """A pretrained base has embeddings for its tokens. To train them all makes the adapter as large
    as they are.
    """
    if settings.train_embeddings != "all":
        return None
    return Answer(
        "new_rows, or none",
        "embeddings and head train and are stored in full, for tokens it knows",
        1.0,
    )


@rule("learning_rate", "rank", source=REGRET, imported_only=True)
def learning_rate(settings: Any, facts: Facts) -> Answer | None:
    """The best rate of LoRA is about 10 times full fine-tuning's (15 in short runs), at ranks from
    1 to 512.
    """
    best, rate = settings.defaults(Pretrained(facts.width)).learning_rate, settings.learning_rate
    times = max(rate / best, best / rate)
    # the rates compared are Adam's
    if times <= TOLERANCE * (1 + 1e-9) or settings.optimizer == "sgd":
        return None
    why = "LoRA's best rate is about 10 times that of full fine-tuning, nearly whatever the rank"
    if settings.COMPARES:
        why += (
            "; with preferences a tenth of it, as an answer that is pushed away takes others along"
        )
    return Answer(f"about {best:g}", why, times)


@rule(
    "target_modules",
    "rank",
    source=f"{REGRET}; Biderman et al. 2024, arXiv 2405.09673",
    imported_only=True,
)
def target_modules(settings: Any, facts: Facts) -> Answer | None:
    """LoRA on all linears matches full fine-tuning; attention alone does not, even with as many
    parameters.
    """
    if {"all-linear", "feed_forward"} & set(settings.target_modules):
        return None
    if facts.adapted is None and settings.target_modules != ("attention",):
        return None  # names: which share of the model they are is not known
    if facts.adapted is not None and facts.adapted >= 0.5:
        return None
    part = (
        "attention alone"
        if facts.adapted is None
        else f"{facts.adapted:.0%} of the blocks' weights"
    )
    why = f"LoRA on {part} learns less than on all linears, even with as many parameters"
    # attention is about a quarter
    return Answer("all-linear", why, 1 / max(facts.adapted or 0.25, 0.01))


@rule("batch_size", "gradient_accumulation_steps", "rank", source=REGRET, imported_only=True)
def batch_size(settings: Any, _: Facts) -> Answer | None:
    """Large batches cost LoRA more than full fine-tuning, at every rank."""
    batch = settings.batch_size * settings.gradient_accumulation_steps
    if batch <= BATCH:
        return None
    why = f"{batch} examples per step; large batches hurt LoRA more than full fine-tuning"
    return Answer(f"at most {BATCH} per step", why, batch / BATCH)


@rule("rank", source=f"{REGRET}; Allen-Zhu & Li 2024, arXiv 2404.05405")
def capacity(settings: Any, facts: Facts) -> Answer | None:
    """An adapter holds about 2 bits per parameter; text holds about 1 bit per trained token."""
    if not facts.trained or facts.tokens is None:
        return None
    holds, needs = facts.trained * BITS_PER_PARAMETER, facts.tokens * BITS_PER_TOKEN
    if needs <= holds:
        return None
    why = (
        f"{facts.tokens:,} trained tokens have about {needs:,} bits, {facts.trained:,} parameters "
        f"hold {holds:,}"
    )
    return Answer(f"at least {ceil(settings.rank * needs / holds)}", why, needs / holds)


@rule(
    "epochs",
    "rank",
    source="Muennighoff et al. 2023, arXiv 2305.16264; LIMA, arXiv 2305.11206",
    imported_only=True,
)
def epochs(settings: Any, facts: Facts) -> Answer | None:
    """Up to 4 epochs repeated data is worth nearly as much as new data; LIMA's 1,000 examples were
    seen 15 times.
    """
    drawn = settings.max_steps * settings.batch_size * settings.gradient_accumulation_steps
    if not facts.examples or (drawn and facts.more):
        return None
    seen = drawn / facts.examples if drawn else settings.epochs
    by = ", as max_steps says," if drawn else ""
    most = EPOCHS if facts.examples >= MANY else EPOCHS_OF_FEW
    if seen <= most:
        return None
    times = f"{seen:,.1f}".removesuffix(".0")
    why = f"{facts.examples:,} examples seen {times} times each{by} are memorized"
    return Answer(f"at most {most}", why, seen / most)


@rule(
    "alpha",
    "rank",
    "rslora",
    source=f"{REGRET}; Kalajdzievski 2023, arXiv 2312.03732",
    imported_only=True,
)
def alpha(settings: Any, facts: Facts) -> Answer | None:
    """The usual scale alpha / rank is 1 to 2; the blog keeps alpha at 32. At high ranks alpha /
    √rank is steadier.
    """
    rank, usual = settings.rank, settings.ALPHA_PER_RANK * settings.rank
    if facts.left and settings.alpha != usual:
        why = (
            "--set changes the rank alone: the update is then scaled by alpha / rank = "
            f"{settings.alpha / rank:.3g}"
        )
        return Answer(
            f"{usual:g} ({settings.ALPHA_PER_RANK:g} × rank)", why, max(usual / settings.alpha, 1.0)
        )
    if settings.rslora or rank <= settings.alpha <= 2 * rank or settings.alpha == FIXED_ALPHA:
        return None
    advised = f"{rank} to {2 * rank} (rank to 2 × rank), or {FIXED_ALPHA}"
    if rank >= HIGH_RANK and settings.alpha < rank:
        advised += ", or rslora=true"
    why = (
        f"the update is scaled by alpha / rank = {settings.alpha / rank:.3g}; usual learning "
        "rates assume 1 to 2"
    )
    return Answer(advised, why, max(rank / settings.alpha, settings.alpha / (2 * rank)))


@rule("max_length", source="lora data show: the end token comes last, so it is cut first")
def max_length(_: Any, facts: Facts) -> Answer | None:
    """A truncated example has no end: a model that never sees one does not learn to stop."""
    if facts.cut is None or facts.cut <= CUT:
        return None
    why = f"{facts.cut:.0%} of the examples are truncated, and lose the end token"
    return Answer("more, or shorter examples", why, facts.cut / CUT)


@rule("quantization", source="docs/how-to/quantization.md: SmolLM2-135M", imported_only=True)
def quantization(settings: Any, facts: Facts) -> Answer | None:
    """NF4 alone changed 15 of 53 first choices of a model with 135 million parameters."""
    if (
        not settings.quantization.startswith("nf4")
        or facts.base is None
        or facts.base >= SMALL_BASE
    ):
        return None
    why = (
        f"four bits change a base of {facts.base / 1e6:,.0f} million parameters more than a "
        "correction does"
    )
    return Answer("none or int8", why, SMALL_BASE / facts.base)

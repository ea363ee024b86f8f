"""Every method on MiniGPT and on a toy Llama: what any run can do, each can. A test a column, a
case a cell.
"""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from pipeline.data.examples import Example, in_evaluation
from pipeline.data.formats import read_examples
from pipeline.data.masking import encode
from pipeline.files import artifact
from pipeline.inference.engine import LoadedModel, load
from pipeline.inference.score import score
from pipeline.project.logs.run_log import LOSS, read_steps
from pipeline.project.params.sections import Quantization
from pipeline.project.runner import run
from pipeline.project.stage_graph import Project
from pipeline.stages.registry import METHODS, open_project
from pipeline.views.models import check, describe
from tests.conftest import Lora
from tests.helpers import families
from tests.helpers.checkpoints import token_ids
from tests.helpers.json_files import write_jsonl
from tests.helpers.process import Forked
from tests.helpers.projects import (
    COMMAND,
    LORA,
    STAGES,
    WORK,
    folder_bytes,
    make,
    new_project,
    played,
    refusal,
)
from tests.helpers.side_by_side import randomized

EVERY, KILLED = 2, 6  # steps between checkpoints; the step that a killed run does not take
Arguments = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """A method: what runs it, how the calculator is asked for each thing that it makes, and what
    PEFT calls it.

    `made`: folder below the stage's → the calculator's arguments. `init`: PEFT's init_lora_weights.
    """

    stage: str
    settings: Arguments
    made: dict[str, Arguments]
    init: bool | str = True
    kept: Quantization = "none"

    @property
    def adapts(self) -> bool:
        """Whether it makes an adapter, and not a whole model."""
        return STAGES[self.stage].kind != "checkpoint"

    @property
    def changes_weights(self) -> bool:
        """Whether what it makes can be merged."""
        return self.stage in ("finetune_lora", "finetune_dpo", "finetune_sweep")


# every step of every method calls it once, at its end
STEP = "pipeline.training.optimizer.FlatOptimizer.step"


def whole(stage: str, *asked: str) -> Row:
    return Row(stage, (), {"": ("--method", *asked)})


def lora(*settings: str, asked: Arguments = ("--method", "lora"), **more: Any) -> Row:
    return Row(
        "finetune_lora",
        tuple(f"finetune_lora.{one}" for one in settings),
        {"": (*asked, "--rank", "4")},
        **more,
    )


ROWS = {
    "scratch": whole(
        "train_from_scratch", "full"
    ),  # the calculator has no word for it: it trains what full fine-tuning does
    "full": whole("finetune_full", "full"),
    "freeze": whole("finetune_freeze", "freeze"),
    "lora": lora(),
    "rslora": lora("rslora=true", asked=("--rslora",)),
    "loraplus": lora("loraplus_ratio=16"),
    "patterns": lora(
        "rank_pattern={v_proj: 3, layers.0.self_attn.q_proj: 7}",
        "alpha_pattern={k_proj: 8}",
        asked=("--rank-pattern", "v_proj=3", "--rank-pattern", "layers.0.self_attn.q_proj=7"),
    ),
    "gaussian": lora("init_lora_weights=gaussian", init="gaussian"),
    "kaiming": lora("init_lora_weights=kaiming"),
    "orthogonal": lora("init_lora_weights=orthogonal", init="orthogonal"),
    "pissa": lora("init_lora_weights=pissa", init="pissa"),
    "dora": lora("dora=true", asked=("--dora",)),
    # PEFT's conversion loses DoRA's lengths: what it makes is DoRA of twice the rank, as such an
    # adapter is stored
    "dora-pissa": lora("dora=true", "init_lora_weights=pissa", asked=("--dora",)),
    "qlora": lora("quantization=nf4-dq", asked=("--method", "qlora"), kept="nf4-dq"),
    "int8": lora("quantization=int8", asked=("--precision", "int8"), kept="int8"),
    "dpo": whole("finetune_dpo", "dpo", "--rank", "4"),
    "prefix": whole("finetune_prefix", "prefix", "--virtual-tokens", "5"),
    "prompt": whole("finetune_prompt", "prompt", "--virtual-tokens", "5"),
    "sweep": Row(
        "finetune_sweep",
        ("finetune_sweep.grid={rank: [2, 6]}",),
        {f"rank-{rank}": ("--method", "lora", "--rank", f"{rank}") for rank in (2, 6)},
    ),
}
MORE = [
    stage for stage in METHODS.values() if stage.name not in {row.stage for row in ROWS.values()}
]
# every further method, by its defaults
ROWS |= {stage.method: whole(stage.name, stage.method) for stage in MORE}
FINETUNED = tuple(
    stage.name
    for stage in METHODS.values()
    if stage.look and stage.variant and stage.method != "scratch"
)
ON_LLAMA = (  # what further methods need on another family
    *(f"{stage.name}.data=data/all.jsonl" for stage in MORE),
    *("finetune_dpo.data=data/pairs.jsonl", "finetune_dpo.target_modules=all-linear"),
    "finetune_dpo.train_embeddings=new_rows",
    *("finetune_dpo.rank=4", "finetune_dpo.alpha=1", "finetune_dpo.learning_rate=5e-4"),
)
TRAINED = ("train_from_scratch", *FINETUNED)
# of the examples, held out: what was saved must have the loss that the last step had on them
HELD = 0.3
SMALL = (
    *(f"{stage}.{setting}" for stage in TRAINED for setting in (f"eval_share={HELD}", "window=0")),
    *(
        "finetune_prefix.virtual_tokens=5",
        "finetune_prompt.virtual_tokens=5",
        "finetune_lora.alpha=8",
    ),
)
BASES: dict[str, Arguments] = {
    "minigpt": (
        *SMALL,
        "pretrain.epochs=2",
        "train_from_scratch.epochs=2",
        *(f"{stage}.epochs=6" for stage in FINETUNED),
        *("finetune_dpo.train_embeddings=all", "finetune_dpo.learning_rate=2e-3"),
    ),
    "llama": (
        *SMALL,
        *(f"{stage}.epochs=8" for stage in TRAINED),
        "finetune_lora.train_embeddings=new_rows",
        *ON_LLAMA,
    ),
}
ASKED: dict[str, Arguments] = {  # what LoRA trains on a base, in the calculator's words
    "minigpt": ("--targets", "attention", "--embeddings", "all"),
    "llama": ("--targets", "all-linear", "--new-rows", "2"),
}
WITHIN = {"minigpt": 1e-5, "llama": 1e-4}  # of a merge, of the largest logit

pytestmark = pytest.mark.filterwarnings("ignore")
# What differs from another row by a number or by how LoRA begins is seen on MiniGPT; on Llama in
# the slow tier.
VARIANTS = ("rslora", "loraplus", "gaussian", "kaiming", "orthogonal", "pissa", "dora", "int8")
each = pytest.mark.parametrize(
    ("method", "base"),
    [
        pytest.param(
            m, b, id=f"{m}-{b}", marks=pytest.mark.slow if b == "llama" and m in VARIANTS else ()
        )
        for m in ROWS
        for b in BASES
    ],
)


@dataclass(frozen=True)
class Workshop:
    """Projects by base, with nothing but the base in them; and by method and base, with what an
    unbroken run made.
    """

    plain: Callable[[str], Path]
    of: Callable[[str, str], Path]

    def folders(self, method: str, base: str) -> dict[Path, Arguments]:
        """Each thing that the method made, and the calculator's arguments for it."""
        output = self.of(method, base) / STAGES[ROWS[method].stage].path
        return {output / name: asked for name, asked in ROWS[method].made.items()}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Read what it holds; do not write to it."""
    top = tmp_path_factory.mktemp("methods")

    @cache
    def plain(base: str) -> Path:
        root = top / base
        if base == "minigpt":
            new_project(root)
        else:
            families.new_project(root, families.FAMILIES[base])
            pairs = [
                {"prompt": one.text[:6], "chosen": one.text[6:16], "rejected": one.text[16:30]}
                for one in read_examples(root / "data/all.jsonl", "all", templated=False) * 3
            ]
            write_jsonl(root / "data/pairs.jsonl", pairs)
        make(root, ["pretrain", "expand_vocab"], BASES[base])
        return root

    @cache
    def of(method: str, base: str) -> Path:
        if ROWS[method].kept != "none":
            pytest.importorskip("bitsandbytes")
        root: Path = shutil.copytree(plain(base), top / f"{method}-{base}")
        stage = STAGES[ROWS[method].stage]
        played(run(project(root, method, base), stage, WORK[stage.name]))
        return root

    return Workshop(plain, of)


def project(root: Path, method: str, base: str) -> Project:
    return open_project(root / "params.yaml", overrides(method, base))


def overrides(method: str, base: str) -> Arguments:
    return (*BASES[base], *ROWS[method].settings)


def base_of(root: Path) -> Path:
    return root / "artifacts/expanded"


def tokens(base: str) -> Tensor:
    """Two sequences of all that the base knows, its new words among them."""
    rows = {"minigpt": 99, "llama": 122}[base]
    return token_ids(rows, 2, 9)


def stock(folder: Path, kept: Quantization = "none") -> Any:
    """A checkpoint in transformers; its blocks' linears in few bits and back, by bitsandbytes' own
    functions.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    for name, module in model.named_modules():
        if kept != "none" and ".layers." in name and isinstance(module, nn.Linear):
            module.weight.data = after_few_bits(module.weight.data, kept)
    return model.eval()


def after_few_bits(weight: Tensor, kept: Quantization) -> Tensor:
    """In blocks of 64, which go over the ends of rows, or row by row."""
    from bitsandbytes import functional

    if kept == "int8":
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return functional.int8_vectorwise_dequant(codes, scales).float()  # type: ignore[no-any-return]
    found = functional.quantize_4bit(
        weight.reshape(-1, 64), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    return functional.dequantize_4bit(*found).view_as(weight)


@torch.no_grad()
def theirs(model: Any, ids: Tensor) -> Tensor:
    """(B, T, V) of the tokens themselves: of virtual ones PEFT gives logits too."""
    logits: Tensor = model.eval()(input_ids=ids).logits
    return logits[:, -ids.shape[1] :]


@torch.no_grad()
def ours(
    base: str, folder: Path, adapter: Path | None = None, kept: Quantization | None = None
) -> Tensor:
    logits: Tensor = load(folder, adapter, quantization=kept).model(tokens(base))
    return logits


def made_by(root: Path, folder: Path, method: str) -> tuple[Path, Path | None]:
    """What the engine opens: a base and its adapter, or a whole model."""
    return (base_of(root), folder) if ROWS[method].adapts else (folder, None)


@each
def test_it_trains(workshop: Workshop, method: str, base: str) -> None:
    """The loss falls, every step is logged, the answers are no longer the base's, and the base is
    as it was.
    """
    root = workshop.of(method, base)
    for folder in workshop.folders(method, base):
        steps = read_steps(folder / LOSS)
        assert [step.step for step in steps] == list(range(1, len(steps) + 1)) and len(
            steps
        ) > KILLED
        third = len(steps) // 3
        assert sum(s.loss for s in steps[-third:]) < sum(s.loss for s in steps[:third])
        assert (
            ours(base, *made_by(root, folder, method)) - ours(base, base_of(root))
        ).abs().max() > 1e-2
    assert folder_bytes(base_of(root)) == folder_bytes(base_of(workshop.plain(base)))


@each
def test_what_it_saves_is_whole_and_is_what_trained(
    workshop: Workshop, method: str, base: str
) -> None:
    """Sealed, bound to its base, of as many numbers as its manifest says; a whole model differs in
    so many. Loaded, it has the loss on what is held out that it had after its last step."""
    root, row = workshop.of(method, base), ROWS[method]
    made = project(root, method, base)
    # without LoRA's texts to retain
    names = made.data_files(STAGES[row.stage])[: 2 if method == "scratch" else 1]
    held = [
        one
        for name in names
        for one in read_examples(root / name, name, templated=False)
        if in_evaluation(one, HELD)
    ]
    for folder in workshop.folders(method, base):
        loaded = load(*made_by(root, folder, method))
        loss = (
            preference_loss(loaded, load(base_of(root)), held)
            if method == "dpo"
            else score(loaded, held).loss
        )
        assert loss == pytest.approx(read_steps(folder / LOSS)[-1].eval_loss, rel=1e-5)
        count = artifact.verify(folder)["parameters"]
        if row.adapts:
            verdict = check(describe(folder), root)
            assert (verdict.state, verdict.reason) == ("verified", None)
            values = load_file(folder / "adapter_model.safetensors").values()
            assert sum(value.numel() for value in values) == count.get("stored", count["trainable"])
        else:
            before, after = (
                load_file(one / "model.safetensors") for one in (base_of(root), folder)
            )
            assert before.keys() == after.keys()
            changed = [
                value for name, value in after.items() if not torch.equal(value, before[name])
            ]
            assert sum(value.numel() for value in changed) == count["trainable"]


@torch.no_grad()
def preference_loss(tuned: LoadedModel, base: LoadedModel, pairs: Sequence[Example]) -> float:
    """DPO's loss as Rafailov et al. 2023 write it (eq. 7), β = 0.1."""

    def log_prob(of: LoadedModel, example: Example) -> Tensor:
        encoded = encode(example, of.tokenizer)
        ids, answered = torch.tensor(encoded.ids), torch.tensor(encoded.trained)
        found: Tensor = of.model(ids[None, :-1])[0].log_softmax(-1)
        return found[torch.arange(len(ids) - 1), ids[1:]][answered[1:]].sum()

    losses = []
    for pair in pairs:
        worse = replace(pair, text=f"{pair.prompt}{pair.rejected}", rejected=None)
        gains = [
            log_prob(tuned, one) - log_prob(base, one)
            for one in (replace(pair, rejected=None), worse)
        ]
        losses.append(-(0.1 * (gains[0] - gains[1])).sigmoid().log())
    return float(torch.stack(losses).mean())


@each
def test_peft_or_transformers_opens_it_with_our_logits(
    workshop: Workshop, method: str, base: str
) -> None:
    root, row = workshop.of(method, base), ROWS[method]
    for folder in workshop.folders(method, base):
        model = stock(base_of(root) if row.adapts else folder, row.kept)
        model = PeftModel.from_pretrained(model, folder) if row.adapts else model
        found = theirs(model, tokens(base))
        assert_close(ours(base, *made_by(root, folder, method)), found, atol=1e-4, rtol=1e-4)


@each
def test_what_peft_or_transformers_saves_loads_here_with_its_logits(
    workshop: Workshop, method: str, base: str, tmp_path: Path
) -> None:
    """An adapter of the same config that PEFT made, random where it trains; of a whole model, one
    that they saved.
    """
    root, row = workshop.of(method, base), ROWS[method]
    for folder in workshop.folders(method, base):
        out = tmp_path / folder.name
        if row.adapts:
            model = saved_by_peft(root, folder, row, out)
            found = ours(base, base_of(root), out, row.kept)
        else:
            model = randomized(stock(folder))
            shutil.copytree(
                folder, out, ignore=shutil.ignore_patterns("model.safetensors", "manifest.json")
            )
            model.save_pretrained(out)
            found = ours(base, out)
        assert_close(found, theirs(model, tokens(base)), atol=1e-4, rtol=1e-4)
        assert (found - ours(base, base_of(root))).abs().max() > 1e-2


def saved_by_peft(root: Path, like: Path, row: Row, out: Path) -> Any:
    """PEFT's own model, saved. PiSSA's, whose base is another, as PEFT converts it to an adapter of
    the base as it was: A and B alone, the rest it leaves out."""
    config, trained = PeftConfig.from_pretrained(like), artifact.read_manifest(like)["params"]
    config.inference_mode = False
    if row.changes_weights:
        config.init_lora_weights = row.init
    if row.init == "pissa":
        config.r, config.lora_alpha = trained["rank"], trained["alpha"]
        config.modules_to_save = config.trainable_token_indices = None
    model = get_peft_model(stock(base_of(root), row.kept), config)
    if row.init == "pissa":
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(out / "first")
        model.peft_config["default"].init_lora_weights = "pissa"
        randomized(model).save_pretrained(
            out, path_initial_model_for_weight_conversion=str(out / "first")
        )
    else:
        randomized(model).save_pretrained(out)
    return model


@each
def test_it_is_merged_or_the_merge_says_what_to_do_instead(
    workshop: Workshop, cli: Lora, method: str, base: str, tmp_path: Path
) -> None:
    root, row = workshop.of(method, base), ROWS[method]
    for folder in workshop.folders(method, base):
        out = tmp_path / folder.name
        answer = cli(
            "merge", "--adapter", str(folder.relative_to(root)), "--out", str(out), cwd=root
        )
        if row.changes_weights:
            assert answer[::2] == (0, "")
            wanted = ours(base, base_of(root), folder)
            most = WITHIN[base] * max(1, float(wanted.abs().max()))
            assert_close(theirs(stock(out), tokens(base)), wanted, atol=most, rtol=0)
        else:
            assert "`lora prompt --" in refusal(answer) and not out.exists()


def test_a_sweep_as_a_whole_is_no_adapter_and_names_one(
    workshop: Workshop, cli: Lora, tmp_path: Path
) -> None:
    root = workshop.of("sweep", "llama")
    said = refusal(
        cli("merge", "--adapter", "artifacts/sweep", "--out", str(tmp_path / "out"), cwd=root)
    )
    assert (
        "contains adapters but is not one. Name one of them, such as artifacts/sweep/rank-2."
        in said
    )


@each
@pytest.mark.sampled(6)
@pytest.mark.slow
def test_killed_it_goes_on_and_ends_with_the_bytes_of_an_unbroken_run(
    workshop: Workshop, cli: Lora, method: str, base: str, tmp_path: Path
) -> None:
    row = ROWS[method]
    wanted = folder_bytes(workshop.of(method, base) / STAGES[row.stage].path)
    root = shutil.copytree(workshop.plain(base), tmp_path / "project")
    sets = [word for one in overrides(method, base) for word in ("--set", one)]
    command = [*COMMAND[row.stage], "--checkpoint-every", f"{EVERY}", *sets]
    output = root / STAGES[row.stage].path
    assert Forked([LORA, *command], root, dies=(STEP, KILLED)).end()[0] == -signal.SIGKILL
    assert not output.exists()
    code, _, said = cli(*command, cwd=root)
    assert code == 0 and f"resumed after step {(KILLED - 1) // EVERY * EVERY}" in said
    assert folder_bytes(output) == wanted


@each
def test_the_calculator_counts_what_trains(
    workshop: Workshop, cli: Lora, method: str, base: str
) -> None:
    """From the model's folder and the method in its words; of a sweep, each adapter alone."""
    root, row = workshop.of(method, base), ROWS[method]
    for folder, asked in workshop.folders(method, base).items():
        more = ASKED[base] if row.changes_weights else ()
        code, out, _ = cli(
            "calc", "--model", "artifacts/expanded", *asked, *more, "--json", cwd=root
        )
        assert code == 0
        assert (
            json.loads(out)["parameters"]["trainable"]
            == artifact.read_manifest(folder)["parameters"]["trainable"]
        )

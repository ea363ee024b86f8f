"""`lora doctor --gpu`: the checks with the numbers of a CPU, the faults that they are for, what
cuts one short.
"""

import getpass
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.models import device, nf4
from pipeline.models.pages import BlockPages
from pipeline.models.transformers_model import TransformersModel
from pipeline.stages.gpu_checks import __main__ as child
from pipeline.stages.gpu_checks import checks, report
from pipeline.stages.gpu_checks.checks import CHECKS, Check, Seen
from pipeline.stages.gpu_checks.lora_run import LoraRun
from tests.conftest import Lora
from tests.helpers.small_checks import TOY, shrink

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    shrink(monkeypatch)
    return monkeypatch


def seen_by(name: str) -> list[Seen]:
    return list(CHECKS[name].run(CPU))


def verdicts(seen: list[Seen]) -> dict[str, bool | None]:
    return {each.what: each.as_expected for each in seen}


def test_all_of_them_take_less_than_a_quarter_of_an_hour() -> None:
    assert sum(check.limit for check in CHECKS.values()) <= 15 * 60


@pytest.mark.usefixtures("small")
def test_one_seed_gives_the_same_bits_and_the_tensor_that_differs_is_named() -> None:
    assert verdicts(seen_by("the same seed twice")) == {"LoRA": True, "LoRA and embeddings": True}
    first, second = LoraRun(TOY, CPU), LoraRun(TOY, CPU)
    name = "model.layers.1.mlp.up_proj.lora_A"
    second.trained()[name].data.view(-1)[0] *= 1 + 2**-20
    seen = checks._first_difference("LoRA", first, second)
    # B is zero in the first step, so that no other gradient differs
    others = len(first.trained()) - 1
    assert seen == Seen(
        "LoRA", f"step 1: {name} differs first; {others} tensors are the same", False
    )


@pytest.mark.usefixtures("small")
def test_what_is_packed_is_kept_apart_and_a_model_that_mixes_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verdicts(seen_by("packing")) == dict.fromkeys(checks.PACKED, True)
    plain = TransformersModel.run_body

    def mixing(
        model: TransformersModel, inputs: Any, positions: Any = None, *_: Any, **__: Any
    ) -> Any:
        return plain(model, inputs, positions)

    monkeypatch.setattr(TransformersModel, "run_body", mixing)
    for each in seen_by("packing"):
        assert each.as_expected is False and "its numbers differ by" in each.text


@pytest.mark.usefixtures("small")
def test_qlora_is_the_same_with_and_without_bitsandbytes_and_a_wrong_table_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert verdicts(seen_by("QLoRA")) == {"nf4": True, "nf4-dq": True, "int8": True}
    table = nf4.levels()
    monkeypatch.setattr(nf4, "levels", lambda: table * torch.linspace(0.8, 1, 16))
    assert verdicts(seen_by("QLoRA")) == {"nf4": False, "nf4-dq": False, "int8": True}


@pytest.mark.usefixtures("small")
def test_without_bitsandbytes_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "missing_libraries", lambda _: ["bitsandbytes"])
    seen = seen_by("QLoRA")
    assert verdicts(seen) == dict.fromkeys(("nf4", "nf4-dq", "int8"))
    assert all("pip" in each.remedy and "not installed" in each.text for each in seen)


@pytest.mark.usefixtures("small")
@pytest.mark.filterwarnings("ignore:called a synchronizing")
def test_the_one_read_of_a_step_is_expected_and_any_other_wait_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes, read, plain = list[object](), device.read_numbers, LoraRun.step
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    (unnoticed,) = seen_by("a step without waits")
    assert unnoticed.as_expected is False and "no wait was noticed" in unnoticed.text

    def read_numbers(tensors: Any) -> list[float]:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return read(tensors)

    monkeypatch.setattr("pipeline.training.step.read_numbers", read_numbers)
    (only,) = seen_by("a step without waits")
    assert only == Seen("read_numbers", f"{TOY.steps} waits in {TOY.steps} steps")

    def waiting(run: LoraRun) -> Any:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return plain(run)

    monkeypatch.setattr(LoraRun, "step", waiting)
    _, other = seen_by("a step without waits")
    assert (
        other.as_expected is False
        and "test_gpu_checks.py:" in other.what
        and other.what.endswith("waiting")
    )
    assert modes == ["warn", "default"] * 3


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("exact", "expected"), [(10.0, True), (-1.0, False)])
def test_memory_measured_is_compared_with_the_prediction(
    exact: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "EXACT", exact)
    seen = seen_by("memory")
    assert [each.what.partition(",")[0] for each in seen] == ["LoRA", "QLoRA"]
    assert all(
        each.as_expected is expected and "measured" in each.text and "predicted" in each.text
        for each in seen
    )


@pytest.mark.usefixtures("small")
def test_answers_are_the_same_from_pages_and_keys_that_are_mixed_up_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = seen_by("answers")
    expected = dict.fromkeys(("pages", "llama, 1 side by side", "llama, 64 side by side"), True)
    assert verdicts(seen) == {**expected, "launches of a token": None}, "a CPU launches nothing"
    assert all("tokens per second" in each.text for each in seen[1:3])
    pairs = BlockPages.pairs
    monkeypatch.setattr(
        BlockPages, "pairs", lambda pages: [(k.roll(1, 2), v) for k, v in pairs(pages)]
    )
    pages = seen_by("answers")[0]
    assert pages.as_expected is False and "tokens differ, by" in pages.text


@pytest.mark.usefixtures("small")
def test_launches_of_a_token_are_those_that_the_profiler_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = [("cudaLaunchKernel", 30), ("cuLaunchKernelEx", 12), ("cudaMemcpyAsync", 2)]
    named = [SimpleNamespace(key=key, count=count) for key, count in events]

    class Profile(nullcontext[Any]):
        def key_averages(self) -> list[SimpleNamespace]:
            return named

    made = Profile()
    made.enter_result = made
    monkeypatch.setattr(torch.profiler, "profile", lambda: made)
    assert seen_by("answers")[-1] == Seen("launches of a token", "42, 21 a block")


@pytest.mark.usefixtures("small")
def test_the_speed_of_training_is_a_number() -> None:
    (seen,) = seen_by("tokens per second")
    assert seen.as_expected and int(seen.text.replace(",", "")) > 0


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_and_a_killed_one_ends_the_run() -> None:
    seen = seen_by("several ranks")
    assert verdicts(seen) == dict.fromkeys(("LoRA", "QLoRA, sharded", "a killed rank"), True), seen


def test_one_card_is_not_compared_with_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "cores", lambda: 1)
    (seen,) = seen_by("several ranks")
    assert seen.as_expected is None


def of(run: Callable[[], None], limit: int = 60) -> Check:
    def lines(_: torch.device) -> Iterator[Seen]:
        yield Seen("first", "seen")
        run()
        yield Seen("second", "seen")

    return Check("faulty", "all is well", "mend it", limit, lines)


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        (
            ValueError("no such kernel"),
            "failed: ValueError: no such kernel (",
            "The check did not come to its end.",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
            "failed: out of memory (",
            "End what else",
        ),
        (MemoryError(), "failed: out of memory (", "End what else"),
    ],
)
def test_what_raises_is_a_line_after_those_that_were_seen(
    error: Exception, said: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def raising() -> None:
        raise error

    monkeypatch.setitem(CHECKS, "faulty", of(raising))
    child.main("faulty", tmp_path / "lines")
    first, last = (
        Seen(*json.loads(line)) for line in (tmp_path / "lines").read_text().splitlines()
    )
    assert first == Seen("first", "seen")
    assert (
        last.text.startswith(said) and last.as_expected is False and last.remedy.startswith(remedy)
    )


CHILD = """
import json, os, signal, subprocess, sys, time
name, path = sys.argv[1:]
with open(path, "a") as file:
    print(json.dumps(["first", "seen", True, ""]), file=file)
if name == "hangs":
    sleeper = subprocess.Popen(["sleep", "300"])
    open("pid", "w").write(str(sleeper.pid))
    time.sleep(300)
if name == "dies":
    print("CUDA error: an illegal memory access", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
"""


def test_a_check_that_hangs_or_dies_is_a_line_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("child.py").write_text(CHILD)
    monkeypatch.setattr(report, "COMMAND", (sys.executable, "child.py"))
    ran = of(lambda: None).run
    faulty = {
        name: Check(name, "all is well", "mend it", 3, ran) for name in ("hangs", "dies", "works")
    }
    monkeypatch.setattr(report, "CHECKS", faulty)
    started = time.perf_counter()
    hangs, dies, works = report.run(CPU)
    assert time.perf_counter() - started < 60
    assert hangs.seen == [
        Seen("first", "seen"),
        Seen("", "failed: not done after 3 s", False, checks.NOT_ENDED),
    ]
    sleeper = Path(f"/proc/{Path('pid').read_text()}/stat")
    assert not sleeper.exists() or ") Z" in sleeper.read_text(), "what it has started is ended too"
    ended = "failed: ended by SIGSEGV: CUDA error: an illegal memory access"
    assert dies.seen == [Seen("first", "seen"), Seen("", ended, False, checks.NOT_ENDED)]
    assert works.seen == [Seen("first", "seen")] and works.as_expected
    assert [line["to do"] for line in hangs.lines()] == ["", checks.NOT_ENDED]


@pytest.mark.parametrize(
    ("verdict", "remedy", "told"),
    [
        (True, "", ""),
        (True, "its own", ""),
        (False, "", "mend it"),
        (False, "its own", "its own"),
        (None, "", ""),
        (None, "its own", "its own"),
    ],
)
def test_what_to_do_is_told_where_something_is_to_be_done(
    verdict: bool | None, remedy: str, told: str
) -> None:
    result = report.Result(of(lambda: None), [Seen("", "seen", verdict, remedy)])
    assert [line["to do"] for line in result.lines()] == [told]


@pytest.mark.slow
def test_the_program_runs_a_check_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "CHECKS", {"versions and card": CHECKS["versions and card"]})
    (result,) = report.run(CPU)
    assert [each.what for each in result.seen[:3]] == ["card", "memory", "versions"], result
    assert f"torch {torch.__version__}" in result.seen[2].text and result.seconds > 0


def test_the_report_names_neither_user_nor_host_nor_folders(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report.socket, "gethostname", lambda: "annes-box")  # type: ignore[attr-defined]
    monkeypatch.setattr(getpass, "getuser", lambda: "anne")
    text = (
        f"no {Path.home()}/x/y.py and /srv/anne/secret/z.so: anne@annes-box, 3 tokens/s, …/w.py "
        "(a/b)"
    )
    assert report._without_names(text) == "no …/x/y.py and …/z.so: …@…, 3 tokens/s, …/w.py (a/b)"


def test_what_to_do_names_no_folder_either() -> None:
    seen = checks.Seen("card", "none", False, "Put it into /srv/secret/lib.so")
    assert report._anonymous(seen).remedy == "Put it into …/lib.so"


def test_a_user_without_a_home_gets_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container, where the user is a number."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert report._without_names("in /srv/secret/z.so") == "in …/z.so"


def test_on_a_cpu_it_says_what_it_would_do(cli: Lora, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = cli("doctor", "--gpu", cwd=tmp_path)
    flat = " ".join(out.split())
    assert code == 0 and "nothing was run" in err and not list(tmp_path.iterdir())
    assert all(
        check.name in out and " ".join(check.expected.split()) in flat for check in CHECKS.values()
    )
    rows = json.loads(cli("doctor", "--gpu", "--json", cwd=tmp_path)[1])["checks"]
    assert [row["name"] for row in rows] == [*CHECKS]


@pytest.mark.parametrize("verdict", [True, None, False])
def test_the_command_writes_a_report_for_readers_and_programs(
    verdict: bool | None, cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Seen("gemma2", "its | numbers differ", verdict)
    monkeypatch.setattr("pipeline.models.device.best_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(
        report, "run", lambda _: (report.Result(each, [seen], 2.0) for each in CHECKS.values())
    )
    code, out, err = cli("doctor", "--gpu", "--out", "r.md", cwd=tmp_path)
    text = (tmp_path / "r.md").read_text()
    rows = json.loads(text.partition(report.FENCE)[2].partition("```")[0])
    assert code == (verdict is False) and (
        "error: not as expected: versions and card, " in err
    ) == (verdict is False)
    assert err.count("error:") == (verdict is False) and "r.md" in err and "9 of 9: answers" in err
    lines = [line for row in rows["checks"] for line in row["lines"]]
    assert {line["verdict"] for line in lines} == {report.VERDICTS[verdict]}
    assert text.count("| its / numbers differ |") == len(CHECKS) and "18 s on cuda:0" in text
    assert "gemma2: its | numbers differ" in out
    assert out.count(CHECKS["packing"].remedy[:40]) == (verdict is False)


def test_a_report_that_cannot_be_written_is_an_error_before_anything_runs(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.models.device.best_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(report, "run", lambda _: pytest.fail("it runs"))
    code, out, err = cli("doctor", "--gpu", "--out", "missing/r.md", cwd=tmp_path)
    assert (
        (code, out) == (1, "")
        and err.startswith("error: No such file or directory")
        and err.count("\n") == 1
    )

"""Artifact folders, written atomically, and the cache of them."""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.files import artifact
from pipeline.project.cache import Cache, Damaged
from pipeline.project.runner import Note
from tests.helpers.json_files import read_json
from tests.helpers.process import NO_FLOCK
from tests.helpers.projects import BRIEF, PIPELINE, folder_bytes, make_one

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/comm").exists(), reason="tells processes apart by /proc"
)

SWEPT = 2  # adapters of the sweep: each has an entry of its own


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(target: Path, text: str) -> None:
    with artifact.writing(target) as folder:
        (folder / "a.txt").write_text(text, encoding="utf-8")
        artifact.seal(folder, {"kind": "test"})


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    for text in ("one", "two"):
        fill(tmp_path / "x", text)
        assert (tmp_path / "x/a.txt").read_text(encoding="utf-8") == text
        assert names(tmp_path) == ["x"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = dict[int, bool]()  # inode → whether the folder had its name when this was synced

    def note(descriptor: int) -> None:
        named[os.fstat(descriptor).st_ino] = (tmp_path / "x").exists()

    monkeypatch.setattr(os, "fsync", note)
    fill(tmp_path / "x", "one")
    inside = [tmp_path / "x", *(tmp_path / "x").iterdir()]
    assert [named[path.stat().st_ino] for path in inside] == [False, False, False]
    assert named[tmp_path.stat().st_ino], "the folder around it, afterwards"


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    with pytest.raises(RuntimeError), artifact.writing(tmp_path / "x") as folder:
        (folder / "a.txt").write_text("half", encoding="utf-8")
        raise RuntimeError
    assert artifact.verify(tmp_path / "x")["kind"] == "test"
    assert names(tmp_path) == ["x"]


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path) -> None:
    def half() -> Iterator[bytes]:
        yield b"half"
        raise OSError(errno.ENOSPC, "No space left on device")

    (path := tmp_path / "x").write_text("before", encoding="utf-8")
    path.chmod(0o640)
    with pytest.raises(OSError, match="No space left") as full:
        artifact.write_file(path, half())
    assert full.value.filename == str(path)
    assert (path.read_text(encoding="utf-8"), names(tmp_path)) == ("before", ["x"])
    for durable in (True, False):
        artifact.write_file(path, f"after, {durable}", durable)
        assert (path.read_text(encoding="utf-8"), names(tmp_path)) == (f"after, {durable}", ["x"])
        assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_are_not(
    kind: str, tmp_path: Path
) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    living = subprocess.Popen(["sleep", "60"])
    for pid in (dead.pid, living.pid):
        (tmp_path / f".x.{pid}.tmp").mkdir()
        (tmp_path / f".x.{pid}-9.tmp").write_text("half", encoding="utf-8")
    (tmp_path / f".x.y.{dead.pid}.tmp").mkdir()  # of another target
    if kind == "folder":
        fill(tmp_path / "x", "one")
    else:
        artifact.write_file(tmp_path / "x", "one")
    living.kill()
    living.wait()
    assert names(tmp_path) == sorted([f".x.{living.pid}.tmp", f".x.y.{dead.pid}.tmp", "x"])


def test_a_leftover_whose_number_no_process_has_is_cleared(tmp_path: Path) -> None:
    (tmp_path / f".x.{10**20}-9.tmp").write_text("half", encoding="utf-8")
    artifact.write_file(tmp_path / "x", "one")
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_another_machine_writes_is_left_alone_for_a_day(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gone: int
) -> None:
    monkeypatch.setattr("pipeline.files.locks.host", lambda: "node-7.cluster")
    with artifact.beside(tmp_path / "x") as folder:
        name = folder.name.replace(f".{os.getpid()}-", f".{gone}-")  # of no process here
        assert name.endswith("-node_7_cluster.tmp") and artifact.is_temporary(name)
    left = tmp_path / name
    if kind == "folder":
        left.mkdir()
        (left / "model").write_text("half", encoding="utf-8")
        os.utime(left / "model", (0, 0))  # a link to an old file, made just now
    else:
        left.write_text("half", encoding="utf-8")
    monkeypatch.undo()
    fill(tmp_path / "x", "one")
    assert names(tmp_path) == [name, "x"]
    later = time.time() + artifact.DAY + 1
    monkeypatch.setattr("pipeline.files.artifact.time.time", lambda: later)
    fill(tmp_path / "x", "two")
    assert names(tmp_path) == ["x"]


@pytest.fixture
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


KILLED_BETWEEN_TWO_RENAMES = """
import os, signal, sys
from pathlib import Path
from pipeline.files import artifact
rename, calls = Path.rename, []
def second_fails(path, target):
    calls.append(path)
    if len(calls) == 2:
        if sys.argv[2] == "stop":
            print(flush=True)
        os.kill(os.getpid(), signal.SIGKILL if sys.argv[2] == "kill" else signal.SIGSTOP)
    return rename(path, target)
Path.rename = second_fails
with artifact.writing(Path(sys.argv[1])) as folder:
    (folder / "a.txt").write_text("two")
"""


def test_what_was_about_to_be_replaced_is_put_back_though_the_process_id_is_used_again(
    tmp_path: Path,
) -> None:
    fill(tmp_path / "x", "one")
    command = [sys.executable, "-c", KILLED_BETWEEN_TWO_RENAMES, str(tmp_path / "x"), "kill"]
    killed = subprocess.Popen(command)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    other = subprocess.Popen(["sleep", "60"])
    for left in tmp_path.glob(".x.*"):  # as if another process had reused the id
        left.rename(left.with_name(left.name.replace(str(killed.pid), str(other.pid))))
    with pytest.raises(RuntimeError), artifact.writing(tmp_path / "x"):
        raise RuntimeError
    other.kill()
    other.wait()
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x/a.txt").read_text(encoding="utf-8") == "one"


def test_a_writer_that_lives_is_left_alone_between_its_two_renames(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    command = [sys.executable, "-c", KILLED_BETWEEN_TWO_RENAMES, str(tmp_path / "x"), "stop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline()
        # continued before it stops, it would stop for good
        os.waitid(os.P_PID, writer.pid, os.WSTOPPED | os.WNOWAIT)
        with pytest.raises(RuntimeError), artifact.writing(tmp_path / "x"):
            raise RuntimeError
        assert not (tmp_path / "x").exists(), "it is the writer's"
        writer.send_signal(signal.SIGCONT)
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x/a.txt").read_text(encoding="utf-8") == "two"


def test_the_leftovers_of_a_zombie_are_those_of_the_dead(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    command = [sys.executable, "-c", KILLED_BETWEEN_TWO_RENAMES, str(tmp_path / "x"), "kill"]
    killed = subprocess.Popen(command)
    # it has ended, but its parent has not waited for it
    os.waitid(os.P_PID, killed.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(RuntimeError), artifact.writing(tmp_path / "x"):
        raise RuntimeError
    killed.wait()
    assert names(tmp_path) == ["x"]


@needs_proc
def test_leftovers_of_this_process_s_number_from_before_are_told_by_its_start(
    tmp_path: Path,
) -> None:
    """Ids are used again: another process with this one's leaves its files under another start
    time.
    """
    with artifact.writing(tmp_path / "x") as folder:
        assert artifact.is_temporary(folder.name)
        told = re.fullmatch(rf"\.x\.{os.getpid()}-(\d+)-\w+\.tmp", folder.name)
    assert told
    living = subprocess.Popen(["sleep", "60"])
    left = [
        f".x.{living.pid}-{told[1]}.tmp",
        f".x.{living.pid}-.tmp",
        f".x.{living.pid}.tmp",
        f".x.{os.getpid()}-1.tmp",
    ]
    for name in left:
        (tmp_path / name).mkdir()
    fill(tmp_path / "x", "one")
    living.kill()
    living.wait()
    assert names(tmp_path) == sorted(["x", *left[1:3]]), (
        "without a start time, whose process lives is left alone"
    )


@needs_proc
def test_a_process_whose_name_is_no_utf8_writes_like_any_other(tmp_path: Path) -> None:
    own = Path("/proc/self/comm")
    before = own.read_bytes()
    own.write_bytes(b"\xff) R 1")
    try:
        fill(tmp_path / "x", "one")
        with artifact.writing(tmp_path / "y") as folder:
            strange = folder.name
    finally:
        own.write_bytes(before)
    with artifact.writing(tmp_path / "y") as folder:
        assert folder.name == strange
    assert names(tmp_path) == ["x", "y"]


@needs_proc
def test_a_process_of_another_user_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_pid: int, _number: int) -> None:
        raise PermissionError

    (tmp_path / ".x.1.tmp").mkdir()
    (tmp_path / ".x.1-3.tmp").mkdir()  # the first process started before the third tick
    monkeypatch.setattr(os, "kill", refuse)
    fill(tmp_path / "x", "one")
    assert names(tmp_path) == [".x.1.tmp", "x"]


def test_where_no_rename_is_possible_the_old_folder_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "x", "one")
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name.endswith(".tmp"):
            raise OSError(errno.EACCES, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", refuse)
        for name in ("x", "y"):
            with pytest.raises(OSError, match="Permission denied"):
                fill(tmp_path / name, "two")
    assert (names(tmp_path), (tmp_path / "x/a.txt").read_text(encoding="utf-8")) == (["x"], "one")


def test_folders_around_it_are_made_and_a_file_needs_them(tmp_path: Path) -> None:
    fill(tmp_path / "new/deep/x", "one")
    fill(tmp_path / "new/deep/y", "one")
    assert names(tmp_path / "new/deep") == ["x", "y"]
    with pytest.raises(OSError, match="No such file") as missing:
        artifact.write_file(tmp_path / "none/x", "text")
    assert (missing.value.errno, missing.value.filename) == (errno.ENOENT, str(tmp_path / "none/x"))


def test_a_file_is_synced_before_it_has_its_name_only_if_it_must_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: seen.append((os.fstat(file).st_size, (tmp_path / "x").exists()))
    )
    artifact.write_file(tmp_path / "y", [b"ab", b"\xffc"])
    assert ((tmp_path / "y").read_bytes(), seen) == (b"ab\xffc", [])
    artifact.write_file(tmp_path / "x", "é", durable=True)
    assert seen == [(2, False)]


def test_what_is_written_must_not_be_or_hold_or_lie_in_an_input(tmp_path: Path) -> None:
    for name in ("in", "other", "full", "empty"):
        (tmp_path / name / "below").mkdir(parents=True)
    (tmp_path / "empty/below").rmdir()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    (tmp_path / "file").write_text("", encoding="utf-8")
    sources = [tmp_path / "other", tmp_path / "in"]
    for name in ("in", "link", "other/../in"):
        with pytest.raises(UserError, match=r"is also an input\. Name another folder with --out"):
            artifact.refuse_other(tmp_path / name, True, sources)
    for out in (tmp_path / "in/below", tmp_path / "in/new/deep", tmp_path, tmp_path / "link/below"):
        with pytest.raises(
            UserError, match=rf"^{out} and the input {tmp_path}/\w+ contain one another"
        ):
            artifact.refuse_other(out, True, sources)
    for name in ("full", "file"):
        with pytest.raises(UserError, match=rf"{name} exists and holds other files"):
            artifact.refuse_other(tmp_path / name, False, sources)
        artifact.refuse_other(tmp_path / name, True, sources)
    for name in ("empty", "new", "in2"):
        artifact.refuse_other(tmp_path / name, False, sources)


def test_the_current_folder_is_nothing_to_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), Path(".."), tmp_path):
        with pytest.raises(UserError, match="holds the current folder, which cannot be replaced"):
            artifact.refuse_other(out, True, [])


def snapshot(root: Path, cache: str = "models--a--b", kind: str = "snapshots") -> Path:
    """A model as the hub's cache holds it: links to blobs beside the snapshots."""
    folder = root / cache / kind / "0123"
    folder.mkdir(parents=True)
    (root / cache / "blobs").mkdir()
    (root / cache / "blobs/ab").write_text("{}", encoding="utf-8")
    (folder / "config.json").symlink_to("../../blobs/ab")
    return folder


def test_a_link_of_the_hub_s_cache_may_lead_to_its_blobs(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    artifact.refuse_untrusted(folder)
    for other in (snapshot(tmp_path / "x", "other"), snapshot(tmp_path / "y", kind="shots")):
        with pytest.raises(
            UserError,
            match=rf"{other}/config.json is a link to a file outside its folder: .*blobs/ab",
        ):
            artifact.refuse_untrusted(other)
    (folder / "secret").symlink_to("../../../secret")
    with pytest.raises(
        UserError, match=rf"/secret is a link .*: {tmp_path}/secret\. Replace it with a copy"
    ):
        artifact.refuse_untrusted(folder)


def test_a_link_may_lead_to_the_folder_itself_or_to_an_object_of_dvc(tmp_path: Path) -> None:
    folder, store = tmp_path / "model", tmp_path / "cache/files/md5/ab"
    (folder / "more").mkdir(parents=True)
    store.mkdir(parents=True)
    (folder / "a").write_text("", encoding="utf-8")
    (folder / "more/inside").symlink_to("../a")
    (folder / "object").symlink_to(store / ("0" * 30))
    (folder / "folder").symlink_to(tmp_path)  # no model is read through it
    (folder / ".git").mkdir()
    (folder / ".git/link").symlink_to(tmp_path / "any")
    artifact.refuse_untrusted(folder)
    artifact.refuse_untrusted(tmp_path / "no folder")
    for name, target in (
        ("object", store / ("0" * 29)),
        ("more/inside", tmp_path / "any"),
        ("additional_chat_templates", tmp_path),
    ):
        with pytest.raises(UserError, match=f"{name} is a link to a file outside its folder"):
            (folder / name).unlink(missing_ok=True)
            (folder / name).symlink_to(target)
            artifact.refuse_untrusted(folder)
        (folder / name).unlink()


def test_texts_that_are_too_large_to_read_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "LARGEST_TEXT", 1000)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 2000)
    (tmp_path / "a.json").mkdir()
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "vocab.txt",
        "tokenizer.model",
        "o200k.tiktoken",
    ):
        (tmp_path / name).write_bytes(b"x" * 1000)
        artifact.refuse_untrusted(tmp_path)
        (tmp_path / name).write_bytes(b"x" * 1001)
        with pytest.raises(
            UserError, match=rf"{name} must have at most 1,000 bytes, got 1,001\. Copy the model"
        ):
            artifact.refuse_untrusted(tmp_path)
        (tmp_path / name).unlink()


def test_json_is_read_as_an_object_up_to_a_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    artifact.write_json(path, {"name": "Grün", "list": [1]})
    text = '{\n  "name": "Grün",\n  "list": [\n    1\n  ]\n}\n'
    assert path.read_bytes() == text.encode()
    monkeypatch.setattr(artifact, "LARGEST_JSON", len(text.encode()))
    assert artifact.read_json(path, "Do this") == {"name": "Grün", "list": [1]}
    path.write_text(f"{text} ", encoding="utf-8")
    with pytest.raises(
        UserError, match=rf"^{path} must have at most {len(text.encode())} bytes\. Do this\.$"
    ):
        artifact.read_json(path, "Do this")
    path.write_bytes(b" " * 10_000_000)
    tracemalloc.start()
    with pytest.raises(UserError, match="must have at most"):
        artifact.read_json(path, "Do this")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000, (
        "of a larger one no more is read than shows it"
    )
    tracemalloc.stop()
    for wrong in (b"[]", b"{", b"\xff", b"[" * 40):
        path.write_bytes(wrong)
        with pytest.raises(UserError, match=rf"^{path} is not a JSON object\. Do this\.$"):
            artifact.read_json(path, "Do this")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/none: No such file or directory\. Do this\.$"
    ):
        artifact.read_json(tmp_path / "none", "Do this")


def test_digests_are_sha256_of_files_and_of_their_list_and_stay_what_they_were(
    tmp_path: Path,
) -> None:
    """Manifests and caches of earlier versions hold them."""
    fill(tmp_path / "x", "one")
    (tmp_path / "x/b").mkdir()
    (tmp_path / "x/b/ä.txt").write_bytes(b"two")
    (tmp_path / "x/b/manifest.json").write_text("{}", encoding="utf-8")
    one, two = (hashlib.sha256(text).hexdigest() for text in (b"one", b"two"))
    assert artifact.digest(tmp_path / "x/a.txt") == one
    assert artifact.contents(tmp_path / "x") == {"a.txt": one, "b/ä.txt": two}
    listed = f'{{"a.txt": "{one}", "b/\\u00e4.txt": "{two}"}}'
    assert artifact.digest(tmp_path / "x") == hashlib.sha256(listed.encode()).hexdigest()
    artifact.seal(tmp_path / "x", {"kind": "test"})
    manifest = read_json(tmp_path / "x/manifest.json")
    assert manifest == {"kind": "test", "files": {"a.txt": one, "b/ä.txt": two}}
    assert artifact.sealed_digest(manifest) == artifact.digest(tmp_path / "x")


def test_the_first_file_that_differs_is_named(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    for name in ("0.txt", "b.txt"):
        (tmp_path / "x" / name).write_text("", encoding="utf-8")
    with pytest.raises(
        UserError,
        match=r"x/0\.txt was added after the artifact was made\. Make it again or remove",
    ):
        artifact.verify(tmp_path / "x")
    assert (
        artifact.verify(tmp_path / "x", lambda _: {"a.txt": hashlib.sha256(b"one").hexdigest()})[
            "kind"
        ]
        == "test"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "a.txt").write_text("x"), "a.txt was changed after the artifact was made"),
        (lambda f: (f / "a.txt").unlink(), "a.txt is missing after the artifact was made"),
        (lambda f: (f / "b.txt").write_text("x"), "b.txt was added after the artifact was made"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json: No such file"),
        (lambda f: (f / "manifest.json").write_text("{}"), "is not a manifest of this project"),
        (
            lambda f: (f / "manifest.json").write_text("no"),
            "is not a JSON object. Make the artifact again",
        ),
    ],
)
def test_any_change_is_named(tmp_path: Path, change: object, message: str) -> None:
    fill(tmp_path / "x", "one")
    change(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(UserError, match=message):
        artifact.verify(tmp_path / "x")


def test_a_digest_covers_names_and_contents_but_not_the_manifest(tmp_path: Path) -> None:
    fill(tmp_path / "x", "one")
    fill(tmp_path / "y", "one")
    (tmp_path / "y/manifest.json").write_text("other", encoding="utf-8")
    assert artifact.digest(tmp_path / "x") == artifact.digest(tmp_path / "y")
    (tmp_path / "y/a.txt").rename(tmp_path / "y/b.txt")
    assert artifact.digest(tmp_path / "x") != artifact.digest(tmp_path / "y")
    with pytest.raises(UserError, match="does not exist"):
        artifact.digest(tmp_path / "z")


def notes(project: Path, *overrides: str, **options: bool) -> list[str]:
    _, events = make_one(project, "finetune_lora", [*BRIEF, *overrides], **options)
    return [
        event.text for event in events if isinstance(event, Note) and "of tensors" not in event.text
    ]


def test_a_hit_restores_the_same_bytes_and_says_so(project: Path) -> None:
    folder = project / "artifacts/lora_adapter"
    before = folder_bytes(folder)
    shutil.rmtree(folder)
    (said,) = notes(project)
    assert "nothing to do, taken from the cache" in said
    assert folder_bytes(folder) == before


def test_force_and_any_change_of_params_or_inputs_miss(project: Path) -> None:
    assert notes(project, force=True) == []
    (replaced,) = notes(project, "finetune_lora.rank=2")
    assert "replaced the earlier one: rank 4 → 2" in replaced
    data = project / "data/finetune.de.txt"
    data.write_text(
        data.read_text(encoding="utf-8") + "der wind weht im winter\n", encoding="utf-8"
    )
    (replaced,) = notes(project)
    assert "replaced the earlier one: rank 2 → 4" in replaced
    assert len(notes(project)) == 1


def test_a_damaged_entry_is_dropped_and_made_again(project: Path) -> None:
    before = folder_bytes(project / "artifacts/lora_adapter")
    (entry,) = (project / ".lora-cache/finetune_lora").iterdir()
    (entry / "loss.csv").write_text("wrong", encoding="utf-8")
    (said,) = notes(project)
    assert said.startswith("finetune_lora: a damaged result was removed from the cache: ")
    assert f"{entry.name}/loss.csv was changed" in said
    assert folder_bytes(project / "artifacts/lora_adapter") == before
    assert len(notes(project)) == 1


@pytest.mark.parametrize("kind", ["a file", "a dangling link", "below a file"])
def test_a_stage_does_without_a_cache_that_cannot_be_made(
    project: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = folder_bytes(project / "artifacts/lora_adapter")
    place = project / "elsewhere"
    if kind == "a dangling link":
        place.symlink_to(project / "nowhere/cache")
    else:
        place.write_text("not a folder", encoding="utf-8")
    monkeypatch.setenv("LORA_CACHE", str(place / "cache" if kind == "below a file" else place))
    looked, kept = notes(project)
    assert looked.startswith(f"finetune_lora: the cache is not used ({place}")
    assert kept.startswith("finetune_lora: done, but not stored in the cache (")
    assert folder_bytes(project / "artifacts/lora_adapter") == before


def test_pruning_clears_what_a_killed_process_had_begun_and_nothing_of_a_running_one(
    project: Path, gone: int
) -> None:
    begun = [
        project / f".lora-cache/finetune_lora/.key.{writer}.tmp"
        for writer in (gone, os.getppid(), f"{gone}-1-node7")
    ]
    for folder in begun:
        folder.mkdir()
    assert Cache(project / ".lora-cache").prune(keep=99) == []
    assert [folder.exists() for folder in begun] == [False, True, True]
    assert Cache(project / "nowhere").prune() == []
    assert not (project / "nowhere").exists()


def test_pruning_passes_a_hidden_file_by(tmp_path: Path) -> None:
    (tmp_path / "merge").mkdir()
    (tmp_path / "merge/.DS_Store").touch()
    assert Cache(tmp_path).prune() == []


def test_an_entry_of_the_cache_is_removed_whole_though_its_removal_is_cut_short(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(project / ".lora-cache")

    def killed(folder: Path, **_: bool) -> None:
        if Path(folder).is_dir():
            next(Path(folder).iterdir()).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(shutil, "rmtree", killed)
        cache.prune()
    for each in cache.entries():
        artifact.verify(each.path)
    assert len(cache.prune()) == len(PIPELINE) + SWEPT - 1
    assert not list((project / ".lora-cache").glob("*/*"))


def test_a_link_where_a_folder_belongs_is_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "y", "one")
    (tmp_path / "x").symlink_to(tmp_path / "y")
    fill(tmp_path / "x", "two")
    assert names(tmp_path) == ["x", "y"]
    assert (tmp_path / "y/a.txt").read_text(encoding="utf-8") == "one"


def test_pruning_keeps_the_newest_of_each_stage(project: Path) -> None:
    cache = Cache(project / ".lora-cache")
    for rank in (1, 2, 3):
        notes(project, f"finetune_lora.rank={rank}")
    assert len(cache.entries()) == len(PIPELINE) + SWEPT + 3
    newest = next(entry.key for entry in cache.entries() if entry.stage == "finetune_lora")
    assert cache.prune(older_than_days=1) == []
    assert {entry.stage for entry in cache.prune(keep=1)} == {"finetune_lora"}
    assert len(cache.entries()) == len(PIPELINE) + SWEPT
    assert newest in {entry.key for entry in cache.entries()}
    cache.prune()
    assert cache.entries() == []


def test_pruning_to_a_size_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    for when, (stage, size) in enumerate(
        [("merge", 500), ("import", 400), ("merge", 300), ("merge", 200)]
    ):
        fill(tmp_path / "made", "x" * size)
        cache.store(stage, f"key-{when}", tmp_path / "made")
        os.utime(cache.root / stage / f"key-{when}" / "manifest.json", (when, when))
    sizes = {entry.key: entry.size for entry in cache.entries()}
    assert [*sizes] == ["key-3", "key-2", "key-1", "key-0"]
    assert cache.prune(max_size=sum(sizes.values())) == []
    assert [e.key for e in cache.prune(max_size=sizes["key-3"] + sizes["key-2"])] == [
        "key-1",
        "key-0",
    ]
    assert [e.key for e in cache.prune(max_size=1, keep=1)] == ["key-2"]


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact with one file that counts as large, and one that does not."""
    monkeypatch.setattr("pipeline.project.cache.LARGE", 1000)
    with artifact.writing(tmp_path / "made") as folder:
        (folder / "model.safetensors").write_bytes(b"x" * 1000)
        (folder / "config.json").write_bytes(b"x" * 999)
        artifact.seal(folder, {})
    return tmp_path / "made"


def test_a_large_file_is_kept_without_costing_its_size_again(large: Path, tmp_path: Path) -> None:
    before, cache = folder_bytes(large), Cache(tmp_path / "cache")
    cache.store("s", "k", large)
    assert cache.restore("s", "k", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == before
    inodes = {
        name: {(folder / name).stat().st_ino for folder in (large, tmp_path / "back")}
        for name in before
    }
    assert [name for name, found in sorted(inodes.items()) if len(found) == 1] == [
        "model.safetensors"
    ]
    assert (large / "model.safetensors").stat().st_nlink == 3
    (entry,) = cache.entries()
    assert entry.shared == 1000 < entry.size
    for folder in (large, tmp_path / "back", tmp_path / "cache/s/k"):
        assert not (folder / "model.safetensors").stat().st_mode & 0o222, (
            "an edit in place would change all three"
        )
        assert (folder / "config.json").stat().st_mode & stat.S_IWUSR
    cache.prune()
    assert folder_bytes(tmp_path / "back") == before


def test_a_linked_file_that_somebody_changes_in_place_is_not_taken_from_the_cache(
    large: Path, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache")
    cache.store("s", "k", large)
    (large / "model.safetensors").chmod(0o644)
    (large / "model.safetensors").write_bytes(b"y" * 1000)
    with pytest.raises(Damaged, match=r"model\.safetensors was changed"):
        cache.restore("s", "k", tmp_path / "back")
    assert cache.entries() == []
    assert not cache.restore("s", "k", tmp_path / "back")


def test_a_read_only_file_is_replaced_copied_and_removed_like_any_other(
    large: Path, tmp_path: Path
) -> None:
    Cache(tmp_path / "cache").store("s", "k", large)
    with artifact.writing(tmp_path / "copy") as folder:
        shutil.copyfile(large / "model.safetensors", folder / "model.safetensors")
        (folder / "model.safetensors").write_bytes(b"z")  # a copy is independent
    fill(large, "new")
    assert names(large) == ["a.txt", "manifest.json"]
    assert Cache(tmp_path / "cache").restore("s", "k", large)
    assert len(Cache(tmp_path / "cache").prune()) == 1
    assert names(large) == ["config.json", "manifest.json", "model.safetensors"]


def test_where_links_are_refused_large_files_are_copied(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr("os.link", refuse)
    cache = Cache(tmp_path / "cache")
    cache.store("s", "k", large)
    assert cache.restore("s", "k", tmp_path / "back")
    assert folder_bytes(tmp_path / "back") == folder_bytes(large)
    assert (large / "model.safetensors").stat().st_nlink == 1
    assert (large / "model.safetensors").stat().st_mode & stat.S_IWUSR


@pytest.fixture
def cache(large: Path, tmp_path: Path) -> Cache:
    """A cache with one entry."""
    cache = Cache(tmp_path / "cache")
    cache.store("s", "k", large)
    return cache


@contextmanager
def locked(cache: Cache) -> Iterator[None]:
    with (cache.root / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_entries_are_restored_and_stored_while_another_process_has_the_lock(
    cache: Cache, large: Path, tmp_path: Path
) -> None:
    started = []
    for call in ("restore('s', 'k', path)", "store('s', 'other', path)"):
        code = (
            "import sys; from pathlib import Path; from pipeline.project.cache import Cache; "
            f"path = Path(sys.argv[1]); Cache(Path({str(cache.root)!r})).{call}"
        )
        place = large if "store('s', 'o" in call else tmp_path / "back"
        started.append([sys.executable, "-c", code, str(place)])
    with locked(cache):
        for command in started:
            subprocess.run(command, timeout=60, check=True)
    assert folder_bytes(tmp_path / "back") == folder_bytes(cache.root / "s/other")


@pytest.mark.parametrize("again", [False, True], ids=["removed", "replaced"])
def test_an_entry_that_is_removed_while_it_is_copied_is_not_handed_out_in_part(
    cache: Cache, tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with artifact.writing(tmp_path / "other") as folder:
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_bytes(b"other")
        artifact.seal(folder, {})
    plain, copied = shutil.copyfile, list[str]()

    def copy(source: Path, target: Path) -> None:
        plain(source, target)
        copied.append(source.name)
        if copied == ["config.json"]:
            cache.prune()
            if again:
                cache.store("s", "k", tmp_path / "other")

    monkeypatch.setattr(shutil, "copyfile", copy)
    assert cache.restore("s", "k", tmp_path / "back") == again
    if again:
        assert folder_bytes(tmp_path / "back") == folder_bytes(tmp_path / "other")
    else:
        assert not (tmp_path / "back").exists()


def test_two_that_find_the_same_damage_end_with_one_note(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache.root / "s/k/config.json").write_bytes(b"y")
    verify = artifact.verify

    def second_removes(folder: Path) -> dict[str, Any]:
        try:
            return verify(folder)
        except UserError:
            if folder == cache.root / "s/k" and folder.exists():
                shutil.rmtree(folder)
            raise

    monkeypatch.setattr(artifact, "verify", second_removes)
    assert not cache.restore("s", "k", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_of_two_copies_of_one_entry_the_second_is_dropped(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "other", "other")
    plain, first = shutil.copyfile, cache.root / "s/new"

    def copy(source: Path, target: Path) -> None:
        plain(source, target)
        if not first.exists():  # another process is done before this one
            shutil.copytree(cache.root / "s/k", first, copy_function=plain)

    monkeypatch.setattr(shutil, "copyfile", copy)
    cache.store("s", "new", tmp_path / "other")
    assert folder_bytes(first) == folder_bytes(cache.root / "s/k")
    assert names(cache.root / "s") == ["k", "new"]


def test_a_large_file_that_is_itself_a_link_is_kept_as_a_file(large: Path, tmp_path: Path) -> None:
    """DVC can be configured to link files into the workspace."""
    (large / "model.safetensors").rename(tmp_path / "store")
    (large / "model.safetensors").symlink_to(tmp_path / "store")
    cache = Cache(tmp_path / "cache")
    cache.store("s", "k", large)
    (tmp_path / "store").unlink()
    assert cache.restore("s", "k", tmp_path / "back")


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", NO_FLOCK], ids=["flock", "no flock"])
def test_many_processes_on_one_cache_never_corrupt_it(
    project: Path, tmp_path: Path, prefix: str
) -> None:
    """Eight processes restore, store and prune the same key at once; the entry verifies at any
    time.
    """
    code = """
import random, sys
from pathlib import Path
from pipeline.files import artifact
from pipeline.project.cache import Cache
root, source, target = map(Path, sys.argv[1:4])
cache = Cache(root)
for turn in range(60):
    cache.store("s", "k", source)
    if cache.restore("s", "k", target):
        artifact.verify(target)
    if random.random() < 0.3:
        cache.prune()
"""
    code = prefix + code
    source = project / "artifacts/lora_adapter"
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                code,
                str(tmp_path / "cache"),
                str(source),
                str(tmp_path / f"out{i}"),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(8)
    ]
    assert [(process.communicate()[1], process.returncode) for process in started] == [("", 0)] * 8
    cache = Cache(tmp_path / "cache")
    cache.store("s", "k", source)
    assert cache.restore("s", "k", tmp_path / "last")
    assert folder_bytes(tmp_path / "last") == folder_bytes(source)


def test_a_file_that_stays_is_hashed_once_and_an_edit_that_restores_size_and_mtime_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "SETTLED", -1)  # as if every file were old
    hashed, plain = list[str](), hashlib.file_digest

    def counting(file: Any, name: str) -> Any:
        hashed.append(Path(file.name).name)
        return plain(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counting)
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    before = [artifact.contents(tmp_path) for _ in range(3)]
    assert sorted(hashed) == ["a", "b"] and before[0] == before[2]
    assert before[0]["a"] == hashlib.sha256(b"a").hexdigest()
    stat = (tmp_path / "a").stat()
    time.sleep(0.05)  # several ticks of the file system's clock
    (tmp_path / "a").write_text("c")
    os.utime(tmp_path / "a", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert artifact.contents(tmp_path) == {**before[0], "a": hashlib.sha256(b"c").hexdigest()}


def test_a_file_that_just_changed_is_hashed_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "SETTLED", 3600 * 10**9)
    (tmp_path / "a").write_text("a")
    state = (tmp_path / "a").stat()
    # within one tick: the state stays
    monkeypatch.setattr(Path, "stat", lambda _path, **_options: state)
    assert artifact.file_digest(tmp_path / "a") == hashlib.sha256(b"a").hexdigest()
    (tmp_path / "a").write_text("b")
    assert artifact.file_digest(tmp_path / "a") == hashlib.sha256(b"b").hexdigest()

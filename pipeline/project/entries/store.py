"""Results of a cache in a DVC remote, for machines that share no folder.

    lora-cache/<stage>/<key>/<digest>/…      the files of a result
    lora-cache/<stage>/<key>/manifest.json   written last: without it there is no result

The files of a result stand under the digest of their names and contents. Two machines can make
different bytes for one key, such as on two kinds of GPU. Neither overwrites files of the other, and
a reader gets the files of the manifest that it has read.

Whoever can write to the remote can write any name, size and content. A name never leads out of the
folder, sizes are compared before files are downloaded, and contents before they are used.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import UserError, first_line
from pipeline.files import artifact
from pipeline.files.artifact import MANIFEST
from pipeline.project.cache import Cache, Damaged

CACHE = "lora-cache"
SIZES = "sizes"  # in a manifest in the remote: name → bytes of each file
LONGEST_NAME = 255  # bytes of a name in a folder, of most file systems


class Unreachable(UserError):
    """The remote does not answer, or refuses."""


class _Contents(msgspec.Struct):
    """What a manifest in the remote must have."""

    files: dict[str, str]  # name → sha256
    sizes: dict[str, int]


@dataclass(frozen=True)
class Store:
    """A DVC remote, with DVC's credentials. Methods raise Unreachable."""

    name: str
    fs: Any  # DVC's file system
    root: str  # the remote's path in it

    @classmethod
    def open(cls, root: Path, name: str) -> "Store":
        """The remote `name` of the DVC repository that holds `root`. Raises UserError."""
        # 0.1 s, which no other run needs
        from dvc.config import Config, RemoteNotFoundError
        from dvc.exceptions import NotDvcRepoError
        from dvc.fs import get_cloud_fs
        from dvc.repo import Repo

        try:
            config = Config(Repo.find_dvc_dir(str(root)))
            file_system, settings, path = get_cloud_fs(config, name=name)
            return cls(name, file_system(**settings), path)
        except NotDvcRepoError:
            problem = f"{root} is in no DVC repository. Run `dvc init` and `dvc remote add`."
        except RemoteNotFoundError:
            names = ", ".join(config["remote"])
            only = f", only {names}" if names else ""
            problem = f"DVC has no remote {name}{only}. See `dvc remote list`."
        except ImportError as error:  # "s3 is supported, but requires 'dvc-s3' to be installed"
            problem = f"{name}: {error}. Install it with pip."
        except Exception as error:  # whatever DVC and the remote's library raise for its settings
            problem = f"{name}: {first_line(error)}. See `dvc remote list`."
        raise UserError(f"fleet.yaml: store: {problem}")

    def push(self, cache: Cache, stage: str, key: str, replace: bool = False) -> None:
        """Upload a result, unless the store has it. Raises UserError if it is damaged.

        `replace`: also if the store has one, which is damaged.
        """
        if not replace and self.has(stage, key):
            return
        folder = cache.root / stage / key
        manifest = artifact.verify(folder)
        target = self._path(CACHE, stage, key, artifact.sealed_digest(manifest))
        files = {name: folder / name for name in manifest["files"]}
        sizes = {name: path.stat().st_size for name, path in files.items()}
        with self._explain_errors():
            self.fs.put([str(path) for path in files.values()], _below(target, files))
        self._write(self._path(CACHE, stage, key, MANIFEST), json.dumps({**manifest, SIZES: sizes}))

    def pull(self, cache: Cache, stage: str, key: str) -> bool:
        """Download a result into the cache. Returns False if the store has none.

        Raises Damaged, with the first file that is not as in the manifest; it stays in the store.
        Raises OSError if the cache cannot be written.
        """
        manifest = self._manifest(stage, key)
        if manifest is None:
            return False
        listed = manifest.pop(SIZES)
        sizes = {name: listed.get(name, -1) for name in manifest["files"]}
        source = self._path(CACHE, stage, key, artifact.sealed_digest(manifest))
        self._refuse_other_sizes(source, sizes)
        # not the entry's own name, whose leftovers are removed when the cache stores it
        with artifact.beside(cache.root / stage / f"{key}.pulled") as folder:
            needed, free = sum(sizes.values()), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"{source} needs {needed:,} bytes, {cache.root} has {free:,}. Free some space."
                )
            with self._explain_errors():
                self.fs.get(_below(source, sizes), _below(str(folder), sizes))
            try:
                artifact.write_json(folder / MANIFEST, manifest)
                artifact.verify(folder)
            # text that is no UTF-8, and lists nested too deep
            except (UserError, ValueError, RecursionError) as error:
                raise Damaged(str(error).replace(str(folder), source)) from None
            cache.store(stage, key, folder)
        return True

    def has(self, stage: str, key: str) -> bool:
        """Whether there is a manifest that can be read; the files may be damaged."""
        try:
            return self._manifest(stage, key) is not None
        except Damaged:
            return False

    def _path(self, *parts: str) -> str:
        return str(self.fs.join(self.root, *parts))

    def _manifest(self, stage: str, key: str) -> dict[str, Any] | None:
        """The manifest, with sizes; None if there is none. Raises Damaged."""
        path = self._path(CACHE, stage, key, MANIFEST)
        text = self._read(path)
        if text is None:
            return None
        try:
            manifest: dict[str, Any] = json.loads(text)
            msgspec.convert(manifest, _Contents)
        except (ValueError, RecursionError, msgspec.MsgspecError):
            raise Damaged(f"{path} is not a manifest of this project.") from None
        for name in manifest["files"]:
            if not _is_inside(name):
                raise Damaged(f"{path} names a file outside its folder: {name[:LONGEST_NAME]!a}.")
        return manifest

    def _refuse_other_sizes(self, folder: str, sizes: Mapping[str, int]) -> None:
        """Raises Damaged for the first file that is missing, a link or of another size."""
        actual = self._list(folder)
        for name, size in sizes.items():
            info = actual.get(name)
            if info is None:
                raise Damaged(f"{folder}/{name} is missing.")
            if info["type"] != "file" or info.get("islink"):
                raise Damaged(f"{folder}/{name} is a link.")
            if info["size"] != size:
                raise Damaged(f"{folder}/{name} has {info['size']:,} bytes instead of {size:,}.")

    def _list(self, folder: str) -> dict[str, Any]:
        """Relative name → DVC's facts of every file below a folder, in one request to S3."""
        with self._explain_errors():
            self.fs.fs.invalidate_cache()  # of earlier listings: other machines write too
            paths = list(self.fs.find(folder))
            infos = self.fs.info(paths)  # of S3, from the listing
            names = ["/".join(self.fs.relparts(path, folder)) for path in paths]
            return dict(zip(names, infos, strict=True))

    def _write(self, path: str, text: str) -> None:
        with self._explain_errors():
            # not empty, as S3 has no range of an empty file to read
            self.fs.put_file(BytesIO(f"{text}\n".encode()), path)

    def _read(self, path: str) -> str | None:
        """The text that `_write` wrote; None if there is none. Raises UserError if it is larger
        than a manifest.
        """
        most = artifact.LARGEST_JSON
        with self._explain_errors():
            try:
                raw: bytes = self.fs.cat_file(path, start=0, end=most + 2)
            except FileNotFoundError:
                return None
        if len(raw) > most + 1:
            raise UserError(f"{path} must have at most {most:,} bytes. Remove it from the store.")
        return raw.decode(errors="replace").removesuffix("\n")

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        """Unreachable for whatever the remote's library raises: errors of some are no OSError."""
        try:
            yield
        except Exception as error:
            raise Unreachable(
                f"fleet.yaml: store: {self.name}: {first_line(error).rstrip('.')}. "
                f"Check it with `dvc status --cloud --remote {self.name}`."
            ) from error


def _below(folder: str, names: Mapping[str, object]) -> list[str]:
    return [f"{folder}/{name}" for name in names]


def _is_inside(name: str) -> bool:
    """Whether a relative name leads to a file below its folder, on any file system."""
    parts = name.split("/")
    return (
        name.isprintable()  # nor does it end a string or a line
        and "\\" not in name
        and not {"", ".", ".."} & {*parts}
        and max(len(part.encode()) for part in parts) <= LONGEST_NAME
    )

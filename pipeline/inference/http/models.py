"""The models that are served, and adapters that clients load."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.adapters.config import CONFIG, read_config
from pipeline.errors import UserError, explain
from pipeline.files.digest_cache import signature
from pipeline.inference.batching import BatchedGenerator
from pipeline.inference.catalog import find_base, model_folders
from pipeline.inference.http.errors import ApiError
from pipeline.inference.model_pool import ModelPool, Resident
from pipeline.project.stage_graph import ARTIFACTS, Project

MAX_LOADED = 32  # models in memory, above which those unused for longest are unloaded
MAX_BASES = 2  # of them with weights of their own


@dataclass(frozen=True)
class Source:
    """A model: the folder of a base, checkpoint or merged model, and of an adapter on it."""

    base: Path
    adapter: Path | None = None

    @property
    def folder(self) -> Path:
        return self.adapter or self.base


Sources = Mapping[str, Source]  # by name; the first is the base that is loaded at the start


def project_models(project: Project) -> Sources:
    """The models in a project's artifacts, by the names that `lora adapters` shows.

    Adapters whose base is missing are left out. Raises UserError if there is no base yet.
    """
    root = project.root / ARTIFACTS
    bases = map(project.artifact, ("expand_vocab", "pretrain"))
    base = next(filter(Path.is_dir, bases), None)
    if base is None:
        raise UserError(
            "There is no model yet. Run `lora import` or `lora pretrain` first, or name a model "
            "with --base."
        )

    def name(folder: Path) -> str:
        return folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.name

    sources = {name(base): Source(base)}
    for folder in model_folders(root):
        with suppress(UserError):  # `lora adapters` shows it, with the reason
            is_adapter = (folder / CONFIG).exists()
            source = Source(find_base(folder, root), folder) if is_adapter else Source(folder)
            sources.setdefault(name(folder), source)
    return sources


def named_models(base: Path, adapters: Iterable[Path]) -> Sources:
    """A base and adapters, by the names of their folders. Raises UserError if two have one name."""
    sources = {base.resolve().name: Source(base)}
    for adapter in adapters:
        name = adapter.resolve().name
        read_config(adapter)
        if name in sources:
            raise UserError(
                f"--adapter: two models are called {name}. Rename the folder {adapter}."
            )
        sources[name] = Source(base, adapter)
    return sources


class ServedModels:
    """The models of a server.

    Its methods run on the event loop's thread; models load and unload on the generator's, between
    steps.
    """

    def __init__(
        self,
        generator: BatchedGenerator,
        scan: Callable[[], Sources],
        adapter_folders: Sequence[Path] = (),
        trust_remote_code: bool = False,
        fits_memory: bool = False,
    ) -> None:
        """Loads the base, which stays in memory. Raises UserError.

        `scan` finds the models again; clients may load adapters in `adapter_folders`.

        `fits_memory`: the generator's `max_tokens` follows the memory that the loaded models leave.
        """
        self._generator, self.pool, self._scan = generator, generator.pool, scan
        self._adapter_folders = [folder.resolve() for folder in adapter_folders]
        self._trusted, self._fits_memory = trust_remote_code, fits_memory
        self._scanned = dict(scan())
        self._added: dict[str, Source] = {}  # by clients
        self._removed: set[str] = set()
        self._loading: dict[tuple[str, Source], asyncio.Future[Resident]] = {}
        self.base, source = next(iter(self._scanned.items()))
        generator.call(partial(self._load_in, self.base, source)).result()

    @property
    def sources(self) -> Sources:
        """All models by name, in memory or not."""
        sources = self._scanned | self._added
        return {name: source for name, source in sources.items() if name not in self._removed}

    async def rescan(self) -> Sources:
        """`sources`, with what was trained since."""
        base = {self.base: self._scanned[self.base]}  # stays, also if its files are gone
        with suppress(UserError):
            self._scanned = base | dict(await asyncio.to_thread(self._scan))
        return self.sources

    async def get(self, name: str) -> Resident:
        """The model, loaded again if its files changed. Raises ApiError 404 or 400."""
        if resident := self.pool.find(name):
            return resident
        source = self.sources.get(name) or (await self.rescan()).get(name)
        if source is None:
            raise unknown(name, self.sources)
        return await self._load(name, source, "model")

    async def _load(self, name: str, source: Source, param: str) -> Resident:
        """The model, loaded once for all who wait for it, even if the first of them goes."""
        key = name, source
        if key not in self._loading:
            future = self._generator.call(partial(self._load_in, name, source))
            self._loading[key] = asyncio.wrap_future(future)
            self._loading[key].add_done_callback(partial(self._finish_loading, key))
        try:
            return await asyncio.shield(self._loading[key])
        except (UserError, OSError) as error:
            message = explain(error) if isinstance(error, OSError) else str(error)
            raise ApiError(400, message, param) from None

    def _finish_loading(self, key: tuple[str, Source], loading: asyncio.Future[Resident]) -> None:
        del self._loading[key]
        if not loading.cancelled():
            loading.exception()  # or asyncio prints it where everyone who waited has gone

    def _load_in(self, name: str, source: Source, pool: ModelPool) -> Resident:
        with pool.using(self.base):  # the base is never evicted
            resident, _ = pool.load(name, source.base, source.adapter, self._trusted)
        if self._fits_memory:
            self._generator.fit_to_memory()
        _ = resident.loaded.tokenizer.end_ids  # starts the process that renders chat templates
        return resident

    def _unload_in(self, name: str, pool: ModelPool) -> None:
        with suppress(UserError):  # it is not in memory
            pool.unload(name)
        if self._fits_memory:
            self._generator.fit_to_memory()

    async def load_adapter(self, name: str, path: str, replace: bool) -> None:
        """Serve the adapter at `path`, on the base, as `name`. Raises ApiError."""
        if name in self.sources and not replace:
            raise ApiError(
                400,
                f"The lora adapter '{name}' has already been loaded. Unload it first, or set "
                "load_inplace to true.",
                "lora_name",
            )
        if name in self._scanned and self._scanned[name].adapter is None:
            raise ApiError(
                400, f"{name} is the name of a model. Choose another lora_name.", "lora_name"
            )
        folder = self._allowed(path)
        source = Source(self._scanned[self.base].base, folder)
        await self._load(name, source, "lora_path")
        self._added[name] = source
        self._removed.discard(name)

    def _allowed(self, path: str) -> Path:
        """The adapter's folder. Of other folders nothing is said, not even whether they exist."""
        try:
            folder = Path(path).resolve()
        except (OSError, ValueError, RuntimeError):  # a NUL, a loop of links
            folder = Path("/")
        if not any(folder.is_relative_to(allowed) for allowed in self._adapter_folders):
            raise ApiError(
                400,
                f"lora_path must be in a folder that is served, got {path[:200]}. "
                "Start `lora serve` with --allow-lora-path.",
                "lora_path",
            )
        try:
            is_adapter = (folder / CONFIG).is_file()
        except OSError:  # a name that is too long, a folder that may not be entered
            is_adapter = False
        if not is_adapter:
            raise ApiError(
                404, f"No adapter found for {path[:200]}: it has no {CONFIG}.", "lora_path"
            )
        return folder

    async def unload_adapter(self, name: str) -> None:
        """Serve an adapter no longer. Raises ApiError 404."""
        source = self.sources.get(name)
        if source is None or source.adapter is None:
            raise ApiError(404, f"The lora adapter '{name[:200]}' cannot be found.", "lora_name")
        # first: nobody must load it again while it is unloaded
        self._added.pop(name, None)
        self._removed.add(name)
        unloaded = self._generator.call(partial(self._unload_in, name))
        await asyncio.wrap_future(unloaded)

    def describe(self, name: str) -> dict[str, object]:
        """An entry of GET /v1/models."""
        source = self.sources[name]
        modified = max((file.modified for file in signature(source.folder)), default=0)
        base = Source(source.base)
        parents = (key for key, candidate in self.sources.items() if candidate == base)
        return {
            "id": name,
            "object": "model",
            "created": modified // 10**9,
            "owned_by": "lora-workbench",
            "parent": next(parents, None) if source.adapter else None,
        }


def unknown(name: str, sources: Sources) -> ApiError:
    """Status 404 for a model that is not served."""
    served = ", ".join(list(sources)[:20])
    return ApiError(
        404, f"The model {name[:200]} does not exist. Served: {served}.", "model", "model_not_found"
    )

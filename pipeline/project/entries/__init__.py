"""What goes into the cache and comes out of it: through `open_cache`, and a store where there is one."""

import os

from pipeline.project.cache import Cache
from pipeline.project.stage_graph import Project

STORE = "LORA_STORE"  # environment variable: the DVC remote behind the cache


def open_cache(project: Project) -> Cache:
    """The project's cache, through which results are read and written. Raises UserError."""
    if name := os.environ.get(STORE):
        from pipeline.project.entries.stored_cache import open_stored

        return open_stored(project.cache, project.root, name)
    return Cache(project.cache)

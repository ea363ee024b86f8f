"""The claims, a file a chapter of the document, found by its name."""

from importlib import import_module
from pkgutil import iter_modules

from lab.claims import Claim

CLAIMS: list[Claim] = [  # in the document's order, which is that of the files' names
    claim
    for file in iter_modules(__path__)
    for claim in import_module(f"{__name__}.{file.name}").chapter
]

"""The claims of the document: one file a chapter, with each statement beside its measurement."""

# Imported by name, not found in the folder: what an artifact was made with follows import statements.
from pipeline.document.claims.chapters import (
    s01_problem,
    s02_core_idea,
    s03_numbers,
    s04_step_by_step,
    s05_hyperparameters,
    s06_where,
    s07_comparison,
    s08_practice,
    s09_implementation,
    s10_further,
)

CHAPTERS = (
    *(s01_problem, s02_core_idea, s03_numbers, s04_step_by_step, s05_hyperparameters),
    *(s06_where, s07_comparison, s08_practice, s09_implementation, s10_further),
)
CLAIMS = [claim for chapter in CHAPTERS for claim in chapter.claim]  # in the document's order

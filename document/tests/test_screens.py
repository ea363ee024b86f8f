"""What the terminal UI shows of the document's stages: the tree, reports and figures."""

from pathlib import Path

from tests.lab_projects import DOCUMENT

from pipeline.stages.registry import open_project
from pipeline.views.reports import numbers_of, read_pages, read_pictures
from pipeline.views.stage_tree import stage_rows


def drawn(unfolded: bool) -> list[str]:
    stages = open_project(DOCUMENT / "params.yaml").readable
    needs = {
        name: [need for need in stage.needs if need in stages] for name, stage in stages.items()
    }
    return [
        f"{row.guides}{row.label}{' ← ' + ', '.join(row.after) if row.after else ''}"
        for row in stage_rows(stages, needs, {})
        if unfolded or row.parent is None
    ]


def test_the_tree_of_the_document() -> None:
    assert drawn(False) == [
        "pretrain",
        "├ expand_vocab",
        "│ ├ scratch",
        "│ ├ full",
        "│ ├ freeze",
        "│ ├ lora",
        "│ │ └ merge",
        "│ ├ prefix",
        "│ ├ prompt",
        "│ ├ sweep",
        "│ ├ evaluate ← scratch, full, freeze, merge, prefix, prompt",
        "│ └ figures ← full, freeze, lora",
        "├ studies",
        "└ claims ← sweep, evaluate, studies, figures",
    ]
    assert drawn(True)[12:15] == ["├ studies", "│ ├ intrinsic_dimension", "│ ├ spectrum"]


def test_reports_and_figures_are_listed_with_their_sections_and_numbers(studied: Path) -> None:
    project = open_project(studied / "params.yaml")
    pages = read_pages(project)
    assert [page.title for page in pages][:3] == ["Comparison", "Figures", "The document, measured"]
    studies = [page for page in pages if page.folder.startswith("studies/")]
    assert len(studies) == 10
    assert all(page.path and page.about.startswith("§") for page in studies)
    pictures = {picture.key: picture for picture in read_pictures(project)}
    assert pictures["figures/attention"].path.suffix == ".png"
    assert "attention.csv" in [path.name for path in pictures["figures/attention"].numbers]
    assert "studies/rank/rank" in pictures
    text = numbers_of(studied / "artifacts/studies/methods/cost.csv", studied)
    heading = "## artifacts/studies/methods/cost.csv"
    assert text.startswith(f"{heading}\n\n**Trainable parameters, memory and storage**")

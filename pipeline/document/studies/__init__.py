"""The document's studies. A study is one file here, found by `document/stages.py`: nothing else lists it.

The file holds its section of params.yaml, its declaration STUDY, and `measure(job, settings)`, which trains, and gives
tables, words and a picture. Nothing heavy is imported before `measure` runs: every command reads the declarations.
"""

from dataclasses import dataclass

from pipeline.project.params.schema import Section


@dataclass(frozen=True)
class Study:
    """`place`: the document's sections that it measures, such as "§7, §9.3". `about`: its line in `lora study`.

    `settings`: the class of its section. The others are as in `Stage`; most studies measure statements about MiniGPT.
    """

    title: str
    place: str
    about: str
    settings: type[Section]
    data: tuple[str, ...]
    needs: tuple[str, ...] = ("pretrain", "expand_vocab")
    extra_sections: tuple[str, ...] = ()
    minigpt_only: bool = True

    @property
    def order(self) -> list[int]:
        """For the document's order: the numbers of the first section."""
        return [int(number) for number in self.place.partition(",")[0].removeprefix("§").split(".")]

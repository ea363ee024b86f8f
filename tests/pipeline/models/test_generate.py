"""Many prompts side by side are continued as each is alone."""

from pathlib import Path

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models import generate as generation
from pipeline.models.generate import generate, generate_all
from pipeline.models.load import load_base
from tests.helpers.families import FAMILIES, new_project


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prepared", [False, True])
def test_side_by_side_each_is_continued_as_alone(
    name: str, prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "GROUP_TOKENS", 40)  # several groups
    model, _ = load_base(new_project(tmp_path / "p", FAMILIES[name]) / "base", "fp32")
    model.eval()
    if prepared:
        model.prepare_cpu_training()
    torch.manual_seed(0)
    prompts = [torch.randint(4, 40, (length,)).tolist() for length in (1, 3, 9, 4, 7, 2)]
    limits = [12, 5, 0, 9, 1, 12]
    alone = [
        list(generate(model, ids, (), limit, packed=False))
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    assert len({tuple(ids) for ids in alone}) > 3, "the model says something of each"
    read = list[int]()
    side_by_side = generation.read_side_by_side

    def counted(*arguments: object) -> torch.Tensor:
        read.append(len(arguments[1]))  # type: ignore[arg-type]
        return side_by_side(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(generation, "read_side_by_side", counted)
    assert generate_all(model, prompts, (), limits) == alone
    assert max(read) > 1, "several in one forward"
    ends = {alone[0][2], alone[3][4]}
    ended = [
        list(generate(model, ids, ends, limit, packed=False))
        for ids, limit in zip(prompts, limits, strict=True)
    ]
    assert generate_all(model, prompts, ends, limits) == ended != alone
    assert generate_all(model, [], ends, []) == []


def test_outputs_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model, _ = load_base(new_project(tmp_path / "p", FAMILIES["llama"]) / "base", "fp32")
    model.eval()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        generate_all(model, [[5, 6]], (), [3])

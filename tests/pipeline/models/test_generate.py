"""Many prompts side by side are continued as each is alone."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models import generate as generation
from pipeline.models.generate import generate, generate_all
from pipeline.models.load import load_base
from pipeline.project import probes
from tests.helpers.families import FAMILIES, new_project


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prepared", [False, True])
def test_side_by_side_each_is_continued_as_alone(
    name: str, prepared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "cache_room", lambda _: 40)  # several groups
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


class Rounding:
    """A model whose logits depend, by a tenth of their size, on how many tokens are read."""

    virtual, device, max_length = None, torch.device("cpu"), 40
    shape = SimpleNamespace(rows=32)

    def __call__(self, ids: Tensor) -> Tensor:
        texts = [ids[0, : n + 1].tolist() for n in range(ids.shape[1])]
        rows = [self.row(text, noise=ids.shape[1]) for text in texts]
        return torch.stack(rows)[None].bfloat16()

    def row(self, text: Sequence[int], noise: int) -> Tensor:
        exact = torch.randn(32, generator=torch.Generator().manual_seed(hash(tuple(text))))
        return exact + 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(noise))


@pytest.mark.parametrize("error, agrees", [(0.0, True), (0.2, False)])
def test_rounding_is_measured_before_a_model_is_refused(error: float, agrees: bool) -> None:
    model = Rounding()
    read: dict[int, list[int]] = {}

    def side_by_side(caches: Sequence[object], parts: Sequence[Sequence[int]]) -> Tensor:
        rows = []
        for cache, part in zip(caches, parts, strict=True):
            text = read.setdefault(id(cache), [])
            text += part
            rows.append(model.row(text, noise=2) * (1 + 5 * error))
        return torch.stack(rows).bfloat16()

    with probes.held() as findings:
        assert generation.agrees(model, side_by_side) is agrees  # type: ignore[arg-type]
    assert len(findings) == (not agrees)

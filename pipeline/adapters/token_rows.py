"""Train single rows of an embedding or head; all other rows keep their bits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.adapters.lora import ROWS, AdapterLayer, scaled_as, weight_of


class EmbeddingRows(AdapterLayer):
    """An embedding whose rows `ids` are replaced by `rows` (n, D); the frozen table is never written."""

    slot: Tensor

    def __init__(self, base: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__(base)
        self.rows = rows
        slot = torch.full((len(weight_of(base)),), -1, device=ids.device)
        slot[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("slot", slot, persistent=False)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {ROWS: self.rows}

    def adapted(self, tokens: Tensor) -> Tensor:
        old: Tensor = self.base(tokens)
        slot = self.slot[tokens]  # (B, T): index into `rows`, or -1
        replaced = F.embedding(slot.clamp(min=0), self.rows)
        return torch.where((slot >= 0)[..., None], scaled_as(self.base, replaced).to(old.dtype), old)


class HeadRows(AdapterLayer):
    """A head whose rows `ids` are replaced by `rows` (n, D)."""

    ids: Tensor

    def __init__(self, base: nn.Module, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__(base)
        self.rows = rows
        self.register_buffer("ids", ids, persistent=False)

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        return {ROWS: self.rows}

    def adapted(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)  # (B, T, V)
        bias = self.base.bias
        new = F.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.ids])  # type: ignore[index]
        return logits.index_copy(-1, self.ids, new)


BY_ROWS = EmbeddingRows | HeadRows

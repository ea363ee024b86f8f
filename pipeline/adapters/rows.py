"""Single rows of an embedding or head that train while all others stay as they are, bit for bit."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class EmbeddingRows(nn.Module):
    """An embedding whose rows `ids` are replaced by `rows` (n, D); the frozen table is never written."""

    slot: Tensor

    def __init__(self, base: nn.Embedding, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        slot = torch.full((base.num_embeddings,), -1, device=ids.device)
        slot[ids] = torch.arange(len(ids), device=ids.device)
        self.register_buffer("slot", slot, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        slot = self.slot[tokens]  # (B, T): the row to use, or -1
        replaced = F.embedding(slot.clamp(min=0), self.rows)
        return torch.where((slot >= 0)[..., None], replaced, self.base(tokens))


class HeadRows(nn.Module):
    """A head whose rows `ids` are replaced by `rows` (n, D)."""

    ids: Tensor

    def __init__(self, base: nn.Linear, ids: Tensor, rows: nn.Parameter) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        self.register_buffer("ids", ids, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.base(x)  # (B, T, V)
        bias = None if self.base.bias is None else self.base.bias[self.ids]
        return logits.index_copy(-1, self.ids, F.linear(x, self.rows, bias))

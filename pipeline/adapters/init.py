"""How A and B begin (the document's §4.1; PEFT's names of the others)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.project.params.sections import Init

DOCUMENT_STD = 0.01
Begin = Callable[[Tensor, Tensor], None]  # fills A (R, I) and B (O, R), in place


def initialize(A: Tensor, B: Tensor, init: Init) -> None:
    """Fill A (R, I) and B (O, R), in place, so that BA = 0: training starts from the base.

    For pissa see `principal`, which needs the weight. Raises UserError for an odd rank where it must be even.
    """
    if not A.is_meta:  # which holds no numbers
        _BEGINNINGS[init](A, B)


def _gaussian(A: Tensor, B: Tensor) -> None:
    """A ~ N(0, 1/R²), B = 0, as PEFT's gaussian."""
    A.normal_(std=1 / A.shape[0])
    B.zero_()


def _document(A: Tensor, B: Tensor) -> None:
    """A ~ N(0, 0.01²), B = 0."""
    A.normal_(std=DOCUMENT_STD)
    B.zero_()


def _kaiming(A: Tensor, B: Tensor) -> None:
    """A uniform in ±1/√I (He et al. 2015 with a = √5), B = 0, as PEFT's default."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B.zero_()


def _orthogonal(A: Tensor, B: Tensor) -> None:
    """A = PᵀX/10 and B = YQ/10 for the even rows P and the odd rows Q of one orthogonal matrix (R, R).

    Neither is zero, and yet BA = Y(QPᵀ)X/100 = 0, but for rounding. X (R/2, I) and Y (O, R/2) are normal.
    """
    rank = A.shape[0]
    if rank % 2:
        raise UserError(
            f"finetune_lora.init_lora_weights orthogonal needs an even rank, got {rank}. Raise finetune_lora.rank, or "
            "its rank_pattern, by one."
        )
    whole = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
    X, Y = torch.randn(rank // 2, A.shape[1]), torch.randn(B.shape[0], rank // 2)
    A.copy_(whole[0::2].T @ X.double() / 10)
    B.copy_(Y.double() @ whole[1::2] / 10)


def _zeros(A: Tensor, B: Tensor) -> None:
    A.zero_()
    B.zero_()


_BEGINNINGS: dict[Init, Begin] = {
    "document": _document,
    "gaussian": _gaussian,
    "kaiming": _kaiming,
    "orthogonal": _orthogonal,
    "pissa": _zeros,
}


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with s·BA = the part of `weight` (O, I) of rank R that is nearest to it, half of each
    singular value's root in either (PiSSA, Meng et al. 2024, §3).

    Raises UserError where the weight has fewer singular values than that.
    """
    most = min(weight.shape)
    if rank > most:
        raise UserError(
            f"finetune_lora.init_lora_weights pissa takes {rank} singular values of a weight that has {most}. "
            f"Set finetune_lora.rank to {most} at most."
        )
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root

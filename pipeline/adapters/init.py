"""Initializations of A and B (the document's §4.1, and PEFT's by their names there)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.project.params.sections import Init

DOCUMENT_STD = 0.01
Initializer = Callable[[Tensor, Tensor], None]  # fills A (R, I) and B (O, R), in place


def initialize(A: Tensor, B: Tensor, init: Init) -> None:
    """Fill A (R, I) and B (O, R) in place so that BA = 0: training starts from the base.

    pissa gets zeros here; `principal` then needs the weight. Raises UserError for orthogonal with an odd rank.
    """
    if not A.is_meta:  # meta tensors hold no numbers
        _INITIALIZERS[init](A, B)


def _gaussian(A: Tensor, B: Tensor) -> None:
    """A ~ N(0, 1/R²), B = 0: PEFT's gaussian."""
    A.normal_(std=1 / A.shape[0])
    B.zero_()


def _document(A: Tensor, B: Tensor) -> None:
    """A ~ N(0, 0.01²), B = 0."""
    A.normal_(std=DOCUMENT_STD)
    B.zero_()


def _kaiming(A: Tensor, B: Tensor) -> None:
    """A uniform in ±1/√I (He et al. 2015 with a = √5), B = 0: PEFT's default."""
    nn.init.kaiming_uniform_(A, a=math.sqrt(5))
    B.zero_()


def _orthogonal(A: Tensor, B: Tensor) -> None:
    """A = PᵀX/10 and B = YQ/10 for the even rows P and the odd rows Q of one orthogonal matrix (R, R).

    Neither is zero, and still BA = Y(QPᵀ)X/100 = 0 up to rounding. X (R/2, I) and Y (O, R/2) are normal.
    """
    rank = A.shape[0]
    if rank % 2:
        raise UserError(
            f"finetune_lora.init_lora_weights orthogonal needs an even rank, got {rank}. Increase finetune_lora.rank, "
            "or its rank_pattern, by one."
        )
    orthogonal = torch.linalg.qr(torch.randn(rank, rank, dtype=torch.float64)).Q
    X, Y = torch.randn(rank // 2, A.shape[1]), torch.randn(B.shape[0], rank // 2)
    A.copy_(orthogonal[0::2].T @ X.double() / 10)
    B.copy_(Y.double() @ orthogonal[1::2] / 10)


def _zeros(A: Tensor, B: Tensor) -> None:
    A.zero_()
    B.zero_()


_INITIALIZERS: dict[Init, Initializer] = {
    "document": _document,
    "gaussian": _gaussian,
    "kaiming": _kaiming,
    "orthogonal": _orthogonal,
    "pissa": _zeros,
}


def principal(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R) with s·BA = the best approximation of `weight` (O, I) of rank R; the square root of each
    singular value goes to A and to B (PiSSA, Meng et al. 2024, §3).

    Raises UserError if the weight has fewer than R singular values.
    """
    most = min(weight.shape)
    if rank > most:
        raise UserError(
            f"finetune_lora.init_lora_weights pissa takes {rank} singular values of a weight that has {most}. "
            f"Set finetune_lora.rank to {most} at most."
        )
    left, values, right = torch.linalg.svd(weight.detach().double(), full_matrices=False)
    root = (values[:rank] / scale).sqrt()  # (R,)
    return root[:, None] * right[:rank], left[:, :rank] * root

"""GPTQ: codes chosen for the inputs that a matrix gets (Frantar et al. 2023, arXiv 2210.17323).

An error of Q counts by what it does to the outputs: ‖(W − Q)Xᵀ‖² = tr (W − Q)G(W − Q)ᵀ for inputs X
(N, I) with the Gram matrix G = XᵀX (I, I), half the Hessian of every row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from pipeline.models.base import (
    CausalLM,
    compute_in_fp32,
    is_conv1d,
    packed_hidden_states,
)
from pipeline.models.load import skeleton
from pipeline.models.quantized_linear import quantizable

DAMPING = 0.01  # of G's mean diagonal, added to it (section 3.3)
BLOCK = 128  # columns that are compensated one by one; the others once for all of these
ROOM = 2**31  # bytes of Gram matrices at once; the model runs again for the others

# values (O,) and the number of their column → the rounded values
RoundColumn = Callable[[Tensor, int], Tensor]


def gptq(
    weight: Tensor,
    gram: Tensor,
    rounding: Callable[[Tensor], RoundColumn],
    block: int = BLOCK,
) -> Tensor:
    """W (O, I) rounded column by column; the columns still to come compensate the error.

    With (G + damping)⁻¹ = UᵀU, U upper triangular, an error e in column i is compensated in column
    j by −e·Uᵢⱼ/Uᵢᵢ. `rounding` gets a block of compensated columns when its first is reached.
    """
    upper = inverse_root(gram.double()).to(weight.dtype)
    remaining, rounded = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.shape[1], block):
        stop = min(start + block, weight.shape[1])
        here, corner = remaining[:, start:stop], upper[start:stop, start:stop]
        round_column, errors = rounding(here), torch.empty_like(here)
        for n in range(stop - start):
            rounded[:, start + n] = round_column(here[:, n], start + n)
            errors[:, n] = (here[:, n] - rounded[:, start + n]) / corner[n, n]
            here[:, n:] -= torch.outer(errors[:, n], corner[n, n:])
        remaining[:, stop:] -= errors @ upper[start:stop, stop:]
    return rounded


def inverse_root(gram: Tensor) -> Tensor:
    """Upper triangular U (I, I) with UᵀU = (G + damping)⁻¹. The damping keeps it defined if inputs
    are always zero.
    """
    diagonal = gram.diagonal().mean().clamp(min=1e-30) * DAMPING
    damped = gram + diagonal * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    upper: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def round_for_inputs(weight: Tensor, gram: Tensor, round_column: RoundColumn) -> Tensor:
    """`gptq` on a fixed grid, the columns of the largest inputs first: the others compensate."""
    order = gram.diagonal().argsort(descending=True)
    numbers = order.tolist()
    rounded = gptq(
        weight[:, order],
        gram[order][:, order],
        lambda _block: lambda column, place: round_column(column, numbers[place]),
    )
    return rounded[:, order.argsort()]


def linear_widths(folder: Path, trust_remote_code: bool = False) -> dict[str, int]:
    """I of each linear of the blocks, by its full name."""
    model = skeleton(folder, trust_remote_code)
    widths = {}
    for name in quantizable(model):
        weight = model.get_parameter(f"{name}.weight")
        widths[name] = weight.shape[0 if is_conv1d(model.get_submodule(name)) else 1]
    return widths


@torch.no_grad()
def input_grams(
    model: CausalLM, widths: Mapping[str, int], sequences: Sequence[Sequence[int]], room: int = ROOM
) -> Iterator[tuple[str, Tensor]]:
    """G (I, I) in fp32 of the inputs of each linear, over all tokens of `sequences`, by its name.

    `widths`: I of each. As many as fit into `room` bytes are summed in one pass of the model.
    """
    bool(model.supports_packing)  # it is tried by running the model: before inputs are summed
    waiting = dict(widths)
    while waiting:
        grams, size = dict[str, Tensor](), 0
        for name, width in waiting.items():
            size += 4 * width**2
            if grams and size > room:
                break
            grams[name] = torch.zeros(width, width, device=model.device)
        handles = [
            model.get_submodule(name).register_forward_pre_hook(_adds_to(gram))
            for name, gram in grams.items()
        ]
        try:
            with compute_in_fp32(model):
                for _hidden in packed_hidden_states(model, sequences):
                    pass
        finally:
            for handle in handles:
                handle.remove()
        for name in grams:
            del waiting[name]
        yield from grams.items()


def _adds_to(gram: Tensor) -> Callable[[torch.nn.Module, tuple[Tensor, ...]], None]:
    def hook(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()  # (B·T, I)
        gram.addmm_(x.T, x)

    return hook

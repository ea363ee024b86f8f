"""A base in q8_0 for `lora serve` on a CPU: half of the bytes that a token reads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import Difference, builtin_prompts, difference_of
from pipeline.models.base import CausalLM, packed_hidden_states
from pipeline.models.kernels.native import native
from pipeline.models.quantized_linear import Q8Linear, quantizable

# The largest mean KL to the base as it is stored, in nats per token. On SmolLM2-135M it is 3e-3; an
# adapter at twice its scale is above 1e-2.
MOST_DIVERGENCE = 1e-2


class Q8Bases:
    """Puts each base in q8_0 when it is loaded. `lines` say what that changed."""

    def __init__(self) -> None:
        self.lines = list[str]()

    def __call__(self, loaded: LoadedModel) -> None:
        """Raises UserError."""
        difference, prompts = store_in_q8_0(loaded), len(builtin_prompts())
        self.lines.append(
            f"{loaded.base.name} is in q8_0: KL {difference.divergence:.1e} nats per token, "
            f"{difference.same_first_choices} of {prompts} next tokens as before."
        )


@torch.no_grad()
def store_in_q8_0(loaded: LoadedModel) -> Difference:
    """Put the linears of a model's blocks in q8_0, one after the other, and the rest in bf16.

    Returns what this changes in the logits as they are served. Raises UserError where it would not
    be faster, and above MOST_DIVERGENCE.
    """
    model = loaded.model
    names = [name for name in quantizable(model) if Q8Linear.takes(model.get_submodule(name))]
    if reason := _unfit(model, names):
        raise UserError(f"--quantization q8_0 {reason}. Serve {loaded.base} without it.")
    ids = [loaded.tokenizer.encode(prompt)[: model.max_length] for prompt in builtin_prompts()]
    before = _logits(model, ids)
    for name in names:
        model.set_submodule(name, Q8Linear(model.get_submodule(name)))  # type: ignore[arg-type]
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.bfloat16()
    difference = difference_of(zip(before, _logits(model, ids), strict=True))
    if not difference.divergence <= MOST_DIVERGENCE:  # refuses NaN too
        raise UserError(
            f"q8_0 changes the answers of {loaded.base}: KL {difference.divergence:.1e} nats per "
            f"token, more than {MOST_DIVERGENCE:.0e}. Serve it without --quantization."
        )
    return difference


def _unfit(model: CausalLM, names: Sequence[str]) -> str | None:
    """Why native.c would not compute with the codes."""
    if model.device.type != "cpu":
        return f"is for a CPU, and the model is on {model.device}"
    if native() is None:
        return "needs the kernels of native.c, and so a C compiler (cc)"
    if not names:
        return "needs linears whose sizes are multiples of 32"
    return None


def _logits(model: CausalLM, ids: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model.logits(hidden).float() for hidden in packed_hidden_states(model, ids)]

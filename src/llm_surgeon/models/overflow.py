"""Search for the origin of NaN or infinity, once a loss has turned out not to be finite."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics.linalg import is_finite


@torch.no_grad()
def loss_not_finite(model: PreTrainedModel, input_ids: Tensor, of_what: str) -> NonFiniteError:
    """Error for a loss that is not finite; to be called under the arithmetic in which the loss was computed.

    The error names the first parameter that is not finite, or else the first module whose output is not finite. To find
    the module, the model is run once more.

    Args:
        model: A causal language model.
        input_ids: ``[batch, length]``, the tokens whose loss is not finite.
        of_what: The text or pass that the loss is of, for the message.
    """
    damaged = next((name for name, value in model.named_parameters() if not is_finite(value)), None)
    if damaged is not None:
        return NonFiniteError(
            f"The loss of {of_what} is not finite: {damaged} holds NaN or infinity.",
            "The checkpoint is damaged, or was not trained to an end: fetch it again, or take another.",
        )
    overflowing = _first_overflow(model, input_ids) or "the head"
    return NonFiniteError(
        f"The loss of {of_what} is not finite: the output of {overflowing} overflows.",
        "Use --dtype bfloat16 or float32: float16 ends at 65,504."
        if model.dtype == torch.float16
        else "Use --precision float32 and --dtype float32; if that does not help, the weights are out of all bounds.",
    )


def _first_overflow(model: nn.Module, input_ids: Tensor) -> str | None:
    """Name of the first module without submodules whose output is not finite; None if there is none."""
    found: list[str] = []
    with contextlib.ExitStack() as stack:
        for name, module in model.named_modules():
            if not any(module.children()):

                def hook(_module: nn.Module, _arguments: Any, output: Any, name: str = name) -> None:
                    if isinstance(output, Tensor) and not is_finite(output):
                        found.append(name)

                stack.callback(module.register_forward_hook(hook).remove)
        model(input_ids=input_ids, use_cache=False)
    return found[0] if found else None

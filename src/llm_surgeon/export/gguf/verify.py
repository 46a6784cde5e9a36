"""Check of a GGUF file: llama.cpp has to compute what the model in memory computes, and to make the same tokens."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import ExportMismatchError
from llm_surgeon.export.format import Exported
from llm_surgeon.export.gguf.keys import context_length
from llm_surgeon.export.gguf.reference import exact_logits
from llm_surgeon.export.gguf.token_check import ENGINE, ask_engine, check_tokens
from llm_surgeon.export.gguf.write import Said
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.models.probe import probe_tokens

# Tokens that follow each prompt; the first comes from one pass over the prompt, the others from the cache.
_STEPS = 4
# Largest difference allowed, as a fraction of the largest logit. The engine rounds what it multiplies to the type of
# the matrices, and computes GELU with a table of float16. A layer that is left out makes a tenth and more.
_ALLOWED = {Kind.F32: 1e-3, Kind.F16: 1e-2, Kind.BF16: 3e-2, Kind.Q8_0: 0.12}
_ALLOWED_GELU = 5e-3
# Logarithms of probabilities below this are those of numbers that float32 cannot hold with all digits.
_LEAST = -80.0
# Texts whose tokens are compared. Rare characters, of which llama.cpp's tables may say something else, are not in them.
_TEXTS = (
    "The quick brown fox jumps over 13 lazy dogs, doesn't it?",
    "def area(r):\n    return 3.14159 * r ** 2  # in m\u00b2\n",
    "Gr\u00f6\u00dfe, na\u00efve, \u6771\u4eac, \u041f\u0440\u0438\u0432\u0435\u0442!  Two  spaces.",
)


@dataclass(frozen=True)
class _Followed:
    """A prompt, and what the engine says of the tokens after it.

    Attributes:
        prompt: The tokens of the prompt.
        tokens: Tokens that follow.
        logprobs: Logarithms of the probabilities of all tokens, for each of those.
    """

    prompt: list[int]
    tokens: list[int]
    logprobs: Tensor


def verify_file(said: Said, exported: Exported, kind: Kind, path: Path) -> ReloadCheck | None:
    """Load a file in llama.cpp in a fresh process, and compare it with the model in memory.

    The logarithms of the probabilities of all tokens are compared after two prompts and after each token that follows,
    and the tokens of a few texts. The model's are computed in float32, whatever its type.

    Args:
        said: The model in the terms of llama.cpp.
        exported: The model.
        kind: Type of the file's matrices.
        path: The file.

    Returns:
        The largest difference; None if llama.cpp is not installed.

    Raises:
        ExportMismatchError: If llama.cpp does not load the file, or computes something else.
    """
    if importlib.util.find_spec(ENGINE) is None:
        return None
    model = exported.model
    check_tokens(path, exported.tokenizer, _TEXTS)
    difference = scale = 0.0
    for followed in _ask(said, model, path):
        # The last token is predicted, and predicts nothing that was asked.
        expected = exact_logits(model, exported.family, followed.prompt + followed.tokens)[
            len(followed.prompt) - 1 : -1
        ]
        differences = expected.log_softmax(-1).clamp(min=_LEAST) - followed.logprobs.clamp(min=_LEAST)
        difference = max(difference, float(differences.abs().max()))
        scale = max(scale, float(expected.abs().max()))
    tolerance = max(_ALLOWED[kind], _ALLOWED_GELU if said.row.approximate else 0.0)
    # The comparison is written so that a NaN fails.
    if not difference <= tolerance * scale:
        raise ExportMismatchError(
            f"llama.cpp computes something else from {path.name} than the model in memory: the logarithms of "
            f"probabilities differ by {difference:.3g}, and {tolerance * scale:.3g} is allowed.",
            f"Nothing was written. Please report this with the model's name and the version of {ENGINE}; without the "
            "format, the export is possible (--format hf).",
        )
    rounded = ", with weights of 8 bits" if kind is Kind.Q8_0 else ""
    return ReloadCheck(difference, scale, f"llama.cpp ({ENGINE} {importlib.metadata.version(ENGINE)}{rounded})")


def _ask(said: Said, model: PreTrainedModel, path: Path) -> list[_Followed]:
    ids = probe_tokens(model)[0].tolist()
    longest = min(len(ids), context_length(model.config, said.row))
    steps = max(1, min(_STEPS, longest - 1))
    # A short prompt shows what goes wrong in few positions, a long one what goes wrong in many.
    lengths = dict.fromkeys(max(1, length) for length in ((longest - steps) // 4, longest - steps))
    prompts = [ids[:length] for length in lengths]
    asked = {"prompts": prompts, "steps": steps, "vocabulary": model.config.vocab_size}
    answers: list[dict[str, Any]] = ask_engine(path, {"continue": asked})["continue"]
    return [
        _Followed(prompt, answer["tokens"], torch.tensor(answer["logprobs"]))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]

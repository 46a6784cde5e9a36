"""Check of an export by vLLM: its greedy tokens and log-probabilities against those of the model in memory."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import ExportMismatchError
from llm_surgeon.export.fresh_process import run_script
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.models.modes import frozen
from llm_surgeon.models.probe import probe_tokens
from llm_surgeon.system.files import PARTIAL

# vLLM wants an environment of its own, so that the Python of that environment can be named.
PYTHON = "LLM_SURGEON_VLLM_PYTHON"
_PROMPTS, _GENERATED = 3, 24
# Largest difference of a log-probability in float32. Kernels differ, and sums are taken in another order.
_TOLERANCE = 5e-3
_REMEDY = "Please report this with the versions of vllm and transformers."


def vllm_python() -> str | None:
    """The Python that has vLLM: the one named by the variable ``LLM_SURGEON_VLLM_PYTHON``, or this one; or None."""
    named = os.environ.get(PYTHON)
    if named:
        return named
    return sys.executable if importlib.util.find_spec("vllm") is not None else None


def verify_in_vllm(
    model: PreTrainedModel,
    directory: Path,
    implementation: Literal["auto", "transformers"] = "auto",
    prompts: Sequence[Sequence[int]] | None = None,
) -> ReloadCheck | None:
    """Let vLLM load an export and generate greedily, and compare with the model in memory.

    vLLM gives no logits. Its tokens have to be likeliest in the model too, after the tokens that vLLM chose before, and
    the log-probabilities of the likeliest tokens have to agree.

    Args:
        model: The model in memory.
        directory: Directory of the export.
        implementation: Classes that vLLM takes: its own where it has them, or those of transformers.
        prompts: Token ids to begin with; None takes a few of the probe.

    Returns:
        Largest difference and largest size of the log-probabilities; None if vLLM is not installed.

    Raises:
        ExportMismatchError: If vLLM cannot load the export, or computes something else.
    """
    python = vllm_python()
    if python is None:
        return None
    if prompts is None:
        prompts = probe_tokens(model)[0, : 8 * _PROMPTS].view(_PROMPTS, -1).tolist()
    answer = _ask(python, directory, {"prompts": prompts, "tokens": _GENERATED}, implementation)
    difference = scale = 0.0
    for prompt, result in zip(prompts, answer["results"], strict=True):
        expected = _log_probabilities(model, prompt, result["tokens"])
        for step, (token, top) in enumerate(zip(result["tokens"], result["top"], strict=True)):
            likeliest = {int(name): value for name, value in top.items()}
            far = max(abs(float(expected[step, name]) - value) for name, value in likeliest.items())
            behind = float(expected[step].max() - expected[step, token])
            difference = max(difference, far, behind)
            scale = max(scale, max(map(abs, likeliest.values())))
    # The comparison is written so that a NaN fails.
    if not difference <= _TOLERANCE * max(1.0, scale):
        raise ExportMismatchError(
            f"vLLM computes log-probabilities for the export that differ by {difference:.3g} from the model's.", _REMEDY
        )
    return ReloadCheck(difference, scale, f"vLLM {answer['version']}")


def _ask(python: str, directory: Path, job: Mapping[str, Any], implementation: str) -> dict[str, Any]:
    """Let the environment of vLLM do a job on an export; returns its answer."""
    script = Path(__file__).with_name("engine_check.py")
    with tempfile.TemporaryDirectory(prefix="check-", suffix=PARTIAL, dir=directory.parent) as scratch:
        file = Path(scratch) / "job.json"
        file.write_text(json.dumps(job), encoding="utf8")
        modules = {"HF_MODULES_CACHE": str(Path(scratch) / "modules")}
        done = run_script(script, [str(directory), str(file), implementation], modules, python)
        answer = Path(f"{file}.out")
        if done.returncode != 0 or not answer.exists():
            errors = [line for line in done.stderr.strip().splitlines() if "Error" in line]
            raise ExportMismatchError(
                f"vLLM cannot load the export: {(errors or ['no message'])[-1]}.",
                f"{_REMEDY} If {PYTHON} is set, it has to name the Python of an environment with vllm.",
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf8"))
    return found


@torch.no_grad()
def _log_probabilities(model: PreTrainedModel, prompt: Sequence[int], generated: Sequence[int]) -> Tensor:
    """Log-probabilities of the tokens after a prompt, ``[generated, vocabulary]`` float32."""
    with frozen(model):
        ids = torch.tensor([[*prompt, *generated]], device=next(model.parameters()).device)
        logits: Tensor = model(ids, return_dict=True).logits[0, len(prompt) - 1 : -1].float().cpu()
    return logits.log_softmax(-1)

"""Reload check of an export: a fresh process without this package loads it, and its logits are compared."""

from __future__ import annotations

import errno
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.errors import ExportMismatchError
from llm_surgeon.export.fresh_process import run_script
from llm_surgeon.models.classes import auto_class
from llm_surgeon.models.overflow import loss_not_finite
from llm_surgeon.models.probe import probe_logits, probe_tokens
from llm_surgeon.models.streaming import weights_of
from llm_surgeon.system.files import PARTIAL, says_full

# Largest difference allowed, as a fraction of the largest logit. Arithmetic and device are the same, but kernels may be
# chosen anew, and a cached step takes another path than a full pass.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class ReloadCheck:
    """Result of the check: how far the logits of the reloaded export are from those of the model in memory.

    Attributes:
        difference: Largest absolute difference of the logits.
        scale: Largest absolute logit.
        engine: Engine that loaded the export, with its version.
    """

    difference: float
    scale: float
    engine: str = f"transformers {transformers.__version__}"


def verify_export(model: PreTrainedModel, directory: Path, plain: bool = False) -> ReloadCheck:
    """Compare the export with the model in memory.

    A fresh process, in which ``llm_surgeon`` cannot be imported and no hub can be asked, loads the directory with
    ``from_pretrained`` of the class that the family's entry names, as a rule ``AutoModelForCausalLM``. It computes the
    logits of a probe in one pass and with the key/value cache, and generates.

    Args:
        model: The pruned model in memory.
        directory: Directory of the export.
        plain: Whether the export has to load without running code of the checkpoint.

    Raises:
        ExportMismatchError: If the process fails or its logits differ.
        NonFiniteError: If the model in memory overflows in its own type.
        OSError: If there is no room on the disk for the logits.
    """
    device = next(model.parameters()).device
    # A model that fits a GPU only by blocks does not fit it when reloaded as a whole.
    elsewhere = device if weights_of(model).blocks is None else torch.device("cpu")
    ids, expected = probe_tokens(model), probe_logits(model)
    if not bool(expected.isfinite().all()):
        raise loss_not_finite(model, ids.to(device), "a pass in the type of the pruned model's weights")
    # The scratch directory is beside the export, so that nothing stays elsewhere if this process is killed.
    with tempfile.TemporaryDirectory(prefix="check-", suffix=PARTIAL, dir=directory.parent) as scratch:
        loader = auto_class(model.config.model_type)
        lean = weights_of(model).blocks is not None
        reloaded = _reload(directory, ids, elsewhere, loader, plain, lean, Path(scratch))
    scale = float(expected.abs().max())
    difference = _difference(expected, reloaded["logits"])
    cached = _difference(expected[:, -1:], reloaded["step"])
    allowed = TOLERANCE.get(model.dtype, 1e-4) * scale
    # The comparison is written so that a NaN fails.
    if not (difference <= allowed and cached <= allowed):
        raise ExportMismatchError(
            f"The reloaded export differs from the model in memory by {difference:.3g} in its logits, and by "
            f"{cached:.3g} with the key/value cache; {allowed:.3g} is allowed.",
            "Nothing was written. Please report this with the versions of torch and transformers.",
        )
    return ReloadCheck(difference, scale)


def _difference(expected: Tensor, actual: Tensor) -> float:
    return float((expected - actual.float()).abs().max())


def _reload(
    directory: Path, ids: Tensor, device: torch.device, loader: str, plain: bool, lean: bool, scratch: Path
) -> dict[str, Tensor]:
    probe = scratch / "probe.safetensors"
    save_file({"input_ids": ids}, probe)
    # transformers copies remote code into a cache; a scratch cache keeps the user's clean and cannot be stale.
    environment = {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("reload_check.py")
    words = "plain" if plain else "trusted", "lean" if lean else "whole"
    done = run_script(script, [str(directory), str(probe), str(device), loader, *words], environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        if says_full(last[0]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise ExportMismatchError(
            f"The export cannot be loaded in a fresh process: {last[0]}.",
            "Nothing was written. Please report this with the versions of torch and transformers.",
        )
    return load_file(f"{probe}.out")

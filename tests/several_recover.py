"""Recoveries in several processes and in one: ``torchrun ... tests/several_recover.py EXPORT TEACHER TEXT FOLDER``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from llm_surgeon import RecoveryRecord, prune_checkpoint, recover
from llm_surgeon.errors import ConfigError
from llm_surgeon.recovery import opening
from llm_surgeon.recovery.training import Training
from llm_surgeon.system.torchrun import own_place

COMMON = {
    "tokens": 3840, "seq_len": 32, "batch_size": 6, "evaluations": 4, "learning_rate": 3e-3,
    "eval_window": 32, "eval_tokens": 320, "precision": "float32", "device": "cpu",
}  # fmt: skip
# Name: whether it has a teacher, and options.
RECOVERIES = {
    "teacher": (True, {}),
    "text alone, whole blocks again": (False, {"gradient_checkpointing": True, "pass_size": 2}),
    "adapters": (True, {"adapters": 3, "label_weight": 0.8, "learning_rate": 1e-2}),
    "interrupted": (True, {"label_weight": 0.5}),
    "at the end of a run": (True, {}),
}


RUN = {name: COMMON[name] for name in ("seq_len", "eval_window", "eval_tokens", "precision", "device")} | {
    "samples": 8, "preset": "none", "shots": 1, "sparsity": 0.5,
    "recover_tokens": 3840, "recover_batch_size": 6, "recover_learning_rate": 3e-3,
}  # fmt: skip


class EndedError(Exception):
    """The end of a process."""


def run(name: str, export: str, teacher: str, text: str, folder: Path) -> RecoveryRecord:
    """One of the recoveries."""
    has_teacher, options = RECOVERIES[name]

    def call() -> RecoveryRecord:
        told = {"teacher": teacher if has_teacher else None, "data": text}
        return recover(export, folder / name, **told, **COMMON | options)

    if name == "at the end of a run":
        prune_checkpoint(teacher, folder / name, calibration=text, **RUN)
        return RecoveryRecord.model_validate_json((folder / name / "recovery.json").read_bytes())
    if name == "interrupted":
        take = Training._step

        def ends(self: Training, *given: object) -> float:
            if self.standing.step == 12:
                raise EndedError
            return take(self, *given)  # type: ignore[arg-type]

        Training._step = ends  # type: ignore[method-assign, assignment]
        try:
            with contextlib.suppress(EndedError):
                call()
        finally:
            Training._step = take  # type: ignore[method-assign]
    return call()


def run_without_memory_in_one(teacher: str, text: str, out: Path) -> None:
    """A run whose training finds too little memory in the second process only."""
    check = opening.check_memory

    def refuses(*given: Any) -> None:
        if own_place().rank == 1:
            raise ConfigError("No memory.", "Buy some.")
        check(*given)

    opening.check_memory = refuses
    try:
        prune_checkpoint(teacher, out, calibration=text, **RUN)
    finally:
        opening.check_memory = check


if __name__ == "__main__":
    export, teacher, text, folder = sys.argv[1:]
    for name in RECOVERIES:
        run(name, export, teacher, text, Path(folder))
    run_without_memory_in_one(teacher, text, Path(folder) / "as pruned")

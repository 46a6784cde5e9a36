"""Loading time and peak memory of a model, which can only be measured when it is alone in a fresh process.

The process is ``python -m llm_surgeon.benchmark.isolated TASK ANSWER``, see ``llm_surgeon.system.worker``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from llm_surgeon.records import Failure, Record
from llm_surgeon.records.bench import OwnMeasures
from llm_surgeon.system.worker import answer_worker, ask_worker, failure_of, module_command

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHUNK = 1 << 24


class IsolatedOrder(Record):
    """Task of the process: load the directory ``source``, and run each of the batches once it is warm."""

    source: str
    dtype: str
    device: str
    threads: int
    prompt: int
    generate: int
    batches: tuple[int, ...]
    trust_remote_code: bool = False


class IsolatedAnswer(Record):
    """Answer of the process: the measures, or the failure."""

    own: OwnMeasures | None = None
    failure: Failure | None = None


def measure_in_process(task: IsolatedOrder) -> IsolatedAnswer:
    """Measure a model in a fresh process; a process that ends without an answer is a failure, not an error."""
    answer = ask_worker(command, task, "Lower --batch or --prompt")
    return IsolatedAnswer(failure=answer) if isinstance(answer, Failure) else IsolatedAnswer.model_validate_json(answer)


def command(order: Path, answer: Path) -> list[str]:
    """Command of the process, with the files of its task and answer."""
    return module_command("llm_surgeon.benchmark.isolated", order, answer)


def measure(task: IsolatedOrder) -> IsolatedAnswer:
    """Measure a model in this process, which should hold nothing else; every error becomes an answer."""
    try:
        return IsolatedAnswer(own=_measure(task))
    except Exception as error:
        return IsolatedAnswer(failure=failure_of(error))


def _measure(task: IsolatedOrder) -> OwnMeasures:
    import torch

    from llm_surgeon.evaluation.speed import Workload, measure_speed, synchronise
    from llm_surgeon.export.save import weight_bytes
    from llm_surgeon.models.loading import check_checkpoint, load_checked, resolve_device
    from llm_surgeon.system.logs import quiet_transformers
    from llm_surgeon.system.memory import peak_bytes, reset_peak

    quiet_transformers()
    torch.set_num_threads(task.threads)
    device = resolve_device(task.device)
    runs_code = check_checkpoint(task.source, task.trust_remote_code)
    _read_into_page_cache(Path(task.source))
    reset_peak(device)
    before = peak_bytes(device)
    start = perf_counter()
    model = load_checked(task.source, runs_code, task.dtype, device)
    synchronise(device)
    seconds = perf_counter() - start
    peaks = {}
    # Ascending, so that each peak is that of loading and of this batch; freed memory may stay with the process.
    for batch in sorted(task.batches):
        measure_speed(model, Workload(task.prompt, task.generate, batch, repeats=1))
        peaks[batch] = peak_bytes(device)
    weights, zeros = _count_linear(model)
    return OwnMeasures(
        parameters=model.num_parameters(),
        linear_weights=weights,
        zero_weights=zeros,
        weight_bytes=weight_bytes(Path(task.source)),
        dtype=str(model.dtype).removeprefix("torch."),
        load_seconds=seconds,
        bytes_before=before,
        peaks=peaks,
    )


def _read_into_page_cache(directory: Path) -> None:
    """Read the weight files, so that the first model to be loaded is not the only one to wait for the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(_CHUNK):
                pass


def _count_linear(model: PreTrainedModel) -> tuple[int, int]:
    """Number of weights stored for linear layers but lm_head, and how many of them are zero."""
    from torch import nn

    head = model.get_output_embeddings()
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear) and layer is not head]
    weights = sum(matrix.numel() for matrix in matrices)
    return weights, weights - sum(int(matrix.count_nonzero()) for matrix in matrices)


def main(order: str, answer: str) -> None:
    """Entry point of the process."""
    answer_worker(lambda task: measure(IsolatedOrder.model_validate_json(task)), order, answer)


if __name__ == "__main__":
    main(*sys.argv[1:])

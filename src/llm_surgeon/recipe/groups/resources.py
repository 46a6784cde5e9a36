"""Options of the machine: device, memory, arithmetic, and the order of the work."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from llm_surgeon.recipe.groups.base import Options, Quantity

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["bfloat16", "float32"]
PassOrder = Literal["auto", "batch-major", "layer-major"]
Residence = Literal["auto", "resident", "streamed"]


class ResourcesOptions(Options):
    """Device, memory and arithmetic of a run, and the order in which it goes through model and text."""

    device: str = Field("auto", min_length=1, description="auto, cpu, cuda or cuda:N.")
    dtype: Dtype = Field("auto", description="Type of the weights: auto (as stored), float32, bfloat16 or float16.")
    precision: Precision = Field(
        "bfloat16", description="Arithmetic of the passes: bfloat16 or float32; sums are float32 in any case."
    )
    device_memory: Quantity | None = Field(
        None, description="Bytes of GPU memory that the run may use, e.g. 24GiB (unset: what is free)."
    )
    host_memory: Quantity | None = Field(
        None,
        description="Bytes of main memory that the run may use, e.g. 16GiB (unset: what is free). What fits neither "
        "there nor on the device waits on disk, see scratch.",
    )
    scratch: str | None = Field(
        None, min_length=1, description="Directory for what waits on disk during the run (unset: TMPDIR)."
    )
    scratch_space: Quantity | None = Field(
        None, description="Bytes of disk that the run may use there, e.g. 200GiB (unset: what is free)."
    )
    order: PassOrder = Field(
        "auto",
        description="Of a pass for the curvature: batch-major (each batch through the whole model), layer-major (all "
        "batches through one block before the next: a third more time, and what does not fit may wait on the host or "
        "on disk), or auto: layer-major where the other would not fit.",
    )
    weights: Residence = Field(
        "auto",
        description="Of the blocks: resident (all where the model runs), streamed (in mapped files on disk, see "
        "scratch, one block at a time where the model runs; the order is layer-major then), or auto: streamed where "
        "they would not fit.",
    )
    trust_remote_code: bool = Field(False, description="Run code that the model's checkpoint brings; read it before.")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.weights == "streamed" and self.order == "batch-major":
            raise ValueError("streamed weights come block by block: order cannot be batch-major")
        return self

"""What ``llm-surgeon bench`` measured, as records; needs neither torch nor transformers."""

from __future__ import annotations

from llm_surgeon.records import Failure, Record, Speed

# Some weights of a dense model may happen to be zero; this share of them are not there by chance.
_SHARE_OF_ZEROS = 0.05


class OwnMeasures(Record):
    """What was measured of one model in a fresh process with nothing else in it.

    Attributes:
        parameters: Tied ones count once.
        linear_weights: Weights stored for linear layers, without biases and lm_head.
        zero_weights: Those of them that are exactly zero.
        weight_bytes: Size of the weight files.
        dtype: Of the parameters in memory.
        load_seconds: From the call until the weights are on the device; the files were in the page cache, and torch
            and transformers imported.
        bytes_before: Peak before loading, in bytes: Python and libraries, or 0 on a GPU.
        peaks: By batch, the peak in bytes of loading, prefill and decoding: of tensors on a GPU, else resident.
    """

    parameters: int
    linear_weights: int
    zero_weights: int
    weight_bytes: int
    dtype: str
    load_seconds: float
    bytes_before: int
    peaks: dict[int, int]

    @property
    def stores_zeros(self) -> bool:
        """Whether weights were removed by setting them to zero, which saves no time."""
        return self.zero_weights > _SHARE_OF_ZEROS * self.linear_weights


class BenchModel(Record):
    """One model: a short name that no other model of the record has, what the user gave, and its own measures."""

    name: str
    source: str
    own: OwnMeasures


class BenchTiming(Record):
    """How fast one model was, or why that is not known; the first compiled run took ``compile_seconds``."""

    model: str
    speed: Speed | None = None
    compile_seconds: float | None = None
    failure: Failure | None = None


class BenchRun(Record):
    """The reference and one other model timed in alternating pairs, or one model alone.

    ``timings`` begins with the reference. The ratios, other to reference, are medians over the pairs; None if there is
    no pair.
    """

    batch: int
    compiled: bool
    timings: tuple[BenchTiming, ...]
    prefill_ratio: float | None = None
    decode_ratio: float | None = None


class Bench(Record):
    """Everything ``llm-surgeon bench`` measured; its ``--out`` is this record. ``models`` begins with the reference."""

    models: tuple[BenchModel, ...]
    runs: tuple[BenchRun, ...]
    prompt: int
    generated: int
    repeats: int
    device: str
    threads: int
    dtype: str
    versions: dict[str, str]
    date: str
    command: str | None = None

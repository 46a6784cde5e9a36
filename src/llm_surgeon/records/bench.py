"""Records of ``llm-surgeon bench``, which need neither torch nor transformers."""

from __future__ import annotations

from llm_surgeon.records import Failure, Record, Speed

# Share of zero weights from which on they count as removed: in a dense model, a few weights are zero by chance.
_SHARE_OF_ZEROS = 0.05


class OwnMeasures(Record):
    """Measures of one model in a fresh process with nothing else in it.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        linear_weights: Number of weights stored for linear layers, without biases and lm_head.
        zero_weights: Number of these linear weights that are exactly zero.
        weight_bytes: Bytes of the weight files.
        dtype: Type of the parameters in memory.
        load_seconds: Seconds from the call until the weights are on the device, with the files in the page cache, and
            torch and transformers imported.
        bytes_before: Peak bytes before loading: Python and libraries, or 0 on a GPU.
        peaks: Peak bytes of loading, prefill and decoding, by batch: of tensors on a GPU, else resident.
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
    """Speed of one model, or the failure to measure it; ``compile_seconds`` is the time of the first compiled run."""

    model: str
    speed: Speed | None = None
    compile_seconds: float | None = None
    failure: Failure | None = None


class BenchRun(Record):
    """The reference and one other model timed in alternating pairs, or one model alone.

    ``timings`` begins with the reference. The ratios, other to reference, are medians over the pairs; they are None
    without a pair.
    """

    batch: int
    compiled: bool
    timings: tuple[BenchTiming, ...]
    prefill_ratio: float | None = None
    decode_ratio: float | None = None


class Bench(Record):
    """All measures of ``llm-surgeon bench``; its ``--out`` is this record. ``models`` begins with the reference."""

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

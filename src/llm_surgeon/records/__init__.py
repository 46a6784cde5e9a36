"""What a run reports: plain records with a JSON form, no behaviour beyond arithmetic on their own fields."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from llm_surgeon.mathematics.nm_pattern import Pattern


class Record(BaseModel):
    """Base of the records: frozen and serialisable; what JSON has no number for (infinity) is a string there."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Size(Record):
    """Parameter counts of a model. ``prunable`` counts weights without biases, ``total`` every parameter once."""

    prunable: int
    total: int


class Perplexity(Record):
    """Token perplexity, and how it was measured.

    ``tokens`` counts the scored targets; ``nll`` is their mean negative log-likelihood in nats, averaged over windows.
    ``bos`` says whether each window begins with the token that begins a text.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int
    stride: int
    data: str
    precision: str
    bos: bool = False


class TaskMetric(Record):
    """One metric of a task; the standard error is known where the metric is a mean over the samples."""

    value: float
    stderr: float | None


class TaskScore(Record):
    """What one task gave.

    ``metrics`` are by lm-eval's names, followed by ``,filter`` where the task filters its answers. ``accuracy`` names
    the one that enters the mean over the tasks; None: none of them is an accuracy. The ``shots`` solved examples before
    each question are drawn from ``examples`` documents, of which ``examples_measured`` are measured themselves.
    """

    task: str
    version: str
    metrics: dict[str, TaskMetric]
    accuracy: str | None
    shots: int
    examples: int = 0
    examples_measured: int = 0
    samples: int
    samples_total: int


class TaskFailure(Record):
    """A task that could not be measured, and why."""

    task: str
    cause: str
    remedy: str


class TaskScores(Record):
    """What the tasks of lm-eval gave, and how they were measured.

    ``mean`` is the plain mean of the accuracies of those tasks that have one and did not fail; each task counts the
    same. None: there is none. ``seed`` is that of the solved examples and of all else that a task draws;
    ``chat_template``: questions and examples were put into the tokenizer's.
    """

    scores: tuple[TaskScore, ...]
    failures: tuple[TaskFailure, ...]
    mean: float | None
    limit: int | None
    batch_size: int
    seed: int
    chat_template: bool = False
    precision: str
    lm_eval: str


class Evaluation(Record):
    """What ``llm-surgeon eval`` measured of a model; its ``--out`` is this record."""

    model: str
    perplexity: Perplexity | None
    tasks: TaskScores | None


class LayerRecord(Record):
    """What is left of one linear layer: kept and original rows and columns, and the weights that are not zero."""

    name: str
    block: int
    kind: str
    rows: int
    columns: int
    rows_dense: int
    columns_dense: int
    weights: int

    @property
    def weights_dense(self) -> int:
        """Weights of the dense layer."""
        return self.rows_dense * self.columns_dense

    @property
    def kept(self) -> float:
        """Kept fraction of the layer's weights."""
        return self.weights / self.weights_dense


class CostHistogram(Record):
    """How the scores of everything that could be removed in a shot are distributed, and which of it went.

    Attributes:
        score: What was ranked by, for the axis: ``cost per weight freed`` or ``cost``.
        exponents: ``bins + 1`` edges of the bins, as powers of ten, ascending.
        kept: Per bin, candidates that stayed.
        removed: Per bin, candidates that went, for their own score or because a partner did.
        outside: Candidates without a place on a logarithmic axis, with a score of zero.
        threshold: The largest score removed.
    """

    score: str
    exponents: tuple[float, ...]
    kept: tuple[int, ...]
    removed: tuple[int, ...]
    outside: int
    threshold: float


class CorrectionRecord(Record):
    """First-order corrections after a shot: steps taken, and the mean loss in nats of the first and last of them."""

    steps: int
    first_loss: float
    last_loss: float


class ReconstructionRecord(Record):
    """Reconstruction after a shot; with cross-fitting, means over the models of both halves of the text.

    ``relative_error`` is that of the stream behind the last block, relative to the dense model's stream; by ``scale``
    the last norm was multiplied.
    """

    relative_error: float
    scale: float = 1.0


class GatesRecord(Record):
    """Gates set after a shot: how many, in how many steps, and the largest relative change of one.

    With cross-fitting the numbers are means over both models, each with the half that its reconstruction did not see.

    Losses are mean ones of the calibration text in nats: before the first step, and after the last one by the parabola
    that gave its length; None if the model has no gates. ``damping`` is that of the first step, as a fraction of the
    mean of the diagonal of the gates' Fisher; None without gates, and in records of versions that did not tell.
    """

    gates: int
    steps: int
    first_loss: float | None
    last_loss: float | None
    largest_change: float
    damping: float | None = None


class ShotRecord(Record):
    """One shot: what it aimed at, what it removed, what it cost. Times are seconds.

    ``peaks`` holds the peak bytes of each phase: of the device if it is a GPU, else resident in the process.
    ``profile`` divides ``seconds`` by what was done: model pass, factor sums, decomposition, transfers and so on.
    ``threshold`` and ``costs`` are None for layer-wise methods, which compare nothing across layers.
    """

    shot: int
    target_sparsity: float
    sparsity: float
    size: Size
    threshold: float | None
    structures_removed: int
    structures_implied: int
    loss: float | None
    curvature_seconds: float
    selection_seconds: float
    update_seconds: float
    evaluation_seconds: float
    perplexity: Perplexity | None
    correction_seconds: float = 0.0
    correction: CorrectionRecord | None = None
    reconstruction_seconds: float = 0.0
    reconstruction: ReconstructionRecord | None = None
    gates_seconds: float = 0.0
    gates: GatesRecord | None = None
    costs: CostHistogram | None = None
    peaks: dict[str, int] = {}
    profile: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Time of the shot itself, without the evaluation that reports on it."""
        pruning = self.curvature_seconds + self.selection_seconds + self.update_seconds
        return pruning + self.reconstruction_seconds + self.gates_seconds + self.correction_seconds


class Speed(Record):
    """Tokens per second of one model: prefill of ``prompt`` tokens, then decoding with its cache; medians."""

    prefill: float
    decode: float
    prompt: int
    generated: int
    batch: int
    repeats: int
    device: str
    dtype: str


class SpeedComparison(Record):
    """Dense and pruned model timed in alternating pairs; the ratios are medians over the pairs.

    The limits are what prefill could gain by its multiplications, and decoding by the weights it reads.
    """

    dense: Speed
    pruned: Speed
    prefill_ratio: float
    decode_ratio: float
    prefill_limit: float | None = None
    decode_limit: float | None = None


class Memory(Record):
    """Peak resident bytes of the process, and the floor that no run of this kind can go below."""

    peak: int
    model: int
    factors: int

    @property
    def floor(self) -> int:
        """Weights of the dense model plus the largest set of factors held at once."""
        return self.model + self.factors


class ExportRecord(Record):
    """Where the export is, how large it is, and how far its reloaded logits are from the model in memory.

    ``plain`` says whether transformers loads it without running code of the checkpoint.
    """

    path: str
    weight_bytes: int
    dense_weight_bytes: int
    max_logit_difference: float
    logit_scale: float
    plain: bool = False


class TargetRecord(Record):
    """A target that was given instead of a sparsity, and what the result has: parameters, bytes or milliseconds."""

    target: str
    wanted: float
    reached: float


class PruneReport(Record):
    """Everything a run measured. ``report.json`` is this record; ``continued``: after which shots, if it was ended."""

    model: str
    family: str
    config: dict[str, Any]
    calibration: dict[str, Any]
    dense_size: Size
    dense_perplexity: Perplexity | None
    shots: tuple[ShotRecord, ...]
    layers: tuple[LayerRecord, ...]
    memory: Memory
    versions: dict[str, str]
    command: str | None = None
    export: ExportRecord | None = None
    target: TargetRecord | None = None
    speed: SpeedComparison | None = None
    plan: Plan | None = None
    continued: tuple[int, ...] = ()
    processes: int = 1

    @property
    def smaller(self) -> bool:
        """Whether the matrices have shrunk; otherwise removed weights are zeros in matrices of the old shape."""
        structure = str(self.config.get("structure", "rows-columns"))
        return structure != "unstructured" and Pattern.parse(structure) is None


class RunRecord(Record):
    """What a run in its directory works on, which the same command has to find again.

    Attributes:
        model: As it was named.
        files: What shows that the model is still the same: its files, or its revision on the hub.
        recipe: Every option as it was given.
        texts: Digest of the tokens.
        circumstances: Versions, device, threads and processes, on which the last bits of the weights depend.
        sparsity: What a target in milliseconds came to; None without one.
    """

    model: str
    files: dict[str, str]
    recipe: dict[str, Any]
    texts: str
    circumstances: dict[str, str]
    sparsity: float | None = None


class Setting(Record):
    """What all cells of a group of a comparison remove: single weights or rows and columns, and how much of them."""

    structure: str
    sparsity: float

    @property
    def label(self) -> str:
        """The setting in words; the sparsity of N:M is in its name."""
        return self.structure if Pattern.parse(self.structure) else f"{self.structure}, {100 * self.sparsity:g} %"


class DenseRecord(Record):
    """The dense model of a comparison; ``texts`` is the digest of the tokens that all cells are given."""

    perplexity: Perplexity
    calibration: dict[str, Any]
    texts: str
    versions: dict[str, str]


class CellMeasures(Record):
    """What one cell of a comparison measured.

    Attributes:
        perplexity: Of the pruned model.
        divergence: Mean of KL(dense || pruned) over the scored tokens, in nats.
        sparsity: Share of the dense model's prunable weights that are zero or gone in the pruned one.
        seconds: Time of the shots, without loading and evaluation.
        peak: Peak bytes while pruning: of the device if it is a GPU, else resident in the process.
        calibration: Where the calibration tokens come from.
        versions: Of what it ran on.
    """

    perplexity: Perplexity
    divergence: float
    sparsity: float
    seconds: float
    peak: int
    calibration: dict[str, Any]
    versions: dict[str, str]


class Failure(Record):
    """Why there is no result, and what can be done about it; the stack trace, and no remedy, if it was not foreseen."""

    cause: str
    remedy: str
    trace: str | None = None


class Cell(Record):
    """One variant under one setting; ``impossible`` is what the recipe refuses, and has none."""

    name: str
    variant: str
    setting: Setting
    model: str
    recipe: dict[str, Any] | None = None
    status: Literal["finished", "failed", "impossible"]
    measures: CellMeasures | None = None
    failure: Failure | None = None


class Comparison(Record):
    """A comparison of methods so far. ``comparison.json`` is this record; ``shared`` are the options of all cells."""

    model: str
    shared: dict[str, Any]
    dense: DenseRecord
    cells: tuple[Cell, ...]
    date: str
    command: str | None = None


class LayerKind(Record):
    """Prunable layers of one kind and shape; ``layers`` counts them."""

    kind: str
    layers: int
    rows: int
    columns: int

    @property
    def weights(self) -> int:
        """Weights of all of them, without biases."""
        return self.layers * self.rows * self.columns


class PlannedPhase(Record):
    """What one phase of a run will take: bytes at its peak, by what holds them, and seconds.

    ``device`` is empty if the run is on the CPU. ``reports`` says whether the peak of the phase enters that of the
    run's report, which begins with the loaded model and ends before the export.
    """

    name: str
    host: dict[str, int]
    device: dict[str, int]
    seconds: float
    reports: bool = True

    @property
    def host_bytes(self) -> int:
        """Bytes resident in the process."""
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        """Bytes of tensors on the GPU."""
        return sum(self.device.values())


class Plan(Record):
    """What a run will take and give, as far as it can be said before it. ``llm-surgeon plan --out`` is this record.

    Attributes:
        device: Where it is to run.
        kinds: What is pruned.
        dense_size: Before.
        size: After the last shot.
        dense_weight_bytes: Bytes of the dense weights as loaded.
        weight_bytes: Bytes of the weight files of the export.
        disk: Bytes of exports and checkpoints, at most at once.
        phases: In the order in which they first run; seconds are of all shots together.
        host_available: Bytes of memory that are free for the run, what this process has included.
        device_available: The same of the GPU; None without one.
        loaders: What can load the result.
        probed: Whether a batch was timed and measured; else time is that of a common machine.
        order: Of the passes, ``batch-major`` or ``layer-major``; what the recipe's ``auto`` comes to.
        store_host: Bytes of memory in which a layer-major run may let hidden states and factors wait; None: any.
        store_device: The same of the GPU.
        scratch: Bytes that will wait on disk in the meantime.
        streamed: Whether the weights of blocks are among them, and come one block at a time.
        processes: How many share the run; memory is that of each.
    """

    model: str
    family: str
    device: str
    kinds: tuple[LayerKind, ...]
    dense_size: Size
    size: Size
    dense_weight_bytes: int
    weight_bytes: int
    disk: int
    phases: tuple[PlannedPhase, ...]
    host_available: int
    device_available: int | None
    loaders: tuple[str, ...]
    probed: bool = False
    order: Literal["batch-major", "layer-major"] = "batch-major"
    store_host: int | None = None
    store_device: int | None = None
    scratch: int = 0
    streamed: bool = False
    processes: int = 1

    @property
    def host_peak(self) -> int:
        """Most bytes resident in the process, over all phases."""
        return max(phase.host_bytes for phase in self.phases)

    @property
    def device_peak(self) -> int:
        """Most bytes of tensors on the GPU, over all phases; 0 without one."""
        return max(phase.device_bytes for phase in self.phases)

    @property
    def peak(self) -> int:
        """What is to be compared with ``Memory.peak`` of the report."""
        reported = [phase for phase in self.phases if phase.reports]
        return max(phase.device_bytes if phase.device else phase.host_bytes for phase in reported)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(phase.seconds for phase in self.phases)

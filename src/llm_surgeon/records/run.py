"""Records of a run: the report, the export, and the identity that a continued run must have."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.records.base import Record
from llm_surgeon.records.evaluation import Perplexity, SpeedComparison
from llm_surgeon.records.plan import Plan
from llm_surgeon.records.shot import LayerRecord, ShotRecord, Size
from llm_surgeon.records.summary import summary_html, summary_text


class Memory(Record):
    """Peak resident bytes of the process, and the floor that no run of this kind can go below."""

    peak: int
    model: int
    factors: int

    @property
    def floor(self) -> int:
        """Weights of the dense model plus the largest set of factors held at once."""
        return self.model + self.factors


class FormatRecord(Record):
    """One format of an export: the size of its weight files, and how far its logits are from the model in memory.

    ``plain`` says whether its engine loads it without running code of the export. ``directory`` names the directory of
    its files inside that of the export, and is empty for what ``from_pretrained`` loads from the latter. ``loading``:
    lines of Python that load the files, with ``{place}`` for their directory.
    """

    name: str
    weight_bytes: int
    max_logit_difference: float
    logit_scale: float
    plain: bool
    directory: str = ""
    loading: tuple[str, ...] = ()


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
    formats: tuple[FormatRecord, ...] = ()

    @property
    def pretrained(self) -> bool:
        """Whether ``from_pretrained`` loads the directory of the export."""
        return not self.formats or any(not form.directory for form in self.formats)


class TargetRecord(Record):
    """A target that was given instead of a sparsity, and what the result has: parameters, bytes or milliseconds."""

    target: str
    wanted: float
    reached: float


class PruneReport(Record):
    """Everything a run measured. ``report.json`` is this record; ``continued``: after which shots, if it was ended.

    ``origin`` has what the dense model says of itself, as far as it is known: ``base_model``, ``license``,
    ``license_name``, ``license_link``, ``language``, ``datasets``.
    """

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
    origin: dict[str, str | list[str]] = Field(default_factory=dict)

    @property
    def smaller(self) -> bool:
        """Whether the matrices have shrunk; otherwise removed weights are zeros in matrices of the old shape."""
        structure = str(self.config.get("structure", "rows-columns"))
        return structure != "unstructured" and Pattern.parse(structure) is None

    def summary(self) -> str:
        """The result in a few lines of text: what is kept, perplexity, sizes, and speed if it was measured."""
        return summary_text(self)

    def _repr_html_(self) -> str:
        """The same as a table, as notebooks show it."""
        return summary_html(self)


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

"""Records of a run: the report, the export, and the identity that a continued run must have."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.records.base import Record
from llm_surgeon.records.evaluation import Perplexity, SpeedComparison
from llm_surgeon.records.plan import Plan
from llm_surgeon.records.recovery import RecoveryRecord
from llm_surgeon.records.samples import SampleComparison
from llm_surgeon.records.shot import LayerRecord, ShotRecord, Size
from llm_surgeon.records.summary import summary_html, summary_text


class Memory(Record):
    """Peak bytes of a run, and the bytes of dense model and factors, which such a run needs at least."""

    peak: int
    model: int
    factors: int

    @property
    def floor(self) -> int:
        """Bytes of the dense model's weights plus the largest factors that are held at once."""
        return self.model + self.factors


class FormatRecord(Record):
    """One format of an export: the size of its weight files, and the distance of its logits from the model in memory.

    ``failed`` is the message of an engine that computes something else from the files, which were removed then.
    ``needs`` says what has to be installed for the check, if it was not there.
    ``engine`` is the engine that loaded the files for that, with its version; the three are None if no engine is
    installed that could. ``plain`` says whether the format's engine loads it without running code of the export.
    ``directory`` names the directory of the files inside the export; it is empty if ``from_pretrained`` loads them from
    the export itself. ``loading`` has lines of Python that load the files, with ``{place}`` for their directory.
    """

    name: str
    weight_bytes: int
    max_logit_difference: float | None
    logit_scale: float | None
    plain: bool
    engine: str | None = None
    failed: str | None = None
    needs: str = ""
    directory: str = ""
    loading: tuple[str, ...] = ()


# Class in transformers that loads language models.
_LOADER = "AutoModelForCausalLM"


class ExportRecord(Record):
    """Path and size of the export, and the distance of its reloaded logits from the model in memory, if measured.

    ``plain`` says whether transformers loads the export without running code of the checkpoint. ``engines`` has
    sentences on the engines that load it, ``quantising`` on the quantised types of llama.cpp that its matrices fit.
    ``loader`` is the name of the class in transformers that loads it.
    """

    path: str
    weight_bytes: int
    dense_weight_bytes: int
    max_logit_difference: float | None
    logit_scale: float | None
    plain: bool = False
    formats: tuple[FormatRecord, ...] = ()
    engines: tuple[str, ...] = ()
    quantising: tuple[str, ...] = ()
    loader: str = _LOADER

    @property
    def written(self) -> tuple[FormatRecord, ...]:
        """Formats of the export; reports of former versions have none, as there was one only."""
        former = FormatRecord(
            name="hf",
            weight_bytes=self.weight_bytes,
            max_logit_difference=self.max_logit_difference,
            logit_scale=self.logit_scale,
            plain=self.plain,
        )
        return self.formats or (former,)

    @property
    def failures(self) -> tuple[str, ...]:
        """Messages of the formats whose engines compute something else than the model."""
        return tuple(form.failed for form in self.formats if form.failed)

    @property
    def reads_images(self) -> bool:
        """Whether the model is one for text and images."""
        return self.loader == "AutoModelForImageTextToText"

    @property
    def pretrained(self) -> bool:
        """Whether ``from_pretrained`` loads the directory of the export."""
        return not self.formats or any(not form.directory for form in self.formats)


class TargetRecord(Record):
    """A target in place of a sparsity, and the value that was reached: parameters, bytes or milliseconds."""

    target: str
    wanted: float
    reached: float


class PruneReport(Record):
    """Report of a run, with all that it measured. ``report.json`` is this record.

    ``continued`` has the shots after which an ended run was continued. ``samples`` are texts that were written later,
    and ``recovery`` is a training after pruning, before which all other figures were measured.
    ``origin`` has the dense model's own statements, as far as they are known: ``base_model``, ``license``,
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
    samples: SampleComparison | None = None
    recovery: RecoveryRecord | None = None
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
        """The result as a table, for notebooks."""
        return summary_html(self)


class RunRecord(Record):
    """Identity of a run in its directory: a run with another identity cannot continue it.

    Attributes:
        model: Name of the model, as it was given.
        files: Marks of the model's files, or its revision on the hub, by which a change is noticed.
        recipe: Every option, as it was given.
        texts: Digest of the tokens.
        circumstances: Versions, device, threads and processes, on which the last bits of the weights depend.
        sparsity: Sparsity for a target in milliseconds; None without such a target.
    """

    model: str
    files: dict[str, str]
    recipe: dict[str, Any]
    texts: str
    circumstances: dict[str, str]
    sparsity: float | None = None

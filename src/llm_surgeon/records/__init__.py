"""Records of runs: plain data with a JSON form, and no behaviour beyond arithmetic on their own fields."""

from __future__ import annotations

from llm_surgeon.records.base import Failure, Record
from llm_surgeon.records.comparison import Cell, CellMeasures, Comparison, DenseRecord, Setting
from llm_surgeon.records.evaluation import (
    Evaluation,
    Perplexity,
    SourcePerplexity,
    Speed,
    SpeedComparison,
    TaskFailure,
    TaskMetric,
    TaskScore,
    TaskScores,
)
from llm_surgeon.records.mark import DoneFit, FitMark, NoWords, RemovalMark, Spent
from llm_surgeon.records.plan import LayerKind, Plan, PlannedPhase
from llm_surgeon.records.recovery import (
    RecoveryCurves,
    RecoveryIdentity,
    RecoveryLoss,
    RecoveryPoint,
    RecoveryRecord,
    RecoverySource,
)
from llm_surgeon.records.run import ExportRecord, FormatRecord, Memory, PruneReport, RunRecord, TargetRecord
from llm_surgeon.records.samples import Continuation, ExportComparison, ExportMeasures, SampleComparison, Samples
from llm_surgeon.records.shot import CostHistogram, Figure, LayerRecord, ShotRecord, Size, StageRecord

__all__ = [
    "Cell",
    "CellMeasures",
    "Comparison",
    "Continuation",
    "CostHistogram",
    "DenseRecord",
    "DoneFit",
    "Evaluation",
    "ExportComparison",
    "ExportMeasures",
    "ExportRecord",
    "Failure",
    "Figure",
    "FitMark",
    "FormatRecord",
    "LayerKind",
    "LayerRecord",
    "Memory",
    "NoWords",
    "Perplexity",
    "Plan",
    "PlannedPhase",
    "PruneReport",
    "Record",
    "RecoveryCurves",
    "RecoveryIdentity",
    "RecoveryLoss",
    "RecoveryPoint",
    "RecoveryRecord",
    "RecoverySource",
    "RemovalMark",
    "RunRecord",
    "SampleComparison",
    "Samples",
    "Setting",
    "ShotRecord",
    "Size",
    "SourcePerplexity",
    "Speed",
    "SpeedComparison",
    "Spent",
    "StageRecord",
    "TargetRecord",
    "TaskFailure",
    "TaskMetric",
    "TaskScore",
    "TaskScores",
]

"""llm-surgeon: makes pretrained language models really smaller, by second-order pruning.

Public names: ``prune`` (a model in memory), ``prune_checkpoint`` (a checkpoint into an export), ``export_as`` (an
export in further formats), ``dequantize`` (a checkpoint in 16 bits), ``evaluate``, ``evaluate_tasks``, ``plan`` (what
a run will take), ``load``, ``recover`` (training after pruning), ``compare`` (methods on identical tokens),
``compare_exports`` (models on the same text), ``sample`` (what models write), ``write_chats``, ``push`` (an export to
the hub), ``bench``, ``PruneConfig``, ``RecoverConfig``, ``Setting``, ``PruneReport``, ``RecoveryRecord``, ``Plan``,
``Perplexity``, ``TaskScores``, ``Comparison``, ``ExportComparison``, ``SampleComparison``, ``Bench``;
``register_family`` with ``Family``, ``Residual`` and the kinds of parts ``Attention``, ``JointlyNormedAttention``,
``FeedForward``, ``MixtureOfExperts`` and ``PlainLayers`` (an architecture of one's own);
and ``SurgeonError``, the base of all errors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_surgeon.benchmark.measuring import bench
    from llm_surgeon.comparison.compare import compare
    from llm_surgeon.errors import SurgeonError
    from llm_surgeon.evaluation.tasks import evaluate_tasks
    from llm_surgeon.models import register_family
    from llm_surgeon.models.family import Family, Residual
    from llm_surgeon.models.loading import load
    from llm_surgeon.models.parts import (
        Attention,
        FeedForward,
        JointlyNormedAttention,
        MixtureOfExperts,
        PlainLayers,
    )
    from llm_surgeon.recipe.config import PruneConfig
    from llm_surgeon.recipe.recovery import RecoverConfig
    from llm_surgeon.records import (
        Comparison,
        ExportComparison,
        Perplexity,
        Plan,
        PruneReport,
        RecoveryRecord,
        SampleComparison,
        Setting,
        TaskScores,
    )
    from llm_surgeon.records.bench import Bench
    from llm_surgeon.run.chats import write_chats
    from llm_surgeon.run.compare_exports import compare_exports
    from llm_surgeon.run.convert import export_as
    from llm_surgeon.run.dequantising import dequantize
    from llm_surgeon.run.recover import recover
    from llm_surgeon.run.run import evaluate, plan, prune, prune_checkpoint
    from llm_surgeon.run.sampling import sample
    from llm_surgeon.run.upload import push
    from llm_surgeon.system.progress import Progress, RichProgress, SilentProgress

__version__ = "0.1.0"
__all__ = [
    "Attention",
    "Bench",
    "Comparison",
    "ExportComparison",
    "Family",
    "FeedForward",
    "JointlyNormedAttention",
    "MixtureOfExperts",
    "Perplexity",
    "PlainLayers",
    "Plan",
    "Progress",
    "PruneConfig",
    "PruneReport",
    "RecoverConfig",
    "RecoveryRecord",
    "Residual",
    "RichProgress",
    "SampleComparison",
    "Setting",
    "SilentProgress",
    "SurgeonError",
    "TaskScores",
    "bench",
    "compare",
    "compare_exports",
    "dequantize",
    "evaluate",
    "evaluate_tasks",
    "export_as",
    "load",
    "plan",
    "prune",
    "prune_checkpoint",
    "push",
    "recover",
    "register_family",
    "sample",
    "write_chats",
]

# Imported on first use: `llm-surgeon --help` and a mistyped option should not wait for torch and transformers.
_HOMES = {
    "Attention": "models.parts",
    "Bench": "records.bench",
    "Comparison": "records",
    "ExportComparison": "records",
    "Family": "models.family",
    "FeedForward": "models.parts",
    "JointlyNormedAttention": "models.parts",
    "MixtureOfExperts": "models.parts",
    "PlainLayers": "models.parts",
    "Perplexity": "records",
    "Plan": "records",
    "Progress": "system.progress",
    "PruneConfig": "recipe.config",
    "PruneReport": "records",
    "RecoverConfig": "recipe.recovery",
    "RecoveryRecord": "records",
    "Residual": "models.family",
    "RichProgress": "system.progress",
    "SampleComparison": "records",
    "Setting": "records",
    "SilentProgress": "system.progress",
    "SurgeonError": "errors",
    "TaskScores": "records",
    "bench": "benchmark.measuring",
    "compare": "comparison.compare",
    "compare_exports": "run.compare_exports",
    "dequantize": "run.dequantising",
    "evaluate": "run.run",
    "evaluate_tasks": "evaluation.tasks",
    "export_as": "run.convert",
    "load": "models.loading",
    "plan": "run.run",
    "prune": "run.run",
    "prune_checkpoint": "run.run",
    "push": "run.upload",
    "recover": "run.recover",
    "register_family": "models",
    "sample": "run.sampling",
    "write_chats": "run.chats",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""llm-surgeon: makes pretrained language models really smaller, by second-order pruning.

Public names: ``prune`` (a model in memory), ``prune_checkpoint`` (a checkpoint into an export), ``evaluate``,
``evaluate_tasks``, ``load``, ``compare`` (methods on identical tokens), ``bench`` (speed and memory), ``PruneConfig``,
``Setting``, ``PruneReport``, ``Perplexity``, ``TaskScores``, ``Comparison``, ``Bench``, and
``SurgeonError``, the base of all errors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_surgeon.config import PruneConfig
    from llm_surgeon.errors import SurgeonError
    from llm_surgeon.evaluation.bench import bench
    from llm_surgeon.evaluation.bench_records import Bench
    from llm_surgeon.evaluation.tasks import evaluate_tasks
    from llm_surgeon.models.loading import load
    from llm_surgeon.pipeline.comparison import compare
    from llm_surgeon.pipeline.run import evaluate, prune, prune_checkpoint
    from llm_surgeon.records import Comparison, Perplexity, PruneReport, Setting, TaskScores

__version__ = "0.1.0"
__all__ = [
    "Bench",
    "Comparison",
    "Perplexity",
    "PruneConfig",
    "PruneReport",
    "Setting",
    "SurgeonError",
    "TaskScores",
    "bench",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "load",
    "prune",
    "prune_checkpoint",
]

# Imported on first use: `llm-surgeon --help` and a mistyped option should not wait for torch and transformers.
_HOMES = {
    "Bench": "evaluation.bench_records",
    "Comparison": "records",
    "Perplexity": "records",
    "PruneConfig": "config",
    "PruneReport": "records",
    "Setting": "records",
    "SurgeonError": "errors",
    "TaskScores": "records",
    "bench": "evaluation.bench",
    "compare": "pipeline.comparison",
    "evaluate": "pipeline.run",
    "evaluate_tasks": "evaluation.tasks",
    "load": "models.loading",
    "prune": "pipeline.run",
    "prune_checkpoint": "pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

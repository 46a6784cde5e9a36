"""llm-surgeon: makes pretrained language models really smaller, by second-order pruning.

Public names: ``prune`` (a model in memory), ``prune_checkpoint`` (a checkpoint into an export), ``evaluate``,
``evaluate_tasks``, ``plan`` (what a run will take), ``load``, ``compare`` (methods on identical tokens),
``PruneConfig``, ``Setting``, ``PruneReport``, ``Plan``, ``Perplexity``, ``TaskScores``, ``Comparison``, and
``SurgeonError``, the base of all errors.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_surgeon.config import PruneConfig
    from llm_surgeon.errors import SurgeonError
    from llm_surgeon.evaluation.tasks import evaluate_tasks
    from llm_surgeon.models.loading import load
    from llm_surgeon.pipeline.comparison import compare
    from llm_surgeon.pipeline.run import evaluate, prune, prune_checkpoint
    from llm_surgeon.planning.plan import plan
    from llm_surgeon.records import Comparison, Perplexity, Plan, PruneReport, Setting, TaskScores

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "Perplexity",
    "Plan",
    "PruneConfig",
    "PruneReport",
    "Setting",
    "SurgeonError",
    "TaskScores",
    "compare",
    "evaluate",
    "evaluate_tasks",
    "load",
    "plan",
    "prune",
    "prune_checkpoint",
]

# Imported on first use: `llm-surgeon --help` and a mistyped option should not wait for torch and transformers.
_HOMES = {
    "Comparison": "records",
    "Perplexity": "records",
    "Plan": "records",
    "PruneConfig": "config",
    "PruneReport": "records",
    "Setting": "records",
    "SurgeonError": "errors",
    "TaskScores": "records",
    "compare": "pipeline.comparison",
    "evaluate": "pipeline.run",
    "evaluate_tasks": "evaluation.tasks",
    "load": "models.loading",
    "plan": "planning.plan",
    "prune": "pipeline.run",
    "prune_checkpoint": "pipeline.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

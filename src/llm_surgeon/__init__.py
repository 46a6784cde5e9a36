"""llm-surgeon: makes pretrained language models really smaller, by second-order pruning.

Public names: ``prune`` (a model in memory), ``prune_checkpoint`` (a checkpoint into an export), ``evaluate``, ``load``,
``PruneConfig``, ``PruneReport``, and the errors.
"""

from llm_surgeon.config import PruneConfig
from llm_surgeon.errors import SurgeonError
from llm_surgeon.models.loading import load
from llm_surgeon.pipeline.run import evaluate, prune, prune_checkpoint
from llm_surgeon.records import Perplexity, PruneReport

__all__ = [
    "Perplexity",
    "PruneConfig",
    "PruneReport",
    "SurgeonError",
    "evaluate",
    "load",
    "prune",
    "prune_checkpoint",
]
__version__ = "0.1.0"

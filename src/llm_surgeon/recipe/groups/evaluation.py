"""Options of the evaluation text, on which perplexity is measured."""

from __future__ import annotations

from pydantic import Field

from llm_surgeon.recipe.groups.base import MANY, Options, TextSources
from llm_surgeon.recipe.sources import NONE


class EvaluationOptions(Options):
    """The evaluation text, and the consecutive windows in which perplexity is measured."""

    evaluation: TextSources | None = Field(
        None,
        description="Text to measure perplexity on, or several, each as TEXT:SHARE; unset: held-out text of each "
        "calibration source, none: skip.",
    )
    eval_window: int = Field(1024, ge=2, le=MANY, description="Tokens per evaluation window.")
    eval_tokens: int = Field(20_480, ge=2, le=MANY, description="Evaluation tokens, at most.")

    @property
    def evaluates(self) -> bool:
        """Whether perplexity is measured."""
        return self.evaluation != (NONE,)

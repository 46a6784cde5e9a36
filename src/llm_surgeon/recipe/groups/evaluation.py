"""Options of the evaluation text, on which perplexity is measured."""

from __future__ import annotations

from pydantic import Field

from llm_surgeon.recipe.groups.base import MANY, Options, TextSource


class EvaluationOptions(Options):
    """The evaluation text, and the consecutive windows in which perplexity is measured."""

    evaluation: TextSource | None = Field(
        None, description="Text to measure perplexity on; unset: held-out text of the calibration source, none: skip."
    )
    eval_window: int = Field(1024, ge=2, le=MANY, description="Tokens per evaluation window.")
    eval_tokens: int = Field(20_480, ge=2, le=MANY, description="Evaluation tokens, at most.")

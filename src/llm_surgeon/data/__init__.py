"""Text to calibrate and evaluate on: corpora, the embedded demo assets, and blocks of tokens with their provenance.

This package knows tokenizers and no models, but for the demo model, which is only fetched and converted here.
"""

from llm_surgeon.data.corpora import Corpus, load_corpus
from llm_surgeon.data.demo import demo_corpus, demo_model
from llm_surgeon.data.tokens import CalibrationTokens, evaluation_tokens, sample_calibration

__all__ = [
    "CalibrationTokens",
    "Corpus",
    "demo_corpus",
    "demo_model",
    "evaluation_tokens",
    "load_corpus",
    "sample_calibration",
]

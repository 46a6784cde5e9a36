"""Every option is measured or explained somewhere: one that nothing names has no reason to be there."""

import re
from pathlib import Path

import pytest

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.wording import flag

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def _named(name):
    """Forms in which a document or a program names an option, and in which no other word of a text is."""
    word = flag(name).removeprefix("--")
    return re.compile(rf"--(no-)?{word}(?![\w-])|`{name}[`:=]|\"{name}\"|(?<!\w){name}=|^ +{name}: ", re.MULTILINE)


@pytest.mark.parametrize("name", PruneConfig.model_fields)
def test_every_option_is_named_in_a_document_or_a_benchmark(name):
    named = _named(name)
    assert any(named.search(path.read_text(encoding="utf8")) for path in (*DOCUMENTS, *BENCHMARKS))


def test_words_that_name_no_option_do_not_count():
    for text in ("the order of the weights", "--samples-of", "`samples_of`", "resamples=3"):
        assert not any(_named(name).search(text) for name in ("order", "weights", "samples"))

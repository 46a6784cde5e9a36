"""What the documentation shows is run."""

import re
from pathlib import Path

import pytest
import torch
from transformers import OlmoConfig, OlmoForCausalLM

from llm_surgeon import PruneConfig, prune
from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.scores import SCORES
from llm_surgeon.models import FAMILIES, examine, family_of
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.recipe.methods import LAYERWISE
from tiny import build, llama_like, tokenizer

DOCS = Path(__file__).parent.parent / "docs"


def test_the_example_of_a_new_score_works(text_file, monkeypatch):
    text = (DOCS / "layerwise.md").read_text(encoding="utf8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 5
    text_file.rename(text_file.with_name("my-text.txt"))
    monkeypatch.chdir(text_file.parent)
    model = build("llama")
    # Windows of 1,024 tokens are too long for the tiny model.
    names = {"model": model, "tokenizer": tokenizer()}
    try:
        exec(example.replace("samples=32", 'samples=32, evaluation="none"'), names)
        assert "squared" in LAYERWISE
    finally:
        LAYERWISE.pop("squared", None)
        SCORES.pop("squared", None)
    assert names["report"].shots[0].sparsity == 0.5
    for layer in examine(model, family_of("llama")).layers.values():
        assert int((read_matrix(model, layer) == 0).sum()) == layer.rows * layer.columns // 2


def test_the_table_has_every_layerwise_method():
    text = (DOCS / "layerwise.md").read_text(encoding="utf8")
    for name, row in LAYERWISE.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
        scope = {"global": "all layers", None: "its blocks"}.get(row.scope, row.scope)
        assert line.endswith(f"| {scope} |")


def test_the_example_of_a_family_works(text_file, tmp_path):
    """Real OLMo, which the package has no entry for: pruned, exported as a plain class, reloaded by a stranger."""
    text = (DOCS / "families.md").read_text(encoding="utf8")
    example, check = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    with pytest.raises(UnsupportedModelError, match="'olmo'"):
        family_of("olmo")
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = llama_like(OlmoConfig, OlmoForCausalLM, **ids).eval()
    recipe = PruneConfig(
        structure="neurons+heads", uniform=True, round_to=4, sparsity=0.4, shots=2, samples=8, seq_len=16,
        calibration=str(text_file), evaluation="none", precision="float32",
    )  # fmt: skip
    try:
        names = {}
        exec(example, names)
        exec(check, names)
        report = prune(model, tokenizer(), recipe, out=tmp_path / "out")
        with pytest.raises(ValueError, match="there is a family 'olmo' already"):
            exec(example, {})
    finally:
        FAMILIES.pop("olmo", None)
    assert report.export.plain
    assert 0.3 < report.shots[-1].sparsity <= 0.4

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.report.card import is_hub_id, model_card
from llm_surgeon.report.table import markdown_table
from report.test_table import sample_report


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    values = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(values, dict)
    return values


def fenced(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, re.DOTALL)


def test_front_matter_is_what_the_hub_reads() -> None:
    front = front_matter(model_card(sample_report()))
    assert front["library_name"] == "transformers"
    assert front["pipeline_tag"] == "text-generation"
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert "llama" in front["tags"]


def test_a_local_model_names_no_base_model_and_no_directory() -> None:
    card = model_card(sample_report(model="/home/someone/models/mine", command=None))
    assert "base_model" not in front_matter(card)
    assert "# mine, pruned" in card
    assert "/home/someone" not in card


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("meta-llama/Llama-2-7b-hf", True),
        ("demo", False),
        ("./models", False),
        ("../models/x", False),
        ("/models/x", False),
        ("a/b/c", False),
        ("owner/na me", False),
    ],
)
def test_is_hub_id(model: str, expected: bool) -> None:
    assert is_hub_id(model) == expected


def test_an_existing_directory_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert is_hub_id("owner/name")
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("owner/name")


def test_recipe_in_the_card_runs_again() -> None:
    report = sample_report()
    recipe, calibration = fenced(model_card(report), "yaml")
    assert PruneConfig.from_mapping(yaml.safe_load(recipe)) == PruneConfig.from_mapping(report.config)
    assert yaml.safe_load(calibration) == report.calibration


def test_card_says_how_to_load_and_where_it_is_from() -> None:
    report = sample_report()
    card = model_card(report)
    (loading,) = fenced(card, "python")
    ast.parse(loading)
    assert "AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)" in loading
    assert "llm_surgeon" not in loading
    assert [block.strip() for block in fenced(card, "bash")] == [report.command]
    assert markdown_table(report) in card
    assert "- torch 2.13.0\n" in card
    assert "by 2.0e-05 at most" in card
    assert "peak of 3.200 GB" in card
    assert "2312.17244" in card


def test_card_without_export_claims_no_reload() -> None:
    assert "Loaded again" not in model_card(sample_report(export=None))


@pytest.mark.parametrize(("method", "source"), [("wanda", "Sun et al."), ("surgeon", "vanderouderaa2024llmsurgeon")])
def test_the_card_names_the_source_of_its_method(method: str, source: str) -> None:
    config = PruneConfig(method=method).model_dump(mode="json")
    assert source in model_card(sample_report().model_copy(update={"config": config}))

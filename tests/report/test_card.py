from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.report.card import is_hub_id, model_card
from llm_surgeon.report.loading import loading_lines
from llm_surgeon.report.table import dense_and_pruned, escape, footnotes, markdown_rows
from report.test_table import sample_report, shot


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


def test_front_matter_has_what_the_dense_model_says_of_itself() -> None:
    origin = {
        "license": "other", "license_name": "own", "license_link": "LICENSE", "language": ["en", "no"],
        "datasets": ["a/b", "c"],
    }  # fmt: skip
    front = front_matter(model_card(sample_report(origin=origin)))
    assert {key: front[key] for key in origin} == origin
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M"
    assert set(front_matter(model_card(sample_report()))) == {"library_name", "pipeline_tag", "tags", "base_model"}


def test_front_matter_names_the_structure_and_the_calibration_set() -> None:
    config = PruneConfig(preset="none", structure="neurons+heads", calibration="owner/texts:small:train").resolved()
    front = front_matter(model_card(sample_report(config=config, origin={"datasets": "c"})))
    assert front["tags"] == ["llm-surgeon", "pruned", "neurons", "heads", "llama"]
    assert front["datasets"] == ["c", "owner/texts"]
    column = PruneConfig(preset="none", calibration="owner/texts:small#answer").resolved()
    assert front_matter(model_card(sample_report(config=column)))["datasets"] == ["owner/texts"]
    for name in ("owner/texts.jsonl", "owner/texts.jsonl#answer", "texts#1.jsonl"):
        local = PruneConfig(preset="none", calibration=name).resolved()
        assert "datasets" not in front_matter(model_card(sample_report(config=local)))


def test_the_demo_has_the_name_of_its_model() -> None:
    base = "HuggingFaceTB/SmolLM2-135M-Instruct"
    card = model_card(sample_report(model="demo", origin={"base_model": base}))
    assert "# SmolLM2-135M-Instruct, pruned\n" in card
    assert front_matter(card)["base_model"] == base
    assert "# demo, pruned\n" in model_card(sample_report(model="demo"))


def test_a_hub_model_is_its_own_base() -> None:
    card = model_card(sample_report(origin={"base_model": "someone/older"}))
    assert front_matter(card)["base_model"] == "HuggingFaceTB/SmolLM2-135M"


def test_what_was_done_is_two_sentences_and_the_recipe_a_link() -> None:
    report = sample_report()
    card = model_card(report)
    done = card.split(", pruned\n\n")[1].split("\n\n")[0]
    assert done.count(". ") + done.endswith(".") == 2
    assert "in 2 shots, until 50.0 % of the prunable weights were left" in done
    assert "in one shot," in model_card(report.model_copy(update={"shots": (shot(1, 0.5, None),)}))
    assert "[recipe.yaml](recipe.yaml)" in card
    assert "dampening" not in card
    (calibration,) = fenced(card, "yaml")
    assert yaml.safe_load(calibration) == report.calibration


def test_card_says_how_to_load_and_where_it_is_from() -> None:
    report = sample_report()
    card = model_card(report)
    (loading,) = fenced(card, "python")
    ast.parse(loading)
    place = '"path/to/this/directory"'
    assert loading.splitlines()[:3] == loading_lines(report, place)
    assert f"AutoModelForCausalLM.from_pretrained({place}, trust_remote_code=True)" in loading
    assert "llm_surgeon" not in loading
    assert card.index("## Loading") < card.index("## Dense and pruned") < card.index("## Limits")
    assert [block.strip() for block in fenced(card, "bash")] == [report.command]
    assert "\n".join(markdown_rows(("", "dense", "pruned", "pruned to dense"), dense_and_pruned(report))) in card
    assert all(f"- {escape(note)}\n" in card for note in footnotes(report))
    assert "torch 2.13.0" in card
    assert "by 2.0e-05 at most" in card
    assert "peak of 3.200 GB" in card
    assert "2312.17244" in card


def test_only_what_needs_code_asks_for_trust() -> None:
    report = sample_report()
    assert report.export is not None
    plain = report.model_copy(update={"export": report.export.model_copy(update={"plain": True})})
    zeros = sample_report(config=PruneConfig(preset="none", structure="unstructured").resolved())
    for trusting, expected in ((report, True), (plain, False), (zeros, False)):
        assert ("trust_remote_code" in "".join(loading_lines(trusting, "'x'"))) == expected
        assert ("trust_remote_code" in model_card(trusting)) == expected


def test_names_in_the_notes_are_not_read_as_markdown() -> None:
    card = model_card(sample_report())
    assert r"layers\\.0\\..\*" in card
    assert r"held out \[en\]" in card


def test_card_without_export_claims_no_reload() -> None:
    assert "Loaded again" not in model_card(sample_report(export=None))


@pytest.mark.parametrize(("method", "source"), [("wanda", "Sun et al."), ("surgeon", "vanderouderaa2024llmsurgeon")])
def test_the_card_names_the_source_of_its_method(method: str, source: str) -> None:
    config = PruneConfig(method=method).model_dump(mode="json")
    assert source in model_card(sample_report().model_copy(update={"config": config}))

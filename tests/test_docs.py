"""Documents hold: examples run, links and cited files exist, pages stay short."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from transformers import OlmoConfig, OlmoForCausalLM

from llm_surgeon import PruneConfig, prune
from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.scores import SCORES
from llm_surgeon.models import FAMILIES, examine, family_of
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.recipe.methods import LAYERWISE
from llm_surgeon.testing import check_family
from tiny import build, llama_like, of_class, tokenizer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted(DOCS.glob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES, *sorted(RESULTS.glob("*.md"))]
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
# Most lines of a page, and of pages without a bound of their own.
LINES = {"after-pruning.md": 200, "experiments.md": 120, "results.md": 290}
OTHER_LINES = 180


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
    example, check, mixture = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
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
        exec(mixture, names)
        check_family(names["olmoe"], of_class("Olmoe", hidden_size=32, num_experts=4, num_experts_per_tok=2))
    finally:
        FAMILIES.pop("olmo", None)
        FAMILIES.pop("olmoe", None)
    assert report.export.plain
    assert 0.3 < report.shots[-1].sparsity <= 0.4


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf8")


def links_of(document: Path) -> list[str]:
    """Targets of links and pictures that lie in this repository, code left out."""
    prose = re.sub(r"```.*?```|`[^`]*`", "", text_of(document), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", prose)
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def linked_files() -> set[Path]:
    """Files that any document links to or shows."""
    return {(page.parent / target.partition("#")[0]).resolve() for page in DOCUMENTS for target in links_of(page)}


def anchors_of(document: Path) -> set[str]:
    """Names of a page's sections, as links have them."""
    prose = re.sub(r"```.*?```", "", text_of(document), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links_lead_to_files_and_sections(document):
    for target in links_of(document):
        name, _, section = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), target
        assert not section or section in anchors_of(path), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_cited_files_exist(document):
    """Whole paths, and ends of paths of the package such as `curvature/kfac.py`."""
    text = text_of(document)
    for name in re.findall(r"(?<![\w/.-])((?:benchmarks|docs|src|tests)/[\w./-]+\.\w+)", text):
        assert (ROOT / name).exists(), name
    modules = [path.as_posix() for path in (ROOT / "src").rglob("*.py")]
    for name in re.findall(r"`((?!benchmarks/|docs/|src/|tests/)[\w/]+\.py)`", text):
        assert any(module.endswith(f"/{name}") for module in modules), name


def test_every_result_is_cited_and_every_kept_picture_shown():
    linked = linked_files()
    kept = re.findall(r"^!(.+\.png)$", text_of(RESULTS / ".gitignore"), flags=re.MULTILINE)
    for path in [*RESULTS.glob("*.md"), *(RESULTS / name for name in kept)]:
        assert path.exists(), path
        assert path in linked, path
    for target in linked:
        assert target.parent != RESULTS or target.suffix != ".png" or target.name in kept, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_stay_short(page):
    assert len(text_of(page).splitlines()) <= LINES.get(page.name, OTHER_LINES)


def test_the_readme_or_a_page_links_to_every_page():
    assert set(PAGES) <= linked_files()


def test_citation_is_of_this_version_and_licence():
    citation = yaml.safe_load(text_of(ROOT / "CITATION.cff"))
    project = tomllib.loads(text_of(ROOT / "pyproject.toml"))["project"]
    assert (citation["title"], citation["version"], citation["license"]) == (
        project["name"],
        project["version"],
        project["license"],
    )
    assert [reference["year"] for reference in citation["references"]] == [2024, 2025]

"""The mathematics knows nothing of models, files or logs of a run."""

import ast
from pathlib import Path

import pytest

import llm_surgeon

SOURCE = Path(llm_surgeon.__file__).parent
ALLOWED = {
    "costs.py": {"llm_surgeon.linalg"},
    "bundles.py": {"llm_surgeon.selection"},
    "selection.py": set(),
    "updates.py": {"llm_surgeon.linalg"},
    "linalg.py": {"llm_surgeon.errors"},
    "element_selection.py": {"llm_surgeon.pattern", "math"},
    "fisher.py": {
        *("llm_surgeon.costs", "llm_surgeon.kronecker_sum", "llm_surgeon.linalg", "llm_surgeon.selection"),
        *("llm_surgeon.updates", "llm_surgeon.stopwatch"),
    },
    "kronecker_sum.py": {"llm_surgeon.linalg", "llm_surgeon.errors"},
    "nearest_kronecker.py": set(),
    "refinement.py": set(),
    "channel_permutation.py": {"llm_surgeon.pattern", "scipy.optimize"},
}
STANDARD = {"__future__", "collections.abc", "dataclasses", "functools", "logging", "math", "typing", "torch"}


@pytest.mark.parametrize("name", ALLOWED)
def test_pure_modules_import_torch_and_each_other_only(name):
    imported = set()
    for node in ast.walk(ast.parse((SOURCE / name).read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported <= STANDARD | ALLOWED[name]


def test_the_modelling_file_of_exports_needs_torch_only():
    text = (SOURCE / "export" / "modeling_pruned.py").read_text(encoding="utf8")
    modules = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert modules <= {"__future__", "typing", "torch"}

"""The order of the packages: each imports those before it only, late imports included."""

import ast
from pathlib import Path

import pytest

import llm_surgeon

SOURCE = Path(llm_surgeon.__file__).parent
# Lowest first. A package may import itself and every package before it, and nothing after it.
ORDER = (
    *("errors", "stopwatch", "versions"),
    *("mathematics", "recipe", "records", "system", "data", "report", "models", "session", "passes", "export"),
    *("curvature", "evaluation", "refit", "recovery", "benchmark", "pruning", "planning", "run", "comparison"),
    *("testing", "cli", "__main__"),
)
PURE = {"__future__", "collections.abc", "dataclasses", "functools", "logging", "math", "re", "typing", "torch"}


def _module(path):
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {_module(path): path for path in sorted(SOURCE.rglob("*.py"))}


def _imported(path):
    """Dotted names of what a file imports, at its top or later; of the package, the modules themselves."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively"
            below = tuple(node.module.split(".")[1:]) if node.module.startswith("llm_surgeon") else None
            for alias in node.names:
                inner = below is not None and (*below, alias.name) in MODULES
                yield f"{node.module}.{alias.name}" if inner else node.module


def _packages_imported(path):
    return {name.split(".")[1] for name in _imported(path) if name.startswith("llm_surgeon.")}


def test_every_package_has_its_place():
    assert {module[0] for module in MODULES if module} == set(ORDER)


@pytest.mark.parametrize("package", ORDER)
def test_packages_import_what_is_below_them_only(package):
    above = set(ORDER[ORDER.index(package) + 1 :])
    climbs = {
        ".".join(module): sorted(_packages_imported(path) & above)
        for module, path in MODULES.items()
        if module[:1] == (package,) and _packages_imported(path) & above
    }
    assert not climbs


def test_the_mathematics_is_pure():
    # Tensors in, tensors out: nothing of models, files or logs.
    allowed = PURE | {"llm_surgeon.errors", "llm_surgeon.stopwatch", "scipy.optimize"}
    for module, path in MODULES.items():
        if module[:1] == ("mathematics",):
            foreign = {name for name in _imported(path) if not name.startswith("llm_surgeon.mathematics")} - allowed
            assert not foreign, f"{'.'.join(module)} imports {foreign}"


def test_the_modelling_file_of_exports_needs_torch_only():
    # An export brings it along, and has nothing else of this package.
    assert set(_imported(SOURCE / "models" / "modeling_pruned.py")) <= {"__future__", "copy", "typing", "torch"}

"""The table of methods: which curvature, whether correlations count, and which structures.

A method is one row. Costs, updates and structures are shared by all of them (``fisher.py``, ``pipeline``), so adding
a method that combines what exists means adding a row here and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

MethodName = Literal["surgeon", "k-obd", "l-obd", "magnitude", "obs-activations"]
CurvatureName = Literal["kfac", "nearest-kronecker", "kronecker-sum", "diagonal", "activations", "identity"]

# What estimating each curvature takes, for help texts.
CURVATURES: dict[CurvatureName, str] = {
    "kfac": "G (x) A from inputs and gradients taken for independent",
    "nearest-kronecker": "the Kronecker product nearest to the Fisher",
    "kronecker-sum": "the nearest sum of two Kronecker products",
    "diagonal": "the Fisher's exact diagonal",
    "activations": "G = I: the inputs alone, no gradients",
    "identity": "F = I: no data",
}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        curvatures: What it can work with, its own default first.
        correlated: Optimal brain surgeon (costs and updates know of correlations) or optimal brain damage (costs of
            independent weights, and no update).
        summary: What it is, in a few words.
    """

    curvatures: tuple[CurvatureName, ...]
    correlated: bool
    summary: str


# All work with every structure: rows and columns, single weights, N:M.
METHODS: dict[MethodName, Method] = {
    "surgeon": Method(("kfac", "nearest-kronecker", "kronecker-sum"), True, "LLM Surgeon"),
    "k-obd": Method(
        ("kfac", "nearest-kronecker", "kronecker-sum", "diagonal"), False, "optimal brain damage with K-FAC"
    ),
    "l-obd": Method(("activations",), False, "layer-wise optimal brain damage"),
    "magnitude": Method(("identity",), False, "smallest weights, no data"),
    "obs-activations": Method(("activations",), True, "layer-wise optimal brain surgeon, as in SparseGPT"),
}
assert tuple(METHODS) == get_args(MethodName)


def resolve_curvature(method: MethodName, curvature: CurvatureName | None) -> CurvatureName:
    """The curvature of a run: the method's own unless another is named.

    Raises:
        ValueError: If the method cannot work with it; lists what is valid.
    """
    row = METHODS[method]
    if curvature is None:
        return row.curvatures[0]
    if curvature not in row.curvatures:
        valid = "; ".join(f"{name}: {', '.join(row.curvatures)}" for name, row in METHODS.items())
        raise ValueError(f"method {method!r} does not work with curvature {curvature!r}; valid are {valid}")
    return curvature

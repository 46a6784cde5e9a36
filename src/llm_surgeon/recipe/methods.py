"""The tables of methods: what each is made of, and what it can work with.

Two kinds exist. *Global* methods need every layer's costs before one threshold; a method is one row that says which
curvature it takes and whether correlations count, and costs, updates and structures are shared by all of them
(``fisher.py``, ``pruning/shots.py``). *Layer-wise* methods go from block to block, each on the outputs of the blocks
already pruned, and take weights of each layer by a score or a solver of their own (``scores.py``, ``sparsegpt.py``,
``pruning/layerwise.py``). Magnitude is both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llm_surgeon.mathematics.scores import Score

CurvatureName = Literal["kfac", "nearest-kronecker", "kronecker-sum", "diagonal", "activations", "identity"]
LayerwiseScope = Literal["row", "layer", "global"]

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
    """One row of the table of global methods.

    Attributes:
        curvatures: What it can work with, its own default first.
        correlated: Optimal brain surgeon (costs and updates know of correlations) or optimal brain damage (costs of
            independent weights, and no update).
        summary: What it is, in a few words.
    """

    curvatures: tuple[CurvatureName, ...]
    correlated: bool
    summary: str


@dataclass(frozen=True)
class LayerwiseMethod:
    """One row of the table of layer-wise methods.

    Attributes:
        scope: What weights are compared within, unless a recipe says otherwise: a row (the weights of one output), a
            layer, or all layers. None if the method has a way of its own.
        summary: What it is, in a few words.
        data: Whether it looks at calibration tokens.
        source: Where it comes from.
    """

    scope: LayerwiseScope | None
    summary: str
    data: bool = True
    source: str = ""


# All work with every structure: rows and columns, single weights, N:M.
METHODS: dict[str, Method] = {
    "surgeon": Method(("kfac", "nearest-kronecker", "kronecker-sum"), True, "LLM Surgeon"),
    "k-obd": Method(
        ("kfac", "nearest-kronecker", "kronecker-sum", "diagonal"), False, "optimal brain damage with K-FAC"
    ),
    "l-obd": Method(("activations",), False, "layer-wise optimal brain damage"),
    "magnitude": Method(("identity",), False, "smallest weights, no data"),
    "obs-activations": Method(("activations",), True, "layer-wise optimal brain surgeon, as in SparseGPT"),
}

_SPARSEGPT = "SparseGPT: Frantar and Alistarh, ICML 2023"
_WANDA = "Wanda: Sun et al., ICLR 2024"
_RIA = "Plug-and-Play: Zhang et al., ICLR 2024"
_SYMMETRIC = "Symmetric Pruning of Large Language Models: Yi and Richtarik, 2025"

# All work with single weights and N:M. The scores are in ``scores.SCORES``, under the same names.
LAYERWISE: dict[str, LayerwiseMethod] = {
    "sparsegpt": LayerwiseMethod(None, "adaptive mask and update, column by column", source=_SPARSEGPT),
    "magnitude": LayerwiseMethod("global", "|W|", data=False),
    "wanda": LayerwiseMethod("row", "|W| times the input's norm", source=_WANDA),
    "owanda": LayerwiseMethod("row", "|W| times the output's norm", source=_SYMMETRIC),
    "symwanda": LayerwiseMethod("row", "|W| times the sum of both norms", source=_SYMMETRIC),
    "symmetric": LayerwiseMethod("layer", "|W| times the norm of its row and column", data=False, source=_SYMMETRIC),
    "ri": LayerwiseMethod("layer", "|W| relative to its row and column", data=False, source=_RIA),
    "lp-ri": LayerwiseMethod("layer", "the same with another norm", data=False, source=_SYMMETRIC),
    "ria": LayerwiseMethod("layer", "RI times a power of the input's norm", source=_RIA),
    "stochria": LayerwiseMethod("layer", "RIA with norms of random subsets", source=_SYMMETRIC),
}


def method_names() -> list[str]:
    """Every method, once."""
    return list(dict.fromkeys([*METHODS, *LAYERWISE]))


def resolve_curvature(method: str, curvature: CurvatureName | None) -> CurvatureName:
    """The curvature of a run of a global method: the method's own unless another is named.

    Raises:
        ValueError: If the method cannot work with it; lists what is valid.
    """
    valid = "; ".join(f"{name}: {', '.join(row.curvatures)}" for name, row in METHODS.items())
    if method not in METHODS:
        raise ValueError(f"method {method!r} takes no curvature (got {curvature!r}); valid are {valid}")
    row = METHODS[method]
    if curvature is None:
        return row.curvatures[0]
    if curvature not in row.curvatures:
        raise ValueError(f"method {method!r} does not work with curvature {curvature!r}; valid are {valid}")
    return curvature


def register_score(name: str, score: Score, scope: LayerwiseScope = "row", summary: str = "") -> None:
    """Make a score of one's own a method like the others, within this process.

    Args:
        name: What ``method`` calls it.
        score: Gives ``[R, C]``, finite, low for what goes first, from ``weight [R, C]``, statistics and options.
        scope: What its weights are compared within, unless a recipe says otherwise.
        summary: What it is, in a few words.

    Raises:
        ValueError: If the name is taken.
    """
    if name in LAYERWISE or not name:
        raise ValueError(f"the name {name!r} is taken; taken are {', '.join(LAYERWISE)}")
    # Scores need torch, for which the command must not wait to answer a mistyped option.
    from llm_surgeon.mathematics.scores import SCORES

    SCORES[name] = score
    LAYERWISE[name] = LayerwiseMethod(scope, summary)

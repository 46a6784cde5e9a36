"""The tables of methods and curvatures, one row for each; rows may be added while the program runs.

Two kinds exist. *Global* methods need every layer's costs before one threshold; a method is one row that says which
curvature it takes and whether correlations count, and costs, updates and structures are shared by all of them
(``fisher.py``, ``pruning/shots.py``). *Layer-wise* methods go from block to block, each on the outputs of the blocks
already pruned, and take weights of each layer by a score or a solver of their own (``scores.py``, ``sparsegpt.py``,
``pruning/layerwise.py``). Magnitude is both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llm_surgeon.mathematics.scores import Score

# A key of ``CURVATURES``.
CurvatureName = str
LayerwiseScope = Literal["row", "layer", "global"]


@dataclass(frozen=True)
class Curvature:
    """One row of the table of curvatures.

    Attributes:
        summary: Form of the approximation, in a few words.
        reads: Kind of data that an estimate takes from the calibration text.
        divisible: Whether the curvature of the weights that are left follows from the one that is there, so that a
            shot can be divided into steps.
        joint: Whether there are joint costs of many rows or columns, which heads, values and blocks need.
        subsets: Whether updates can be limited to so many removed structures at a time (``max_correlations``).
        samples_gradients: Whether gradient factors can be summed over a share of the tokens (``gradient_share``).
    """

    summary: str
    reads: Literal["nothing", "inputs", "gradients"] = "gradients"
    divisible: bool = False
    joint: bool = True
    subsets: bool = True
    samples_gradients: bool = False


CURVATURES: dict[CurvatureName, Curvature] = {
    "kfac": Curvature(
        "G (x) A from inputs and gradients taken for independent", divisible=True, samples_gradients=True
    ),
    "nearest-kronecker": Curvature("the Kronecker product nearest to the Fisher"),
    "kronecker-sum": Curvature("the nearest sum of two Kronecker products", joint=False, subsets=False),
    "diagonal": Curvature("the Fisher's exact diagonal"),
    "activations": Curvature("G = I: the inputs alone, no gradients", reads="inputs", divisible=True),
    "identity": Curvature("F = I: no data", reads="nothing", divisible=True),
}


@dataclass(frozen=True)
class Method:
    """One row of the table of global methods.

    Attributes:
        curvatures: What it can work with, its own default first; none if its loop estimates no curvature.
        correlated: Optimal brain surgeon (costs and updates know of correlations) or optimal brain damage (costs of
            independent weights, and no update).
        summary: What it is, in a few words.
        loop: Name of the loop that runs it.
        course: What the loop did, in the words of the model card, after the name of the method.
    """

    curvatures: tuple[CurvatureName, ...]
    correlated: bool
    summary: str
    loop: str = "shots"
    course: str = "ranked them by a cost, one threshold over all layers selected them"


@dataclass(frozen=True)
class LayerwiseMethod:
    """One row of the table of layer-wise methods.

    Attributes:
        scope: What weights are compared within, unless a recipe says otherwise: a row (the weights of one output), a
            layer, or all layers. None if the method has a way of its own.
        summary: What it is, in a few words.
        data: Whether it looks at calibration tokens.
        source: Where it comes from.
        loop: Name of the loop that runs it.
    """

    scope: LayerwiseScope | None
    summary: str
    data: bool = True
    source: str = ""
    loop: str = "layerwise"


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


def resolve_curvature(method: str, curvature: CurvatureName | None) -> CurvatureName | None:
    """The curvature of a run of a global method: the method's own unless another is named; None if it has none.

    Raises:
        ValueError: If the method cannot work with it; lists what is valid.
    """
    valid = "; ".join(f"{name}: {', '.join(row.curvatures)}" for name, row in METHODS.items() if row.curvatures)
    if method not in METHODS or (curvature is not None and not METHODS[method].curvatures):
        raise ValueError(f"method {method!r} takes no curvature (got {curvature!r}); valid are {valid}")
    row = METHODS[method]
    if curvature is None:
        return next(iter(row.curvatures), None)
    if curvature not in row.curvatures:
        raise ValueError(f"method {method!r} does not work with curvature {curvature!r}; valid are {valid}")
    return curvature


def register_curvature(name: CurvatureName, row: Curvature, methods: Iterable[str]) -> None:
    """Make a curvature of one's own one that recipes can name, within this process.

    Args:
        name: Its name in a recipe (``curvature``).
        row: Its row in the table.
        methods: Global methods that can work with it.

    Raises:
        ValueError: If the name is taken, or a method is none of the global ones.
    """
    methods = tuple(methods)
    if name in CURVATURES or not name:
        raise ValueError(f"the name {name!r} is taken; taken are {', '.join(CURVATURES)}")
    unknown = [method for method in methods if method not in METHODS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no global method; these are {', '.join(METHODS)}")
    CURVATURES[name] = row
    for method in methods:
        METHODS[method] = replace(METHODS[method], curvatures=(*METHODS[method].curvatures, name))


def register_method(name: str, row: Method) -> None:
    """Make a global method of one's own one that recipes can name, within this process.

    Args:
        name: Its name in a recipe (``method``).
        row: Its row in the table, which names its loop.

    Raises:
        ValueError: If the name is taken.
    """
    if name in method_names() or not name:
        raise ValueError(f"the name {name!r} is taken; taken are {', '.join(method_names())}")
    METHODS[name] = row


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

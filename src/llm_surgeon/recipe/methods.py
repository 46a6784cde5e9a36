"""The tables of methods and curvatures, one row for each; rows may be added while the program runs.

There are two kinds of methods. *Global* methods need every layer's costs before one threshold. The row of such a method
says which curvature it takes and whether correlations count; all global methods share costs, updates and structures
(``fisher.py``, ``pruning/shots.py``). *Layer-wise* methods prune block after block, each on the outputs of the blocks
already pruned, and choose the weights of each layer by a score or a solver of their own (``scores.py``,
``sparsegpt.py``, ``pruning/layerwise.py``). Magnitude is both.
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
        divisible: Whether the curvature of the weights left after a step follows from the estimated one, so that a shot
            can be divided into steps.
        joint: Whether there are joint costs of many rows or columns, which heads, values and blocks need.
        subsets: Whether updates can be limited to some removed structures at a time (``max_correlations``).
        structures: Structures that there are costs of; empty if there are of all.
        samples_gradients: Whether gradient factors can be summed over a share of the tokens (``gradient_share``).
    """

    summary: str
    reads: Literal["nothing", "inputs", "gradients"] = "gradients"
    divisible: bool = False
    joint: bool = True
    subsets: bool = True
    samples_gradients: bool = False
    structures: tuple[str, ...] = ()


CURVATURES: dict[CurvatureName, Curvature] = {
    "kfac": Curvature(
        "G (x) A from inputs and gradients taken for independent", divisible=True, samples_gradients=True
    ),
    "nearest-kronecker": Curvature("the Kronecker product nearest to the Fisher"),
    "kronecker-sum": Curvature("the nearest sum of two Kronecker products", joint=False, subsets=False),
    "diagonal": Curvature("the Fisher's exact diagonal"),
    "activations": Curvature("G = I: the inputs alone, no gradients", reads="inputs", divisible=True),
    "identity": Curvature("F = I: no data", reads="nothing", divisible=True),
    "reap": Curvature("mean routing share times norm of an expert's outputs", reads="inputs", structures=("experts",)),
    "mean-norm": Curvature("mean norm of an expert's outputs", reads="inputs", structures=("experts",)),
    "frequency": Curvature("number of tokens sent to an expert", reads="inputs", structures=("experts",)),
}


@dataclass(frozen=True)
class Method:
    """One row of the table of global methods.

    Attributes:
        curvatures: Names of the curvatures that the method can work with, its default first; empty if its loop
            estimates no curvature.
        correlated: Whether the method is optimal brain surgeon (costs and updates know of correlations); otherwise it
            is optimal brain damage (costs of independent weights, and no update).
        summary: Description of the method, in a few words.
        loop: Name of the loop that runs the method.
        course: Words of the model card on the work of the loop, which follow the name of the method.
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
        scope: Scope in which weights are compared, unless a recipe says otherwise: a row (the weights of one output), a
            layer, or all layers. None for a solver, which makes its own masks.
        summary: Description of the method, in a few words.
        data: Whether the method reads calibration tokens.
        source: Publication of the method.
        loop: Name of the loop that runs the method.
    """

    scope: LayerwiseScope | None
    summary: str
    data: bool = True
    source: str = ""
    loop: str = "layerwise"


# Global methods work with every structure (rows and columns, single weights, N:M) that their curvature has costs of.
METHODS: dict[str, Method] = {
    "surgeon": Method(("kfac", "nearest-kronecker", "kronecker-sum"), True, "LLM Surgeon"),
    "k-obd": Method(
        ("kfac", "nearest-kronecker", "kronecker-sum", "diagonal"), False, "optimal brain damage with K-FAC"
    ),
    "l-obd": Method(("activations",), False, "layer-wise optimal brain damage"),
    "magnitude": Method(("identity",), False, "smallest weights, no data"),
    "obs-activations": Method(("activations",), True, "layer-wise optimal brain surgeon, as in SparseGPT"),
    "reap": Method(("reap",), False, "experts by REAP: mean routing share times norm of their outputs"),
    "mean-norm": Method(("mean-norm",), False, "experts by the mean norm of their outputs"),
    "frequency": Method(("frequency",), False, "experts by the number of their tokens"),
}

_SPARSEGPT = "SparseGPT: Frantar and Alistarh, ICML 2023"
_WANDA = "Wanda: Sun et al., ICLR 2024"
_RIA = "Plug-and-Play: Zhang et al., ICLR 2024"
_SYMMETRIC = "Symmetric Pruning of Large Language Models: Yi and Richtarik, 2025"

# All layer-wise methods work with single weights and N:M. Scores have the same names in ``scores.SCORES``.
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
    """Names of all methods, each once."""
    return list(dict.fromkeys([*METHODS, *LAYERWISE]))


def resolve_curvature(method: str, curvature: CurvatureName | None) -> CurvatureName | None:
    """Name of a global method's curvature: its default unless another is named; None if the method has none.

    Raises:
        ValueError: If the method cannot work with the curvature, with the valid ones.
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
    """Let recipes name a curvature of your own (``curvature``), within this process.

    Args:
        name: Name of the curvature in a recipe.
        row: Row of the curvature in the table.
        methods: Names of global methods that can work with it.

    Raises:
        ValueError: If the name is taken, or a method is not a global one.
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
    """Let recipes name a global method of your own (``method``), within this process.

    Args:
        name: Name of the method in a recipe.
        row: Row of the method in the table, which names its loop.

    Raises:
        ValueError: If the name is taken.
    """
    if name in method_names() or not name:
        raise ValueError(f"the name {name!r} is taken; taken are {', '.join(method_names())}")
    METHODS[name] = row


def register_score(name: str, score: Score, scope: LayerwiseScope = "row", summary: str = "") -> None:
    """Let recipes name a score of your own as a layer-wise method (``method``), within this process.

    Args:
        name: Name of the method in a recipe.
        score: Function of ``weight [R, C]``, statistics and options that gives finite scores ``[R, C]``; a weight of
            low score goes first.
        scope: Scope in which weights are compared, unless a recipe says otherwise.
        summary: Description of the method, in a few words.

    Raises:
        ValueError: If the name is taken.
    """
    if name in LAYERWISE or not name:
        raise ValueError(f"the name {name!r} is taken; taken are {', '.join(LAYERWISE)}")
    # Scores need torch, and the command must not wait for torch before it refuses a mistyped option.
    from llm_surgeon.mathematics.scores import SCORES

    SCORES[name] = score
    LAYERWISE[name] = LayerwiseMethod(scope, summary)

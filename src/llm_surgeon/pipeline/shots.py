"""The global multi-shot loop (paper, Alg. 2): curvature, costs, threshold, update, and again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.config import PruneConfig
from llm_surgeon.costs import column_costs, row_costs
from llm_surgeon.curvature import Curvature, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.linalg import damped_cholesky, damping_of, inverse_diagonal
from llm_surgeon.models.family import Anatomy, LinearLayer, to_index
from llm_surgeon.models.matrix import read_matrix, write_matrix
from llm_surgeon.report.progress import Progress
from llm_surgeon.selection import KeepMask, Selection, StructureCosts, select
from llm_surgeon.updates import remove_columns, remove_rows


@dataclass
class ShotResult:
    """What a shot did: its selection, the seconds of its phases and the bytes of its factors."""

    shot: int
    target_sparsity: float
    selection: Selection
    factor_bytes: int
    loss: float
    seconds: dict[str, float] = field(default_factory=dict)


def run_shots(
    model: PreTrainedModel,
    anatomy: Anatomy,
    tokens: CalibrationTokens,
    config: PruneConfig,
    progress: Progress,
) -> Iterator[ShotResult]:
    """Prune a model in place, shot by shot; yields after each, so that the caller can evaluate and save.

    Curvature is estimated afresh in each shot, on the model as shrunk so far.

    Raises:
        NonFiniteError: If activations, gradients or costs are not finite.
        NotPositiveDefiniteError: If a factor cannot be decomposed even with more damping.
    """
    keep = anatomy.dense_masks()
    for number, sparsity in enumerate(config.sparsity_schedule, start=1):
        seconds: dict[str, float] = {}
        with (
            _timed(seconds, "curvature"),
            progress.phase(f"shot {number}/{config.shots}: curvature", tokens.input_ids.numel()) as phase,
        ):
            curvature = estimate(
                model,
                anatomy,
                keep,
                tokens,
                batch_size=config.batch_size,
                precision=config.precision,
                advance=phase.advance,
            )
        with _timed(seconds, "selection"):
            costs = {
                name: layer_costs(model, layer, keep[name], curvature, config) for name, layer in anatomy.layers.items()
            }
            target = round((1 - sparsity) * anatomy.prunable_weights)
            selection = select(keep, costs, anatomy.couplings, target, config.rank_by == "cost-per-weight")
        with _timed(seconds, "update"):
            for name, layer in anatomy.layers.items():
                matrix = updated_matrix(model, layer, keep[name], selection, curvature, config)
                write_matrix(model, anatomy, layer, selection.keep[name], matrix)
        keep = selection.keep
        result = ShotResult(number, sparsity, selection, curvature.nbytes, curvature.loss, seconds)
        # Or this shot's factors would stay until the next shot's are complete.
        del curvature
        yield result


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - start


@torch.no_grad()
def layer_costs(
    model: PreTrainedModel, layer: LinearLayer, keep: KeepMask, curvature: Curvature, config: PruneConfig
) -> StructureCosts:
    """Costs of a layer's kept rows and columns, in the coordinates of the dense model, on the CPU.

    Raises:
        NonFiniteError: If a cost is not finite.
    """
    weight = read_matrix(model, layer)
    a, g = curvature.input_factor(layer, keep), curvature.gradient_factor(layer)
    a_inverse = inverse_diagonal(damped_cholesky(a, damping_of(a, config.dampening_a), f"{layer.name} (inputs)"))
    g_inverse = inverse_diagonal(damped_cholesky(g, damping_of(g, config.dampening_g), f"{layer.name} (gradients)"))
    rows = row_costs(weight, a, g_inverse)
    # The bias is a column of the matrix but never a structure of its own.
    columns = column_costs(weight, g, a_inverse)[: int(keep.columns.sum())]
    costs = StructureCosts(_to_dense(rows, keep.rows), _to_dense(columns, keep.columns))
    if not (costs.rows.isfinite().all() and costs.columns.isfinite().all()):
        raise NonFiniteError(
            f"The pruning costs of {layer.name} are not finite.",
            "Run with --precision float32 and --dtype float32, or use more calibration samples.",
        )
    return costs


def _to_dense(values: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    dense[mask] = values.double().cpu()
    return dense


@torch.no_grad()
def updated_matrix(
    model: PreTrainedModel,
    layer: LinearLayer,
    keep: KeepMask,
    selection: Selection,
    curvature: Curvature,
    config: PruneConfig,
) -> Tensor:
    """The kept rows and columns of a layer after compensating for the chosen ones: rows, then columns on the result.

    Returns:
        ``[kept rows, kept columns (+ bias)]``.
    """
    weight = read_matrix(model, layer)
    after, chosen = selection.keep[layer.name], selection.chosen[layer.name]
    device = weight.device
    rows_kept, rows_removed = _positions(keep.rows, after.rows, chosen.rows, device)
    columns_kept, columns_removed = _positions(keep.columns, after.columns, chosen.columns, device)
    if layer.bias:
        columns_kept = torch.cat([columns_kept, columns_kept.new_tensor([weight.shape[1] - 1])])
    if len(rows_removed):
        g = curvature.gradient_factor(layer)
        damping = damping_of(g, config.dampening_g)
        weight = remove_rows(weight, g, rows_removed, rows_kept, damping, f"{layer.name} (gradients)")
    else:
        weight = weight[rows_kept]
    if len(columns_removed):
        a = curvature.input_factor(layer, keep)
        damping = damping_of(a, config.dampening_a)
        return remove_columns(weight, a, columns_removed, columns_kept, damping, f"{layer.name} (inputs)")
    return weight[:, columns_kept]


def _positions(before: Tensor, after: Tensor, chosen: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Kept and chosen positions within what was left before the shot."""
    return to_index(after[before]).to(device), to_index(chosen[before]).to(device)

"""Structures that shrink matrices: rows and columns, and coupled groups of them (neurons, heads, blocks)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.form import builds
from llm_surgeon.mathematics.candidates import Group, bystanders, joint_group, line_up, score_groups, single_scores
from llm_surgeon.mathematics.fisher import Fisher, Split
from llm_surgeon.mathematics.keep_masks import AXES, Coupling, KeepMask, Side, StructureCosts, count_weights
from llm_surgeon.mathematics.structured_selection import Selection, select
from llm_surgeon.mathematics.widths import Widths, bundle_parts, merge, pools_of
from llm_surgeon.models.anatomy import Anatomy, LinearLayer, restricted, to_index
from llm_surgeon.models.family import Family
from llm_surgeon.models.matrix import check_finite
from llm_surgeon.pruning.solver import solver_of
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.structures import STRUCTURES, StructureRow

# Functions that find couplings of structures that no part of a block has, by the name of the structure.
COUPLINGS: dict[str, Callable[[Anatomy], Sequence[Coupling]]] = {}


def register_structure(name: str, row: StructureRow, couplings: Callable[[Anatomy], Sequence[Coupling]]) -> None:
    """Let recipes name a structure of your own (``structure``), within this process.

    Args:
        name: Name of the structure in a recipe.
        row: Row in the table of recipes: widths, and whether the structure can be uniform.
        couplings: Function that finds the groups of rows and columns that go together in a dense model. Their
            ``structure`` is ``name``. For a part of your own, override ``Part.couplings`` instead.

    Raises:
        ValueError: If the name is taken.
    """
    if name in STRUCTURES or not name:
        raise ValueError(f"the name {name!r} is taken; taken are {', '.join(STRUCTURES)}")
    STRUCTURES[name] = row
    COUPLINGS[name] = couplings


def _row_of(coupling: Coupling) -> StructureRow:
    """The row of the structure that removes the groups of a coupling; an empty row if no structure does."""
    return STRUCTURES.get(coupling.structure, StructureRow())


def _couplings(config: PruneConfig, anatomy: Anatomy) -> list[Coupling]:
    """Couplings that count in a run; couplings of whole parts of blocks count only if these are candidates."""
    found = [coupling for part in config.parts if part in COUPLINGS for coupling in COUPLINGS[part](anatomy)]
    added = restricted(found, anatomy.layers)
    of_parts = [x for x in anatomy.couplings if x.structure in config.parts or not _row_of(x).whole]
    return [*added, *of_parts]


def _allowed_counts(config: PruneConfig, anatomy: Anatomy) -> dict[tuple[int, str], frozenset[int]]:
    """Numbers of groups that may be left, by block and kind of coupling; what is not there may have any number.

    Uniform widths are such that the class takes them. For a quantised type, the dimensions of all heads are a multiple
    of its block, as the columns of the output projection are.
    """
    settings = anatomy.family.settings_of(anatomy.settings)

    @functools.cache
    def accepted(sizes: tuple[tuple[str, int], ...]) -> bool:
        left = dict(sizes)
        columns = left.get("num_attention_heads", 0) * left.get("head_dim", 0)
        return columns % config.block_of_quantised == 0 and (not config.uniform or builds(settings, left))

    if not config.uniform and config.block_of_quantised == 1:
        return {}
    return {
        (part.block, kind): counts
        for part in anatomy.parts
        if set(part.entry.structures) & set(config.parts)
        for kind, counts in part.widths(lambda sizes: accepted(tuple(sizes.items()))).items()
    }


class SideKey(NamedTuple):
    """Key of one side of one coupling."""

    coupling: int
    side: int


@dataclass(frozen=True)
class LayerCosts:
    """Costs of a layer's structures, on the CPU, in the coordinates of the dense model.

    Attributes:
        singles: Costs of single rows and columns; None if these are no candidates.
        sides: Joint costs ``[groups]`` of the sides of couplings that are in this layer.
    """

    singles: StructureCosts | None
    sides: Mapping[SideKey, Tensor]


class Shapes:
    """Rows, columns and whole groups of them, with the removals that they imply."""

    def __init__(self, config: PruneConfig, anatomy: Anatomy) -> None:
        self._config, self._anatomy = config, anatomy
        self._per_weight = config.rank_by == "cost-per-weight"
        self._singles = "rows-columns" in config.parts
        self._couplings = _couplings(config, anatomy)
        self._sides = self._sides_by_layer()
        self._counts = _allowed_counts(config, anatomy)
        self._least = {(part.block, kind): least for part in anatomy.parts for kind, least in part.least.items()}
        self._multiples = {(part.block, kind): by for part in anatomy.parts for kind, by in part.multiples.items()}
        self.masks: Mapping[str, KeepMask] = anatomy.dense_masks()
        self.score_name = "cost per weight freed" if self._per_weight else "cost"
        if not self._singles and not any(self._is_candidate(coupling) for coupling in self._couplings):
            raise ConfigError(
                f"Nothing is left to prune as {config.structure}: what it consists of is ignored.",
                "Ignore fewer layers, or choose another structure.",
            )

    def _is_candidate(self, coupling: Coupling) -> bool:
        return coupling.structure in self._config.parts

    @property
    def shapes(self) -> Mapping[str, KeepMask]:
        """Rows and columns that the matrices still have: the masks, as removed ones are really gone."""
        return self.masks

    @property
    def element_masks(self) -> None:
        """None, as no zeros are stored."""
        return None

    def costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> LayerCosts:
        """Costs of a layer's kept rows and columns, and of its sides of the groups, on the CPU."""
        singles = self._single_costs(layer, weight, fisher) if self._singles else None
        sides = {key: self._side_costs(layer, side, weight, fisher) for key, side in self._sides.get(layer.name, ())}
        check_finite(layer, *sides.values())
        return LayerCosts(singles, sides)

    def _single_costs(self, layer: LinearLayer, weight: Tensor, fisher: Fisher) -> StructureCosts:
        keep, correlated = self.masks[layer.name], self._config.correlated
        rows = fisher.row_costs(weight, correlated=correlated)
        # The bias is a column of the matrix, but never a candidate.
        columns = fisher.column_costs(weight, correlated=correlated)[: int(keep.columns.sum())]
        check_finite(layer, rows, columns)
        return StructureCosts(_to_dense(rows, keep.rows), _to_dense(columns, keep.columns))

    def _sides_by_layer(self) -> dict[str, list[tuple[SideKey, Side]]]:
        """Sides of couplings whose groups have joint costs, by layer: a mixture has thousands of couplings."""
        found: dict[str, list[tuple[SideKey, Side]]] = {}
        for number, coupling in enumerate(self._couplings):
            for place, side in enumerate(coupling.sides if self._is_candidate(coupling) else ()):
                found.setdefault(side.layer, []).append((SideKey(number, place), side))
        return found

    def _side_costs(self, layer: LinearLayer, side: Side, weight: Tensor, fisher: Fisher) -> Tensor:
        """Joint costs of the living members of a side's groups, ``[groups]``; zero where none lives."""
        keep = self.masks[layer.name].axis(side.axis)
        places, alive = (keep.cumsum(0) - 1).clamp(min=0)[side.index], keep[side.index]
        some = alive.any(1)
        costs = torch.zeros(len(side.index), dtype=torch.float64)
        if bool(some.any()):
            sets, valid = places[some].to(weight.device), alive[some].to(weight.device)
            joint = fisher.set_costs(weight, side.axis, sets, valid, correlated=self._config.correlated)
            # A trace of products of rounded matrices may come out a little below zero.
            costs[some] = joint.double().cpu().clamp(min=0)
        return costs

    def select(self, costs: Mapping[str, LayerCosts], target_weights: int) -> Selection:
        """Choose the structures that go, by the largest threshold that leaves the target, implied removals included."""
        singles = self._all_singles(costs)
        groups = self._groups(costs, singles)
        # Even if the cheapest candidate is large, the last step has to remove one if nothing is removed yet.
        last = target_weights == round((1 - self._config.sparsity) * self._anatomy.prunable_weights)
        nothing_yet = count_weights(self.masks) == self._anatomy.prunable_weights
        return select(
            *(self.masks, singles, groups, target_weights, self._per_weight),
            fill=self._config.uniform,
            some=last and nothing_yet,
        )

    def _all_singles(self, costs: Mapping[str, LayerCosts]) -> dict[str, StructureCosts] | None:
        return {name: cost.singles for name, cost in costs.items() if cost.singles} if self._singles else None

    def _groups(self, costs: Mapping[str, LayerCosts], singles: Mapping[str, StructureCosts] | None) -> list[Group]:
        """Groups with scores, which are candidates, and groups that can only follow."""
        groups = []
        for number, coupling in enumerate(self._couplings):
            if self._is_candidate(coupling):
                parts = [costs[side.layer].sides[SideKey(number, k)] for k, side in enumerate(coupling.sides)]
                groups.append(joint_group(self.masks, coupling, torch.stack(parts), self._per_weight))
            elif singles is not None and not _row_of(coupling).large:
                groups.append(score_groups(self.masks, singles, coupling, self._per_weight))
            else:
                groups.append(bystanders(coupling))
        return self._shaped(groups)

    def _shaped(self, groups: Sequence[Group]) -> list[Group]:
        """Bundle groups that have to go together so that the widths are as the recipe asks."""
        if self._singles:
            return list(groups)
        by_kind: dict[str, list[Group]] = {}
        for group in groups:
            by_kind.setdefault(group.coupling.kind, []).append(group)
        shaped = []
        for members in by_kind.values():
            if self._is_candidate(members[0].coupling):
                for alike in self._alike(members):
                    shaped += bundle_parts(alike, self._widths(alike[0]), self._per_weight)
            else:
                shaped += members
        return self._whole_blocks(shaped) if self._config.uniform and _takes_whole(self._config) else shaped

    def _alike(self, members: Sequence[Group]) -> list[list[list[Group]]]:
        """Groups of one kind that have to keep the same widths, by block: those of all blocks, or those of each."""
        by_block: dict[int, list[Group]] = {}
        for member in members:
            by_block.setdefault(self._anatomy.block_of(member.coupling), []).append(member)
        blocks = list(by_block.values())
        return [blocks] if self._config.uniform else [[block] for block in blocks]

    def _widths(self, groups: Sequence[Group]) -> Widths:
        """Widths that the recipe allows for the groups of one kind in one block."""
        coupling = groups[0].coupling
        pools = pools_of(groups)
        least = math.ceil(self._config.least_width * len(pools) / (int(pools.max()) + 1))
        key = self._anatomy.block_of(coupling), coupling.kind
        least = max(least, self._least.get(key, 0))
        row = _row_of(coupling)
        if row.whole:
            # A part of a block goes as a whole, and has no width.
            return Widths()
        multiple = self._config.widths_multiple if row.multiple is not None else 1
        multiple = math.lcm(multiple, self._multiples.get(key, 1))
        counts = self._counts.get(key)
        return Widths(multiple, least, self._config.uniform, counts)

    def _whole_blocks(self, groups: Sequence[Group]) -> list[Group]:
        """Merge all parts of a block into one candidate."""
        parts: dict[int, list[Group]] = {}
        for group in groups:
            if _row_of(group.coupling).whole:
                parts.setdefault(self._anatomy.block_of(group.coupling), []).append(group)
        whole = [group for members in parts.values() for group in merge(members, self._per_weight)]
        return whole + [group for group in groups if not _row_of(group.coupling).whole]

    def scored(self, costs: Mapping[str, LayerCosts], selection: Selection) -> Iterator[tuple[Tensor, Tensor]]:
        """Scores and whether each candidate goes: of single rows and columns if they are candidates, else of groups."""
        singles = self._all_singles(costs)
        for name, keep in self.masks.items() if singles is not None else ():
            scores = single_scores(keep, singles[name], self._per_weight)  # type: ignore[index]
            for axis in AXES:
                alive = keep.axis(axis)
                yield scores.axis(axis)[alive], ~selection.keep[name].axis(axis)[alive]
        for group in selection.groups if singles is None else ():
            alive = group.score.isfinite()
            side = group.coupling.sides[0]
            left = selection.keep[side.layer].axis(side.axis)[side.index].any(1)
            yield group.score[alive], ~left[alive]

    def matrix_after(
        self, layer: LinearLayer, weight: Tensor, fisher: Callable[[], Fisher], selection: Selection
    ) -> Tensor:
        """The layer's matrix after the removal, ``[kept rows, kept columns (+ bias)]``."""
        before, after, chosen = self.masks[layer.name], selection.keep[layer.name], selection.chosen[layer.name]
        rows = _split(before.rows, after.rows, chosen.rows, weight.device)
        columns = _split(before.columns, after.columns, chosen.columns, weight.device)
        if layer.bias:
            last = columns.kept.new_tensor([weight.shape[1] - 1])
            columns = Split(torch.cat([columns.kept, last]), columns.removed)
        if not self._config.correlated or not len(rows.removed) + len(columns.removed):
            return weight[rows.kept][:, columns.kept]
        return fisher().remove_rows_and_columns(weight, rows, columns, solver_of(self._config))

    def shapes_after(self, selection: Selection) -> Mapping[str, KeepMask]:
        """Rows and columns that the matrices have after the removal: the selection's masks."""
        return selection.keep

    def commit(self, selection: Selection) -> None:
        """Set the masks to a selection's, after its removals are done."""
        self.masks = selection.keep

    def resume(self, masks: Mapping[str, KeepMask]) -> None:
        """Set the masks to the ones that an earlier run has left."""
        self.masks = masks

    def random_masks(self, sparsity: float, seed: int) -> Mapping[str, KeepMask]:
        """Masks after a random removal, in which large candidates go no sooner than small ones."""
        singles, groups = self._random_candidates(seed)
        target = round((1 - sparsity) * self._anatomy.prunable_weights)
        return select(self.masks, singles, groups, target, fill=self._config.uniform).keep

    def _random_candidates(self, seed: int) -> tuple[dict[str, StructureCosts] | None, list[Group]]:
        """Random costs of single rows and columns, and random scores of groups, in proportion to their size."""
        generator = torch.Generator().manual_seed(seed)

        def costs(freed: Tensor) -> Tensor:
            return freed * torch.rand(freed.shape, generator=generator, dtype=torch.float64)

        groups = []
        for coupling in self._couplings:
            group = bystanders(coupling)
            if self._is_candidate(coupling):
                freed = joint_group(self.masks, coupling, group.side_costs).freed
                group = joint_group(self.masks, coupling, costs(freed).expand(len(coupling.sides), -1))
            groups.append(group)
        singles = None
        if self._singles:
            layers = self._anatomy.layers.items()
            wide = {n: (torch.full((la.rows,), la.columns), torch.full((la.columns,), la.rows)) for n, la in layers}
            singles = {name: StructureCosts(*(costs(freed.double()) for freed in axes)) for name, axes in wide.items()}
        return singles, self._shaped(groups)

    def least_weights(self) -> int:
        """Number of weights that are left when every candidate is gone."""
        return 0 if self._singles else count_weights(self.random_masks(1.0, seed=0))

    def smallest_candidate(self) -> int:
        """Number of weights of the smallest candidate."""
        if self._singles:
            return min(min(layer.rows, layer.columns) for layer in self._anatomy.layers.values())
        return int(line_up(self.masks, {}, self._random_candidates(seed=0)[1]).freed.min())


_LEAST_EXPERTS = " Of experts as many stay in each block as a token is sent to."


def check_shapes(config: PruneConfig, anatomy: Anatomy) -> None:
    """Check that a model has the structures of a recipe, and that its sparsity can be reached with them.

    Raises:
        ConfigError: If not, with the sparsities that can be reached.
    """
    _check_refused(config, anatomy.family)
    if config.uniform:
        _check_uniform(config, anatomy)
    structures = Shapes(config, anatomy)
    most = 1 - structures.least_weights() / anatomy.prunable_weights
    rounding = "" if config.rounding == 1 else f"a lower --round-to than {config.rounding}, "
    # The sparsity for a latency is not known before the model is timed.
    if config.sparsity > most and config.target != "target_latency":
        raise ConfigError(
            f"With {config.structure} {100 * most:.1f} % of the prunable weights can be removed, and "
            f"{100 * config.sparsity:g} % are to be.",
            f"Ask for a lower --sparsity, {rounding}a lower --min-width, or add structures, as in neurons+heads."
            f"{_LEAST_EXPERTS if 'experts' in config.parts else ''}",
        )
    least = structures.smallest_candidate() / anatomy.prunable_weights
    if config.sparsity < least and config.target != "target_latency":
        raise ConfigError(
            f"The least that can go with {config.structure} is {100 * least:.3g} % of the prunable weights, and "
            f"{100 * config.sparsity:g} % are to be removed.",
            f"Ask for a --sparsity of {math.ceil(1e4 * least) / 1e4:g} at least, or choose smaller structures or a "
            "lower --round-to.",
        )


def _check_refused(config: PruneConfig, family: Family) -> None:
    """Check that the family's parts have the structures of the recipe, and do not refuse them.

    Raises:
        ConfigError: If not.
    """
    offered = {structure for entry in family.parts for structure in entry.structures} | set(COUPLINGS)
    for structure in config.parts:
        if structure not in offered | {"rows-columns", "blocks"} and not _refusing(family, structure):
            raise ConfigError(f"{family.model_class} has no {structure}.", "Use --structure neurons.")
    for reasons in (entry.refused for entry in family.parts):
        for structure in (structure for structure in config.parts if structure in reasons):
            others = [part for part in config.parts if not _refusing(family, part)]
            possible = (part for part in ("experts", "neurons", "heads") if part in offered)
            left = "+".join(others) or next((part for part in possible if not _refusing(family, part)), "unstructured")
            raise ConfigError(f"{family.model_class} {reasons[structure]}.", f"Use --structure {left}.")


def _refusing(family: Family, structure: str) -> bool:
    """Whether a part of the family says itself why it cannot lose a structure."""
    return any(structure in entry.refused for entry in family.parts)


def _check_uniform(config: PruneConfig, anatomy: Anatomy) -> None:
    """Check that the plain transformers class can be built with the recipe's uniform structures.

    Raises:
        ConfigError: If it cannot.
    """
    family, parts = anatomy.family, set(config.parts)
    for fixed in (entry.fixed for entry in family.parts if entry.fixed and parts.intersection(entry.structures)):
        raise ConfigError(
            f"{family.model_class} {fixed}, so that it cannot be built with fewer.",
            "Use --structure neurons, or leave --uniform out: the export then brings a modelling file.",
        )
    biased = [layer.name for layer in anatomy.layers.values() if layer.bias]
    if _takes_whole(config) and biased:
        raise ConfigError(
            f"Of a block without weights its biases would be left ({biased[0]}), so that it cannot be left out.",
            "Leave --uniform out: the export then brings a modelling file.",
        )
    for entry in family.parts:
        whole, all_of_it = ([part for part in some if part.entry == entry] for some in (anatomy.parts, anatomy.located))
        concerned = parts.intersection(entry.structures) or _takes_whole(config)
        if concerned and len(whole) < len(all_of_it):
            raise ConfigError(
                "Layers of some blocks are ignored, so that blocks cannot stay equal.",
                "Ignore fewer layers, or leave --uniform out.",
            )


def _takes_whole(config: PruneConfig) -> bool:
    """Whether a recipe removes whole parts of blocks."""
    return any(STRUCTURES[part].whole for part in config.parts)


def _to_dense(values: Tensor, mask: Tensor) -> Tensor:
    dense = torch.zeros(mask.shape, dtype=torch.float64)
    dense[mask] = values.double().cpu()
    return dense


def _split(before: Tensor, after: Tensor, chosen: Tensor, device: torch.device) -> Split:
    """Positions of kept and of chosen rows or columns, among the ones that were left before the step."""
    return Split(to_index(after[before]).to(device), to_index(chosen[before]).to(device))

"""The contract of structures that shrink matrices: a test class inherits it, and names the structure."""

from __future__ import annotations

import math
from typing import ClassVar

import pytest
import torch

from choosing import made_up_costs, masked
from llm_surgeon import PruneConfig
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.keep_masks import count_weights, dead_sides
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import cut_out
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.recipe.structures import STRUCTURES
from tiny import build, tokens

SEEDS = (0, 1, 2)


class StructureContract:
    """What targets, exports and reports rely on.

    Attributes:
        structure: Its name in a recipe.
        options: Further options.
        sparsity: A sparsity that it can reach on the tiny models.
        largest: Weights of the largest candidate, all that it implies included, on the tiny Llama.
        ignored: Patterns of all layers that it consists of.
        families: Models that it is for.
    """

    structure = ""
    options: ClassVar = {}
    sparsity = 0.3
    largest = 0
    ignored: tuple = ()
    families = ("llama-biased", "opt", "phi3")

    def config(self, **changes):
        return PruneConfig.from_mapping(
            {"preset": "none", "structure": self.structure, "sparsity": self.sparsity, **self.options, **changes}
        )

    def examined(self, family="llama", ignore=()):
        model = build(family)
        return model, examine(model, family_of(model.config.model_type), ignore)

    def selected(self, anatomy, seed, sparsity=None, **changes):
        """Shapes, and a selection by costs that are made up."""
        config = self.config(**changes)
        shapes, generator = Shapes(config, anatomy), torch.Generator().manual_seed(seed)
        costs = made_up_costs(
            shapes, anatomy, lambda count: torch.rand(count, generator=generator, dtype=torch.float64)
        )
        target = round((1 - (config.sparsity if sparsity is None else sparsity)) * anatomy.prunable_weights)
        return shapes, shapes.select(costs, target), target

    def widths(self, shapes, keep):
        """Of each coupling that is removed: its structure's row, and how many groups it had and has.

        Pools within a coupling have no width of their own: all of a pool goes if what it belongs to does.
        """
        for coupling in shapes._couplings:
            if coupling.structure in shapes._config.parts and coupling.pools is None:
                alive = ~dead_sides(keep, coupling).any(0)
                yield STRUCTURES[coupling.structure], len(alive), int(alive.sum())

    @pytest.mark.parametrize("seed", SEEDS)
    def test_a_selection_is_within_one_candidate_of_its_target(self, seed):
        _, anatomy = self.examined()
        _, selection, target = self.selected(anatomy, seed)
        left = count_weights(selection.keep)
        assert 0 <= left - target < selection.next_weights <= self.largest
        assert left < anatomy.prunable_weights

    @pytest.mark.parametrize("seed", SEEDS)
    def test_what_goes_at_random_reaches_its_target_too(self, seed):
        _, anatomy = self.examined()
        shapes = Shapes(self.config(), anatomy)
        keep = shapes.random_masks(self.sparsity, seed)
        target = round((1 - self.sparsity) * anatomy.prunable_weights)
        assert 0 <= count_weights(keep) - target < self.largest
        again = shapes.random_masks(self.sparsity, seed)
        assert all(torch.equal(keep[name].rows, again[name].rows) for name in keep)

    def test_a_cut_model_computes_what_zeros_do(self):
        for family in self.families:
            _, anatomy = self.examined(family)
            keep = Shapes(self.config(), anatomy).random_masks(self.sparsity, seed=1)
            assert count_weights(keep) < anatomy.prunable_weights
            smaller, _ = self.examined(family)
            cut_out(smaller, anatomy, keep)
            zeros = masked(build(family), anatomy, keep)
            ids = tokens(3, 12, seed=7)
            with torch.no_grad():
                torch.testing.assert_close(smaller(ids).logits, zeros(ids).logits, rtol=1e-4, atol=1e-4)
            assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in zeros.parameters())

    def test_widths_are_multiples_and_no_narrower_than_asked(self):
        _, anatomy = self.examined()
        rounded = {} if self.config().widths_multiple == 1 else {"round_to": 8}
        multiple, least = rounded.get("round_to", 1), 0.25
        checked = 0
        for seed in SEEDS:
            shapes, selection, _ = self.selected(anatomy, seed, min_width=least, **rounded)
            for row, before, after in self.widths(shapes, selection.keep):
                if not row.whole:
                    assert after >= min(before, math.ceil(least * before))
                    assert after in (before, 0) or row.multiple is None or after % multiple == 0
                    checked += 1
        kinds = [STRUCTURES[part] for part in self.structure.split("+")]
        assert checked or all(row.whole or not row.coupled for row in kinds)

    def test_everything_that_can_go_leaves_the_least_widths_and_no_less(self):
        _, anatomy = self.examined()
        shapes, selection, _ = self.selected(anatomy, 0, sparsity=1.0)
        assert count_weights(selection.keep) == shapes.least_weights()
        config = self.config()
        for row, before, after in self.widths(shapes, selection.keep):
            least = 0 if row.whole else math.ceil(config.least_width * before)
            multiple = config.widths_multiple if row.multiple is not None else 1
            assert after == math.ceil(least / multiple) * multiple if before % multiple == 0 else after >= least

    def test_a_sparsity_beyond_reach_is_refused_with_what_can_be_had(self):
        _, anatomy = self.examined()
        most = 1 - Shapes(self.config(), anatomy).least_weights() / anatomy.prunable_weights
        if most < 1:
            with pytest.raises(ConfigError, match=rf"With {self._words} {100 * most:.1f} % of the .*--sparsity"):
                check_shapes(self.config(sparsity=most + 1e-3), anatomy)
            check_shapes(self.config(sparsity=most - 1e-6), anatomy)
        with pytest.raises(ConfigError, match=rf"least that can go with {self._words} is .*--sparsity of [\d.e-]+ at"):
            check_shapes(self.config(sparsity=1e-5), anatomy)

    def test_without_its_layers_nothing_is_left_to_prune(self):
        with pytest.raises(ConfigError, match=r"[Nn]othing.* to prune.*Ignore fewer layers"):
            Shapes(self.config(), self.examined(ignore=self.ignored)[1])

    def test_layers_that_are_ignored_stay_whole(self):
        _, anatomy = self.examined(ignore=(r"layers\.0\.mlp\.gate_proj", r"layers\.0\.self_attn\.q_proj"))
        _, selection, target = self.selected(anatomy, 0)
        assert set(selection.keep) == set(anatomy.layers)
        assert target <= count_weights(selection.keep) < anatomy.prunable_weights

    @property
    def _words(self):
        return self.structure.replace("+", r"\+")

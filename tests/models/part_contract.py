"""The contract of a kind of part; a new kind inherits it and says what model has such a part."""

import torch

from llm_surgeon.models import examine
from llm_surgeon.models.parts import Part, PartEntry
from llm_surgeon.models.permutation import fold_order
from llm_surgeon.testing import FamilyChecks

STRUCTURES = {"", "neurons", "heads", "values", "blocks"}


class PartContract:
    """Truths of every kind of part.

    Attributes:
        family: A family that has the part.
        entry: The part's entry in it.
        build: Makes a tiny random model of the family, the same at each call.
    """

    def model(self):
        model = self.build()
        examine(model, self.family)  # makes transposed layers plain
        return model

    def checks(self):
        model = self.model()
        return FamilyChecks(self.family, model, examine(model, self.family))

    def parts(self, checks):
        return [part for part in checks.anatomy.parts if part.entry == self.entry]

    def test_some_blocks_have_the_part_and_others_say_that_they_have_not(self):
        model, checks = self.model(), self.checks()
        there = {part.block for part in self.parts(checks)}
        assert there
        for number, block in enumerate(model.get_submodule(self.family.blocks)):
            prefix = f"{self.family.blocks}.{number}."
            part = self.entry.locate(model.config, block, number, prefix)
            assert (part is not None) == (number in there)
        assert self.entry.locate(model.config, torch.nn.Linear(2, 2), 0, "") is None

    def test_the_part_and_its_entry_are_of_the_socket(self):
        assert PartEntry in type(self.entry).__mro__
        assert all(Part in type(part).__mro__ for part in self.parts(self.checks()))

    def test_layers_are_linear_and_meet_the_stream_as_the_entry_says(self):
        checks = self.checks()
        width = checks.network.get_submodule(self.family.residual.tokens).weight.shape[1]
        for part in self.parts(checks):
            layers = {name: checks.anatomy.layers[name] for name in part.layers}
            assert set(part.writers) <= set(layers)
            assert all(layers[name].rows == width for name in part.writers)
            assert all(layers[part.prefix + name].columns == width for name in self.entry.readers)

    def test_without_what_it_writes_the_part_is_of_no_effect(self):
        checks = self.checks()
        part = self.parts(checks)[0]
        keep = checks.anatomy.dense_masks()
        for name in part.writers:
            keep[name].rows.fill_(False)
            keep[name].columns.fill_(False)
        silent = logits(checks.masked(keep))
        for name in set(part.layers) - set(part.writers):
            keep[name].rows.fill_(False)
        assert torch.equal(logits(checks.masked(keep)), silent)
        assert (silent - logits(checks.network)).abs().max() > 1e-3

    def test_couplings_are_within_the_part_and_of_known_structures(self):
        checks = self.checks()
        for part in self.parts(checks):
            couplings = list(part.couplings())
            assert {coupling.structure for coupling in couplings} <= STRUCTURES
            assert set(self.entry.structures) <= {coupling.structure for coupling in couplings}
            for coupling in couplings:
                assert len({len(side.index) for side in (*coupling.sides, *coupling.followers)}) == 1
                for side in (*coupling.sides, *coupling.followers):
                    assert side.layer in part.layers
                    size = len(checks.anatomy.dense_masks()[side.layer].axis(side.axis))
                    assert 0 <= int(side.index.min()) <= int(side.index.max()) < size
                    assert len(side.index.unique()) == side.index.numel()

    def test_the_part_can_go_as_a_whole(self):
        checks = self.checks()
        for part in self.parts(checks):
            (whole,) = [coupling for coupling in part.couplings() if coupling.structure == "blocks"]
            assert len(whole.sides[0].index) == 1
            keep = checks.without_every_second(whole)
            assert all(keep[name].weights == 0 for name in part.layers)

    def test_what_dies_together_does(self):
        checks = self.checks()
        for part in self.parts(checks):
            for coupling in part.couplings():
                checks.check_coupling(coupling)

    def test_smaller_matrices_compute_what_zeros_do(self):
        checks = self.checks()
        for part in self.parts(checks):
            for coupling in part.couplings():
                checks.check_smaller(checks.without_every_second(coupling), coupling.kind)

    def test_a_dense_part_is_as_its_model_is_built(self):
        checks = self.checks()
        dense = checks.anatomy.dense_masks()
        for part in self.parts(checks):
            assert all(bool(present.all()) for _rows, _axis, present in part.present(dense))
            assert part.counts(dense) == {}
            for name, value in part.sizes(dense).items():
                # GPT-2 has no entry for what it computes; where there is one, it says the same.
                assert getattr(checks.network.config, name, None) in (None, value)

    def test_what_is_present_is_at_least_what_is_kept(self):
        checks = self.checks()
        for part in self.parts(checks):
            for coupling in part.couplings():
                keep = checks.without_every_second(coupling)
                for rows, axis, present in part.present(keep):
                    kept = keep[rows.layer].axis(axis)[rows.index]
                    assert not bool((kept & ~present).any())

    def test_gates_scale_rows_and_columns_of_the_part_once(self):
        checks = self.checks()
        for part in self.parts(checks):
            seen = {}
            for rows, axis, width in part.gates(2):
                assert rows.layer in part.layers
                assert rows.index.numel() % width == 0 or part.neurons
                places = set(rows.index.flatten().tolist())
                assert not places & seen.setdefault((rows.layer, axis), set())
                seen[rows.layer, axis] |= places

    def test_free_orders_are_free(self):
        checks = self.checks()
        expected = logits(checks.network)
        for part in self.parts(checks):
            for order in part.orders():
                model = self.model()
                assert {order.reader.layer, *(rows.layer for rows in order.writers)} <= set(part.layers)
                fold_order(model, order, torch.arange(order.channels).flip(0).expand(order.sets, -1))
                torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)

    def test_products_of_pairs_of_tokens_do_not_grow(self):
        checks = self.checks()
        for part in self.parts(checks):
            dense = part.products(checks.anatomy.dense_masks())
            for coupling in part.couplings():
                left = part.products(checks.without_every_second(coupling))
                assert 0 <= left <= dense
                assert coupling.structure != "blocks" or left == 0


@torch.no_grad()
def logits(model):
    ids = torch.randint(model.config.vocab_size, (3, 12), generator=torch.Generator().manual_seed(7))
    return model(ids, use_cache=False).logits

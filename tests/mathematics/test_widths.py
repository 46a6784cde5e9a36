"""Whatever threshold is taken, bundled groups leave the widths that were asked for."""

import pytest
import torch

from llm_surgeon.mathematics.candidates import Group, joint_group
from llm_surgeon.mathematics.keep_masks import Coupling, KeepMask, Side
from llm_surgeon.mathematics.widths import Widths, bundle, merge

BLOCKS, NEURONS, HEADS = 3, 22, 6


def groups(alive=None, pools=None, count=NEURONS, seed=0):
    """One coupling of single rows per block, with random costs."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for block in range(BLOCKS):
        keep = {
            "layer": KeepMask(torch.ones(count, dtype=torch.bool) if alive is None else alive[block], torch.ones(4))
        }
        coupling = Coupling("neuron", (Side("layer", "rows", torch.arange(count).view(-1, 1)),), pools=pools)
        made.append(joint_group(keep, coupling, torch.rand(1, count, generator=generator, dtype=torch.float64)))
    return made


def left(bundled, threshold):
    """How many groups of each block are not removed; dead ones do not count."""
    return [int((group.score > threshold)[group.freed > 0].sum()) for group in bundled]


def thresholds(bundled):
    scores = torch.cat([group.score for group in bundled])
    return scores[scores.isfinite()].unique().tolist()


@pytest.mark.parametrize("multiple", [1, 4, 8])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("least", [0, 3])
def test_every_threshold_leaves_the_widths(multiple, uniform, least):
    bundled = bundle(groups(), Widths(multiple, least, uniform))
    for threshold in thresholds(bundled):
        counts = left(bundled, threshold)
        assert all(count >= least for count in counts)
        assert all(count % multiple == 0 or count == NEURONS for count in counts)
        assert not uniform or len(set(counts)) == 1
    # All but what has to stay can go.
    reachable = left(bundled, max(thresholds(bundled)))
    assert all(count < least + multiple + (NEURONS % multiple if least else 0) for count in reachable)


def test_the_cheapest_go_first_and_a_bundle_costs_what_its_groups_cost():
    plain = groups()
    bundled = bundle(plain, Widths(multiple=4, least=4))
    for before, after in zip(plain, bundled, strict=True):
        order = before.score.argsort()
        # 22 leave 20, then 16, ...: the first bundle holds two.
        for start, end in ((0, 2), (2, 6), (6, 10)):
            members = order[start:end]
            expected = before.side_costs[0, members].sum() / before.freed[members].sum()
            torch.testing.assert_close(after.score[members], expected.expand(end - start))
        assert (after.score.isinf().nonzero().flatten().sort().values == order[-4:].sort().values).all()


def test_uniform_bundles_add_up_over_the_blocks():
    plain = groups()
    bundled = bundle(plain, Widths(uniform=True))
    cheapest = [int(group.score.argmin()) for group in plain]
    cost = sum(float(group.side_costs[0, n]) for group, n in zip(plain, cheapest, strict=True))
    freed = sum(float(group.freed[n]) for group, n in zip(plain, cheapest, strict=True))
    assert {float(group.score[n]) for group, n in zip(bundled, cheapest, strict=True)} == {cost / freed}


def test_pools_keep_equally_many():
    """Two query heads of each of three key/value heads: one of each goes, or both do."""
    pools = torch.tensor([0, 0, 1, 1, 2, 2])
    bundled = bundle(groups(pools=pools, count=HEADS), Widths())
    for group in bundled:
        for threshold in thresholds([group]):
            stays = (group.score > threshold).view(3, 2).sum(1)
            assert len(set(stays.tolist())) == 1
        assert len(group.score.unique()) == 2


def test_the_dead_are_in_no_bundle():
    alive = [torch.arange(NEURONS) >= 6] * BLOCKS
    bundled = bundle(groups(alive=alive), Widths(multiple=8, uniform=True))
    for group in bundled:
        assert group.score[:6].isinf().all()
    assert [left(bundled, threshold)[0] for threshold in thresholds(bundled)] == [8, 0]


def test_raw_costs():
    plain = groups()
    bundled = bundle(plain, Widths(multiple=22), per_weight=False)
    for before, after in zip(plain, bundled, strict=True):
        torch.testing.assert_close(after.score, before.side_costs.sum().expand(NEURONS))


def test_merged_groups_go_together_and_the_dead_do_not_hinder():
    keep = {"layer": KeepMask(torch.tensor([True, False]), torch.ones(4, dtype=torch.bool))}
    coupling = Coupling("attention", (Side("layer", "rows", torch.tensor([[0], [1]])),))
    partly = joint_group(keep, coupling, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    whole = Group(
        coupling, torch.tensor([[3.0, 5.0]]), torch.tensor([4.0, 4.0]), torch.tensor([0.75, 1.25]), torch.arange(2)
    )
    first, second = merge([partly, whole])
    torch.testing.assert_close(second.score.double(), torch.tensor([4 / 8, 5 / 4], dtype=torch.float64))
    assert float(first.score[0]) == float(second.score[0])
    assert first.score[1].isinf()

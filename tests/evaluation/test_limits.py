import pytest

from choosing import attentions, feed_forwards, shrink
from llm_surgeon.evaluation.limits import speed_limits
from llm_surgeon.models import examine, family_of
from tiny import build, tokens


def test_limits_of_half_the_neurons():
    """Counted by hand on the tiny Llama: two blocks of 24 channels, 40 neurons, 4 heads of 8 dimensions, 2 shared."""
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    keep = anatomy.dense_masks()
    for part in feed_forwards(anatomy):
        keep[part.output.layer].columns[20:] = False
        for rows in part.inputs:
            keep[rows.layer].rows[20:] = False
    attention, neuron = 24 * (32 + 16 + 16 + 32), 3 * 24
    head = 64 * 24
    dense, pruned = 2 * (attention + 40 * neuron), 2 * (attention + 20 * neuron)
    scores = 10 * 10 * 2 * 4 * 8
    prefill, decode = speed_limits(anatomy, keep, head, 10)
    assert prefill == pytest.approx((10 * dense + scores + head) / (10 * pruned + scores + head))
    assert decode == pytest.approx((dense + head) / (pruned + head))


def test_multiplications_are_those_that_torch_counts():
    """torch's own counter sees the matrix products of both models; attention it counts whole, not causally."""
    from torch.utils.flop_counter import FlopCounterMode

    dense, pruned = build("llama"), build("llama")
    anatomy = examine(pruned, family_of("llama"))
    keep = anatomy.dense_masks()
    part = attentions(anatomy)[0]
    for rows, axis in ((part.query, "rows"), (part.key, "rows"), (part.value, "rows"), (part.output, "columns")):
        keep[rows.layer].axis(axis)[rows.index[0].flatten()] = False
    shrink(pruned, anatomy, keep)
    counted = []
    for model in (dense, pruned):
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(tokens(1, 100), logits_to_keep=1)
        by_kind = counter.get_flop_counts()["Global"]
        attention = sum(count for kind, count in by_kind.items() if "bmm" in str(kind))
        counted.append(sum(by_kind.values()) - attention / 2)
    head = model.lm_head.weight.numel()
    assert speed_limits(anatomy, keep, head, 100)[0] == pytest.approx(counted[0] / counted[1], rel=0.01)

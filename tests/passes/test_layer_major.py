"""Block by block or batch by batch: the same sums."""

import pytest
import torch

from llm_surgeon.curvature import ESTIMATORS, Estimation, estimate
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import NonFiniteError
from llm_surgeon.mathematics.fisher import Damping
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.passes.task import Task
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import Budgets, TensorStore
from tiny import BUILDERS, build, tokens

DAMPING = Damping(0.01, 0.1)


def calibration(padded=False):
    ids = tokens(5, 9)
    mask = None
    if padded:
        mask = torch.ones_like(ids, dtype=torch.bool)
        mask[::2, 6:] = False
    return CalibrationTokens(ids, mask, {})


def both(model, text, store=None, **how):
    """The curvature in both orders, with the tokens that were told of."""
    anatomy = examine(model, family_of(model.config.model_type))
    result = []
    for order in ("batch-major", "layer-major"):
        seen = []
        estimation = Estimation(batch_size=2, precision="float32", order=order, **how)
        place = store if order == "layer-major" else None
        curvature = estimate(Session(model, anatomy, text, store=place), anatomy.dense_masks(), estimation, seen.append)
        result.append((curvature, sum(seen)))
    return anatomy, *result


def costs_of(model, anatomy, curvature, correlated=True):
    for name, layer in anatomy.layers.items():
        fisher = curvature.fisher(layer, anatomy.dense_masks()[name], DAMPING)
        weight = read_matrix(model, layer)
        for costs in (fisher.row_costs, fisher.column_costs):
            yield costs(weight, correlated=correlated)


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", BUILDERS)
def test_factors_are_the_same(family, padded, share):
    model = build(family)
    anatomy, (one, told), (other, told_too) = both(model, calibration(padded), gradient_share=share)
    assert told == told_too == 45
    assert other.result.tokens == one.result.tokens
    assert other.loss == pytest.approx(one.loss, rel=1e-6)
    for name, layer in anatomy.layers.items():
        keep = anatomy.dense_masks()[name]
        torch.testing.assert_close(other.input_factor(layer, keep), one.input_factor(layer, keep))
        torch.testing.assert_close(other.gradient_factor(layer), one.gradient_factor(layer), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "how",
    [
        {"curvature": "activations"},
        {"curvature": "diagonal"},
        {"curvature": "nearest-kronecker"},
        {"curvature": "kfac", "sampled_labels": 3, "seed": 4},
    ],
    ids=lambda how: how["curvature"],
)
def test_costs_of_other_curvatures_are_the_same(how):
    model = build("llama")
    anatomy, (one, _), (other, _) = both(model, calibration(), **how)
    # An exact diagonal has costs of independent weights only.
    correlated = how["curvature"] != "diagonal"
    pairs = zip(costs_of(model, anatomy, one, correlated), costs_of(model, anatomy, other, correlated), strict=True)
    for expected, actual in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-9)


def test_what_does_not_fit_goes_to_disk_and_comes_back(tmp_path):
    model = build("llama")
    store = TensorStore(torch.device("cpu"), Budgets(host=2000), tmp_path)
    peak = []
    put = store.put
    store.put = lambda tensor: (put(tensor), peak.append(store.bytes_on_disk))[0]
    anatomy, (one, _), (other, _) = both(model, calibration(), store)
    assert max(peak) > 10_000
    # Names are gone as soon as the files are mapped.
    assert not list(tmp_path.iterdir())
    for expected, actual in zip(costs_of(model, anatomy, one), costs_of(model, anatomy, other), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-9)


def test_hidden_states_and_gradients_are_given_back():
    model = build("llama")
    store = TensorStore(torch.device("cpu"), Budgets(host=10**9))
    _, _, (curvature, _) = both(model, calibration(), store)
    grams = [*(sum_.gram for sum_ in curvature.inputs.values()), *curvature.gradients.values()]
    assert 10**9 - store._free["host"] == sum(gram.nbytes for gram in grams)
    # The next shot finds the room of this one's sums.
    del grams, curvature
    assert store._free["host"] == 10**9


@pytest.mark.parametrize("curvature", [name for name, row in ESTIMATORS.items() if row.puts_away])
def test_only_one_block_has_sums_that_are_not_put_away(curvature):
    """At the end of a block, what it summed is in the store, and later blocks have not begun."""
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    seen = []

    class Watching(Task):
        def run(self, hooks, *, backward, finished):
            def look(block):
                finished(block)
                seen.append((block, self.store._free["host"]))

            return super().run(hooks, backward=backward, finished=look)

    store = TensorStore(torch.device("cpu"), Budgets(host=10**9))
    how = Estimation(batch_size=2, precision="float32", order="layer-major", curvature=curvature)
    task = Watching(Session(model, anatomy, calibration(), store=store), anatomy.dense_masks(), how)
    found = ESTIMATORS[curvature].estimate(task, None)
    # Inputs are seen on the way forward, gradients on the way back.
    assert [block for block, _ in seen] == ([0, 1] if curvature == "activations" else [1, 0])
    assert seen[0][1] != seen[1][1]
    assert 10**9 - store._free["host"] == found.nbytes


def test_a_loss_that_is_not_finite_is_an_error():
    model = build("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    anatomy = examine(model, family_of("llama"))
    how = Estimation(batch_size=2, precision="float32", order="layer-major")
    with pytest.raises(NonFiniteError, match="loss"):
        estimate(Session(model, anatomy, calibration()), anatomy.dense_masks(), how)

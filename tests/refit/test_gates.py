"""Gates on tiny models of the real classes."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from choosing import feed_forwards
from llm_surgeon import PruneConfig, prune
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.anatomy import to_index
from llm_surgeon.models.matrix import core_of, read_matrix
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.passes.task import Task
from llm_surgeon.pruning.shots import _Shots, run_shots
from llm_surgeon.refit import gates as module
from llm_surgeon.refit.gates import BACKWARD_PASSES, FORWARD_PASSES, gate_width, gates_of, set_gates
from llm_surgeon.refit.stages import with_dense
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import Budgets, TensorStore
from pruned_models import pruned
from tiny import BUILDERS, build, tokenizer, tokens

families = pytest.mark.parametrize("family", sorted(BUILDERS))
TEXT = CalibrationTokens(tokens(8, 16), None, {})


def task_of(model, anatomy, keep, order="batch-major", store=None, advance=lambda _: None, text=TEXT):
    how = Estimation(3, "float32", order=order)
    return Task(Session(model, anatomy, text, store=store), keep, how, advance)


def lively(family, **changes):
    """A pruned model that is not indifferent to what its blocks do, as random small ones are."""
    model, _, anatomy, keep = pruned(family, **changes)
    with torch.no_grad():
        for layer in anatomy.layers.values():
            core_of(model, layer).weight.mul_(4)
    return model, anatomy, keep


def loss_of(model):
    """Mean loss of the text, by transformers."""
    with torch.no_grad():
        logits = model(TEXT.input_ids).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), TEXT.input_ids[:, 1:].flatten())


def gate_by_hooks(model, gates, keep, factors):
    """Multiply what passes instead of weights; ``factors`` are ``[tokens or 1, gates]`` of each of ``gates``."""
    for gated, own in zip(gates, factors, strict=True):
        members = gated.members[to_index(keep[gated.layer.name].axis(gated.axis))]
        core = core_of(model, gated.layer)

        def scaled(x, own=own, members=members):
            factors = torch.cat([own, torch.ones(len(own), 1)], dim=1)[:, members]
            return (x.flatten(0, -2) * factors).view_as(x)

        if gated.axis == "columns":
            core.register_forward_pre_hook(lambda _m, arguments, scaled=scaled: (scaled(arguments[0]),))
        else:
            core.register_forward_hook(lambda _m, _i, output, scaled=scaled: scaled(output))


@families
@pytest.mark.parametrize("width", [None, 5])
def test_moments_are_those_of_derivatives_at_each_position(family, width, monkeypatch):
    """By autograd, with a gate of its own at each position of each sequence."""
    model, anatomy, keep = lively(family)
    gates = [gated for gated in gates_of(anatomy, width) if keep[gated.layer.name].weights]
    other, positions = deepcopy(model), TEXT.input_ids.numel()
    own = [torch.ones(positions, gated.count, requires_grad=True) for gated in gates]
    gate_by_hooks(other, gates, keep, own)
    logits = other(TEXT.input_ids).logits[:, :-1]
    labels = TEXT.input_ids[:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    by_token = torch.cat(torch.autograd.grad(loss, own), dim=1)
    seen = []
    step = torch.zeros(by_token.shape[1])
    monkeypatch.setattr(module, "newton_step", lambda *moments: seen.append(moments) or step)

    record = set_gates(task_of(model, anatomy, keep), 1, 0.7, width)

    ((slopes, fisher, damping),) = seen
    for found, expected in ((slopes, by_token.sum(0)), (fisher, by_token.T @ by_token)):
        expected = expected / len(labels)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
        assert float(expected.abs().max()) > 1e-4
    assert damping == pytest.approx(0.7 * float(fisher.diagonal().mean()))
    assert record.damping == pytest.approx(0.7)
    assert record.gates == by_token.shape[1]
    assert record.first_loss == pytest.approx(float(loss.detach()) / len(labels), rel=1e-5)
    assert record.last_loss == pytest.approx(record.first_loss, rel=1e-6)


def test_damping_is_what_the_evidence_of_the_labels_says(monkeypatch):
    model, anatomy, keep = lively("llama")
    asked, used = [], []
    monkeypatch.setattr(module, "evidence_damping", lambda *given: asked.append(given) or 0.25)
    monkeypatch.setattr(module, "newton_step", lambda *given: used.append(given) or torch.zeros(len(given[0])))

    record = set_gates(task_of(model, anatomy, keep), 2)

    for (slopes, fisher, count), (own_slopes, own_fisher, damping) in zip(asked, used, strict=True):
        assert slopes is own_slopes
        assert fisher is own_fisher
        assert count == TEXT.input_ids[:, 1:].numel()
        assert damping == 0.25
    assert len(used) == 2
    assert record.damping == pytest.approx(0.25 / float(used[0][1].diagonal().mean()))


@families
@pytest.mark.parametrize("width", [None, 5])
def test_gates_are_in_the_weights_afterwards(family, width, monkeypatch):
    model, anatomy, keep = lively(family)
    gates = [gated for gated in gates_of(anatomy, width) if keep[gated.layer.name].weights]
    other, before, length = deepcopy(model), deepcopy(model), 0.6
    count = sum(gated.count for gated in gates)
    step = 0.5 * torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.2
    monkeypatch.setattr(module, "newton_step", lambda *_: step)
    monkeypatch.setattr(module, "step_length", lambda *_: length)

    record = set_gates(task_of(model, anatomy, keep), 1, 0.5, width)

    factors = (1 + length * step).float().split([gated.count for gated in gates])
    gate_by_hooks(other, gates, keep, [own[None] for own in factors])
    with torch.no_grad():
        expected, found = other(TEXT.input_ids).logits, model(TEXT.input_ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (found - before(TEXT.input_ids).logits).abs().max() > 0.01
    assert record.largest_change == pytest.approx(length * float(step.abs().max()))


def test_a_group_is_as_wide_as_is_said():
    anatomy = examine(build("llama"), family_of("llama"))
    (part, _), width = feed_forwards(anatomy), 7
    assert part.neurons % width
    for layer, axis in ((part.output.layer, "columns"), (part.inputs[0].layer, "rows")):
        (gated,) = (x for x in gates_of(anatomy, width) if (x.layer.name, x.axis) == (layer, axis))
        assert gated.members.tolist() == [neuron // width for neuron in range(part.neurons)]
        assert gated.count == -(-part.neurons // width)
    heads = [gated.count for gated in gates_of(anatomy, width) if "self_attn" in gated.layer.name]
    assert heads == [4] * 4


def width_of(**options):
    config = PruneConfig.from_mapping({**SMALL, "gate_steps": 1, "reconstruction": True, **options})
    return gate_width(examine(build("llama"), family_of("llama")), config)


def test_gates_are_as_fine_as_the_text_of_the_other_half_allows(monkeypatch):
    monkeypatch.setattr(module, "NARROWEST", 4)
    (part, _) = feed_forwards(examine(build("llama"), family_of("llama")))
    # Gates of a model with groups so wide: four heads and the groups, two gates each, in two blocks.
    counts = {width: 4 * (4 + -(-part.neurons // width)) for width in (4, 8, 16)}
    for width, count in counts.items():
        # Sequences of two tokens, half of which set the gates.
        assert width_of(samples=count, seq_len=2, cross_fit=True) == width
    assert width_of(samples=counts[4] - 1, seq_len=2, cross_fit=True) == 8
    assert width_of(samples=2, seq_len=2, cross_fit=True) == part.neurons
    monkeypatch.setattr(module, "MOST_GATES", counts[8])
    assert width_of(samples=1000, cross_fit=True) == 8


def test_gates_are_one_for_a_part_where_reconstruction_has_seen_the_text():
    (part, _) = feed_forwards(examine(build("llama"), family_of("llama")))
    assert width_of(samples=1000) == part.neurons
    assert width_of(samples=1000, gate_width=3) == width_of(samples=1000, gate_width=3, cross_fit=True) == 3


@families
def test_steps_lower_the_loss_by_what_is_predicted(family):
    model, anatomy, keep = lively(family)
    before = float(loss_of(model))

    record = set_gates(task_of(model, anatomy, keep), 3, 0.5)

    assert record.first_loss == pytest.approx(before, rel=1e-5)
    assert record.last_loss < before - 1e-3
    assert float(loss_of(model)) - before == pytest.approx(record.last_loss - before, rel=0.3)
    assert record.steps == 3


def test_only_gated_layers_change():
    model, anatomy, keep = lively("llama-biased")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    set_gates(task_of(model, anatomy, keep), 1, 0.5)

    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # A bias of what a head or a feed-forward part puts out is not its own.
    kinds = {"columns": ("weight",), "rows": ("weight", "bias")}
    expected = {
        f"{gated.layer.name}.{kind}"
        for gated in gates_of(anatomy)
        for kind in kinds[gated.axis]
        if keep[gated.layer.name].weights
    }
    assert {name.replace(".core.", ".") for name in changed} == expected


@pytest.mark.parametrize("family", ["llama-biased", "gpt2", "phi3"])
def test_orders_and_a_store_on_disk_make_no_difference(family):
    states = []
    for order, budgets in (("batch-major", None), ("layer-major", Budgets(host=0, device=0))):
        model, anatomy, keep = lively(family)
        store = TensorStore(torch.device("cpu"), budgets)
        set_gates(task_of(model, anatomy, keep, order, store), 2, 0.5, 5)
        states.append({name: read_matrix(model, layer) for name, layer in anatomy.layers.items()})
        assert store.bytes_on_disk == 0
    for name, matrix in states[0].items():
        torch.testing.assert_close(matrix, states[1][name], rtol=1e-3, atol=1e-4)


def test_padding_does_not_count():
    ids = TEXT.input_ids.clone()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 11:] = False
    results = []
    for filler in (1, 2):
        padded = ids.masked_fill(~mask, filler)
        model, anatomy, keep = lively("llama")
        record = set_gates(task_of(model, anatomy, keep, text=CalibrationTokens(padded, mask, {})), 1, 0.5)
        results.append((record, [read_matrix(model, layer) for layer in anatomy.layers.values()]))
    (first, matrices), (second, others) = results
    assert first == second
    assert all(torch.equal(*pair) for pair in zip(matrices, others, strict=True))


@pytest.mark.parametrize("order", ["batch-major", "layer-major"])
def test_progress_counts_every_pass(order):
    model, anatomy, keep = lively("llama")
    told = []
    set_gates(task_of(model, anatomy, keep, order, advance=told.append), 2, 0.5)
    assert sum(told) == 2 * TEXT.input_ids.numel() * (BACKWARD_PASSES + FORWARD_PASSES)


def test_parts_that_are_not_all_prunable_have_no_gates():
    model, anatomy, keep = lively("llama", ignore=("o_proj", r"0\.mlp.*"))
    names = {gated.layer.name for gated in gates_of(anatomy)}
    assert names == {f"model.layers.1.mlp.{kind}_proj" for kind in ("gate", "down")}
    assert set_gates(task_of(model, anatomy, keep), 1, 0.5).gates == 2


def test_a_model_without_gates_stays_as_it_is():
    model, anatomy, keep = lively("llama", ignore=("o_proj", "down_proj"))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    record = set_gates(task_of(model, anatomy, keep), 1, 0.5)
    assert (record.gates, record.steps, record.first_loss, record.last_loss) == (0, 0, None, None)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


SMALL = {"preset": "none", "samples": 8, "seq_len": 16, "sparsity": 0.4, "evaluation": "none", "precision": "float32"}


@pytest.mark.parametrize(
    "options",
    [
        {"reconstruction": True, "shots": 2, "dampening_g": 0.5},
        {"structure": "neurons+heads", "shots": 2},
        {"structure": "blocks", "sparsity": 0.8, "shots": 1},
        {"structure": "unstructured", "shots": 1},
        {"structure": "2:4", "method": "magnitude", "sparsity": None, "shots": 1},
    ],
)
def test_a_run_records_its_gates(options):
    config = PruneConfig.from_mapping({**SMALL, "gate_steps": 1, **options})
    model = build("llama")
    report = prune(model, tokenizer(), config)
    assert all(shot.stage("gates")["loss after"] <= shot.stage("gates")["loss before them"] for shot in report.shots)
    assert all(shot.seconds_of("gates") > 0 and shot.stage("gates")["number of gates"] > 0 for shot in report.shots)
    assert report.shots[-1].sparsity == pytest.approx(config.sparsity, abs=0.1)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "20 gates are set by 128 tokens: fewer than 7 for each"),
        ({"samples": 9}, None),
        ({"gate_width": 16}, "28 gates are set by 128 tokens"),
        ({"reconstruction": True, "cross_fit": True, "samples": 8}, None),
        ({"reconstruction": True, "cross_fit": True, "samples": 7}, "20 gates are set by 56 tokens: fewer than 3"),
        ({"ignore": ["o_proj", "down_proj"]}, "there are no gates to set"),
    ],
)
def test_what_gates_cannot_do_is_said_once_before_the_first_shot(options, expected, monkeypatch, caplog):
    monkeypatch.setattr(module, "TOKENS_PER_GATE", 7)
    monkeypatch.setattr(module, "CROSSWISE_TOKENS_PER_GATE", 3)
    said = []
    monkeypatch.setattr(_Shots, "shot", lambda *_: said.append(caplog.text) or SimpleNamespace(start=None))
    config = PruneConfig.from_mapping({**SMALL, "shots": 2, "gate_steps": 1, **options})
    model = build("llama")
    anatomy = examine(model, family_of("llama"), config.ignore)
    list(run_shots(with_dense(Session(model, anatomy, TEXT, config))))
    first, second = said
    assert first == second
    assert expected in first if expected else not first


def test_layer_wise_methods_have_no_gates():
    with pytest.raises(ConfigError, match=r"gate_steps is for the global methods .* not for wanda"):
        PruneConfig.from_mapping({"gate_steps": 1, "method": "wanda"})

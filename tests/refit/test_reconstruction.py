"""Reconstruction on tiny models of the real classes."""

from copy import deepcopy

import pytest
import torch

from llm_surgeon import PruneConfig, prune
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import core_of, read_matrix
from llm_surgeon.refit import last_norm
from llm_surgeon.refit.reconstruction import (
    DENSE_RUNS,
    PRUNED_RUNS,
    Reconstruction,
    check_stream,
    dense_copy,
    reconstruct,
)
from llm_surgeon.session.session import Session
from llm_surgeon.system.storage import Budgets, TensorStore
from pruned_models import pruned
from tiny import BUILDERS, build, tokenizer, tokens

# Outputs are normalised before they are added, or their sum with the stream is.
NORMALISED = ("gemma2", "gemma3", "gemma3-tower", "opt-post-norm", "exaone4", "olmo2", "olmo3", "glm4")
families = pytest.mark.parametrize("family", sorted(BUILDERS.keys() - set(NORMALISED)))
# Families whose norms add 1 to their weights.
WITH_ONE = (
    "qwen3-5",
    "qwen3-5-tower",
)
TEXT = CalibrationTokens(tokens(8, 16), None, {})
HOW = Reconstruction(ridge=1e-3, batch_size=3, precision="float32")


def last_stream(model, anatomy, block, text=TEXT):
    """What leaves a block, ``[tokens, width]``."""
    seen = []
    module = model.get_submodule(f"{anatomy.family.blocks}.{block}")
    handle = module.register_forward_hook(lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        model(text.input_ids, attention_mask=text.attention_mask)
    handle.remove()
    return seen[0].flatten(0, -2)


def weights(model, anatomy):
    return {name: read_matrix(model, layer).clone() for name, layer in anatomy.layers.items()}


def last_layer(anatomy):
    return anatomy.parts[-1].writers[0]


@families
def test_the_last_layer_is_the_least_squares_solution_on_what_it_really_gets(family):
    """Run on all tokens at once by the model itself, with a dense system for all rows."""
    model, dense, anatomy, keep = pruned(family)
    reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)
    name = last_layer(anatomy)
    layer, core = anatomy.layers[name], core_of(model, anatomy.layers[name])
    # The other layers are as they were when the last one was corrected, and it has to be as it was before.
    before = deepcopy(model)
    start = pruned(family)[0]
    core_of(before, layer).load_state_dict(core_of(start, layer).state_dict())
    seen = []
    core_of(before, layer).register_forward_pre_hook(lambda _m, arguments: seen.append(arguments[0].flatten(0, -2)))
    reached = last_stream(before, anatomy, anatomy.blocks - 1)
    error = (last_stream(dense, anatomy, anatomy.blocks - 1) - reached)[:, keep[name].rows].double()
    x = torch.cat([seen[0], torch.ones(len(seen[0]), 1)], dim=1) if layer.bias else seen[0]
    x = x.double()
    damping = HOW.ridge * (x**2).mean() * len(x)
    expected = torch.linalg.solve(x.T @ x + damping * torch.eye(x.shape[1]), x.T @ error).T
    # Granite multiplies what a part puts out before it adds it.
    expected = expected / getattr(model.config, "residual_multiplier", 1)
    change = read_matrix(model, layer) - read_matrix(start, layer)
    assert core.weight.shape == (int(keep[name].rows.sum()), int(keep[name].columns.sum()))
    torch.testing.assert_close(change.double(), expected, rtol=1e-2, atol=1e-4 * float(expected.abs().max()))
    assert float(expected.norm()) > 0.01


@families
def test_the_stream_comes_nearer_to_the_dense_one(family):
    model, dense, anatomy, keep = pruned(family)
    goal, before = (last_stream(m, anatomy, anatomy.blocks - 1) for m in (dense, model))

    record = reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)

    after = last_stream(model, anatomy, anatomy.blocks - 1)
    assert (goal - after).norm() < 0.8 * (goal - before).norm()
    assert record.relative_error == pytest.approx(float((goal - after).norm() / goal.norm()), rel=1e-3)


@families
def test_only_what_writes_into_the_stream_changes(family):
    model, dense, anatomy, keep = pruned(family)
    before, goal = weights(model, anatomy), {n: p.clone() for n, p in dense.named_parameters()}

    reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)

    changed = {name for name, matrix in weights(model, anatomy).items() if not torch.equal(matrix, before[name])}
    assert changed == {name for part in anatomy.parts for name in part.writers}
    assert all(torch.equal(parameter, goal[name]) for name, parameter in dense.named_parameters())


def by_scale(model, text, scale):
    """Mean loss of a model whose last hidden states are scaled, in float64."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        states = model.base_model(input_ids=text).last_hidden_state.double()[:, :-1] * scale
        logits = states @ head.weight.double().T
        # Cohere multiplies logits, Granite divides them.
        logits = logits * getattr(model.config, "logit_scale", 1) / getattr(model.config, "logits_scaling", 1)
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()))


@families
def test_the_last_norm_is_scaled_by_derivatives_of_the_loss_of_the_text(family, monkeypatch):
    model, dense, anatomy, keep = pruned(family)
    norm = model.get_submodule(anatomy.family.residual.final_norm)
    with torch.no_grad():
        # Random models are next to indifferent.
        for parameter in norm.parameters():
            parameter.mul_(8)
    before = {name: parameter.clone() for name, parameter in norm.named_parameters()}
    seen, scale, h = [], 0.9, 1e-3
    monkeypatch.setattr(last_norm, "logit_scale", lambda *derivatives: seen.append(derivatives) or scale)

    # Of the other sequences the next tokens are not known to be right.
    record = reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW, text=2)

    assert record.scale == scale
    one = family in WITH_ONE
    for name, parameter in norm.named_parameters():
        torch.testing.assert_close(parameter + one, (before[name] + one) * scale)
    ((slope, curvature),) = seen
    low, middle, high = (by_scale(model, TEXT.input_ids[:2], (1 + step) / scale) for step in (-h, 0, h))
    assert slope == pytest.approx((high - low) / (2 * h), rel=0.005)
    assert curvature == pytest.approx((high - 2 * middle + low) / h**2, rel=0.005)
    below, above = (by_scale(model, TEXT.input_ids, (1 + step) / scale) for step in (-h, h))
    whole, counted = (above - below) / (2 * h), (high - low) / (2 * h)
    assert abs(slope - counted) < abs(slope - whole) / 4


def test_a_norm_of_another_kind_is_left_alone():
    model, dense, anatomy, keep = pruned("llama")

    class Quarter(torch.nn.Module):
        """In proportion neither to the weight, nor to the weight and 1."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((model.config.hidden_size,), 8.0))

        def forward(self, x):
            return x * x.square().mean(-1, keepdim=True).rsqrt() * (1 + self.weight / 4)

    model.model.norm = Quarter()
    record = reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)
    assert record.scale == 1
    assert torch.equal(model.model.norm.weight, torch.full_like(model.model.norm.weight, 8.0))


def test_a_model_that_lost_nothing_stays_as_it_is():
    model, dense, anatomy, keep = pruned("llama", share=0.0)
    before = weights(model, anatomy)

    record = reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)

    assert record.relative_error == 0
    assert all(torch.equal(matrix, before[name]) for name, matrix in weights(model, anatomy).items())


def test_layers_that_are_ignored_stay_as_they_are():
    model, dense, anatomy, keep = pruned("llama", ignore=("o_proj", r"0\.mlp.*"))
    names = ["model.layers.0.self_attn.o_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    before = [model.get_parameter(name).clone() for name in names]

    reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW)

    assert all(torch.equal(model.get_parameter(name), old) for name, old in zip(names, before, strict=True))


def test_padding_does_not_count():
    ids = TEXT.input_ids.clone()
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 11:] = False
    padded, other = ids.clone(), ids.clone()
    padded[:, 11:], other[:, 11:] = 1, 2
    results = []
    for some in (padded, other):
        model, dense, anatomy, keep = pruned("llama")
        record = reconstruct(Session(model, anatomy, CalibrationTokens(some, mask, {}), dense=dense), keep, HOW)
        results.append((record, weights(model, anatomy)))
    (first, matrices), (second, others) = results
    assert first == second
    assert all(torch.equal(matrix, others[name]) for name, matrix in matrices.items())


def test_batches_and_a_store_on_disk_make_no_difference(monkeypatch):
    # A third of the tokens are looked at.
    monkeypatch.setattr(last_norm, "_TOKENS", TEXT.input_ids.numel() // 3)
    states, scales = [], []
    for batch_size, budgets in ((8, None), (3, Budgets(host=0, device=0))):
        model, dense, anatomy, keep = pruned("llama-biased")
        store = TensorStore(torch.device("cpu"), budgets)
        how = Reconstruction(0.1, batch_size, "float32")
        scales.append(reconstruct(Session(model, anatomy, TEXT, store=store, dense=dense), keep, how).scale)
        states.append(weights(model, anatomy))
        assert store.bytes_on_disk == 0
    for name, matrix in states[0].items():
        torch.testing.assert_close(matrix, states[1][name], rtol=1e-3, atol=1e-4)
    assert scales[0] == pytest.approx(scales[1], rel=1e-4)
    assert scales[0] != 1


def test_bfloat16_models_keep_their_type():
    model, dense, anatomy, keep = pruned("llama")
    model, dense = model.bfloat16(), dense.bfloat16()
    goal, before = (last_stream(m, anatomy, 1).float() for m in (dense, model))

    reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, Reconstruction(0.01, 8, "bfloat16"))

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (goal - last_stream(model, anatomy, 1).float()).norm() < 0.8 * (goal - before).norm()


def test_progress_counts_every_pass():
    model, dense, anatomy, keep = pruned("llama", ignore=("o_proj",))
    told = []
    reconstruct(Session(model, anatomy, TEXT, dense=dense), keep, HOW, advance=told.append)
    assert sum(told) == TEXT.input_ids.numel() * anatomy.blocks * (DENSE_RUNS + PRUNED_RUNS)


def test_the_copy_shares_what_is_not_pruned_and_nothing_else():
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    copy = dense_copy(model, anatomy)
    shared = {name for name, parameter in copy.named_parameters() if parameter is model.get_parameter(name)}
    own = {f"{name}.weight" for name in anatomy.layers} | {"model.norm.weight"}
    assert own == {n for n, _ in copy.named_parameters()} - shared
    assert "model.embed_tokens.weight" in shared


@pytest.mark.parametrize("family", sorted(BUILDERS))
def test_streams_that_are_no_sum_are_refused(family):
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type))
    session = Session(model, anatomy, TEXT, PruneConfig(precision="float32"))
    if family in NORMALISED:
        with pytest.raises(UnsupportedModelError, match="reconstruction"):
            check_stream(session)
    else:
        check_stream(session)


def test_single_weights_are_refused():
    with pytest.raises(ConfigError, match="reconstruction is for structures that shrink"):
        PruneConfig.from_mapping({"reconstruction": True, "structure": "unstructured"})


def test_a_run_records_what_it_reconstructed():
    config = PruneConfig.from_mapping(
        {
            **{"samples": 8, "seq_len": 16, "shots": 2, "sparsity": 0.4, "reconstruction": True},
            **{"evaluation": "none", "precision": "float32", "dampening_g": 0.5},
        }
    )
    report = prune(build("llama"), tokenizer(), config)
    errors = [shot.stage("reconstruction")["error of the stream"] for shot in report.shots]
    assert 0 < errors[0] < errors[1] < 1
    assert all(shot.seconds_of("reconstruction") > 0 for shot in report.shots)

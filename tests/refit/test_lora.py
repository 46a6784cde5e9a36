import importlib.util
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from choosing import choose, shrink
from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError, NonFiniteError
from llm_surgeon.mathematics.keep_masks import StructureCosts
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.modeling_pruned import PrunedLinear
from llm_surgeon.passes.head import head_loss, label_positions
from llm_surgeon.refit import lora as corrections
from llm_surgeon.refit.lora import Corrections, correct
from llm_surgeon.refit.stage import Shot
from llm_surgeon.refit.stages import Stages
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.progress import SilentProgress
from tiny import build, tokens

adapters = pytest.importorskip("llm_surgeon.refit.adapters", reason="peft is not installed")

FAMILIES = ("llama", "llama-biased", "opt")
STATES = ("dense", "structured", "masked")
families = pytest.mark.parametrize("family", FAMILIES)
states = pytest.mark.parametrize("state", STATES)
TOKENS = CalibrationTokens(tokens(8, 16), None, {})
HOW = Corrections(rank=4, learning_rate=1e-2, steps=12)


def pruned(family, state):
    """A tiny model, its anatomy and its element masks."""
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type), ignore=("layers.1.self_attn.q_proj",))
    if state == "structured":
        cut(model, anatomy)
    return model, anatomy, element_masks(model, anatomy) if state == "masked" else None


def cut(model, anatomy, share=0.5):
    """Remove random rows and columns."""
    generator = torch.Generator().manual_seed(1)
    dense = anatomy.dense_masks()
    costs = {
        name: StructureCosts(
            torch.rand(mask.rows.shape, generator=generator), torch.rand(mask.columns.shape, generator=generator)
        )
        for name, mask in dense.items()
    }
    keep = choose(dense, costs, anatomy.couplings, round((1 - share) * anatomy.prunable_weights)).keep
    shrink(model, anatomy, keep)


@torch.no_grad()
def element_masks(model, anatomy):
    """Remove random single weights."""
    generator = torch.Generator().manual_seed(2)
    masks = {}
    for name, layer in anatomy.layers.items():
        weight = core_of(model, layer).weight
        masks[name] = torch.rand(weight.shape, generator=generator) > 0.5
        weight[~masks[name]] = 0
    return masks


def run(model, anatomy, masks, how=HOW, text=TOKENS, **changes):
    options = {"batch_size": 4, "precision": "float32", "seed": 0, **changes}
    return correct(model, anatomy, masks, text, how, **options)


@torch.no_grad()
def loss(model, text=TOKENS):
    positions, labels = label_positions(text.input_ids, text.attention_mask)
    hidden = model.base_model(input_ids=text.input_ids).last_hidden_state.flatten(0, 1)
    return head_loss(model, hidden[positions], labels) / len(labels)


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def structure(model):
    """Everything about a model but the values of its weights."""
    modules = [(name, type(m), sorted(vars(m)), m.training, sorted(m._modules)) for name, m in model.named_modules()]
    parameters = [
        (name, id(p), p.shape, p.dtype, p.requires_grad, p.grad is None) for name, p in model.named_parameters()
    ]
    return modules, parameters, list(model.state_dict()), model.config.to_dict()


def assert_same_values(model, before):
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@families
@states
def test_the_calibration_loss_goes_down(family, state):
    model, anatomy, masks = pruned(family, state)
    before = loss(model)
    seen = []
    record = run(model, anatomy, masks, advance=seen.append)
    assert loss(model) < before - 0.1
    assert record.steps == 12
    assert record.last_loss < record.first_loss
    assert seen == [4 * 16] * 12


def test_a_step_has_sequences_of_its_own_number():
    """How many sequences a pass for the curvature takes is a matter of memory, and changes no training."""
    model, anatomy, _ = pruned("llama", "structured")
    seen = []

    class Counting(SilentProgress):
        @contextmanager
        def phase(self, description, total_tokens):
            seen.append(total_tokens)
            yield SimpleNamespace(advance=lambda tokens: seen.append(-tokens))

    config = PruneConfig(
        preset="none", lora=True, lora_final_steps=2, lora_batch_size=3, batch_size=5, precision="float32", shots=1
    )
    Stages(Session(model, anatomy, TOKENS, config, Counting())).run(Shot(1, {}), Clock(torch.device("cpu")))
    assert seen == [2 * 3 * 16, -3 * 16, -3 * 16]


@families
def test_the_first_loss_is_that_of_the_first_batch(family):
    model, anatomy, _ = pruned(family, "dense")
    before = loss(model)
    record = run(model, anatomy, None, batch_size=8)
    assert record.first_loss == pytest.approx(before, rel=1e-5)


@families
@states
def test_only_kept_weights_of_prunable_layers_change(family, state):
    model, anatomy, masks = pruned(family, state)
    before = values(model)
    run(model, anatomy, masks)
    weights = {id(core_of(model, layer).weight): name for name, layer in anatomy.layers.items()}
    for name, parameter in model.named_parameters():
        layer = weights.get(id(parameter))
        if layer is None:
            assert torch.equal(parameter, before[name]), name
        elif masks is None:
            assert parameter.numel() == 0 or (parameter != before[name]).any(), name
        else:
            assert (parameter[~masks[layer]] == 0).all(), name
            assert (parameter != before[name])[masks[layer]].float().mean() > 0.9, name


@families
@states
def test_structure_and_modes_are_left_as_they_were(family, state):
    model, anatomy, masks = pruned(family, state)
    model.train()
    model.get_submodule(anatomy.family.blocks)[0].eval()
    model.get_output_embeddings().weight.requires_grad_(False)
    assert state != "structured" or any(isinstance(module, PrunedLinear) for module in model.modules())
    before = structure(model)
    precision = torch.get_float32_matmul_precision()
    random_state = torch.get_rng_state()
    run(model, anatomy, masks, precision="bfloat16")
    assert structure(model) == before
    assert torch.get_float32_matmul_precision() == precision
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@families
@states
def test_what_was_trained_is_what_is_kept(family, state, monkeypatch):
    model, anatomy, masks = pruned(family, state)
    with_adapters = []

    def measured(layers, absorb=adapters.absorb):
        with_adapters.append(loss(model))
        absorb(layers)

    monkeypatch.setattr(adapters, "absorb", measured)
    run(model, anatomy, masks)
    assert loss(model) == pytest.approx(with_adapters[0], rel=1e-5)


@pytest.mark.parametrize("state", ["dense", "masked"])
def test_a_step_is_one_of_adam_on_the_factors_of_each_kept_weight(state):
    """One step of plain autograd on explicit factors, from the same random one, gives the same weights."""
    model, anatomy, masks = pruned("llama", state)
    expected, *_ = pruned("llama", state)
    name = "model.layers.1.mlp.down_proj"
    weight, mask = expected.get_submodule(name).weight, 1.0 if masks is None else masks[name].float()
    with adapters.attached(model, dict.fromkeys(anatomy.layers), 4, 0) as layers:
        a = layers[list(anatomy.layers).index(name)].lora_A["correction"].weight.detach().clone()
    b = torch.zeros(24, 4, requires_grad=True)
    effective = weight.detach() + mask * (b @ a)
    logits = torch.func.functional_call(expected, {f"{name}.weight": effective}, (TOKENS.input_ids,)).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS.input_ids[:, 1:].flatten()).backward()
    optimizer = torch.optim.AdamW([b], lr=1e-2)
    optimizer.step()
    run(model, anatomy, masks, Corrections(rank=4, learning_rate=1e-2, steps=1), batch_size=8)
    corrected = weight.detach() + mask * (b @ a).detach()
    torch.testing.assert_close(model.get_submodule(name).weight.detach(), corrected, rtol=1e-4, atol=1e-6)


@states
def test_same_seed_same_result_and_another_seed_another(state):
    results = []
    for seed in (3, 3, 4):
        model, anatomy, masks = pruned("llama", state)
        torch.manual_seed(len(results))
        run(model, anatomy, masks, Corrections(rank=4, learning_rate=1e-2, steps=3), seed=seed)
        results.append(values(model))
    names = [name for name in results[0] if name.endswith("down_proj.weight") or name.endswith("down_proj.core.weight")]
    assert names
    for name in names:
        assert torch.equal(results[0][name], results[1][name])
        assert not torch.equal(results[0][name], results[2][name])


def test_tied_embeddings_stay_tied_and_untouched():
    model, anatomy, _ = pruned("llama", "dense")
    before = model.get_input_embeddings().weight.clone()
    run(model, anatomy, None)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_rank_beyond_that_of_a_matrix_and_empty_matrices_work():
    model, anatomy, _ = pruned("llama", "dense")
    cut(model, anatomy, share=0.97)
    shapes = [core_of(model, layer).weight.shape for layer in anatomy.layers.values()]
    assert any(shape.numel() == 0 for shape in shapes)
    assert any(0 < min(shape) < 6 for shape in shapes)
    before = loss(model)
    run(model, anatomy, None, Corrections(rank=16, learning_rate=1e-2, steps=20))
    assert loss(model) < before


@states
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_corrected_in_their_type(state, dtype):
    model, anatomy, masks = pruned("llama", state)
    model.to(dtype)
    before = loss(model)
    run(model, anatomy, masks)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert loss(model) < before - 0.1
    for name, mask in (masks or {}).items():
        assert (model.get_submodule(name).weight[~mask] == 0).all()


@states
def test_bfloat16_arithmetic_sees_each_step(state):
    """Autocast must not keep copies of the adapters from before a step."""
    model, anatomy, masks = pruned("llama", state)
    before = loss(model)
    record = run(model, anatomy, masks, precision="bfloat16")
    assert loss(model) < before - 0.1
    assert record.last_loss < record.first_loss - 0.1


def test_padding_changes_nothing():
    filler = torch.zeros(8, 3, dtype=torch.long)
    mask = torch.cat([torch.ones(8, 16, dtype=torch.bool), torch.zeros(8, 3, dtype=torch.bool)], 1)
    padded = CalibrationTokens(torch.cat([TOKENS.input_ids, filler], 1), mask, {})
    results = []
    for text in (TOKENS, padded):
        model, anatomy, _ = pruned("llama", "dense")
        record = run(model, anatomy, None, Corrections(rank=4, learning_rate=1e-3, steps=3), text)
        results.append((record.first_loss, record.last_loss))
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_the_sequences_are_gone_through_again_and_again():
    used = [ids for ids, _ in corrections._batches(TOKENS, Corrections(steps=8), 2, seed=0)]
    assert all(torch.equal(used[step], used[step + 4]) for step in range(4))
    assert len(torch.cat(used[:4]).unique(dim=0)) == TOKENS.n_samples == 8


def interrupted(layers):
    raise KeyboardInterrupt


@families
@states
def test_an_interrupt_leaves_the_model_as_it_was(family, state, monkeypatch):
    model, anatomy, masks = pruned(family, state)
    before, shape = values(model), structure(model)
    monkeypatch.setattr(adapters, "absorb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, anatomy, masks)
    assert_same_values(model, before)
    assert structure(model) == shape


@states
def test_a_diverging_loss_is_named_and_leaves_the_model_as_it_was(state):
    model, anatomy, masks = pruned("llama", state)
    before, shape = values(model), structure(model)
    with pytest.raises(NonFiniteError, match="corrections"):
        run(model, anatomy, masks, Corrections(rank=4, learning_rate=1e30, steps=12))
    assert_same_values(model, before)
    assert structure(model) == shape


def test_weights_that_overflow_when_absorbed_are_named_and_nothing_is_absorbed():
    model, anatomy, _ = pruned("llama", "dense")
    model.half()
    before = values(model)
    with pytest.raises(NonFiniteError, match="A weight is not finite"):
        run(model, anatomy, None, Corrections(rank=4, learning_rate=1e7, steps=1), batch_size=8)
    assert_same_values(model, before)


def test_a_mask_that_does_not_fit_is_refused():
    model, anatomy, masks = pruned("llama", "masked")
    name = next(iter(masks))
    with pytest.raises(ConfigError, match=rf"mask of {name} is torch.bool of shape \(1, 24\)"):
        run(model, anatomy, masks | {name: masks[name][:1]})


def test_without_peft_the_remedy_is_named(monkeypatch):
    model, anatomy, _ = pruned("llama", "dense")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r'pip install "llm-surgeon\[lora\]"'):
        run(model, anatomy, None)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"steps": 0}, {"learning_rate": 0.0}])
def test_senseless_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="Corrections"):
        Corrections(**wrong)

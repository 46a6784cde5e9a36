"""Numbers that go wrong, through the real pipeline: what is survived, what is warned of, and what is refused."""

import copy
import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llm_surgeon import PruneConfig, prune
from llm_surgeon.errors import ConfigError, NonFiniteError, NotPositiveDefiniteError, TargetError
from llm_surgeon.pruning.shapes import Shapes
from tiny import build, llama, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 32,
    "eval_window": 64,
    "eval_tokens": 256,
    "shots": 1,
    "sparsity": 0.3,
}
STRUCTURES = {
    "rows-columns": {},
    "neurons+heads": {"structure": "neurons+heads", "round_to": 1},
    "unstructured": {"structure": "unstructured"},
    "unstructured in groups": {"structure": "unstructured", "max_correlations": 4},
    "2:4": {"structure": "2:4", "sparsity": 0.5},
    "kronecker-sum": {"curvature": "kronecker-sum"},
    "nearest-kronecker": {"curvature": "nearest-kronecker"},
    "diagonal": {"method": "k-obd", "curvature": "diagonal"},
    "true Fisher": {"fisher": "true"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda": {"method": "wanda"},
    "stochria": {"method": "stochria"},
    "permuted": {"method": "wanda", "structure": "2:4", "sparsity": 0.5, "permute": True},
    "corrected": {"lora": True, "lora_steps": 2, "lora_final_steps": 2},
}
KINDS = pytest.mark.parametrize("kind", STRUCTURES)


def untied():
    torch.manual_seed(0)
    return llama(tie_word_embeddings=False).eval()


def pruned(model, text, **options):
    recipe = PruneConfig.from_mapping({**SMALL, "calibration": str(text), **options})
    return prune(model, tokenizer(), recipe)


def finite(model):
    return all(bool(value.isfinite().all()) for value in model.state_dict().values())


def digest(model):
    """SHA-256 of all weights, byte for byte."""
    total = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        total.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def digests(text):
    """Of a model pruned in each way; by the default arithmetic, which rounds most."""
    found = {}
    for kind, options in STRUCTURES.items():
        model = build("llama")
        pruned(model, text, **options)
        found[kind] = digest(model)
    return found


def test_same_seed_same_bytes_in_this_process_and_in_another(text_file):
    # As many threads as here, where other tests may have set them.
    script = f"import torch; torch.set_num_threads({torch.get_num_threads()}); "
    script += "import sys, test_numbers; [print(k, v, sep='=') for k, v in test_numbers.digests(sys.argv[1]).items()]"
    here = Path(__file__).parent
    path = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}; "
    other = subprocess.Popen([sys.executable, "-c", path + script, text_file], stdout=subprocess.PIPE, text=True)
    first, second = digests(text_file), digests(text_file)
    assert first == second
    assert len(set(first.values())) == len(first), "each way is to give another model"
    output, _ = other.communicate()
    assert first == dict(line.rsplit("=", 1) for line in output.splitlines())


@torch.no_grad()
def dead_channel(model):
    """A channel of the residual stream that nothing writes to and that is zero for all tokens."""
    model.get_input_embeddings().weight[:, 3] = 0
    for block in model.model.layers:
        block.self_attn.o_proj.weight[3] = 0
        block.mlp.down_proj.weight[3] = 0


@torch.no_grad()
def duplicated(model):
    for block in model.model.layers:
        for weight in (block.mlp.up_proj.weight, block.mlp.gate_proj.weight, block.self_attn.v_proj.weight):
            weight[1] = weight[0]


@torch.no_grad()
def layer_of_zeros(model):
    model.model.layers[0].mlp.up_proj.weight.zero_()


@torch.no_grad()
def without_effect(model):
    """Channels, neurons, values and a layer that do nothing, or the same twice."""
    dead_channel(model)
    duplicated(model)
    model.model.layers[1].mlp.up_proj.weight.zero_()


@torch.no_grad()
def outliers(model):
    """A neuron and a channel of the residual stream of 10,000 times the size of the others."""
    model.model.layers[0].mlp.up_proj.weight[5] *= 1e4
    model.model.layers[1].mlp.down_proj.weight[5] *= 1e4


@pytest.mark.parametrize("damage", [without_effect, outliers])
@KINDS
def test_odd_channels_are_survived_by_the_damping_asked_for(damage, kind, text_file, caplog):
    model = untied()
    damage(model)
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        report = pruned(model, text_file, **STRUCTURES[kind])
    assert finite(model)
    assert report.shots[-1].perplexity.perplexity < 2 * report.dense_perplexity.perplexity
    # A second term is indefinite, so that its damping may well be escalated.
    assert kind == "kronecker-sum" or "needed a damping" not in caplog.text


def test_single_weights_without_effect_go_first_and_no_more_than_asked_for(text_file):
    """A product with zeros: of its 2,880 weights 2,074 go, and nothing else."""
    model = untied()
    layer_of_zeros(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = pruned(model, text_file, structure="unstructured", sparsity=0.2)
    assert report.shots[-1].sparsity == pytest.approx(0.2, abs=1e-3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) or "layers.0.mlp" in name
    assert report.shots[-1].perplexity.nll == pytest.approx(report.dense_perplexity.nll, abs=1e-5)


def test_neurons_without_effect_go_first(text_file):
    model = untied()
    layer_of_zeros(model)
    report = pruned(model, text_file, structure="neurons", round_to=1, sparsity=0.3, min_width=0.0)
    left = {(layer.block, layer.kind): layer.rows for layer in report.layers}
    assert left[0, "up_proj"] == 0
    assert 30 < left[1, "up_proj"] < 40


def change_gradients(module, change):
    """Let what leaves a module's output on the way back be changed, before the curvature sees it."""

    def hook(_module, _arguments, output):
        if output.requires_grad:
            output.register_hook(change)

    module.register_forward_hook(hook)


def test_gradients_out_of_all_proportion_are_survived(text_file):
    """One token in sixteen with gradients of 1e6 times the others'."""
    model = untied()
    scale = torch.where(torch.arange(32) % 16 == 3, 1e6, 1.0)[:, None]
    change_gradients(model.model.layers[1].mlp.down_proj, lambda gradient: gradient * scale.to(gradient))
    report = pruned(model, text_file)
    assert finite(model)
    assert report.shots[-1].perplexity.perplexity < 2 * report.dense_perplexity.perplexity


@pytest.mark.parametrize("structure", ["rows-columns", "neurons+heads", "unstructured"])
def test_sums_of_gradients_that_overflow_name_the_layer(structure, text_file):
    """Squares of 1e22 are beyond float32."""
    model = untied()
    change_gradients(model.model.layers[0].self_attn.v_proj, lambda gradient: gradient * 1e22)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.v_proj"):
        pruned(model, text_file, structure=structure)


@pytest.fixture
def one_word(tmp_path):
    path = tmp_path / "one-word.txt"
    path.write_text("w7 " * 4000, encoding="utf8")
    return path


def test_repeated_tokens_are_damped_enough(one_word, caplog):
    """One input and one gradient: factors of rank one, which the default damping makes definite."""
    model = untied()
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        pruned(model, one_word)
    assert finite(model)
    assert not caplog.records


def test_factors_of_low_rank_escalate_the_damping_and_say_so(one_word, caplog):
    model = untied()
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        pruned(model, one_word, dampening_a=1e-8, dampening_g=1e-8)
    assert finite(model)
    assert any(
        "needed a damping of" in record.message and "model.layers." in record.message for record in caplog.records
    )


def test_what_no_damping_mends_is_refused_with_the_layer(one_word):
    with pytest.raises(NotPositiveDefiniteError, match=r"model\.layers\.\d.*--dampening"):
        pruned(untied(), one_word, dampening_a=1e-30, dampening_g=1e-30)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(("name", "place"), [("model.layers.1.mlp.down_proj", (0, 0)), ("model.embed_tokens", 7)])
def test_damaged_weights_are_refused_by_name(name, place, value, text_file):
    model = untied()
    with torch.no_grad():
        model.get_submodule(name).weight[place] = float(value)
    with pytest.raises(NonFiniteError, match=rf"{name}\.weight holds NaN or infinity"):
        pruned(model, text_file)


@KINDS
def test_damaged_weights_are_refused_without_an_evaluation_too(kind, text_file):
    model = untied()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        pruned(model, text_file, evaluation="none", **STRUCTURES[kind])


def test_float16_that_overflows_is_refused_with_the_layer_and_another_type(text_file):
    model = untied()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e4)
        model.model.layers[0].mlp.gate_proj.weight.mul_(1e3)
    model.half()
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.\w+ overflows. Use --dtype bfloat16") as refused:
        pruned(model, text_file, precision="float32")
    assert "layers.1" not in refused.value.cause
    # bfloat16 passes have the range, so that the same model can be pruned as it is.
    pruned(model, text_file, precision="bfloat16")
    assert finite(model)


def test_an_update_that_overflows_the_stored_type_is_refused_with_the_layer(text_file):
    """The same neuron twice, in a group of two that loses one: the other takes over its weight, 80,000 together."""
    model = untied()
    with torch.no_grad():
        feed_forward = model.model.layers[0].mlp
        feed_forward.up_proj.weight[1] = feed_forward.up_proj.weight[0]
        feed_forward.gate_proj.weight[1] = feed_forward.gate_proj.weight[0]
        feed_forward.down_proj.weight[0, :2] = 4e4
    options = {"structure": "1:2", "sparsity": 0.5, "ignore": ["up_proj", "gate_proj"], "dampening_a": 1e-4}
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.down_proj overflows in float16"):
        pruned(copy.deepcopy(model).half(), text_file, **options)
    pruned(model, text_file, **options)
    assert float(model.model.layers[0].mlp.down_proj.weight.detach().max()) > torch.finfo(torch.float16).max


def test_structures_of_equal_cost_are_divided(text_file):
    model = untied()
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()
    report = pruned(model, text_file)
    assert report.shots[-1].sparsity == pytest.approx(0.3, abs=0.01)


def test_a_run_that_can_remove_nothing_ends_before_the_work_with_the_least_that_goes(text_file):
    with pytest.raises(ConfigError, match=r"least that can go with blocks is 22\.2 % .* --sparsity of 0\.2223"):
        pruned(untied(), text_file, structure="blocks", sparsity=0.2)


def test_a_target_that_is_missed_is_an_error(text_file, monkeypatch):
    """Whatever the reason: a selection that stops early is not reported as a success."""
    whole = Shapes.select

    def early(self, costs, target_weights):
        return whole(self, costs, (target_weights + self._anatomy.prunable_weights) // 2)

    monkeypatch.setattr(Shapes, "select", early)
    with pytest.raises(TargetError, match=r"% of the prunable weights can be removed as rows-columns, and 30 %"):
        pruned(untied(), text_file)

import logging

import pytest
import torch
from safetensors import safe_open

from llm_surgeon import PruneConfig, plan, prune_checkpoint
from llm_surgeon.data.texts import Texts
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError, DataError, ModelError
from llm_surgeon.export.formats import loaders
from llm_surgeon.models.skeleton import skeleton_of
from llm_surgeon.passes.head import CHUNK
from llm_surgeon.planning.foresee import warn_if_short
from llm_surgeon.planning.memory import (
    ELEMENT_BYTES,
    GAPS,
    LARGE,
    LIBRARIES,
    LOGITS_LEFT,
    READ_AROUND,
    logits_left,
    passes_within,
    weights_read,
)
from llm_surgeon.planning.probe import Probe
from llm_surgeon.planning.seconds import default_rates, phase_seconds
from llm_surgeon.planning.trace import factor_bytes
from llm_surgeon.refit.gates import gate_width, gates_of
from tiny import VOCABULARY, build, llama, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 32,
    "eval_window": 64,
    "eval_tokens": 512,
    "shots": 2,
    "device": "cpu",
}


@pytest.fixture
def recipe(text_file):
    return lambda **changes: PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **changes})


def named(foreseen):
    return {phase.name: phase for phase in foreseen.phases}


def tensor_bytes(directory):
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    return total


def test_zeros_are_as_large_as_planned_to_the_byte(checkpoint, recipe):
    foreseen = plan(str(checkpoint), recipe(structure="unstructured"))
    # Matrices keep their shapes, so the export is as large as the dense model's files.
    assert foreseen.weight_bytes == tensor_bytes(checkpoint) == foreseen.dense_weight_bytes
    assert foreseen.size.prunable == foreseen.dense_size.prunable // 2


def test_a_run_keeps_its_plan_and_comes_out_about_as_planned(checkpoint, recipe, tmp_path):
    report = prune_checkpoint(str(checkpoint), tmp_path / "out", recipe(sparsity=0.4))
    foreseen = report.plan
    assert foreseen is not None
    assert foreseen.dense_size == report.dense_size
    assert report.shots[-1].size.prunable == pytest.approx(foreseen.size.prunable, rel=0.05)
    indices = sum(layer.rows + layer.columns for layer in report.layers) * 8
    assert foreseen.weight_bytes * 0.95 < tensor_bytes(tmp_path / "out") < foreseen.weight_bytes * 1.05 + indices
    assert foreseen.disk > foreseen.weight_bytes
    assert {stage.name for stage in report.shots[0].stages} <= set(named(foreseen))
    assert foreseen.host_peak >= foreseen.peak > report.memory.model
    assert foreseen.device_peak == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "predicted to measured" in page


def test_what_is_pruned_is_listed_by_kind(checkpoint, recipe):
    foreseen = plan(str(checkpoint), recipe(ignore=["lm_head", "o_proj"]))
    assert [kind.kind for kind in foreseen.kinds] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    assert sum(kind.weights for kind in foreseen.kinds) == foreseen.dense_size.prunable
    assert all(kind.layers == 2 for kind in foreseen.kinds)


def test_a_larger_batch_needs_more(checkpoint, recipe):
    small, large = (named(plan(str(checkpoint), recipe(batch_size=size)))["curvature"] for size in (1, 4))
    assert large.host["passes"] > 2 * small.host["passes"]
    assert large.host["factors"] == small.host["factors"]


def test_reconstruction_is_planned(checkpoint, recipe):
    without, one, three = (
        plan(str(checkpoint), recipe(**options))
        for options in (
            {},
            {"reconstruction": True, "reconstruction_copies": 0},
            {"reconstruction": True, "reconstruction_copies": 2},
        )
    )
    assert "reconstruction" not in named(without)
    phase, more = named(one)["reconstruction"], named(three)["reconstruction"]
    assert more.host["hidden states"] == 3 * phase.host["hidden states"] > 0
    assert more.seconds > 3 * phase.seconds > 0
    copy = without.dense_size.prunable * 4
    assert all(each.host["dense weights for stages"] == copy for each in one.phases if each.name != "load")


def test_costs_of_single_weights_are_held_as_far_as_they_are_compared(checkpoint, recipe):
    def held(**options):
        return named(plan(str(checkpoint), recipe(shots=1, **options)))["selection"].host["costs of single weights"]

    layers = [layer.rows * layer.columns for layer in skeleton_of(str(checkpoint), recipe()).anatomy.layers.values()]
    assert held(structure="unstructured") == held(method="wanda", scope="global") == ELEMENT_BYTES * sum(layers)
    assert held(method="wanda") == held(method="sparsegpt") == ELEMENT_BYTES * max(layers)
    assert held(method="wanda", structure="2:4") == ELEMENT_BYTES * max(layers)


@pytest.mark.parametrize("order", ["batch-major", "layer-major"])
def test_gates_are_planned(checkpoint, recipe, order):
    without, two = (plan(str(checkpoint), recipe(order=order, gate_steps=steps)) for steps in (0, 2))
    assert "gates" not in named(without)
    phase = named(two)["gates"]
    assert phase.host["passes"] > 0
    # Four heads and one feed-forward part in either block, with two gates each, at all tokens.
    count, tokens = 2 * 2 * (4 + 1), recipe().samples * recipe().seq_len
    assert phase.host["Fisher of gates"] == 4 * count**2
    states = tokens * 24 * 4
    if order == "batch-major":
        assert phase.host["effects of gates"] == 4 * count * tokens
    else:
        # States of both blocks wait when the way back begins, and gradients beside them.
        assert phase.host["hidden states and factors"] == max(2 * states, 4 * count * tokens) + 2 * states


def test_gates_are_planned_as_fine_as_they_are_for_the_whole_text(checkpoint, recipe):
    """A process has its part of the text only, and all gates."""
    common = {"samples": 64, "reconstruction": True, "gate_steps": 1, "cross_fit": True}
    one, two = (named(plan(str(checkpoint), recipe(**common), processes=n))["gates"].host for n in (1, 2))
    config = recipe(**common)
    anatomy = skeleton_of(str(checkpoint), config).anatomy
    count = sum(gated.count for gated in gates_of(anatomy, gate_width(anatomy, config)))
    assert count > sum(gated.count for gated in gates_of(anatomy))
    for found, samples in ((one, 64), (two, 32)):
        assert found["effects of gates"] == 4 * count * (samples * config.seq_len // 2)


def test_cross_fitting_holds_the_weights_of_the_other_half(checkpoint, recipe):
    common = {"reconstruction": True, "gate_steps": 1, "shots": 2, "sparsity": 0.5}
    without, crossed = (plan(str(checkpoint), recipe(cross_fit=cross, **common)) for cross in (False, True))
    # After the first shot, three quarters are left, of four bytes each.
    expected = 0.75 * 4 * without.dense_size.prunable
    for name in ("reconstruction", "gates"):
        assert "weights of the other half" not in named(without)[name].host
        assert named(crossed)[name].host["weights of the other half"] == pytest.approx(expected, abs=4)
        assert named(crossed)[name].seconds == pytest.approx(named(without)[name].seconds)


@pytest.mark.parametrize("order", ["batch-major", "layer-major"])
def test_seconds_of_gates_are_those_of_their_passes(checkpoint, recipe, order):
    config = recipe(shots=1, sparsity=0.5, gate_steps=2)
    skeleton = skeleton_of(str(checkpoint), config)
    rates = default_rates(config, torch.device("cpu"))

    seconds = phase_seconds(skeleton, config, rates, 512, order)["gates"]

    # There and back, and there once more; layer by layer, blocks are run again on the way back. Half of them is left.
    left = skeleton.anatomy.prunable_weights / 2
    weights = 3 * (skeleton.parameters - left) + (left if order == "layer-major" else 0)
    assert seconds == pytest.approx(2 * 2 * weights * config.samples * config.seq_len / rates.passes)


def test_steps_of_a_shot_take_costs_and_updates_again_but_no_pass(checkpoint, recipe):
    skeleton = skeleton_of(str(checkpoint), recipe())
    rates = default_rates(recipe(), torch.device("cpu"))
    one, four = (phase_seconds(skeleton, recipe(steps_per_shot=n), rates, 512, "batch-major") for n in (1, 4))
    changed = {name: four[name] / one[name] for name in one if one[name] and four[name] != one[name]}
    assert changed == pytest.approx({"selection": 4, "update": 4})


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_seconds_of_reconstruction_are_runs_of_the_parts_of_a_block(tmp_path, recipe, family):
    build(family).save_pretrained(tmp_path)
    config = recipe(shots=1, sparsity=0.5, reconstruction=True, reconstruction_copies=0)
    skeleton = skeleton_of(str(tmp_path), config)
    rates = default_rates(config, torch.device("cpu"))
    layers = skeleton.anatomy.layers.values()
    both = sum(layer.rows * layer.columns for layer in layers)
    attention = sum(layer.rows * layer.columns for layer in layers if "attn" in layer.name)

    seconds = phase_seconds(skeleton, config, rates, 512, "batch-major")["reconstruction"]

    # The dense model once; the pruned one, half as large, up to the attention and twice as a whole.
    operations = 2 * (both + 0.5 * (attention + 2 * both)) * config.samples * config.seq_len
    assert seconds == pytest.approx(operations / rates.passes)


def test_a_layerwise_plan_grows_with_the_samples(checkpoint, recipe):
    few, many = (named(plan(str(checkpoint), recipe(method="wanda", shots=1, samples=n))) for n in (8, 16))
    assert many["curvature"].host["hidden states"] == 2 * few["curvature"].host["hidden states"]
    assert "speed" not in many, "zeros are not timed"


def test_weights_of_another_type_are_converted_while_the_files_are_read(checkpoint, recipe):
    foreseen = plan(str(checkpoint), recipe(dtype="bfloat16"))
    files = skeleton_of(str(checkpoint), recipe()).stored_bytes
    assert named(foreseen)["load"].host["weight files while read"] == files
    assert foreseen.dense_weight_bytes == foreseen.dense_size.total * 2


def test_a_probe_says_what_was_measured(checkpoint, recipe, monkeypatch):
    measured = Probe(tokens=64, seconds=2.0, peak=20 * 2**30)
    monkeypatch.setattr("llm_surgeon.planning.schedule.probe_batch", lambda *_, **__: measured)
    foreseen = plan(str(checkpoint), recipe(shots=1), probe=True)
    assert foreseen.probed
    phase = named(foreseen)["curvature"]
    assert phase.host_bytes == pytest.approx(measured.peak, abs=8)
    # 8 samples of 32 tokens are four times as many as were probed.
    assert phase.seconds == pytest.approx(8.0)


def test_a_probe_runs_a_real_batch(checkpoint, recipe):
    foreseen = plan(str(checkpoint), recipe(), probe=True)
    assert foreseen.probed
    assert named(foreseen)["curvature"].seconds > 0


def test_passes_are_what_a_measured_peak_leaves_for_them(checkpoint, recipe):
    config = recipe(seq_len=512)
    skeleton = skeleton_of(str(checkpoint), config)
    factors = factor_bytes(skeleton.network, skeleton.anatomy, config)
    passes = passes_within(10**9, skeleton, config, torch.device("cpu"), 10**7, 10**6)
    assert 10**7 + 10**6 + LIBRARIES + factors + (1 + GAPS) * passes == pytest.approx(10**9)
    assert passes_within(0, skeleton, config, torch.device("cpu"), 0, 0) == 0


def test_freed_logits_stay_if_a_batch_has_many_chunks(checkpoint, recipe):
    skeleton, most = skeleton_of(str(checkpoint), recipe()), (LARGE - 1) * CHUNK
    assert logits_left(skeleton, recipe(batch_size=1, seq_len=most + 1)) == 0
    assert logits_left(skeleton, recipe(batch_size=1, seq_len=most + 2)) == LOGITS_LEFT * CHUNK * VOCABULARY * 4


@pytest.mark.parametrize(
    ("options", "curvature"),
    [
        ({"shots": 1}, False),
        ({"shots": 2}, True),
        ({"shots": 2, "method": "l-obd"}, False),
        ({"shots": 2, "order": "layer-major"}, True),
    ],
)
def test_passes_of_a_pruned_model_leave_freed_logits(options, curvature, checkpoint, recipe):
    config = recipe(batch_size=1, seq_len=(LARGE - 1) * CHUNK + 2, gate_steps=1, **options)
    phases, left = named(plan(str(checkpoint), config)), LOGITS_LEFT * CHUNK * VOCABULARY * 4
    assert phases["curvature"].host.get("freed logits", 0) == curvature * left
    assert phases["gates"].host["freed logits"] == left


def test_rows_that_no_text_reads_stay_in_the_file(tmp_path, recipe):
    for tied in (True, False):
        llama(tie_word_embeddings=tied, vocab_size=50_000).save_pretrained(tmp_path / str(tied))
    text = CalibrationTokens(torch.zeros(1, 8, dtype=torch.int64), None, {})
    tied, own = (skeleton_of(str(tmp_path / str(tied)), recipe()) for tied in (True, False))
    cpu, texts = torch.device("cpu"), Texts(text, None)
    assert weights_read(tied, cpu, texts) == tied.weight_bytes
    assert weights_read(own, cpu, texts) == own.weight_bytes - 50_000 * 24 * 4 + READ_AROUND
    other = skeleton_of(str(tmp_path / "False"), recipe(dtype="bfloat16"))
    assert weights_read(other, cpu, texts) == other.weight_bytes, "converted, so all of it is read"


def test_too_little_memory_is_a_warning_with_a_remedy(checkpoint, recipe, caplog):
    foreseen = plan(str(checkpoint), recipe())
    caplog.clear()
    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        warn_if_short(foreseen)
        assert not caplog.messages
        phase = named(foreseen)["curvature"].model_copy(update={"host": {"process": 1, "passes": 2**40}})
        warn_if_short(foreseen.model_copy(update={"phases": (phase,)}))
    (message,) = caplog.messages
    assert "passes with 1024.0 GiB" in message
    assert "--batch-size" in message


def test_dense_weights_that_do_not_fit_are_no_longer_held_without_reconstruction(checkpoint, recipe, caplog):
    def warned(config):
        foreseen = plan(str(checkpoint), config)
        parts = named(foreseen)["curvature"].host | {"weights": 2**40}
        phase = named(foreseen)["curvature"].model_copy(update={"host": parts})
        warn_if_short(foreseen.model_copy(update={"phases": (phase,)}))
        return caplog.messages[-1]

    with caplog.at_level(logging.WARNING, "llm_surgeon"):
        assert "--no-reconstruction" in warned(recipe(reconstruction=True))
        assert "--no-reconstruction" not in warned(recipe())


def test_mistakes_are_found_as_in_a_run(checkpoint, recipe, tmp_path):
    with pytest.raises(ModelError):
        plan(str(tmp_path / "nothing"), recipe())
    with pytest.raises(DataError):
        plan(str(checkpoint), recipe(samples=100_000))
    with pytest.raises(ConfigError):
        plan(str(checkpoint), recipe(device="cuda:99"))
    with pytest.raises(ConfigError):
        plan(str(checkpoint), recipe(structure="7:16"))


def test_loaders_tell_shapes_apart():
    (smaller,) = loaders(PruneConfig(), build("llama").config)
    assert "trust_remote_code" in smaller
    # vLLM's backend for transformers has full attention and windows only.
    (hybrid,) = loaders(PruneConfig(structure="neurons+heads"), build("qwen3-5").config)
    assert "no serving engine, as vLLM's backend" in hybrid
    assert "DeltaNet" in hybrid
    for structure in ("unstructured", "2:4"):
        (zeros,) = loaders(PruneConfig(structure=structure), build("qwen2").config)
        assert "qwen2" in zeros
        assert "no faster" in zeros


def test_a_configuration_and_a_tokenizer_are_enough(checkpoint, recipe, tmp_path):
    whole = plan(str(checkpoint), recipe())
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    found = plan(str(tmp_path), recipe())
    assert (found.dense_size, found.size, found.disk) == (whole.dense_size, whole.size, whole.disk)
    with pytest.raises(ModelError, match="safetensors"):
        prune_checkpoint(str(tmp_path), tmp_path / "out", recipe())
    with pytest.raises(ModelError, match=r"A probe loads the model, and .* has no weights .*safetensors") as caught:
        plan(str(tmp_path), recipe(), probe=True)
    assert "without --probe" in caught.value.remedy
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="Only safetensors are read"):
        plan(str(tmp_path), recipe())


def test_a_plan_is_for_the_gpu_of_another_machine_too(checkpoint, recipe):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ConfigError, match="--device-memory"):
        plan(str(checkpoint), recipe(device="cuda"))
    found = plan(str(checkpoint), recipe(device="cuda", device_memory=2**30))
    assert found.device_available == 2**30
    assert 0 < found.device_peak < 2**30
    with pytest.raises(ConfigError, match="cannot be used"):
        plan(str(checkpoint), recipe(device="cuda", device_memory=2**30), probe=True)
    with pytest.raises(ConfigError, match="cannot be used"):
        plan(str(checkpoint), recipe(device="cuda:x", device_memory=2**30))


def test_what_waits_on_disk_has_a_limit(checkpoint, recipe, tmp_path, caplog):
    options = {"weights": "streamed", "scratch": str(tmp_path)}
    found = plan(str(checkpoint), recipe(**options))
    assert found.scratch >= found.scratch_weights > 0
    with pytest.raises(ConfigError, match="--scratch-space"):
        plan(str(checkpoint), recipe(**options, scratch_space=found.scratch - 1))
    plan(str(checkpoint), recipe(**options, scratch_space=found.scratch))
    with pytest.raises(ConfigError, match="--scratch"):
        plan(str(checkpoint), recipe(**options | {"scratch": str(tmp_path / "missing")}))


def memory_of_tensors(foreseen):
    """Largest bytes of a phase of a shot, without the process and without what may wait elsewhere."""
    shots = ("curvature", "selection", "update", "reconstruction", "gates")
    apart = ("process", "hidden states and factors", "allocator")
    phases = [phase.host for phase in foreseen.phases if phase.name in shots]
    return max(sum(size for part, size in host.items() if part not in apart) for host in phases)


def test_with_the_default_recipe_memory_grows_neither_with_depth_nor_with_tokens(tmp_path, recipe):
    """Weights are streamed; the rest waits where the budget says, so that only the work of one block is left."""
    small = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "head_dim": 16}
    found = {}
    for name, blocks, samples in (("one", 6, 8), ("deep", 24, 8), ("long", 6, 32)):
        llama(**small, num_hidden_layers=blocks).config.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        # As many gates in all cases, which are chosen by the tokens otherwise.
        options = {"preset": "best", "shots": 1, "weights": "streamed", "gate_width": 128, "batch_size": 2}
        found[name] = plan(str(tmp_path / name), recipe(**options, samples=samples, structure="neurons"))
    one = memory_of_tensors(found["one"])
    assert memory_of_tensors(found["long"]) <= 1.1 * one
    assert memory_of_tensors(found["deep"]) <= 1.1 * one
    assert found["deep"].scratch_weights == pytest.approx(4 * found["one"].scratch_weights, rel=0.01)

"""Weights that wait in mapped files give what resident ones give, bit for bit."""

import copy
import gc
import os

import pytest
import torch
from safetensors.torch import load_file

from llm_surgeon import PruneConfig
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.data.windows import EvaluationText
from llm_surgeon.errors import ConfigError, DiskSpaceError
from llm_surgeon.evaluation import perplexity as perplexity_module
from llm_surgeon.evaluation.perplexity import perplexity
from llm_surgeon.models import examine, family_of, streaming
from llm_surgeon.models.streaming import StreamedWeights, require_streaming, stream, weights_of
from llm_surgeon.passes.sweep import Sweep
from llm_surgeon.planning import schedule as way
from llm_surgeon.run.run import plan, prune, prune_checkpoint
from quick import without_what_has_other_tests
from tiny import BUILDERS, build, tokenizer, tokens

CPU = torch.device("cpu")


def streamed(family="llama", dtype=torch.float32, **options):
    model = build(family)
    entry = family_of(model.config.model_type)
    anatomy = examine(model, entry)
    stream(model, entry.blocks, CPU, dtype, **options)
    return model, anatomy


def mapped(tensor):
    return tensor.untyped_storage().filename is not None


@pytest.mark.parametrize("family", BUILDERS)
def test_a_streamed_model_computes_the_same(family):
    model, anatomy = streamed(family)
    blocks = model.get_submodule(anatomy.family.blocks)
    assert all(mapped(tensor) for tensor in blocks.parameters())
    assert not mapped(model.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(model(tokens(2, 16)).logits, build(family)(tokens(2, 16)).logits)


def test_files_have_no_names_and_go_with_the_weights(tmp_path):
    model, _ = streamed(scratch=tmp_path)
    assert not list(tmp_path.iterdir())

    def maps():
        with open("/proc/self/maps") as file:
            return sum(str(tmp_path) in line for line in file)

    if not os.path.exists("/proc/self/maps"):
        pytest.skip("only Linux shows what is mapped")
    blocks = model.model.layers
    assert maps() >= len(list(blocks.parameters()))
    del model, blocks
    gc.collect()
    assert maps() == 0


def test_weights_take_the_type_that_is_asked_for():
    model, _ = streamed(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_is_written_is_kept_and_what_is_new_is_put_away():
    model, _ = streamed()
    weights, layer = weights_of(model), model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight[0, 0] = 7.0
    weights.forget()
    assert layer.weight[0, 0] == 7.0
    layer.weight = torch.nn.Parameter(torch.full((3, 5), 2.0))
    weights.settle(layer)
    assert mapped(layer.weight)
    assert torch.equal(layer.weight, torch.full((3, 5), 2.0))


def test_a_copy_lies_in_the_same_files_and_stays_as_it_is():
    model, anatomy = streamed()
    weights, path = weights_of(model), "model.layers.1.mlp.up_proj"
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    dense = weights.copy(model, {id(parameter): parameter for parameter in model.parameters()})
    assert dense.get_input_embeddings().weight is model.get_input_embeddings().weight
    layer, other = model.get_submodule(path), dense.get_submodule(path)
    assert other.weight.data_ptr() == layer.weight.data_ptr()
    expected = build("llama")(tokens(2, 16)).logits
    weights.write(layer.weight, torch.full_like(layer.weight, 2.0))
    assert mapped(layer.weight)
    assert bool((layer.weight == 2).all())
    assert torch.equal(dense(tokens(2, 16)).logits, expected)
    assert torch.equal(other.weight, before[f"{path}.weight"])
    assert weights_of(dense).blocks == anatomy.family.blocks
    # Taken back without another file.
    weights.write(layer.weight, other.weight.data)
    assert layer.weight.data_ptr() == other.weight.data_ptr()
    assert torch.equal(model(tokens(2, 16)).logits, expected)


@pytest.mark.parametrize("streams", [False, True])
def test_kept_values_stay_as_they_were(streams):
    model = streamed()[0] if streams else build("llama")
    weights = weights_of(model)
    for parameter in (model.model.layers[0].mlp.down_proj.weight, model.model.norm.weight):
        kept = weights.kept(parameter)
        former = kept.clone()
        weights.write(parameter, torch.zeros_like(parameter))
        assert not parameter.any()
        assert torch.equal(kept, former)


def test_weights_are_present_while_a_block_runs_and_no_longer(monkeypatch):
    # On a CPU nothing moves; here a copy stands for what is on a GPU.
    monkeypatch.setattr(StreamedWeights, "_arriving", lambda _self, home: home.clone())
    model, _ = streamed()
    seen = []
    block = model.model.layers[0]
    block.mlp.up_proj.register_forward_hook(lambda module, *_: seen.append(mapped(module.weight)))
    before = block.mlp.up_proj.weight.data_ptr()
    with torch.no_grad():
        model(tokens(1, 8))
    with weights_of(model).present(block):
        there = block.mlp.up_proj.weight.data_ptr()
        with torch.no_grad():
            model(tokens(1, 8))
        # Running it has not sent away what somebody else still needs.
        assert block.mlp.up_proj.weight.data_ptr() == there != before
    assert seen == [False, False]
    assert block.mlp.up_proj.weight.data_ptr() == before


@pytest.fixture
def arrivals(monkeypatch):
    """Weights that move as to a GPU, copies on the CPU standing for what is there; what has arrived, by home."""
    arrived = []

    def arriving(_self, home):
        arrived.append(home.data_ptr())
        return home.clone()

    monkeypatch.setattr(StreamedWeights, "_arriving", arriving)
    monkeypatch.setattr(StreamedWeights, "_moves", True)
    return arrived


def test_weights_of_the_next_block_come_while_one_is_run(arrivals):
    model, anatomy = streamed()
    weights, blocks = weights_of(model), model.get_submodule(anatomy.family.blocks)
    sweep = Sweep(model, anatomy.family.blocks, CalibrationTokens(tokens(2, 16), None, {}), 1, "float32")
    homes = [{parameter.data_ptr() for parameter in block.parameters()} for block in blocks]
    arrivals.clear()
    for number in reversed(range(len(blocks))):
        with sweep.ready(number, then=number - 1):
            # Begun while this block is there, without being asked for.
            for begun in weights._coming.get(blocks[number - 1], []):
                begun()
            assert set(arrivals) == set().union(*homes[max(0, number - 1) :])
    # Each once.
    assert len(arrivals) == sum(map(len, homes))
    assert not weights._coming


def test_weights_that_were_written_meanwhile_are_the_new_ones(arrivals):
    model, _ = streamed()
    weights, block = weights_of(model), model.model.layers[1]
    weights.expect(block)
    with torch.no_grad():
        block.mlp.up_proj.weight.fill_(2.0)
    weights.settle(block.mlp.up_proj)
    with weights.present(block):
        assert torch.equal(block.mlp.up_proj.weight, torch.full_like(block.mlp.up_proj.weight, 2.0))


def test_weights_go_home_after_an_error(monkeypatch):
    monkeypatch.setattr(StreamedWeights, "_arriving", lambda _self, home: home.clone())
    model, _ = streamed()
    block = model.model.layers[0]
    with pytest.raises(RuntimeError, match="half-way"), weights_of(model).present(block):
        raise RuntimeError("half-way")
    assert all(mapped(parameter) for parameter in block.parameters())


def test_a_resident_model_has_nothing_to_do():
    model = build("llama")
    weights, before = weights_of(model), copy.deepcopy(model.state_dict())
    with weights.present(model.model.layers[0]):
        weights.settle(model.model.layers[0])
    weights.forget()
    assert weights.blocks is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_full_disk_is_an_error_with_the_remedy(monkeypatch):
    def full(_file, _start, _size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskSpaceError, match="--scratch"):
        streamed()


def test_systems_that_cannot_are_told_so(monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")
    assert not streaming.can_stream()
    require_streaming("auto")
    with pytest.raises(ConfigError, match="--weights resident"):
        require_streaming("streamed")


@pytest.mark.parametrize("together", [64, 2**15])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_perplexity_is_the_same(precision, together, monkeypatch):
    monkeypatch.setattr(perplexity_module, "_TOGETHER", together)
    text = EvaluationText(tokens(1, 200)[0], "", window=48, stride=30, precision=precision)
    one, other = (perplexity(model, text) for model in (build("llama"), streamed()[0]))
    assert other == one


@pytest.fixture
def recipe(text_file):
    def make(**options):
        common = {"samples": 6, "seq_len": 32, "shots": 2, "sparsity": 0.4, "precision": "float32", "device": "cpu"}
        common |= {
            "preset": "none",
            "calibration": str(text_file),
            "eval_window": 64,
            "eval_tokens": 512,
        }
        return PruneConfig.from_mapping(common | options)

    return make


def saved(folder, family="llama", dtype=torch.float32):
    build(family).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


# Every kind of step that reads or writes weights, fused and transposed layers among them.
RUNS = {
    "rows and columns": ("llama-biased", {}),
    "transposed layers": ("gpt2", {"structure": "neurons+heads", "round_to": 4}),
    "fused layers": ("gpt-neox", {"structure": "rows-columns+blocks"}),
    "single weights": ("llama", {"structure": "unstructured", "sparsity": 0.5}),
    "diagonal": ("llama", {"method": "k-obd", "curvature": "diagonal"}),
    "no curvature": ("llama", {"method": "magnitude"}),
    "gates": ("llama-biased", {"gate_steps": 1}),
    "reconstruction": ("opt", {"reconstruction": True}),
    "the default recipe": ("llama-biased", {"preset": "best", "structure": "neurons+heads"}),
    "experts": ("mixtral", {"preset": "best", "structure": "experts", "sparsity": 0.25}),
    "scores": ("opt", {"method": "wanda"}),
    "solver, permuted": ("llama", {"method": "sparsegpt", "structure": "2:4", "permute": True}),
}


def result_of(folder):
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_weights(name, recipe, tmp_path, monkeypatch):
    without_what_has_other_tests(monkeypatch)
    # What comes to a GPU is another tensor than what is written to.
    monkeypatch.setattr(StreamedWeights, "_arriving", lambda _self, home: home.clone())
    monkeypatch.setattr(StreamedWeights, "_moves", True)
    family, options = RUNS[name]
    shots = {"shots": 1} if options.get("method") in ("wanda", "sparsegpt") else {}
    if "2:4" in options.values():
        shots["sparsity"] = 0.5
    source = saved(tmp_path / "dense", family, torch.bfloat16)
    results = []
    for weights in ("resident", "streamed"):
        config = recipe(**{"dtype": "float32", "order": "layer-major", "weights": weights, **options, **shots})
        report = prune_checkpoint(source, tmp_path / weights, config)
        results.append((result_of(tmp_path / weights), [shot.perplexity.perplexity for shot in report.shots]))
    (one, first), (other, second) = results
    assert second == first
    assert other.keys() == one.keys()
    assert all(torch.equal(other[key], one[key]) and other[key].dtype == one[key].dtype for key in one)


def test_a_run_goes_on_with_streamed_weights(recipe, tmp_path, monkeypatch):
    source, config = saved(tmp_path / "dense"), recipe(weights="streamed")
    report = prune_checkpoint(source, tmp_path / "whole", config)
    assert report.plan.streamed
    assert report.export is not None
    # A disk is not to be timed.
    assert report.speed is None

    def killed(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("llm_surgeon.export.hugging_face.verify_export", killed)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoint(source, tmp_path / "out", config)
    # After a full disk, say, what waits goes elsewhere; that changes no result.
    (tmp_path / "elsewhere").mkdir()
    elsewhere = recipe(weights="streamed", scratch=str(tmp_path / "elsewhere"), scratch_space=2**30)
    report = prune_checkpoint(source, tmp_path / "out", elsewhere)
    assert report.continued == (2,)
    one, other = result_of(tmp_path / "whole"), result_of(tmp_path / "out")
    assert all(torch.equal(other[key], one[key]) for key in one)


def test_a_plan_streams_what_does_not_fit(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(way, "process_bytes", lambda: 0)
    source = saved(tmp_path / "dense")
    enough = plan(source, recipe(order="layer-major"))
    assert not enough.streamed
    shots = [phase for phase in enough.phases if phase.name in ("curvature", "selection", "update")]
    # What waits can wait on disk; of the rest, a little more than there is.
    waits = {name for phase in shots for name in phase.host if name.startswith("hidden")}
    short = max(phase.host_bytes - sum(round(1.19 * phase.host.get(name, 0)) for name in waits) for phase in shots) - 9
    little = plan(source, recipe(host_memory=short))
    assert little.streamed
    assert little.order == "layer-major"
    assert little.scratch > enough.scratch
    assert max(phase.host_bytes for phase in little.phases if phase.name in ("curvature", "update")) <= short
    with pytest.raises(ConfigError, match="--host-memory"):
        plan(source, recipe(host_memory=short, weights="resident"))
    probed = plan(source, recipe(weights="streamed"), probe=True)
    assert probed.probed
    assert probed.streamed


@pytest.mark.parametrize(
    "options",
    [{"order": "batch-major"}, {"lora": True}, {"target_latency": 10.0, "sparsity": None}],
)
def test_what_needs_all_weights_is_refused(recipe, options):
    with pytest.raises(ConfigError, match="streamed"):
        recipe(weights="streamed", **options)


def test_a_loaded_model_is_not_streamed(recipe):
    with pytest.raises(ConfigError, match="prune_checkpoint"):
        prune(build("llama"), tokenizer(), recipe(weights="streamed"))


@pytest.mark.gpu
def test_only_one_block_is_on_a_gpu(recipe, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    model = build("llama")
    anatomy = examine(model, family_of(model.config.model_type))
    gpu = torch.device("cuda")
    stream(model, anatomy.family.blocks, gpu, torch.float32)
    assert all(parameter.device.type == "cpu" for parameter in model.model.layers.parameters())
    with torch.no_grad():
        logits = model(tokens(2, 16).to(gpu)).logits.cpu()
        torch.testing.assert_close(logits, build("llama")(tokens(2, 16)).logits, rtol=1e-3, atol=1e-4)
    source = saved(tmp_path / "dense")
    report = prune_checkpoint(source, tmp_path / "out", recipe(device="cuda", weights="streamed"))
    assert report.plan.streamed

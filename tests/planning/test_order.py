import math

import pytest
import torch

from llm_surgeon import PruneConfig, plan, prune, prune_checkpoint
from llm_surgeon.errors import ConfigError
from llm_surgeon.models.skeleton import skeleton_of
from llm_surgeon.passes.layer_major import LayerMajorPass
from llm_surgeon.planning import foresee as plan_module
from llm_surgeon.planning import schedule as way
from llm_surgeon.planning.order import Available, Waiting, budgets_of, goes_layer_major, placed
from llm_surgeon.planning.seconds import pass_operations
from llm_surgeon.system import storage
from llm_surgeon.system.storage import Budgets, TensorStore
from tiny import build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 32,
    "eval_window": 64,
    "eval_tokens": 512,
    "shots": 2,
    "device": "cpu",
}
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def recipe(text_file):
    return lambda **changes: PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **changes})


@pytest.mark.parametrize(("host", "device"), [(100, None), (100, 50), (10**9, 50)])
def test_auto_goes_layer_by_layer_where_the_model_does_not_fit_at_once(host, device, recipe):
    fits = host >= 80 and (device is None or device >= 60)
    assert goes_layer_major(recipe(), Available(host, device), lambda: (80, 60)) is not fits


def test_what_is_asked_for_is_done_whatever_there_is(recipe):
    def never():
        raise AssertionError

    assert goes_layer_major(recipe(order="layer-major"), Available(1, None), never)
    assert not goes_layer_major(recipe(order="batch-major"), Available(1, None), never)
    assert goes_layer_major(recipe(method="wanda", shots=1), Available(1, None), never)
    assert not goes_layer_major(recipe(method="magnitude"), Available(1, None), never)


def test_a_store_gets_what_the_rest_leaves(recipe):
    assert budgets_of(recipe(), Available(500, None), (260, 0), 0.2) == Budgets(math.inf, 200)
    assert budgets_of(recipe(), Available(500, 90), (260, 60), 0.0) == Budgets(30, 240)
    # Where nothing was asked for, less than nothing is nothing, and a warning says so.
    assert budgets_of(recipe(), Available(500, 90), (600, 100), 0.0) == Budgets(0, 0)


@pytest.mark.parametrize(("option", "floor"), [("host_memory", (200, 0)), ("device_memory", (0, 200))])
def test_a_limit_that_cannot_be_kept_is_an_error_that_says_what_could(option, floor, recipe):
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')}"):
        budgets_of(recipe(**{option: 100}), Available(100, 100), floor, 0.0)
    with pytest.raises(ConfigError, match="--no-reconstruction"):
        budgets_of(recipe(reconstruction=True, **{option: 100}), Available(100, 100), floor, 0.0)


def test_tensors_wait_on_the_device_then_on_the_host_then_on_disk():
    assert placed(100, Budgets(), CPU) == Waiting(0, 100, 0)
    assert placed(100, Budgets(30, 50), CPU) == Waiting(0, 50, 50)
    assert placed(100, Budgets(30, 50), GPU) == Waiting(30, 50, 20)
    assert placed(100, Budgets(), GPU) == Waiting(100, 0, 0)


def test_a_plan_chooses_layer_major_for_little_memory(checkpoint, recipe, monkeypatch):
    # Constants of the process and its allocator are larger than any tiny model.
    monkeypatch.setattr(way, "process_bytes", lambda: 0)
    enough = plan(str(checkpoint), recipe(samples=64, batch_size=2))
    assert enough.order == "batch-major"
    assert enough.scratch == 0
    assert enough.store_host is None
    phase = next(phase for phase in enough.phases if phase.name == "curvature")
    little = plan(str(checkpoint), recipe(samples=64, batch_size=2, host_memory=phase.host_bytes - 1000))
    assert little.order == "layer-major"
    assert little.scratch > 0
    assert little.store_host >= 0
    short = next(phase for phase in little.phases if phase.name == "curvature")
    assert short.host_bytes <= phase.host_bytes - 1000
    assert short.seconds > phase.seconds


@pytest.mark.parametrize(("method", "blocks_run"), [("surgeon", 2 * 2 * 2), ("wanda", 2)])
def test_a_run_near_its_limit_hands_freed_memory_back_block_by_block(
    method, blocks_run, checkpoint, recipe, tmp_path, monkeypatch
):
    # What the plan takes for nothing is more than the limit.
    monkeypatch.setattr(way, "process_bytes", lambda: 0)
    handed_back = []
    monkeypatch.setattr(storage, "hand_back_freed_memory", lambda: handed_back.append(True))
    shots = {} if method == "surgeon" else {"shots": 1}
    settings = recipe(method=method, order="layer-major", evaluation="none", **shots)
    prune_checkpoint(str(checkpoint), tmp_path / "no limit", settings)
    assert not handed_back
    limit = plan(str(checkpoint), settings).host_peak
    prune_checkpoint(str(checkpoint), tmp_path / "limit", settings.model_copy(update={"host_memory": limit}))
    assert len(handed_back) >= blocks_run


def test_each_of_several_processes_has_its_part_of_tokens_and_memory(checkpoint, recipe, monkeypatch):
    monkeypatch.setattr(way, "process_bytes", lambda: 0)
    one = plan(str(checkpoint), recipe(samples=32, batch_size=2))
    shared = plan(str(checkpoint), recipe(samples=64, batch_size=2), processes=2)
    assert (one.processes, shared.processes) == (1, 2)
    for single, part in zip(one.phases, shared.phases, strict=True):
        assert part.host == single.host
        halved = single.name in ("selection", "update", "dense evaluation", "evaluation")
        assert part.seconds == pytest.approx(single.seconds / 2 if halved else single.seconds)
    limit = next(phase for phase in one.phases if phase.name == "curvature").host_bytes - 1000
    one = plan(str(checkpoint), recipe(samples=32, batch_size=2, host_memory=limit))
    shared = plan(str(checkpoint), recipe(samples=64, batch_size=2, host_memory=2 * limit), processes=2)
    assert one.order == shared.order == "layer-major"
    assert one.store_host == shared.store_host
    assert shared.host_available == limit
    with pytest.raises(ConfigError, match=r"in 2 processes, and --host-memory is 0\.00 GiB"):
        plan(str(checkpoint), recipe(samples=64, host_memory=1000), processes=2)


def test_what_several_processes_cannot_have_is_said_at_once(recipe):
    with pytest.raises(ConfigError, match="cannot be shared out among 9 processes"):
        plan("nowhere", recipe(), processes=9)
    with pytest.raises(ConfigError, match="A probe times a batch in one process"):
        plan("nowhere", recipe(), probe=True, processes=2)


def test_a_run_is_the_same_in_either_order_and_on_disk(checkpoint, recipe, tmp_path, monkeypatch):
    reports = {}
    put, on_disk = TensorStore.put, []

    def watched(self, tensor):
        stored = put(self, tensor)
        on_disk.append(self.bytes_on_disk)
        return stored

    monkeypatch.setattr(TensorStore, "put", watched)
    foresee = plan_module.foresee

    def all_on_disk(*arguments, **named):
        return foresee(*arguments, **named).model_copy(update={"store_host": 0})

    monkeypatch.setattr("llm_surgeon.run.opening.foresee", all_on_disk)
    for order in ("batch-major", "layer-major"):
        config = recipe(order=order, precision="float32", sparsity=0.3)
        reports[order] = prune_checkpoint(str(checkpoint), tmp_path / order, config)
        assert bool(max(on_disk)) == (order == "layer-major")
    assert max(on_disk) > 100_000
    one, other = reports.values()
    assert other.plan.order == "layer-major"
    assert other.layers == one.layers
    for first, second in zip(one.shots, other.shots, strict=True):
        assert second.perplexity.perplexity == pytest.approx(first.perplexity.perplexity, rel=1e-4)


def test_limits_need_a_checkpoint(recipe):
    with pytest.raises(ConfigError, match="prune_checkpoint"):
        prune(build("llama"), tokenizer(), recipe(host_memory=10**9))


def test_a_cpu_has_no_device_memory(checkpoint, recipe):
    with pytest.raises(ConfigError, match="--host-memory"):
        plan(str(checkpoint), recipe(device_memory=10**9))


def test_limits_and_a_latency_do_not_go_together(recipe):
    with pytest.raises(ConfigError, match="nothing is planned"):
        recipe(target_latency=10, host_memory=10**9)


def test_a_layerwise_method_has_its_order(recipe):
    with pytest.raises(ConfigError, match="layer by layer"):
        recipe(method="wanda", shots=1, order="batch-major")


def test_a_probe_runs_its_batch_in_the_order_of_the_run(checkpoint, recipe, monkeypatch):
    ran = []
    run = LayerMajorPass.run

    def watched(self, *arguments, **named):
        ran.append(self)
        return run(self, *arguments, **named)

    monkeypatch.setattr(LayerMajorPass, "run", watched)
    plan(str(checkpoint), recipe(), probe=True)
    # Plans trace both orders, on tensors without numbers.
    traced = len(ran)
    ran.clear()
    plan(str(checkpoint), recipe(order="layer-major"))
    without = len(ran)
    ran.clear()
    plan(str(checkpoint), recipe(order="layer-major"), probe=True)
    assert traced == 0
    assert len(ran) == without + 2


def test_layer_by_layer_the_blocks_are_run_forward_once_more(checkpoint, recipe):
    skeleton = skeleton_of(str(checkpoint), recipe())
    prunable = skeleton.anatomy.prunable_weights
    for kept in (1.0, 0.5):
        one, other = (pass_operations(skeleton, recipe(), order, kept) for order in ("batch-major", "layer-major"))
        assert other - one == pytest.approx(2 * kept * prunable)
    inputs_only = recipe(method="l-obd")
    assert pass_operations(skeleton, inputs_only, "batch-major") == pass_operations(
        skeleton, inputs_only, "layer-major"
    )

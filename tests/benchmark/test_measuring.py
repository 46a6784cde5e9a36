from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from llm_surgeon.benchmark import isolated as alone
from llm_surgeon.benchmark import measuring as bench_module
from llm_surgeon.benchmark import pairs
from llm_surgeon.benchmark.compiled import compiled_run
from llm_surgeon.benchmark.isolated import IsolatedOrder
from llm_surgeon.benchmark.measuring import bench
from llm_surgeon.benchmark.pairs import time_pair
from llm_surgeon.errors import ConfigError, ModelError
from llm_surgeon.evaluation.speed import Rates, Workload, ready_to_time
from llm_surgeon.records import Failure
from llm_surgeon.records.bench import Bench

SMALL = {"prompt": 6, "generate": 2, "repeats": 2}
WORK = Workload(prompt=6, generate=2, repeats=3)
CPU = torch.device("cpu")


@pytest.fixture
def here(monkeypatch):
    """Measures in this process, which is quick; gives the tasks."""
    tasks = []

    def measure(task):
        tasks.append(task)
        return alone.measure(task)

    monkeypatch.setattr(bench_module, "measure_in_process", measure)
    return tasks


@pytest.fixture(scope="session")
def sparse(checkpoint, tmp_path_factory):
    """The tiny checkpoint with half of the weights of its blocks set to zero."""
    path = tmp_path_factory.mktemp("sparse") / "sparse"
    shutil.copytree(checkpoint, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for layer in model.model.layers.modules():
            if isinstance(layer, nn.Linear):
                layer.weight[:, ::2] = 0
    model.save_pretrained(path)
    return path


def scripted(monkeypatch, rates):
    """Instead of warm runs: the rates of each model in turn; gives the order in which they were taken."""
    order = []
    series = iter(rates.items())

    def warm_run(_model, _ids, _generate):
        name, of_model = next(series)
        left = iter(of_model)

        def run():
            order.append(name)
            return next(left)

        return run

    monkeypatch.setattr(pairs, "warm_run", warm_run)
    return order


def test_each_model_is_timed_against_the_reference(here, checkpoint, sparse, tmp_path):
    third = tmp_path / "third"
    shutil.copytree(checkpoint, third)
    result = bench([sparse, third], against=checkpoint, batches=(2, 1, 2), **SMALL)
    assert [model.name for model in result.models] == ["tiny-llama", "sparse", "third"]
    assert [task.source for task in here] == [str(checkpoint), str(sparse), str(third)]
    timed = [(run.batch, *(timing.model for timing in run.timings)) for run in result.runs]
    assert timed == [(batch, "tiny-llama", other) for batch in (1, 2) for other in ("sparse", "third")]
    for run in result.runs:
        assert not run.compiled
        assert run.prefill_ratio > 0 < run.decode_ratio
        for timing in run.timings:
            assert (timing.speed.batch, timing.speed.prompt, timing.speed.repeats) == (run.batch, 6, 2)
    assert (result.prompt, result.generated, result.repeats, result.dtype) == (6, 2, 2, "auto")
    assert result.threads == torch.get_num_threads()
    assert "torch" in result.versions
    assert Bench.model_validate_json(result.model_dump_json()) == result


def test_without_against_the_first_is_the_reference_and_names_are_distinct(here, checkpoint):
    result = bench([checkpoint, str(checkpoint)], batches=[1], **SMALL)
    (run,) = result.runs
    assert [timing.model for timing in run.timings] == ["tiny-llama", "tiny-llama (2)"]


def test_one_model_is_measured_alone(here, checkpoint):
    result = bench(checkpoint, batches=[1], dtype="bfloat16", **SMALL)
    (run,) = result.runs
    (timing,) = run.timings
    assert timing.speed.dtype == result.models[0].own.dtype == "bfloat16"
    assert run.prefill_ratio is None


def test_own_measures_count_what_is_stored(here, checkpoint, sparse):
    result = bench([checkpoint, sparse], batches=[1, 3], **SMALL)
    model = tiny.build("llama")
    inside = [layer.weight.numel() for layer in model.model.layers.modules() if isinstance(layer, nn.Linear)]
    for found in result.models:
        own = found.own
        assert own.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert own.linear_weights == sum(inside)
        assert own.weight_bytes > 4 * own.parameters
        assert list(own.peaks) == [1, 3]
        # Linux sums its counters of pages lazily, hence the slack.
        assert 0 < own.bytes_before < own.peaks[1] + 2**20 < own.peaks[3] + 2**21
    dense, zeros = (found.own for found in result.models)
    assert (dense.stores_zeros, zeros.stores_zeros) == (False, True)
    assert zeros.zero_weights == sum(inside) // 2


def test_a_few_zeros_are_no_sparsity(here, checkpoint):
    own = bench([checkpoint], batches=[1], **SMALL).models[0].own
    assert not own.model_copy(update={"linear_weights": 1000, "zero_weights": 50}).stores_zeros
    assert own.model_copy(update={"linear_weights": 1000, "zero_weights": 51}).stores_zeros
    assert not own.model_copy(update={"linear_weights": 0, "zero_weights": 0}).stores_zeros


def test_pairs_alternate_and_ratios_are_medians_over_them(monkeypatch):
    # The ratios are 2, 10 and 1; the ratio of the medians would be 5.
    rates = {"a": [1.0, 1.0, 8.0], "b": [2.0, 10.0, 8.0]}
    order = scripted(monkeypatch, {name: [Rates(rate, 3 * rate) for rate in some] for name, some in rates.items()})
    model = tiny.build("llama")
    run = time_pair(["a", "b"], [model, model], WORK, False, CPU)
    assert order == ["a", "b"] * 3
    assert (run.prefill_ratio, run.decode_ratio) == (2, 2)
    assert [timing.speed.prefill for timing in run.timings] == [1, 8]
    assert [timing.speed.decode for timing in run.timings] == [3, 24]


@pytest.mark.parametrize(
    ("message", "cause"),
    [
        ("backend='inductor' raised:\nBad: no such instruction\nlong story", "raised: Bad: no such instruction."),
        ("InvalidCxxCompiler: No working C++ compiler found in config: (None, 'g++')", "There is no C++ compiler."),
    ],
)
def test_who_cannot_be_compiled_is_on_record_and_the_other_is_timed(monkeypatch, message, cause):
    dense, broken = tiny.build("llama"), tiny.build("llama")

    def compiled(model, _ids, _generate):
        if model is broken:
            raise RuntimeError(message)
        return lambda: Rates(1.0, 2.0), 7.0

    monkeypatch.setattr(pairs, "compiled_run", compiled)
    run = time_pair(["dense", "broken"], [dense, broken], WORK, True, CPU)
    first, second = run.timings
    assert (first.speed.decode, first.compile_seconds, first.failure) == (2, 7, None)
    assert second.speed is None
    assert second.failure.cause.endswith(cause)
    assert len(second.failure.cause.splitlines()) == 1
    assert (run.prefill_ratio, run.decode_ratio) == (None, None)


def test_compiled_is_measured_after_all_else_of_a_pair(here, checkpoint, monkeypatch):
    monkeypatch.setattr(pairs, "compiled_run", lambda *_: (lambda: Rates(1.0, 2.0), 7.0))
    result = bench([checkpoint, checkpoint], batches=(1, 2), compiled=True, **SMALL)
    assert [(run.compiled, run.batch) for run in result.runs] == [(False, 1), (False, 2), (True, 1), (True, 2)]


COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++")), "")
NEEDS_COMPILER = pytest.mark.skipif(not shutil.which(COMPILER), reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, NEEDS_COMPILER])])
def test_a_compiled_model_decodes_what_it_decodes_otherwise(monkeypatch, backend):
    model, fed, compile_function = tiny.llama(num_hidden_layers=1).eval(), [], torch.compile

    def compiled(function):
        inner = compile_function(function, backend=backend)

        def call(**options):
            fed.append(options["input_ids"].clone())
            return inner(**options)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    with ready_to_time([model], WORK, CPU) as ids:
        run, seconds = compiled_run(model, ids, WORK.generate)
        fed.clear()
        # Nothing is compiled any more.
        with torch.compiler.set_stance("fail_on_recompile"):
            run()
        everything = torch.ones_like(ids)
        expected = model.generate(
            ids, attention_mask=everything, max_new_tokens=WORK.generate, do_sample=False, eos_token_id=None
        )
    assert torch.equal(torch.cat(fed, dim=1), expected)
    assert seconds > 0
    torch.compiler.reset()


def test_of_models_that_share_code_the_second_is_compiled_for_its_own_sizes_too(monkeypatch):
    compile_function, symbols = torch.compile, []

    def backend(module, inputs):
        sizes = [size for given in inputs for size in (given.shape if isinstance(given, torch.Tensor) else [given])]
        symbols.append(sum(isinstance(size, torch.SymInt) for size in sizes))
        return module

    monkeypatch.setattr(torch, "compile", lambda function: compile_function(function, backend=backend))
    models = [tiny.llama(num_hidden_layers=1, intermediate_size=width) for width in (40, 30)]
    run = time_pair(["wide", "narrow"], models, WORK, True, CPU)
    assert [timing.failure for timing in run.timings] == [None, None]
    assert symbols == [0] * 4, "a prefill and a step each"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": []}, "nothing to measure"),
        ({"batches": ()}, "nothing to measure"),
        ({"batches": (0,)}, "batch .* is 0"),
        ({"repeats": 0}, "repeats .* is 0"),
        ({"prompt": 127}, "tiny-llama: 127 prompt and 2 generated tokens exceed the model's 128 positions"),
        ({"device": "cuda:99"}, "'cuda:99' cannot be used"),
        ({"dtype": "int4"}, "'int4'"),
    ],
)
def test_mistakes_are_found_before_any_work(here, checkpoint, changes, message):
    with pytest.raises(ConfigError, match=message):
        bench(**{"models": [checkpoint], "batches": [1], **SMALL, **changes})
    assert here == []


def test_directories_are_checked_before_any_work(here, checkpoint, tmp_path):
    file = tmp_path / "file"
    file.touch()
    for wrong, message in (
        (tmp_path, "no config.json"),
        (tmp_path / "missing", "There is no directory"),
        ("./missing", "There is no directory"),
        (file, "is a file, not a directory"),
    ):
        with pytest.raises(ModelError, match=message):
            bench([checkpoint, wrong], **SMALL)
    assert here == []


def test_a_model_that_cannot_be_loaded_is_an_error_before_any_is_measured(here, checkpoint, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copy(checkpoint / "config.json", broken)
    monkeypatch.setattr("llm_surgeon.benchmark.measuring.measure_in_process", lambda _: pytest.fail("measured"))
    with pytest.raises(ModelError, match=r"The model of '.*broken' cannot be loaded: .*model\.safetensors"):
        bench([checkpoint, broken], **SMALL)


def test_a_process_that_dies_is_an_error(checkpoint, monkeypatch):
    monkeypatch.setattr(alone, "command", lambda *_: [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    with pytest.raises(ModelError, match=r"probably because memory ran out\. Lower --batch or --prompt"):
        bench([checkpoint], **SMALL)


def test_an_unforeseen_error_keeps_its_stack_trace(monkeypatch):
    monkeypatch.setattr(alone, "_measure", lambda _: 1 / 0)
    task = IsolatedOrder(source="s", dtype="auto", device="cpu", threads=1, prompt=1, generate=1, batches=(1,))
    failure = alone.measure(task).failure
    assert isinstance(failure, Failure)
    assert failure.cause == "ZeroDivisionError: division by zero"
    assert "in measure" in failure.trace


@pytest.mark.slow
@pytest.mark.usefixtures("real_python")  # what it has from others is not its own
def test_a_process_of_its_own_measures_the_same(checkpoint):
    task = IsolatedOrder(
        source=str(checkpoint), dtype="auto", device="cpu", threads=1, prompt=6, generate=2, batches=(2,)
    )
    varying = {"load_seconds", "bytes_before", "peaks"}
    own = alone.measure_in_process(task).own
    assert own.model_dump(exclude=varying) == alone.measure(task).own.model_dump(exclude=varying)
    assert own.peaks[2] > own.bytes_before > 0

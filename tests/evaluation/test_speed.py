from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_surgeon.errors import ConfigError, ModelError
from llm_surgeon.evaluation import speed
from llm_surgeon.evaluation.speed import Workload, compare_speed, measure_speed


def tiny_model(intermediate: int = 48, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": intermediate, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(options | changes)))


def record_calls(model: LlamaForCausalLM, log: list[dict[str, Any]], name: str = "") -> None:
    """Write down each forward: its name, its input's shape, the cache's length before, its options."""

    def before(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert not args
        cache = kwargs.get("past_key_values")
        log.append(
            {
                "name": name,
                "ids": kwargs["input_ids"].clone(),
                "cached": 0 if cache is None else cache.get_seq_length(),
                "training": model.training,
                "inference": torch.is_inference_mode_enabled(),
                "logits_to_keep": kwargs.get("logits_to_keep"),
            }
        )

    model.register_forward_pre_hook(before, with_kwargs=True)


def clock_that_charges(costs: dict[str, list[float]], log: list[dict[str, Any]]) -> Callable[[], float]:
    """A timer by which each run of a model takes the next of its costs in seconds per forward."""

    def now() -> float:
        seconds, run = 0.0, dict.fromkeys(costs, -1)
        for call in log:
            run[call["name"]] += call["cached"] == 0
            seconds += costs[call["name"]][run[call["name"]]]
        return seconds

    return now


def test_runs_alternate_after_a_warm_up() -> None:
    log: list[dict[str, Any]] = []
    dense, pruned = tiny_model(), tiny_model(16)
    record_calls(dense, log, "dense")
    record_calls(pruned, log, "pruned")
    compare_speed(dense, pruned, prompt=5, generate=3, repeats=2)
    assert [call["name"] for call in log if not call["cached"]] == ["dense", "pruned"] * 3
    assert [call["name"] for call in log] == (["dense"] * 4 + ["pruned"] * 4) * 3


def test_decoding_is_greedy_and_uses_the_cache_of_the_prefill() -> None:
    log: list[dict[str, Any]] = []
    model = tiny_model()
    record_calls(model, log)
    measure_speed(model, Workload(prompt=5, generate=3, batch=2, repeats=1))
    counted = log[4:]
    assert [call["cached"] for call in counted] == [0, 5, 6, 7]
    assert [tuple(call["ids"].shape) for call in counted] == [(2, 5), (2, 1), (2, 1), (2, 1)]
    assert {call["logits_to_keep"] for call in log} == {1}
    assert all(call["inference"] and not call["training"] for call in log)
    expected = model.eval().generate(
        counted[0]["ids"].clone(), max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    decoded = torch.cat([call["ids"] for call in counted], dim=1)
    torch.testing.assert_close(decoded, expected)


def test_prompts_are_random_but_the_same_each_time() -> None:
    log: list[dict[str, Any]] = []
    model = tiny_model()
    record_calls(model, log)
    for seed in (1, 2):  # the seed of the caller is neither used nor moved
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        measure_speed(model, Workload(prompt=8, generate=1, repeats=1))
        assert torch.equal(torch.get_rng_state(), state)
    prompts = [call["ids"] for call in log if not call["cached"]]
    assert len(prompts) == 4
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)
    assert len(prompts[0].unique()) > 3


def test_rates_are_medians_and_ratios_are_medians_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[dict[str, Any]] = []
    dense, pruned = tiny_model(), tiny_model(16)
    record_calls(dense, log, "dense")
    record_calls(pruned, log, "pruned")
    # The warm-up first, then three pairs whose ratios are 1, 20 and 2/3; the ratio of the medians would be 2.
    costs = {"dense": [99.0, 1.0, 10.0, 2.0], "pruned": [99.0, 1.0, 0.5, 3.0]}
    monkeypatch.setattr(speed, "perf_counter", clock_that_charges(costs, log))
    result = compare_speed(dense, pruned, prompt=6, generate=3, batch=2, repeats=3)
    # 12 tokens in one forward; 2 tokens in each of the forwards of decoding.
    assert result.dense.prefill == pytest.approx(12 / 2)
    assert result.dense.decode == pytest.approx(2 / 2)
    assert result.pruned.prefill == pytest.approx(12 / 1)
    assert result.prefill_ratio == pytest.approx(1)
    assert result.decode_ratio == pytest.approx(1)


def test_fields_say_what_was_timed() -> None:
    result = compare_speed(
        tiny_model().to(torch.bfloat16), tiny_model(16), prompt=5, generate=2, batch=3, repeats=1, device="cpu"
    )
    for one, dtype in ((result.dense, "bfloat16"), (result.pruned, "float32")):
        assert (one.prompt, one.generated, one.batch, one.repeats, one.dtype) == (5, 2, 3, 1, dtype)
        assert one.device == f"cpu ({torch.get_num_threads()} threads)"


def test_a_model_without_logits_to_keep_is_timed_plainly() -> None:
    class Plain(LlamaForCausalLM):
        def forward(  # type: ignore[override]
            self, input_ids: Any = None, past_key_values: Any = None, use_cache: Any = None
        ) -> Any:
            return super().forward(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)

    log: list[dict[str, Any]] = []
    model = Plain(tiny_model().config)
    record_calls(model, log)
    measure_speed(model, Workload(prompt=4, generate=2, repeats=1))
    assert [(call["cached"], call["logits_to_keep"]) for call in log] == [(0, None), (4, None), (5, None)] * 2


@pytest.mark.parametrize("fails", [False, True])
def test_training_flags_come_back_one_by_one(fails: bool) -> None:
    model = tiny_model().train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]
    if fails:
        model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure_speed(model, Workload(prompt=4, generate=1, repeats=1))
    else:
        measure_speed(model, Workload(prompt=4, generate=1, repeats=1))
    assert [module.training for module in model.modules()] == flags
    assert len(set(flags)) == 2


@pytest.mark.parametrize("name", ["prompt", "generate", "batch", "repeats"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} .* is 0"):
        compare_speed(tiny_model(), tiny_model(), **{name: 0})


def test_too_few_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="32 positions"):
        compare_speed(tiny_model(), tiny_model(), prompt=30, generate=3)
    measure_speed(tiny_model(), Workload(prompt=30, generate=2, repeats=1))


def test_models_on_another_device_are_refused() -> None:
    with pytest.raises(ModelError, match="is on cpu, not on meta"):
        compare_speed(tiny_model(), tiny_model(), prompt=4, generate=2, device="meta")

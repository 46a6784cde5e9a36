"""Targets in parameters, bytes and milliseconds come to a sparsity, and the result is held against them."""

import pytest
import torch

from choosing import attentions, feed_forwards
from llm_surgeon import PruneConfig, prune, prune_checkpoint
from llm_surgeon.errors import ConfigError
from llm_surgeon.models import examine, family_of
from llm_surgeon.pruning import targets
from llm_surgeon.run.job import count_parameters
from tiny import build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "batch_size": 4,
    "precision": "float32",
    "eval_window": 32,
    "eval_tokens": 64,
}


def config(**options):
    return PruneConfig.from_mapping({**SMALL, "structure": "neurons", "round_to": 1, **options})


def examined(family="llama"):
    model = build(family)
    return model, examine(model, family_of(model.config.model_type))


def test_parameters_and_bytes_come_to_the_same_sparsity():
    model, anatomy = examined()
    total = count_parameters(model)
    wanted = total - anatomy.prunable_weights // 4
    for options in ({"target_params": wanted}, {"target_bytes": str(4 * wanted)}):
        found = targets.count_based(config(**options), anatomy, total, 4)
        assert found.sparsity == pytest.approx(0.25, abs=1e-3)
        assert found.target is None
    assert targets.count_based(config(sparsity=0.3), anatomy, total, 4).sparsity == 0.3


def test_targets_out_of_reach_are_refused():
    model, anatomy = examined()
    total = count_parameters(model)
    with pytest.raises(ConfigError, match="not larger than"):
        targets.count_based(config(target_params=total), anatomy, total, 4)
    with pytest.raises(ConfigError, match=r"Embeddings.*cannot be reached"):
        targets.count_based(config(target_params=total - anatomy.prunable_weights), anatomy, total, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_params": "90M", "sparsity": 0.5}, "only one of"),
        ({"target_params": "90M", "target_bytes": "1G"}, "only one of"),
        ({"target_params": "many"}, "no positive number"),
        ({"target_bytes": "90M", "structure": "unstructured"}, "structures that shrink"),
    ],
)
def test_targets_that_make_no_sense(options, message):
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_a_latency_is_read_off_the_line_between_timed_copies(monkeypatch):
    """Time falls by 1 ms for every weight that is gone, as far as the stand-in for the clock knows."""
    model, anatomy = examined()
    dense = count_parameters(model)
    monkeypatch.setattr(targets, "seconds_of", lambda m: (100_000 - (dense - count_parameters(m))) / 1000)
    lost = anatomy.prunable_weights * 0.2
    found = targets.latency_based(config(target_latency=100_000 - lost), model, anatomy)
    assert found.sparsity == pytest.approx(0.2, abs=0.02)
    assert count_parameters(model) == dense
    with pytest.raises(ConfigError, match="The dense model is not slower"):
        targets.latency_based(config(target_latency=100_001), model, anatomy)
    with pytest.raises(ConfigError, match="cannot be reached by removing neurons"):
        targets.latency_based(config(target_latency=1), model, anatomy)


def test_a_pass_is_timed_and_copies_leave_the_model_alone():
    model, anatomy = examined()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert targets._time(model, anatomy, config(), 0.2) > 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_result_is_held_against_the_target(text_file, tmp_path):
    model, _ = examined()
    total = count_parameters(model)
    recipe = config(target_params=int(0.85 * total), calibration=str(text_file), evaluation="none", shots=2)
    report = prune(model, tokenizer(), recipe, out=tmp_path / "out")
    assert report.target.target == "target_params"
    assert 0.8 * total < report.shots[-1].size.total <= 1.01 * report.target.wanted
    assert report.shots[-1].size.total == report.target.reached
    # The recipe that is kept says what was done.
    assert PruneConfig.from_mapping(report.config).target is None
    assert report.config["sparsity"] == pytest.approx(report.shots[-1].sparsity, abs=0.01)


def test_a_latency_that_was_missed_is_said(caplog, monkeypatch):
    monkeypatch.setattr(targets, "seconds_of", lambda _: 0.5)
    record = targets.reached(config(target_latency=400.0), build("llama"), 1, 1)
    assert record.reached == 500.0
    assert "400 was asked for" in caplog.text
    caplog.clear()
    targets.reached(config(target_latency=490.0), build("llama"), 1, 1)
    assert not caplog.text


def test_targets_are_checked_before_the_weights_are_loaded(tmp_path, text_file, monkeypatch):
    model = build("llama")
    model.save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    monkeypatch.setattr("llm_surgeon.run.opening.loaded", lambda *_, **__: pytest.fail("loaded"))
    recipe = config(target_params=10, calibration=str(text_file))
    with pytest.raises(ConfigError, match="cannot be reached"):
        prune_checkpoint(str(tmp_path / "dense"), tmp_path / "out", recipe)


def test_timed_copies_lose_of_each_kind_its_share():
    """Large groups do not go first only because they are large."""
    from llm_surgeon.pruning.shapes import Shapes
    from tiny import llama

    model = llama(num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8)
    anatomy = examine(model, family_of("llama"))
    keep = Shapes(config(structure="neurons+heads", min_width=0.0), anatomy).random_masks(0.5, seed=0)
    heads = torch.stack([part.present_heads(keep) for part in attentions(anatomy)]).float().mean()
    neurons = torch.stack([keep[part.output.layer].columns for part in feed_forwards(anatomy)]).float().mean()
    assert float(heads) == pytest.approx(0.5, abs=0.15)
    assert float(neurons) == pytest.approx(0.5, abs=0.15)

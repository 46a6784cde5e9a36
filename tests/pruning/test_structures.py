"""Structures and methods end to end on tiny models of the real classes."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from llm_surgeon import PruneConfig, prune, prune_checkpoint
from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.expert_scores import EXPERT_SCORES
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.matrix import read_matrix
from llm_surgeon.recipe.methods import METHODS
from llm_surgeon.records import PruneReport
from tiny import BUILDERS, build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "batch_size": 4,
    "precision": "float32",
    "eval_window": 32,
    "eval_tokens": 64,
}


def config(text_file, **changes):
    return PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), "evaluation": "none", **changes})


def matrices(model):
    """Weights of the prunable layers, without biases."""
    anatomy = examine(model, family_of(model.config.model_type))
    return {name: read_matrix(model, layer)[:, : layer.columns].clone() for name, layer in anatomy.layers.items()}


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("structure", ["unstructured", "2:4", "1:8"])
def test_elements_become_zero_and_stay_zero(family, structure, text_file):
    model = build(family)
    dense = matrices(model)
    pattern = Pattern.parse(structure)
    sparsity = pattern.sparsity if pattern else 0.6
    report = prune(model, tokenizer(), config(text_file, structure=structure, sparsity=sparsity, shots=3))
    after = matrices(model)
    assert {name: w.shape for name, w in after.items()} == {name: w.shape for name, w in dense.items()}
    total, zeros = sum(w.numel() for w in after.values()), sum(int((w == 0).sum()) for w in after.values())
    assert zeros / total == pytest.approx(sparsity, abs=1e-3)
    assert [shot.sparsity for shot in report.shots] == pytest.approx([sparsity * s / 3 for s in (1, 2, 3)], abs=2e-3)
    assert report.shots[-1].size.total == report.dense_size.total - zeros
    assert sum(layer.weights for layer in report.layers) == total - zeros
    for shot in report.shots:
        assert sum(shot.costs.removed) > 0
        assert {stage.name for stage in shot.stages} == {"curvature", "selection", "update"}, "nothing was evaluated"
        assert report.memory.peak >= shot.peak > 0
    candidates = total if pattern is None else total // pattern.group
    assert sum(report.shots[0].costs.kept + report.shots[0].costs.removed) + report.shots[0].costs.outside == candidates
    if pattern:
        for weight in after.values():
            kept = (weight != 0).view(len(weight), -1, pattern.group).sum(-1)
            assert (kept == pattern.kept).all()
    # The rest made up for what went: kept weights are not what they were.
    assert any((w[w != 0] != dense[name][w != 0]).any() for name, w in after.items())


def test_zeros_of_every_shot_are_among_those_of_the_next(text_file, monkeypatch):
    from llm_surgeon.pruning import shots

    seen = []
    update = shots._Shots._update

    def spy(self, *arguments):
        update(self, *arguments)
        seen.append({name: weight == 0 for name, weight in matrices(self.session.model).items()})

    monkeypatch.setattr(shots._Shots, "_update", spy)
    prune(build("opt"), tokenizer(), config(text_file, structure="unstructured", sparsity=0.6, shots=4))
    assert len(seen) == 4
    for before, after in itertools.pairwise(seen):
        for name in before:
            assert not (before[name] & ~after[name]).any()


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
def test_the_export_is_plain_and_needs_no_remote_code(structure, checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    report = prune_checkpoint(str(checkpoint), out, config(text_file, structure=structure, sparsity=0.5, shots=2))
    assert not (out / "modeling_pruned.py").exists()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)
    zeros = sum(int((w == 0).sum()) for w in matrices(loaded).values())
    assert zeros == report.dense_size.prunable - report.shots[-1].size.prunable
    assert report.speed is None
    assert report.export.weight_bytes >= report.dense_size.total
    card = (out / "README.md").read_text()
    assert "trust_remote_code=True" not in card
    assert "no faster" in card


@pytest.mark.parametrize("structure", ["rows-columns", "unstructured", "2:4"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in EXPERT_SCORES])
def test_every_method_works_with_every_structure(method, structure, text_file):
    for curvature in METHODS[method].curvatures:
        model = build("llama-biased")
        before = matrices(model)
        settings = config(text_file, method=method, structure=structure, sparsity=0.3, shots=2, curvature=curvature)
        report = prune(model, tokenizer(), settings)
        assert report.shots[-1].sparsity == pytest.approx(0.3, abs=0.03)
        assert (report.shots[0].loss is None) == (method == "magnitude")
        if structure != "rows-columns":
            kept_as_they_were = all(torch.equal(w[w != 0], before[name][w != 0]) for name, w in matrices(model).items())
            assert kept_as_they_were != METHODS[method].correlated


def test_magnitude_removes_the_smallest_weights(text_file):
    model = build("llama")
    before = torch.cat([w.flatten() for w in matrices(model).values()]).abs()
    prune(model, tokenizer(), config(text_file, method="magnitude", structure="unstructured", sparsity=0.5, shots=1))
    after = torch.cat([w.flatten() for w in matrices(model).values()])
    assert before[after == 0].max() <= before[after != 0].min()


@pytest.mark.parametrize("structure", ["rows-columns", "unstructured"])
def test_correlations_considered_change_the_result(structure, text_file):
    results = []
    for size in (0, 1, 8):
        model = build("opt")
        settings = config(text_file, structure=structure, sparsity=0.4, shots=1, max_correlations=size)
        prune(model, tokenizer(), settings)
        results.append(torch.cat([value.flatten().float() for value in model.state_dict().values()]))
    # The same structures go: groups change the update, not the costs.
    assert all(len(result) == len(results[0]) for result in results)
    assert not torch.allclose(results[0], results[1])
    assert not torch.allclose(results[1], results[2])


def test_a_width_that_the_pattern_does_not_divide_is_refused_and_can_be_left_dense(text_file):
    with pytest.raises(ConfigError, match=r"3:7 does not divide.*--ignore"):
        prune(build("llama"), tokenizer(), config(text_file, structure="3:7"))
    # Inputs are 24 wide, or 40 in down_proj: only 24 is a multiple of 3.
    model = build("llama")
    prune(model, tokenizer(), config(text_file, structure="2:3", ignore=["lm_head", "down_proj", "o_proj"], shots=1))
    assert (model.model.layers[0].mlp.down_proj.weight != 0).all()
    assert ((model.model.layers[0].mlp.up_proj.weight != 0).view(40, -1, 3).sum(-1) == 2).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "4:2"}, "valid are rows-columns, neurons"),
        ({"structure": "heads+2:4"}, "valid are rows-columns, neurons"),
        ({"structure": "2:4", "sparsity": 0.6}, "more than 2:4 can reach"),
        ({"method": "magnitude", "curvature": "kfac"}, "valid are surgeon: kfac"),
        ({"method": "obd"}, "surgeon"),
        ({"curvature": "kronecker-sum", "max_correlations": 8}, "all together"),
    ],
)
def test_impossible_combinations_are_refused_with_what_is_valid(options, message):
    with pytest.raises(ConfigError, match=message):
        PruneConfig.from_mapping(options)


def test_a_pattern_says_how_sparse():
    assert PruneConfig.from_mapping({"structure": "1:4"}).sparsity == 0.75
    assert PruneConfig.from_mapping({"structure": "1:4", "sparsity": 0.5}).sparsity == 0.5
    assert PruneConfig.from_mapping({"structure": "unstructured"}).sparsity == 0.5


@pytest.mark.parametrize("structure", ["rows-columns", "unstructured"])
def test_corrections_lower_the_loss_and_leave_the_structure(structure, text_file):
    results = []
    corrections = {"lora": True, "lora_steps": 8, "lora_final_steps": 16, "lora_learning_rate": 1e-2}
    for options in ({}, corrections):
        model = build("llama-biased")
        settings = config(text_file, structure=structure, sparsity=0.5, shots=2, evaluation=str(text_file), **options)
        report = prune(model, tokenizer(), settings)
        results.append((model, report))
    (_, plain), (model, corrected) = results
    assert [shot.stage("correction")["correction steps"] for shot in corrected.shots] == [8, 16]
    assert [shot.stage("correction") for shot in plain.shots] == [None, None]
    assert corrected.shots[-1].size.prunable == pytest.approx(plain.shots[-1].size.prunable, rel=0.02)
    assert corrected.shots[-1].perplexity.nll < plain.shots[-1].perplexity.nll
    assert corrected.shots[-1].seconds_of("correction") > 0
    if structure == "unstructured":
        kept = sum(int((w != 0).sum()) for w in matrices(model).values())
        assert kept == corrected.shots[-1].size.prunable


@pytest.mark.parametrize("structure", ["rows-columns", "2:4"])
def test_shots_on_the_way_are_exports_of_their_own(structure, checkpoint, text_file, tmp_path):
    out = tmp_path / "out"
    settings = config(text_file, structure=structure, sparsity=0.5, shots=3, export_shots=[1, 2, 3])
    report = prune_checkpoint(str(checkpoint), out, settings)
    assert sorted(path.name for path in out.glob("shot-*")) == ["shot-1", "shot-2"]
    for number in (1, 2):
        directory = out / f"shot-{number}"
        loaded = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=structure == "rows-columns")
        parameters = sum((p != 0).sum() if structure == "2:4" else p.numel() for p in loaded.parameters())
        assert int(parameters) == report.shots[number - 1].size.total
        own = PruneReport.model_validate_json((directory / "report.json").read_text())
        assert own.shots == report.shots[:number]
        assert own.export.path == directory.name


def test_shots_to_export_are_checked(text_file):
    with pytest.raises(ConfigError, match="between 1 and 2"):
        config(text_file, shots=2, export_shots=[3])
    with pytest.raises(ConfigError, match="no place to export"):
        prune(build("llama"), tokenizer(), config(text_file, export_shots=[1]))

"""Cross-fitting on tiny models of the real classes."""

from copy import deepcopy

import pytest
import torch

from choosing import feed_forwards
from llm_surgeon import PruneConfig, prune
from llm_surgeon.data.tokens import CalibrationTokens
from llm_surgeon.errors import ConfigError
from llm_surgeon.passes.batch_major import Estimation
from llm_surgeon.passes.task import Task
from llm_surgeon.refit import gates_stage, reconstruction_stage
from llm_surgeon.refit.cross_fit import OtherWeights
from llm_surgeon.refit.gates import SetGates, gate_width, set_gates
from llm_surgeon.refit.reconstruction import Reconstructed, Reconstruction, reconstruct
from llm_surgeon.refit.stage import Shot
from llm_surgeon.refit.stages import Stages
from llm_surgeon.session.session import Session
from llm_surgeon.system.clock import Clock
from llm_surgeon.system.processes import ALONE, Processes
from pruned_models import pruned
from tiny import build, tokenizer, tokens

TEXT = CalibrationTokens(tokens(8, 16), None, {})
RECIPE = {
    **{"samples": 8, "seq_len": 16, "batch_size": 3, "precision": "float32", "evaluation": "none", "shots": 1},
    **{"sparsity": 0.4, "reconstruction": True, "reconstruction_copies": 0, "gate_steps": 1, "cross_fit": True},
}
CPU = torch.device("cpu")


def session_of(model, dense, anatomy, text=TEXT, processes=ALONE, **options):
    config = PruneConfig.from_mapping({**RECIPE, **options})
    return Session(model, anatomy, text, config, processes=processes, dense=dense)


def run(session, keep):
    """Records of the stages by name, after they have fitted what a shot has left."""
    return {record.name: record for record in Stages(session).run(Shot(1, keep), Clock(CPU))}


@pytest.mark.parametrize(("gate_steps", "damping"), [(0, None), (2, None), (2, 0.5)])
@pytest.mark.parametrize("family", ["llama-biased", "gpt2", "phi3"])
def test_the_result_is_the_mean_of_a_model_of_each_half(family, gate_steps, damping):
    model, dense, anatomy, keep = pruned(family)
    width = gate_width(anatomy, PruneConfig.from_mapping(RECIPE))
    assert width < feed_forwards(anatomy)[0].neurons
    models, records = [deepcopy(model), deepcopy(model)], []
    even, odd = (CalibrationTokens(TEXT.input_ids[first::2], None, {}) for first in (0, 1))
    for one, own, other in zip(models, (even, odd), (odd, even), strict=True):
        first = reconstruct(Session(one, anatomy, own, dense=dense), keep, Reconstruction(0.2, 3, "float32"))
        task = Task(Session(one, anatomy, other), keep, Estimation(3, "float32"))
        records.append((first, set_gates(task, gate_steps, damping, width) if gate_steps else None))

    found = run(session_of(model, dense, anatomy, gate_steps=gate_steps, gate_damping=damping), keep)

    halves = [one.state_dict() for one in models]
    for name, tensor in model.state_dict().items():
        first, second = (half[name] for half in halves)
        torch.testing.assert_close(tensor, (first + second) / 2 if first.is_floating_point() else first)
    assert not all(torch.equal(tensor, halves[1][name]) for name, tensor in halves[0].items())
    errors, scales = zip(*((record.relative_error, record.scale) for record, _ in records), strict=True)
    assert found["reconstruction"]["error of the stream"] == pytest.approx(sum(errors) / 2)
    assert found["reconstruction"]["scale of predictions"] == pytest.approx(sum(scales) / 2)
    if not gate_steps:
        assert "gates" not in found
        return
    figures = {
        "first_loss": "loss before them",
        "last_loss": "loss after",
        "largest_change": "largest change of a gate",
        "damping": "damping of gates",
    }
    for name, figure in figures.items():
        expected = sum(getattr(record, name) for _, record in records) / 2
        assert found["gates"][figure] == pytest.approx(expected)
    assert found["gates"]["number of gates"] == records[0][1].gates


def test_a_mean_of_bfloat16_is_rounded_once():
    first, _, anatomy, _ = pruned("llama")
    work = OtherWeights(first.bfloat16(), anatomy)
    names = [f"{name}.{kind}" for name, layer in anatomy.layers.items() for kind in ("core.weight", "weight")]
    before = {name: tensor.clone() for name, tensor in first.named_parameters() if name in names}
    assert before
    other = {name: torch.randn_like(tensor) for name, tensor in before.items()}
    for name, tensor in other.items():
        first.get_parameter(name).data.copy_(tensor)
    work.take_mean()
    for name, tensor in before.items():
        expected = ((tensor.double() + other[name].double()) / 2).bfloat16()
        assert torch.equal(first.get_parameter(name), expected)


@pytest.mark.parametrize("copies", [0, 2])
def test_halves_have_the_copies_of_their_sequences_and_do_not_depend_on_processes(copies, monkeypatch):
    """By what reconstruction and gates are given, in one process and in each of three."""
    model, dense, anatomy, keep = pruned("llama")
    seen = {"reconstruct": [], "set_gates": []}

    def reconstructed(_session, _keep, _how, given, *, text, **_rest):
        seen["reconstruct"].append((given, text))
        return Reconstructed(0.1, 1.0)

    def gated_by(task, *_rest):
        seen["set_gates"].append(task.tokens)
        return SetGates(1, 1, 1.0, 1.0, 0.0, 1.0)

    monkeypatch.setattr(reconstruction_stage, "reconstruct", reconstructed)
    monkeypatch.setattr(gates_stage, "set_gates", gated_by)

    def given_to(text, processes):
        for calls in seen.values():
            calls.clear()
        options = {"reconstruction_copies": copies, "reconstruction_share": 1.0}
        run(session_of(model, dense, anatomy, text, processes, **options), keep)
        return [(rows.input_ids, n) for rows, n in seen["reconstruct"]], [rows.input_ids for rows in seen["set_gates"]]

    fitted, gated = given_to(TEXT, ALONE)
    assert torch.equal(gated[0], TEXT.input_ids[1::2])
    assert torch.equal(gated[1], TEXT.input_ids[::2])
    for (ids, n), own in zip(fitted, reversed(gated), strict=True):
        assert n == 4
        assert torch.equal(ids[:4], own)
        # A copy begins as its sequence does, and goes on differently.
        assert torch.equal(ids[:, 0], own[:, 0].repeat(copies + 1))
        assert not any(torch.equal(copy, own) for copy in ids.split(4)[1:])
    shares = [given_to(TEXT, of) for of in (Processes(rank, 3) for rank in range(3))]
    for half in range(2):
        assert rows_of(gated[half]) == rows_of(*(share[1][half] for share in shares))
        assert rows_of(fitted[half][0]) == rows_of(*(share[0][half][0] for share in shares))


def rows_of(*parts):
    return sorted(tuple(row) for ids in parts for row in ids.tolist())


def test_padding_goes_with_its_sequence(monkeypatch):
    mask = torch.rand(8, 16, generator=torch.Generator().manual_seed(0)) < 0.7
    model, dense, anatomy, keep = pruned("llama")
    seen = []

    def gated_by(task, *_rest):
        seen.append(task.tokens.attention_mask)
        return SetGates(1, 1, 1.0, 1.0, 0.0, 1.0)

    monkeypatch.setattr(gates_stage, "set_gates", gated_by)
    text = CalibrationTokens(TEXT.input_ids, mask, {})
    run(session_of(model, dense, anatomy, text), keep)
    assert torch.equal(seen[0], mask[1::2])
    assert torch.equal(seen[1], mask[::2])


@pytest.mark.parametrize("copies", [0, 1])
def test_a_run_records_the_means_of_both_halves(copies):
    config = PruneConfig.from_mapping({**RECIPE, "shots": 2, "steps_per_shot": 2, "reconstruction_copies": copies})
    report = prune(build("llama"), tokenizer(), config)
    assert all(shot.stage("gates")["loss after"] <= shot.stage("gates")["loss before them"] for shot in report.shots)
    assert all(shot.seconds_of("reconstruction") > 0 and shot.seconds_of("gates") > 0 for shot in report.shots)
    assert all(0 < shot.stage("reconstruction")["error of the stream"] < 1 for shot in report.shots)


def test_without_reconstruction_there_is_nothing_to_cross():
    with pytest.raises(ConfigError, match="cross_fit is for reconstruction"):
        PruneConfig.from_mapping({"reconstruction": False, "cross_fit": True, "gate_steps": 2})


def test_one_sequence_has_no_halves():
    with pytest.raises(ConfigError, match="samples has to be at least 2"):
        PruneConfig.from_mapping({**RECIPE, "samples": 1})

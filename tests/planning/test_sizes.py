"""The disk that a run is said to need, against what it writes."""

import pytest

from llm_surgeon import PruneConfig
from llm_surgeon.data.texts import prepare_texts
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.skeleton import skeleton_of
from llm_surgeon.planning.sizes import SMALL_FILES, checkpoint_bytes, disk_bytes, weight_bytes
from llm_surgeon.pruning.checkpoint import tensors_of
from llm_surgeon.refit.stages import with_dense
from llm_surgeon.run.job import Job, run_job
from llm_surgeon.session.session import Session
from tiny import build, tokenizer

SMALL = {
    "preset": "none",
    "samples": 8,
    "seq_len": 16,
    "evaluation": "none",
    "precision": "float32",
    "sparsity": 0.3,
    "shots": 1,
}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("opt", {"structure": "neurons+heads", "round_to": 1, "curvature": "nearest-kronecker"}),
        ("opt", {"structure": "unstructured"}),
        ("llama", {"structure": "2:4", "method": "wanda", "permute": True, "sparsity": 0.5}),
        ("gpt2", {"reconstruction": True}),
    ],
)
def test_a_checkpoint_is_about_as_large_as_expected_and_never_larger(family, options, text_file, tmp_path):
    model = build(family)
    model.save_pretrained(tmp_path / "dense")
    config = PruneConfig.from_mapping({**SMALL, "calibration": str(text_file), **options})
    anatomy = examine(model, family_of(model.config.model_type), config.ignore)
    texts = prepare_texts(tokenizer(), config)
    session = with_dense(Session(model, anatomy, texts.calibration, config))
    state = run_job(Job(session, tokenizer(), texts, "m"))
    tensors = tensors_of(model, anatomy, state, config)
    assert ("parameter/transformer.ln_f.bias" in tensors) == config.reconstruction
    expected = checkpoint_bytes(skeleton_of(str(tmp_path / "dense"), config), config, state.report.shots[0].sparsity)
    assert 0.75 * expected < sum(tensor.nbytes for tensor in tensors.values()) <= expected


def test_three_checkpoints_and_the_exports_so_far_have_to_fit(checkpoint):
    config = PruneConfig(sparsity=0.5, shots=5, export_shots=(2,))
    skeleton = skeleton_of(str(checkpoint), config)

    def held(*shots):
        return sum(checkpoint_bytes(skeleton, config, 0.1 * shot) for shot in shots)

    def exported(*shots):
        return sum(weight_bytes(skeleton, config, 0.1 * shot) + SMALL_FILES for shot in shots)

    assert disk_bytes(skeleton, config) == pytest.approx(exported(2, 5) + held(3, 4, 5), abs=8)
    one = PruneConfig(sparsity=0.5, shots=1)
    assert disk_bytes(skeleton, one) == exported(5) + held(5)

"""Gemma 4: heads of different widths, keys as values, and a factor of the stream behind each block."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from choosing import masked, shrink
from llm_surgeon import PruneConfig, plan, prune_checkpoint
from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.export.save import save_model
from llm_surgeon.export.verify import verify_export
from llm_surgeon.models import examine, family_of
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.testing import check_family
from tiny import build, byte_tokenizer, gemma4, tokenizer, tokens

GEMMA4 = family_of("gemma4_text")
IDS = tokens(3, 12, seed=7)
FORMS = {
    "plain": {"structure": "neurons", "uniform": True, "round_to": 1},
    # Blocks have entries of their own in the configuration already.
    "gaps": {"structure": "neurons", "round_to": 1},
    "rows and columns": {"structure": "rows-columns"},
}


def test_the_entry_is_right():
    check_family(GEMMA4, build("gemma4"))


@pytest.mark.parametrize("name", FORMS)
def test_exports_compute_what_the_masked_model_does(name, tmp_path):
    model, whole = build("gemma4"), build("gemma4")
    anatomy = examine(model, GEMMA4)
    keep = Shapes(PruneConfig.from_mapping({**FORMS[name], "sparsity": 0.3}), anatomy).random_masks(0.3, seed=3)
    expected = masked(whole, anatomy, keep)(IDS).logits
    shrink(model, anatomy, keep)
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    assert save_model(model, tokenizer(), anatomy, keep, tmp_path).kind == ("plain" if name == "plain" else "gaps")
    assert verify_export(model, tmp_path).difference <= 1e-5
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=name != "plain").eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"structure": "neurons", "uniform": True, "round_to": 8, "gate_steps": 1},
        {"structure": "rows-columns"},
        {"method": "wanda", "structure": "2:4", "sparsity": 0.5, "shots": 1},
        {"method": "sparsegpt", "structure": "2:4", "sparsity": 0.5, "shots": 1, "permute": True},
    ],
)
def test_a_run_goes_from_a_checkpoint_to_an_export(options, tmp_path):
    """With resident weights and with streamed ones, in the same order."""
    build("gemma4").save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + int(x) % 26) for x in tokens(60, 16, seed=3).flatten()))
    common = {"preset": "none", "samples": 24, "seq_len": 16, "sparsity": 0.3, "shots": 2, "evaluation": "none"}
    common |= {"precision": "float32", "calibration": str(text), "device": "cpu", "order": "layer-major"}
    config = PruneConfig.from_mapping({**common, **options})
    foreseen = plan(str(tmp_path / "dense"), config)
    results = []
    for weights in ("resident", "streamed"):
        report = prune_checkpoint(
            str(tmp_path / "dense"), tmp_path / weights, config.model_copy(update={"weights": weights})
        )
        assert report.dense_size == foreseen.dense_size
        results.append(load_file(tmp_path / weights / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(results[0][name], tensor) for name, tensor in results[1].items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_kv_shared_layers": 2, "num_hidden_layers": 4}, "keys and values of earlier blocks"),
        ({"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64}, "inputs for each block"),
        ({"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}, "has experts"),
    ],
)
def test_models_with_more_than_the_entry_describes_are_refused(changes, words):
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * (changes.get("num_hidden_layers", 2) // 2)}
    with pytest.raises(UnsupportedModelError, match=words):
        examine(gemma4(**{**kinds, **changes}), GEMMA4)


@pytest.mark.parametrize("structure", ["heads", "values", "neurons+heads"])
def test_heads_are_refused(structure):
    with pytest.raises(ConfigError, match="Gemma4ForCausalLM has no"):
        check_shapes(
            PruneConfig.from_mapping({"structure": structure, "sparsity": 0.2}), examine(build("gemma4"), GEMMA4)
        )

"""Exports of models whose language model is one tower: smaller blocks, and everything beside them as it was."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from choosing import masked, shrink
from llm_surgeon import bench, evaluate, export_as, load, plan, prune_checkpoint
from llm_surgeon.errors import ConfigError, UnsupportedModelError
from llm_surgeon.export.save import save_model
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.loading import load_model
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.recipe.config import PruneConfig
from stored_towers import PROCESSOR, assert_the_other_towers_are_the_same, beside, stored
from tiny import TOWERS, build, byte_tokenizer, tokenizer, tokens
from tiny_towers import image_inputs

towers = pytest.mark.parametrize("family", TOWERS)
QUICK = {"samples": 8, "seq_len": 16, "preset": "none", "evaluation": "none", "device": "cpu", "dampening_g": 0.5}
FORMS = {
    "plain": {"structure": "neurons+heads", "uniform": True, "round_to": 8},
    "gaps": {"structure": "rows-columns"},
    "uneven": {"structure": "neurons+heads", "round_to": 1},
}


def reloaded(directory):
    """The export as transformers alone loads it; its class has to take every tensor."""
    auto = transformers.AutoModelForImageTextToText
    model, found = auto.from_pretrained(
        directory, trust_remote_code=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def text_logits(model):
    with torch.no_grad():
        return model(tokens(2, 12, seed=7), use_cache=False).logits


def image_logits(model):
    with torch.no_grad():
        return model(**image_inputs(model), use_cache=False).logits


def close(actual, expected):
    return float((actual - expected).abs().max()) <= 1e-4 * float(expected.abs().max())


def exported(family, source, out, keep_of):
    """The masked model, the export of the smaller one as it is loaded again, and the form of the export."""
    entry = family_of(build(family).config.model_type)
    whole, smaller = (load_model(str(source), "float32") for _ in range(2))
    anatomy = examine(smaller, entry)
    keep = keep_of(anatomy)
    shrink(smaller, anatomy, keep)
    out.mkdir()
    form = save_model(smaller, tokenizer(), anatomy, keep, out, source)
    return masked(whole, anatomy, keep), reloaded(out), form


@pytest.mark.parametrize("form", FORMS)
@towers
def test_an_export_computes_what_the_masked_model_does_of_text_and_images(family, form, tmp_path):
    source = stored(family, tmp_path / "dense")
    recipe = PruneConfig.from_mapping({**FORMS[form], "sparsity": 0.4})
    whole, export, found = exported(
        family, source, tmp_path / "out", lambda anatomy: Shapes(recipe, anatomy).random_masks(0.4, seed=3)
    )
    assert found.plain == (form == "plain")
    assert close(text_logits(export), text_logits(whole))
    assert close(image_logits(export), image_logits(whole))
    assert not close(image_logits(export)[:, 2:], text_logits_of_the_image(export)[:, 2:])
    assert_the_other_towers_are_the_same(source, tmp_path / "out")


def text_logits_of_the_image(model):
    """Logits of the same tokens without the image."""
    with torch.no_grad():
        return model(image_inputs(model)["input_ids"], use_cache=False).logits


@pytest.mark.parametrize("dead", [0, 1])
@towers
def test_a_dead_block_goes_only_where_nothing_is_handed_to_blocks_by_number(family, dead, tmp_path):
    def without_a_block(anatomy):
        keep = anatomy.dense_masks()
        for name, layer in anatomy.layers.items():
            if layer.block == dead:
                keep[name].rows[:] = False
                keep[name].columns[:] = False
        return keep

    whole, export, form = exported(family, stored(family, tmp_path / "dense"), tmp_path / "out", without_a_block)
    # A cache knows its length by blocks with attention, of which Qwen 3.5 has one here.
    stays = family == "qwen3-vl-tower" or (family == "qwen3-5-tower" and dead == 1)
    assert form.blocks == ((0, 1) if stays else (1 - dead,))
    assert form.plain == (not stays)
    assert close(text_logits(export), text_logits(whole))
    assert close(image_logits(export), image_logits(whole))


@pytest.mark.parametrize("emptied", [False, True])
def test_a_tower_with_experts_loses_some_of_them(emptied, tmp_path):
    source = stored("qwen3-5-moe-tower", tmp_path / "dense")
    model = load_model(str(source), "float32")
    anatomy = examine(model, family_of("qwen3_5_moe"))
    recipe = PruneConfig.from_mapping({"structure": "experts", "sparsity": 0.15})
    keep = Shapes(recipe, anatomy).random_masks(0.15, seed=3)
    for name in anatomy.layers if emptied else ():
        if "linear_attn" in name:
            (keep[name].columns if "out_proj" in name else keep[name].rows)[:] = False
    shrink(model, anatomy, keep)
    (tmp_path / "out").mkdir()
    assert save_model(model, tokenizer(), anatomy, keep, tmp_path / "out", source).plain != emptied
    export = reloaded(tmp_path / "out")
    assert {len(block.mlp.gate.weight) for block in export.model.language_model.layers} == {3}
    assert close(text_logits(export), text_logits(model))
    assert close(image_logits(export), image_logits(model))
    assert_the_other_towers_are_the_same(source, tmp_path / "out")


@pytest.mark.parametrize("uniform", [True, False])
def test_a_tower_whose_attention_stays_as_it_is(uniform, tmp_path):
    recipe = PruneConfig.from_mapping({"structure": "neurons", "uniform": uniform, "round_to": 1, "sparsity": 0.3})
    source = stored("gemma4-tower", tmp_path / "dense")
    whole, export, form = exported(
        "gemma4-tower", source, tmp_path / "out", lambda anatomy: Shapes(recipe, anatomy).random_masks(0.3, seed=3)
    )
    assert form.plain == uniform
    assert close(text_logits(export), text_logits(whole))
    assert close(image_logits(export), image_logits(whole))
    assert not close(image_logits(export)[:, 2:], text_logits_of_the_image(export)[:, 2:])
    assert_the_other_towers_are_the_same(source, tmp_path / "out")


@pytest.mark.parametrize("form", ["plain", "gaps"])
@pytest.mark.parametrize("family", ["gemma3-tower", "mistral3-tower", "qwen3-vl-tower"])
def test_a_run_from_checkpoint_to_checkpoint(family, form, text_file, tmp_path):
    source, out = stored(family, tmp_path / "dense", former_names=family == "gemma3-tower"), tmp_path / "out"
    options = {**QUICK, **FORMS[form], "sparsity": 0.4, "calibration": str(text_file)}
    report = prune_checkpoint(str(source), out=out, **options, dtype="float32", precision="float32")
    assert report.export.plain == (form == "plain")
    assert_the_other_towers_are_the_same(source, out)
    for name in (*PROCESSOR, "chat_template.jinja", "tokenizer.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    card = (out / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card
    export = reloaded(out)
    dense = build(family)
    assert type(dense) in type(export).__mro__
    assert image_logits(export).isfinite().all()
    # The package's own commands take it too, without a word on trust.
    assert close(text_logits(load_model(str(out), "float32")), text_logits(export))
    assert evaluate(*load(out), str(text_file), window=16, max_tokens=64).perplexity > 1


def test_a_checkpoint_of_several_files_in_a_run_of_streamed_weights(text_file, tmp_path):
    source, parts, out = stored("mistral3-tower", tmp_path / "dense"), tmp_path / "parts", tmp_path / "out"
    shutil.copytree(source, parts)
    tensors = load_file(parts / "model.safetensors")
    (parts / "model.safetensors").unlink()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        some = {name: tensors[name] for name in tensors if places[name] == place}
        save_file(some, parts / place, metadata={"format": "pt"})
    (parts / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    options = {**QUICK, **FORMS["plain"], "sparsity": 0.4, "calibration": str(text_file), "dtype": "float32"}
    prune_checkpoint(str(parts), out=out, **options, weights="streamed", order="layer-major")
    assert_the_other_towers_are_the_same(source, out)
    assert image_logits(reloaded(out)).isfinite().all()


def test_in_the_type_of_the_checkpoint_nothing_beside_the_blocks_changes(text_file, tmp_path):
    source, out = stored("gemma3-tower", tmp_path / "dense"), tmp_path / "out"
    options = {**QUICK, **FORMS["plain"], "sparsity": 0.4, "calibration": str(text_file)}
    prune_checkpoint(str(source), out=out, **options)
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    same = {name for name in before if ".layers." not in name or beside(name)}
    assert same
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in same)


def test_commands_that_prune_nothing_take_such_a_checkpoint(text_file, tmp_path, monkeypatch):
    from llm_surgeon.benchmark import isolated

    monkeypatch.setattr("llm_surgeon.benchmark.measuring.measure_in_process", isolated.measure)
    source = str(stored("gemma3-tower", tmp_path / "dense"))
    foreseen = plan(source, **QUICK, sparsity=0.4, calibration=str(text_file))
    assert foreseen.family == "gemma3"
    assert foreseen.further == ()
    assert evaluate(*load(source), str(text_file), window=16, max_tokens=64).perplexity > 1
    (run,) = bench([source], batches=[1], prompt=6, generate=2, repeats=1).runs
    assert run.timings[0].speed is not None


@pytest.mark.parametrize("form", ["gguf", "nemotron-nas"])
def test_formats_of_language_models_alone_are_refused_before_the_work(form, text_file, tmp_path):
    source = str(stored("mistral3-tower", tmp_path / "dense"))
    options = {**QUICK, **FORMS["plain"], "sparsity": 0.4, "calibration": str(text_file), "formats": [form]}
    with pytest.raises(ConfigError, match="mistral3"):
        prune_checkpoint(source, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    # A tokenizer that the formats could say.
    byte_tokenizer().save_pretrained(source)
    with pytest.raises(ConfigError, match="mistral3"):
        export_as(source, form, out=tmp_path / "other")


def test_an_order_of_the_stream_is_refused_as_other_towers_write_into_it(text_file, tmp_path):
    source = str(stored("qwen3-vl-tower", tmp_path / "dense"))
    options = {"samples": 8, "seq_len": 16, "device": "cpu", "calibration": str(text_file)}
    with pytest.raises(UnsupportedModelError, match=r"other towers write into the residual stream.*permute"):
        plan(source, **options, method="wanda", structure="2:4", permute=True)


def test_a_cap_that_the_class_leaves_out_is_left_out():
    """Gemma 3 caps the logits of the language model alone, and not those of the model for images."""
    from llm_surgeon.testing import check_family
    from tiny import tower
    from tiny_towers import gemma3

    torch.manual_seed(0)
    model = tower(gemma3, final_logit_softcapping=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_family(family_of("gemma3"), model)

"""Every structure on every family: the export, loaded by a stranger, computes what the masked model computes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from choosing import attentions, feed_forwards, made_up_costs, masked, shrink
from llm_surgeon.errors import ConfigError
from llm_surgeon.export.form import form_of
from llm_surgeon.export.save import save_model
from llm_surgeon.models import examine, family_of
from llm_surgeon.models.modeling_pruned import EmptyAttention, PrunedLinear
from llm_surgeon.pruning.shapes import Shapes, check_shapes
from llm_surgeon.recipe.config import PruneConfig
from tiny import ALONE, build, llama, tokenizer, tokens

families = pytest.mark.parametrize("family", ALONE)

# Name: options, and whether no index is needed at run time.
STRUCTURES = {
    "neurons": ({"structure": "neurons", "sparsity": 0.3, "round_to": 4}, True),
    "heads": ({"structure": "heads", "sparsity": 0.2, "min_width": 0.0}, True),
    "neurons+heads": ({"structure": "neurons+heads", "sparsity": 0.5, "round_to": 1}, True),
    "values": ({"structure": "values", "sparsity": 0.1}, False),
    "blocks": ({"structure": "blocks", "sparsity": 0.5}, True),
    "heads+rows-columns": ({"structure": "heads+rows-columns", "sparsity": 0.6}, False),
    "uniform neurons": ({"structure": "neurons", "sparsity": 0.3, "uniform": True, "round_to": 8}, True),
    "uniform neurons+heads": ({"structure": "neurons+heads", "sparsity": 0.4, "uniform": True, "round_to": 8}, True),
    "uniform blocks": ({"structure": "blocks", "sparsity": 0.5, "uniform": True}, True),
}
IDS = tokens(2, 12, seed=7)

# What somebody has who never heard of this package: torch and transformers.
STRANGER = """
import sys
sys.modules["llm_surgeon"] = None
import json, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM
probe, *exports = sys.argv[1:]
ids, results = load_file(probe)["ids"], {}
for export in exports:
    plain = "auto_map" not in json.load(open(export + "/config.json"))
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=not plain).eval()
    with torch.inference_mode():
        first = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=first.past_key_values, use_cache=True)
        results[export] = torch.cat([first.logits, step.logits], dim=1).contiguous()
        # The model without its head, from the same files: serving engines begin with it.
        if plain or "AutoModel" in model.config.auto_map:
            base = AutoModel.from_pretrained(export, trust_remote_code=not plain).eval()
            states = model.base_model(ids).last_hidden_state
            torch.testing.assert_close(base(ids).last_hidden_state, states, rtol=0, atol=0)
        model.generate(ids[:, :4], max_new_tokens=3, do_sample=False)
save_file(results, probe + ".out")
"""


def config(name):
    return PruneConfig.from_mapping(STRUCTURES[name][0])


def random_masks(anatomy, recipe, seed=1):
    """What a recipe leaves if costs are random."""
    generator = torch.Generator().manual_seed(seed)
    structure = Shapes(recipe, anatomy)
    costs = made_up_costs(structure, anatomy, lambda count: torch.rand(count, generator=generator))
    return structure.select(costs, round((1 - recipe.sparsity) * anatomy.prunable_weights)).keep


def possible(name, anatomy):
    """Whether the family's plain class can be built so; everything else is possible with every family."""
    entries = anatomy.family.parts
    free = not any(entry.fixed or entry.refused for entry in entries)
    if any(part in entry.refused for entry in entries for part in config(name).parts):
        return False
    biased = any(layer.bias for layer in anatomy.layers.values())
    return {"uniform neurons+heads": free, "uniform blocks": not biased}.get(name, True)


def expected_kind(name, anatomy, keep):
    """Code that an export needs, by what its structure leaves and by what the family's class can be built with."""
    if name.startswith("uniform"):
        return "plain"
    emptied = any(not mask.weights for mask in keep.values())
    concerned = [entry for entry in anatomy.family.parts if set(entry.structures) & set(name.split("+"))]
    return (
        "per layer"
        if concerned
        and not emptied
        and "rows" not in name
        and "values" not in name
        and not any(entry.fixed for entry in concerned)
        # Blocks that have entries of their own in the dense model get no more of them.
        and "per_layer_config" not in anatomy.settings.to_dict()
        else "gaps"
    )


@families
def test_every_structure_is_loaded_by_a_stranger(family, tmp_path):
    expected = {}
    for name in STRUCTURES:
        model = build(family)
        anatomy = examine(model, family_of(model.config.model_type))
        if not possible(name, anatomy):
            continue
        keep = random_masks(anatomy, config(name))
        reference = masked(build(family), anatomy, keep)
        shrink(model, anatomy, keep)
        with torch.no_grad():
            expected[name] = reference(IDS).logits
            torch.testing.assert_close(model(IDS).logits, expected[name], rtol=1e-4, atol=1e-5)
        indexed = any(isinstance(module, PrunedLinear) for module in model.modules())
        assert not (STRUCTURES[name][1] and indexed)
        form = save_model(model, tokenizer(), anatomy, keep, tmp_path / name.replace(" ", "-"))
        # Where blocks happen to have lost equally much, a plain class is enough.
        assert form.plain or form.kind == expected_kind(name, anatomy, keep)
    places = {name: str(tmp_path / name.replace(" ", "-")) for name in expected}
    save_file({"ids": IDS}, tmp_path / "probe")
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "probe"), *places.values()],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = load_file(tmp_path / "probe.out")
    for name, place in places.items():
        torch.testing.assert_close(results[place], expected[name], rtol=1e-4, atol=1e-4, msg=name)


@families
def test_uniform_exports_say_in_the_configuration_what_they_are(family, tmp_path):
    """No modelling file, the dense model type, and the widths under the names of the class."""
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type))
    keep = random_masks(anatomy, config("uniform neurons"))
    shrink(model, anatomy, keep)
    save_model(model, tokenizer(), anatomy, keep, tmp_path)
    assert not list(tmp_path.glob("*.py"))
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == model.config.model_type
    assert "auto_map" not in written
    neurons = {int(keep[part.output.layer].columns.sum()) for part in feed_forwards(anatomy)}
    assert neurons == {written[feed_forwards(anatomy)[0].entry.width]}
    assert next(iter(neurons)) % 8 == 0


def test_whole_blocks_are_left_out():
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    keep = random_masks(anatomy, config("uniform blocks"))
    form = form_of(anatomy, keep, model.config)
    assert form.plain
    assert len(form.blocks) == 1
    assert form.settings == {"num_hidden_layers": 1}


def test_kinds_of_blocks_stay_with_their_blocks():
    model = build("gemma2")
    anatomy = examine(model, family_of("gemma2"))
    keep = anatomy.dense_masks()
    for layer in anatomy.layers.values():
        if layer.block == 0:
            keep[layer.name].rows.fill_(False)
            keep[layer.name].columns.fill_(False)
    form = form_of(anatomy, keep, model.config)
    assert form.settings == {"num_hidden_layers": 1, "layer_types": ["full_attention"]}


def test_plain_classes_that_tie_heads_to_the_width_refuse_uniform_heads():
    anatomy = examine(build("opt"), family_of("opt"))
    with pytest.raises(ConfigError, match="OPTForCausalLM ties the number of heads to the hidden size"):
        check_shapes(config("uniform neurons+heads"), anatomy)
    with pytest.raises(ConfigError, match="its biases would be left"):
        check_shapes(config("uniform blocks"), anatomy)


def test_ignored_blocks_cannot_stay_equal():
    anatomy = examine(build("llama"), family_of("llama"), ignore=("layers.0.mlp.down_proj",))
    with pytest.raises(ConfigError, match="some blocks are ignored"):
        check_shapes(config("uniform neurons"), anatomy)


def test_targets_out_of_reach_are_refused_with_what_can_be_had():
    anatomy = examine(build("llama"), family_of("llama"))
    recipe = PruneConfig.from_mapping({"structure": "heads", "sparsity": 0.5})
    with pytest.raises(ConfigError, match=r"With heads 2\d\.\d % of the prunable weights can be removed"):
        check_shapes(recipe, anatomy)


def test_attention_keeps_equally_many_query_heads_for_each_key():
    """Where rows and columns leave unequal numbers, dead heads stay; whole groups go."""
    anatomy = examine(llama(num_attention_heads=6, num_key_value_heads=3), family_of("llama"))
    part, keep = attentions(anatomy)[0], anatomy.dense_masks()
    columns = part.output.index
    keep[part.output.layer].columns[columns[0].flatten()] = False
    keep[part.output.layer].columns[columns[1, 0]] = False
    assert part.present_heads(keep).tolist() == [[False, False], [True, True], [True, True]]
    keep[part.output.layer].columns[columns[2, 1]] = False
    assert part.present_heads(keep).tolist() == [[False, False], [False, True], [True, False]]


def test_emptied_attention_keeps_count_of_the_cached_text():
    model = build("llama")
    anatomy = examine(model, family_of("llama"))
    keep = anatomy.dense_masks()
    for name in attentions(anatomy)[0].layers:
        keep[name].rows.fill_(False)
        keep[name].columns.fill_(False)
    shrink(model, anatomy, keep)
    assert isinstance(model.model.layers[0].self_attn, EmptyAttention)
    with torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :-1], use_cache=True)
        assert first.past_key_values.get_seq_length() == IDS.shape[1] - 1
        step = model(IDS[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(step, whole[:, -1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dead", "left", "kind"),
    [
        ({0: True}, (1,), "plain"),
        # Delta nets do not know how long the cached text is.
        ({1: True}, (0, 1), "gaps"),
        ({0: False}, (0, 1), "gaps"),
        ({0: False, 1: False}, (0, 1), "gaps"),
    ],
)
def test_a_model_without_some_delta_nets_or_attention_continues_a_cached_text(dead, left, kind, tmp_path):
    """Dead are the first parts of some blocks, or (True) their feed-forward parts too."""
    model = build("qwen3-5")
    anatomy = examine(model, family_of("qwen3_5_text"))
    keep = anatomy.dense_masks()
    for part in anatomy.parts:
        if dead.get(part.block, False) or (part.block in dead and part not in feed_forwards(anatomy)):
            for name in part.layers:
                keep[name].rows.fill_(False)
                keep[name].columns.fill_(False)
    reference = masked(build("qwen3-5"), anatomy, keep)
    shrink(model, anatomy, keep)
    form = save_model(model, tokenizer(), anatomy, keep, tmp_path)
    assert (form.blocks, form.kind) == (left, kind)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        whole = reference(IDS).logits
        torch.testing.assert_close(loaded(IDS, use_cache=False).logits, whole, rtol=1e-4, atol=1e-4)
        first = loaded(IDS[:, :-1], use_cache=True)
        step = loaded(IDS[:, -1:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(step, whole[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["neurons+heads", "blocks", "uniform neurons+heads", "heads+rows-columns"])
def test_exports_keep_their_type_and_compile(name, tmp_path):
    """bfloat16 stays bfloat16; the graph of the whole pass is one piece; attention is torch's own."""
    model = build("llama").bfloat16()
    anatomy = examine(model, family_of("llama"))
    keep = random_masks(anatomy, config(name))
    shrink(model, anatomy, keep)
    form = save_model(model, tokenizer(), anatomy, keep, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=not form.plain).eval()
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert loaded.config._attn_implementation == "sdpa"
    with torch.no_grad():
        expected = loaded(IDS, use_cache=False).logits
        torch._dynamo.reset()
        compiled = torch.compile(loaded, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, expected)


def uneven(family, **removed):
    """A model whose first block has lost neurons and, where the class allows it, heads; its anatomy and masks."""
    model = build(family)
    anatomy = examine(model, family_of(model.config.model_type))
    keep = anatomy.dense_masks()
    part = feed_forwards(anatomy)[0]
    for rows in part.inputs:
        keep[rows.layer].rows[rows.index[:7]] = False
    keep[part.output.layer].columns[part.output.index[:7]] = False
    attention = attentions(anatomy)[0]
    free = attention.entry.fixed is None and "heads" not in attention.entry.refused
    if removed.get("heads", True) and free:
        for rows in (attention.query_and_gate, attention.key, attention.value):
            keep[rows.layer].rows[rows.index[0]] = False
        keep[attention.output.layer].columns[attention.output.index[0]] = False
    shrink(model, anatomy, keep)
    return model, anatomy, keep


@families
def test_uneven_widths_are_standard_blocks_of_the_family(family, tmp_path):
    """Serving engines know a family's own blocks and the entry per_layer_config, and no layers of ours."""
    model, anatomy, keep = uneven(family)
    form = save_model(model, tokenizer(), anatomy, keep, tmp_path)
    assert form.kind == "per layer"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    dense = build(family)
    kinds = [(name, type(module)) for name, module in loaded.base_model.named_modules() if name]
    assert kinds == [(name, type(module)) for name, module in dense.base_model.named_modules() if name]
    written = json.loads((tmp_path / "config.json").read_text())
    width = feed_forwards(anatomy)[0].entry.width
    dense_width = len(feed_forwards(anatomy)[0].output.index)
    assert [written["per_layer_config"][number][width] for number in "01"] == [dense_width - 7, dense_width]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} == set(written["auto_map"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_the_implementation_of_attention_is_chosen_in_all_blocks(tmp_path):
    model, anatomy, keep = uneven("llama")
    save_model(model, tokenizer(), anatomy, keep, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        before = loaded(IDS).logits
        loaded.set_attn_implementation("eager")
        seen = loaded(IDS, output_attentions=True)
    assert [weights.shape[1] for weights in seen.attentions] == [2, 4], "the heads of each block"
    torch.testing.assert_close(seen.logits, before, rtol=1e-4, atol=1e-4)


def test_an_uneven_export_is_saved_and_loaded_again(tmp_path):
    """After fine-tuning, say: the widths stay, and so does the code that builds them."""
    model, anatomy, keep = uneven("llama")
    save_model(model, tokenizer(), anatomy, keep, tmp_path / "first")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True).eval()
    loaded.save_pretrained(tmp_path / "second")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "second", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)


def test_heads_that_the_class_refuses_for_all_blocks_are_said_block_by_block(tmp_path):
    """Llama's configuration wants a width that the number of heads divides, though heads have a width of their own."""
    model = llama(num_attention_heads=5, num_key_value_heads=5, hidden_size=20, num_hidden_layers=2)
    anatomy = examine(model, family_of("llama"))
    keep = anatomy.dense_masks()
    for part in attentions(anatomy):
        for rows in (part.query, part.key, part.value):
            keep[rows.layer].rows[rows.index[:2]] = False
        keep[part.output.layer].columns[part.output.index[:2]] = False
    shrink(model, anatomy, keep)
    form = save_model(model, tokenizer(), anatomy, keep, tmp_path)
    assert form.kind == "per layer"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=1e-4, atol=1e-4)

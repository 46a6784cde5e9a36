"""A kind of part that the package does not know, in one file: the short convolutions of LFM2, a real architecture.

Some of its blocks have an attention and others a gated convolution over the last tokens in its place. The part is
written as people would write it, and goes through the whole run: plan, pruning, export, reload by a stranger.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from llm_surgeon import Attention, Family, FeedForward, PruneConfig, Residual, plan, prune_checkpoint, register_family
from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.mathematics.keep_masks import Coupling
from llm_surgeon.models import FAMILIES, examine
from llm_surgeon.models.parts import Part, PartEntry, Rows, channels_in, columns_of, has_module, rows_of
from llm_surgeon.testing import check_family
from models.part_contract import PartContract
from tiny import VOCABULARY, tokenizer


@dataclass(frozen=True)
class ShortConvolution(PartEntry):
    """``out(C * conv(B * x))``, where one layer makes B, C and x of the stream, and each channel has its own filter."""

    structures: ClassVar[tuple[str, ...]] = ("values",)

    module: str = "conv"

    @property
    def input_groups(self):
        return (f"{self.module}.in_proj",), (f"{self.module}.out_proj",)

    @property
    def readers(self):
        return (f"{self.module}.in_proj",)

    @property
    def writers(self):
        return (f"{self.module}.out_proj",)

    @property
    def inside(self):
        return (f"{self.module}.conv",)

    def check(self, config, model_type):
        if config.conv_bias:
            raise UnsupportedModelError("A convolution with biases keeps dead channels alive.", "Set conv_bias=False.")

    def locate(self, config, block, number, prefix):
        if not has_module(block, f"{self.module}.in_proj"):
            return None
        width = channels_in(block, f"{self.module}.out_proj")
        gates = Rows(f"{prefix}{self.module}.in_proj", torch.arange(3 * width).view(3, width))
        output = Rows(f"{prefix}{self.module}.out_proj", torch.arange(width))
        return ShortConvolutionPart(self, number, prefix, gates, output)


@dataclass(frozen=True)
class ShortConvolutionPart(Part):
    entry: ShortConvolution
    block: int
    prefix: str
    gates_and_value: Rows
    output: Rows

    def couplings(self):
        for kind, structure, shape in (("channel", "values", (-1, 1)), ("convolution", "blocks", (1, -1))):
            inputs = (rows_of(self.gates_and_value, index.view(shape)) for index in self.gates_and_value.index)
            yield Coupling(kind, (columns_of(self.output, self.output.index.view(shape)), *inputs), structure=structure)


ATTENTION = Attention(
    module="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    rotary=True,
    head_norms=("self_attn.q_layernorm", "self_attn.k_layernorm"),
    counts=(("num_key_value_groups", "shared"),),
)
LFM2 = Family(
    model_type="lfm2",
    model_class="Lfm2ForCausalLM",
    config_class="Lfm2Config",
    blocks="model.layers",
    parts=(
        ShortConvolution(),
        ATTENTION,
        FeedForward(inputs=("feed_forward.w1", "feed_forward.w3"), output="feed_forward.w2", activation=None),
    ),
    residual=Residual(
        tokens="model.embed_tokens",
        norms=("operator_norm", "ffn_norm"),
        final_norm="model.embedding_norm",
    ),
)


def build(**changes):
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 24,
        "intermediate_size": 40,
        "block_auto_adjust_ff_dim": False,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(0)
    return Lfm2ForCausalLM(Lfm2Config(**{**settings, **changes})).eval()


@pytest.fixture
def registered():
    register_family(LFM2)
    yield
    FAMILIES.pop("lfm2")


@pytest.fixture
def dense(tmp_path, registered):
    build().save_pretrained(tmp_path / "dense")
    tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


class TestShortConvolution(PartContract):
    family, entry, build = LFM2, LFM2.parts[0], staticmethod(build)


class TestAttentionOfSomeBlocks(PartContract):
    family, entry, build = LFM2, LFM2.parts[1], staticmethod(build)


def test_the_family_passes_all_checks():
    check_family(LFM2, build())


def test_a_wrong_coupling_of_the_part_is_found():
    """With a filter's bias the input of a dead channel is not nothing; the entry says so, and is right."""

    class Careless(ShortConvolution):
        def check(self, config, model_type):
            return

    biased = build(conv_bias=True)
    with pytest.raises(UnsupportedModelError, match="A convolution with biases"):
        examine(biased, LFM2)
    with pytest.raises(UnsupportedModelError, match=r"what is said to be dead has an effect .*channel"):
        check_family(replace(LFM2, parts=(Careless(), *LFM2.parts[1:])), biased)


RECIPES = {
    "its own channels": {"structure": "values", "sparsity": 0.2, "min_width": 0.0, "preset": "none"},
    "all that is refitted": {"structure": "rows-columns", "sparsity": 0.4, "preset": "best", "order": "layer-major"},
    "neurons": {"structure": "neurons", "uniform": True, "round_to": 4, "sparsity": 0.2, "preset": "none"},
    "a pattern": {"method": "wanda", "structure": "2:4", "permute": True, "sparsity": 0.5, "shots": 1},
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_from_the_plan_to_the_reloaded_export(name, dense, text_file, tmp_path):
    shared = {"shots": 2, "samples": 8, "seq_len": 16, "eval_window": 32, "eval_tokens": 256}
    recipe = PruneConfig.from_mapping({**shared, "calibration": str(text_file), **RECIPES[name]})
    foreseen = plan(str(dense), recipe)
    report = prune_checkpoint(str(dense), tmp_path / "out", recipe)
    assert foreseen.dense_size == report.dense_size
    assert report.shots[-1].sparsity == pytest.approx(recipe.sparsity, abs=0.03)
    assert report.export.plain == (name in ("neurons", "a pattern"))
    convolutions = [layer for layer in report.layers if layer.name.endswith("conv.out_proj")]
    assert len(convolutions) == 2
    assert any(layer.columns < 24 for layer in convolutions) != report.export.plain

"""The format nemotron-nas: safetensors and ``block_configs``, for a class in vLLM that builds each block by itself.

vLLM's ``DeciLMForCausalLM`` is a Llama whose blocks may differ in the number of neurons, and may lack attention or
feed-forward part; all have equally many query heads. It is there for models that a search has made uneven (Puzzle,
arXiv:2411.19146). Key/value heads are equal too here, as pruning removes them together with their query heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from llm_surgeon.errors import ConfigError
from llm_surgeon.export.companions import GENERATION_FILE, copy_companions
from llm_surgeon.export.format import Exported, Format
from llm_surgeon.export.save import weight_bytes
from llm_surgeon.export.standard_layers import BlockWidths, block_widths, check_without_gaps, full_matrix, head_width
from llm_surgeon.export.verify import ReloadCheck
from llm_surgeon.export.vllm.verify import PYTHON, verify_in_vllm
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.modeling_text import BLOCK_CONFIGS_FILE, block_configs_text
from llm_surgeon.models.parts import Attention, FeedForward
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.system.files import writing

VERIFIED = "vLLM 0.32.0"
# Families whose blocks are those of vLLM's class.
_FAMILIES = ("llama", "mistral", "qwen2")
# Entries of exports that say in another way what block_configs says.
_OTHER_ENTRIES = ("auto_map", "per_layer_config", "pruned_linears", "pruned_attention", "pruned_attention_emptied")
_ATTENTION_NORM, _FEED_FORWARD_NORM = "input_layernorm", "post_attention_layernorm"
_ALTERNATIVE = "Leave nemotron-nas out of --format: vLLM loads the format hf with its backend for transformers."
# Neurons of a feed-forward part that has none, but whose bias is left.
_PLACEHOLDER = 32


class NemotronNas(Format):
    """A directory that vLLM loads with its own class, whose blocks differ in the number of neurons."""

    name = "nemotron-nas"
    engine = f"vLLM, in this environment or in one whose Python {PYTHON} names"

    def loaders(self, config: PruneConfig, settings: Any) -> tuple[str, ...]:
        """Engines that load the export; see ``Format.loaders``."""
        return (f"vLLM, with its own class DeciLMForCausalLM and --trust-remote-code; verified with {VERIFIED}",)

    def check(self, config: PruneConfig, anatomy: Anatomy, settings: Any) -> None:
        """Refuse what vLLM's class cannot be; see ``Format.check``."""
        _check_family(anatomy.family.model_type, settings)
        parts = set(config.parts)
        if not parts <= {"neurons", "heads", "blocks"}:
            raise ConfigError(
                f"The format {self.name} has no matrices without some of their rows or columns, as "
                f"{config.structure} leaves them.",
                "Use --structure neurons, or leave nemotron-nas out of --format.",
            )
        if "heads" in parts and not config.uniform:
            raise ConfigError(
                f"In the format {self.name} all blocks have equally many heads, and as {config.structure} they lose "
                "them unevenly.",
                f"Use --structure neurons or --uniform, or leave {self.name} out of --format: vLLM loads the format hf "
                "with its backend for transformers.",
            )

    def check_result(self, exported: Exported) -> None:
        """Refuse what vLLM's class cannot be; see ``Format.check_result``."""
        _check_family(exported.family.model_type, exported.model.config)
        check_without_gaps(exported.model, self.name)
        check_heads(block_widths(exported.model, exported.family))

    def loading(self) -> tuple[str, ...]:
        """Lines of Python that load the export in vLLM."""
        return ("from vllm import LLM", "model = LLM({place}, trust_remote_code=True)")

    def write(self, exported: Exported, directory: Path) -> bool:
        """Write the model; see ``Format.write``."""
        self.check_result(exported)
        model = exported.model
        heads = check_heads(block_widths(model, exported.family))
        blocks = blocks_of(exported)
        state = dict(outside(exported))
        for number, block in enumerate(blocks):
            state |= state_of_block(block, exported, heads, number)
        with writing(directory, sum(tensor.nbytes for tensor in state.values())):
            save_torch_state_dict(state, directory)
            if exported.source is None or not copy_companions(exported.source, directory):
                exported.tokenizer.save_pretrained(directory)
            generation = getattr(model, "generation_config", None)
            if generation is not None and not (directory / GENERATION_FILE).exists():
                (directory / GENERATION_FILE).write_text(generation.to_json_string(), encoding="utf8")
            (directory / BLOCK_CONFIGS_FILE).write_text(block_configs_text(), encoding="utf8")
            entries = json.dumps(configuration(exported, blocks, heads), indent=2)
            (directory / "config.json").write_text(f"{entries}\n", encoding="utf8")
        return True

    def verify(self, exported: Exported, directory: Path, plain: bool) -> ReloadCheck | None:
        """Let vLLM load the export, where it is installed; see ``verify_in_vllm``."""
        return verify_in_vllm(exported.model, directory)

    def weight_bytes(self, directory: Path) -> int:
        """Bytes of the safetensors."""
        return weight_bytes(directory)


@dataclass(frozen=True)
class BlockPlan:
    """One block of a model, and the parts of it that are written.

    Attributes:
        number: Number of the block in the model.
        neurons: Neurons of its feed-forward part; 0 if none is written.
        attention: Whether attention is written.
        kind: Entry of the block in ``layer_types`` of the configuration, or None.
    """

    number: int
    neurons: int
    attention: bool
    kind: str | None

    @property
    def gone(self) -> bool:
        """Whether nothing of the block is written."""
        return not self.attention and not self.neurons

    def entry(self, heads: tuple[int, int]) -> dict[str, Any]:
        """Entry of the block in ``block_configs``.

        Args:
            heads: Query heads and key/value heads of every block.
        """
        attention = {"no_op": False, "n_heads_in_group": heads[0] // heads[1]} if self.attention else {"no_op": True}
        neurons = {"no_op": False, "intermediate_size": self.neurons} if self.neurons else {"no_op": True}
        return {"attention": attention, "ffn": neurons}


def check_heads(widths: Sequence[BlockWidths]) -> tuple[int, int]:
    """Query heads and key/value heads that all blocks with attention have.

    Raises:
        ConfigError: If the numbers differ, or no block has attention.
    """
    found = sorted({(block.heads, block.kv_heads) for block in widths if block.heads})
    if len(found) == 1:
        return found[0]
    if not found:
        raise ConfigError("No block of the model has attention, and vLLM wants one.", "Prune less.")
    raise ConfigError(
        "In the format nemotron-nas all blocks have equally many heads, and the model's have "
        f"{', '.join(f'{query}/{kv}' for query, kv in found)} query and key/value heads.",
        f"Prune with --structure neurons or --uniform. {_ALTERNATIVE}",
    )


def blocks_of(exported: Exported) -> list[BlockPlan]:
    """Blocks that are written. A part without weights is left out, unless a bias is left of it.

    vLLM's class cannot begin with a block that has a feed-forward part alone; the attention there is written as zeros.
    """
    kinds = getattr(exported.model.config, "layer_types", None) or ()
    plans = []
    for number, widths in enumerate(block_widths(exported.model, exported.family)):
        of_attention, of_neurons = (_output(exported, number, kind) for kind in (Attention, FeedForward))
        neurons = widths.neurons or (_PLACEHOLDER if of_neurons[1] is not None else 0)
        attention = bool(widths.heads) or of_attention[1] is not None
        plan = BlockPlan(number, neurons, attention, kinds[number] if kinds else None)
        plans += [] if plan.gone else [plan]
    return [replace(plan, attention=True) if place == 0 else plan for place, plan in enumerate(plans)]


def _output(exported: Exported, number: int, kind: type) -> tuple[Tensor | None, Tensor | None]:
    """Matrix and bias of the layer that a part of a block ends in."""
    entry = next(entry for entry in exported.family.parts if isinstance(entry, kind))
    name = f"{exported.family.blocks}.{number}.{entry.writers[0]}"
    return full_matrix(exported.model.get_submodule(name))


def outside(exported: Exported) -> Iterator[tuple[str, Tensor]]:
    """Weights outside the blocks, by their names; a head that is tied to the embedding is not among them."""
    tied = {"lm_head.weight"} if exported.model.config.tie_word_embeddings else set()
    for name, tensor in exported.model.state_dict().items():
        if not name.startswith(f"{exported.family.blocks}.") and name not in tied:
            yield name, tensor.detach()


def state_of_block(block: BlockPlan, exported: Exported, heads: tuple[int, int], number: int) -> dict[str, Tensor]:
    """Weights of a block under their names in the file, where it is block ``number``.

    Args:
        block: The block.
        exported: The model.
        heads: Query heads and key/value heads of every block.
        number: Number of the block in the file.
    """
    module = exported.model.get_submodule(f"{exported.family.blocks}.{block.number}")
    width, hidden = head_width(exported.model.config), exported.model.config.hidden_size
    queries, keys = heads[0] * width, heads[1] * width
    biased = getattr(exported.model.config, "attention_bias", False)
    # Rows, columns, and whether the class has a bias there.
    names: dict[str, tuple[int, int, bool]] = {}
    for entry in exported.family.parts:
        if isinstance(entry, Attention) and block.attention:
            of_readers = biased or exported.family.model_type == "qwen2"
            names[entry.query] = queries, hidden, of_readers
            names |= dict.fromkeys((entry.key, entry.value), (keys, hidden, of_readers))
            names[entry.output] = hidden, queries, biased
        elif isinstance(entry, FeedForward) and block.neurons:
            biases = getattr(exported.model.config, "mlp_bias", False)
            names |= dict.fromkeys(entry.inputs, (block.neurons, hidden, biases))
            names[entry.output] = hidden, block.neurons, biases
    found: dict[str, Tensor] = {}
    for written, norm in ((block.attention, _ATTENTION_NORM), (block.neurons, _FEED_FORWARD_NORM)):
        found |= {f"{norm}.weight": module.get_parameter(f"{norm}.weight").detach()} if written else {}
    zeros = next(iter(found.values())).new_zeros
    for name, (rows, columns, bias) in names.items():
        # Of a part without weights, zeros are written.
        weight, added = full_matrix(module.get_submodule(name))
        found[f"{name}.weight"] = zeros(rows, columns) if weight is None else weight
        if bias:
            found[f"{name}.bias"] = zeros(rows) if added is None else added
    return {f"{exported.family.blocks}.{number}.{name}": tensor.contiguous() for name, tensor in found.items()}


def configuration(exported: Exported, blocks: Sequence[BlockPlan], heads: tuple[int, int]) -> dict[str, Any]:
    """The file config.json.

    Args:
        exported: The model.
        blocks: Blocks that are written.
        heads: Query heads and key/value heads of every block.
    """
    settings = exported.model.config
    entries = {name: value for name, value in settings.to_dict().items() if name not in _OTHER_ENTRIES}
    kinds = {"layer_types": [block.kind for block in blocks]} if "layer_types" in entries else {}
    return {
        **entries,
        **kinds,
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{Path(BLOCK_CONFIGS_FILE).stem}.BlockConfigsConfig"},
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": head_width(settings),
        "intermediate_size": max((block.neurons for block in blocks), default=_PLACEHOLDER) or _PLACEHOLDER,
        # Qwen 2 has biases on queries, keys and values alone; Llama has them everywhere or nowhere.
        **(
            {"qkv_bias": True, "attention_bias": False, "mlp_bias": False}
            if exported.family.model_type == "qwen2"
            else {}
        ),
        "block_configs": [block.entry(heads) for block in blocks],
    }


def _check_family(model_type: str, settings: Any) -> None:
    """Check that the blocks of a dense model are those of vLLM's class.

    Raises:
        ConfigError: If they are not.
    """
    if model_type not in _FAMILIES:
        *others, last = _FAMILIES
        raise ConfigError(
            f"The format nemotron-nas is for the blocks of {', '.join(others)} and {last}, not for {model_type}.",
            _ALTERNATIVE,
        )
    windows = "sliding_attention" in (getattr(settings, "layer_types", None) or ())
    if windows or (model_type == "mistral" and settings.sliding_window is not None):
        raise ConfigError("vLLM's class DeciLMForCausalLM has no sliding windows, and the model has.", _ALTERNATIVE)
    if settings.hidden_act != "silu":
        raise ConfigError(
            f"vLLM's class DeciLMForCausalLM has the activation silu, and the model has {settings.hidden_act}.",
            _ALTERNATIVE,
        )

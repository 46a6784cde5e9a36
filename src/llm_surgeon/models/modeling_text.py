"""Text of the modelling file that an export brings along, and the entries of its configuration that name the file."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Literal

from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from llm_surgeon.models.family import Family

MODELING_FILE = "modeling_pruned.py"
# What the format nemotron-nas brings along in a directory of its own.
BLOCK_CONFIGS_FILE = "configuration_block_configs.py"

# Forms of an export that need a modelling file, and the module of this package whose text the file begins with.
Brought = Literal["per layer", "gaps"]
_COMMON: dict[Brought, str] = {"per layer": "modeling_per_layer.py", "gaps": "modeling_pruned.py"}

# The rest of the file: the classes of one family, subclasses of transformers' own.
_GAPS = Template('''

from transformers import $config_class, $model_class  # noqa: E402


class Pruned$config_class($config_class):
    """The dense model's configuration, with the shapes of the pruned layers and the heads that are left."""

    model_type = "$model_type"


class Pruned$model_class($model_class):
    """transformers' own model with smaller layers."""

    config_class = Pruned$config_class

    def __init__(self, config: Pruned$config_class) -> None:
        super().__init__(config)
        prune(self, $settings)
''')
_PER_LAYER = Template('''

from transformers import $config_class, $base_class, $model_class  # noqa: E402


class Pruned$config_class($config_class):
    """The dense model's configuration, with the widths of each block."""

    model_type = "$model_type"
    # The entries of the model as a whole are those of the dense model.
    allow_global_per_layer_attribute_access = True


class Pruned$base_class(OwnWidths, $base_class):
    """transformers' own blocks, each with its own widths, without the head for tokens."""

    config_class = Pruned$config_class

    def __init__(self, config: Pruned$config_class) -> None:
        with as_one(config):
            super().__init__(config)
        narrow_blocks(self.get_submodule("$blocks"), config)
        self.post_init()


class Pruned$model_class(OwnWidths, $model_class):
    """transformers' own model, its blocks each with their own widths."""

    config_class = Pruned$config_class

    def __init__(self, config: Pruned$config_class) -> None:
        with as_one(config):
            super().__init__(config)
        narrow_blocks(self.base_model.get_submodule("$blocks"), config)
        self.post_init()
''')


def modeling_text(family: Family, form: Brought = "gaps") -> str:
    """Text of the self-contained modelling file of an export.

    Args:
        family: Entry of the architecture.
        form: Form of the export.
    """
    common = (Path(__file__).parent / _COMMON[form]).read_text(encoding="utf8")
    names = {
        "config_class": family.config_class,
        "model_class": family.model_class,
        "base_class": base_class(family),
        "model_type": export_type(family),
        # The first name of the path is that of the model without its head.
        "blocks": family.blocks.partition(".")[2],
        "settings": "config" if family.text_config is None else f"config.{family.text_config}",
    }
    if form == "per layer":
        return common + _PER_LAYER.substitute(names)
    return common + _GAPS.substitute(names)


def block_configs_text() -> str:
    """Text of the file with the configuration that has ``block_configs``."""
    return (Path(__file__).parent / BLOCK_CONFIGS_FILE).read_text(encoding="utf8")


def base_class(family: Family) -> str | None:
    """Name of the class in transformers that computes the hidden states; None if it is not known by the model type."""
    name = MODEL_MAPPING_NAMES.get(family.model_type)
    return name if isinstance(name, str) else None


def export_type(family: Family) -> str:
    """Type of an export for its ``model_type``: a type of its own, so that no loader takes it for a dense model."""
    return f"llm_surgeon_{family.model_type}"


def auto_map(family: Family, form: Brought) -> dict[str, str]:
    """Entry ``auto_map`` of an export's configuration: the classes of the modelling file that load it.

    The model without its head is named where its blocks are standard ones. vLLM begins with that model, and does not
    load the indices of layers that skip channels: it would compute something else without a word.

    Args:
        family: Entry of the architecture.
        form: Form of the export.
    """
    module = Path(MODELING_FILE).stem
    names = {"AutoConfig": family.config_class, family.auto_class: family.model_class}
    if form == "per layer":
        names["AutoModel"] = f"{base_class(family)}"
    return {name: f"{module}.Pruned{value}" for name, value in names.items()}

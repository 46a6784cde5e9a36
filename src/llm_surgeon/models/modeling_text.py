"""Text of the modelling file that an export brings along, and the entries of its configuration that name the file."""

from __future__ import annotations

from pathlib import Path
from string import Template

from llm_surgeon.models.family import Family

MODELING_FILE = "modeling_pruned.py"


# What the export adds to the common modelling text: the classes of one family, subclasses of transformers' own.
_FAMILY_CLASSES = Template('''

from transformers import $config_class, $model_class  # noqa: E402


class Pruned$config_class($config_class):
    """The dense model's configuration, with the shapes of the pruned layers and the heads that are left."""

    model_type = "$model_type"


class Pruned$model_class($model_class):
    """transformers' own model with smaller layers."""

    config_class = Pruned$config_class

    def __init__(self, config: Pruned$config_class) -> None:
        super().__init__(config)
        shrink_linears(self, config.pruned_linears)
        narrow_attention(self, config.pruned_attention, config.pruned_attention_output)
        drop_empty_linears(self, config.pruned_linears)
''')


def modeling_text(family: Family) -> str:
    """Text of the self-contained modelling file of an export."""
    common = (Path(__file__).parent / MODELING_FILE).read_text(encoding="utf8")
    classes = _FAMILY_CLASSES.substitute(
        config_class=family.config_class, model_class=family.model_class, model_type=export_type(family)
    )
    return common + classes


def export_type(family: Family) -> str:
    """Type of an export for its ``model_type``: a type of its own, so that no loader takes it for a dense model."""
    return f"llm_surgeon_{family.model_type}"


def auto_map(family: Family) -> dict[str, str]:
    """Entry ``auto_map`` of an export's configuration: the classes of the modelling file that load it."""
    module = Path(MODELING_FILE).stem
    return {
        "AutoConfig": f"{module}.Pruned{family.config_class}",
        "AutoModelForCausalLM": f"{module}.Pruned{family.model_class}",
    }

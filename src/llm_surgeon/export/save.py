"""Writing a pruned model so that plain transformers loads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from string import Template

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.export.form import Form, form_of, renamed
from llm_surgeon.export.place import writing
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.family import Family
from llm_surgeon.selection import KeepMask

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
''')


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    anatomy: Anatomy,
    keep: Mapping[str, KeepMask] | None,
    directory: Path,
) -> Form:
    """Write weights (safetensors), configuration, tokenizer, generation configuration and, if needed, modelling file.

    Args:
        model: The pruned model.
        tokenizer: Its tokenizer.
        anatomy: Its prunable layers.
        keep: Rows and columns that are left of them; None if all are, and the architecture is the dense one.
        directory: Where to write; exists.

    Returns:
        What the export needs to be loaded.

    Raises:
        DiskSpaceError: If the disk is full.
        OutputError: If writing fails for another reason.
    """
    form = form_of(anatomy, keep, model.config)
    with writing(directory, sum(parameter.nbytes for parameter in model.parameters())):
        # The names that a class gives to what it saves are known to its own type only, not to that of an export.
        model.save_pretrained(directory, state_dict=_state(model, anatomy, form), save_original_format=form.plain)
        tokenizer.save_pretrained(directory)
        if keep is not None:
            _write_config(model, anatomy, form, directory)
        if not form.plain:
            (directory / MODELING_FILE).write_text(modeling_text(anatomy.family), encoding="utf8")
    return form


def _state(model: PreTrainedModel, anatomy: Anatomy, form: Form) -> dict[str, Tensor] | None:
    """Parameters under the names and in the layout of the class that will load them; None if they have them."""
    transposed = {f"{name}.weight" for name in anatomy.layers if anatomy.family.transposed and form.plain}
    if len(form.blocks) == anatomy.blocks and not transposed:
        return None
    state = {}
    for name, value in model.state_dict().items():
        if (new := renamed(anatomy, form.blocks, name)) is not None:
            state[new] = value.T.contiguous() if name in transposed else value
    return state


def modeling_text(family: Family) -> str:
    """The self-contained modelling file of an export."""
    common = (Path(__file__).parent / MODELING_FILE).read_text(encoding="utf8")
    classes = _FAMILY_CLASSES.substitute(
        config_class=family.config_class, model_class=family.model_class, model_type=export_type(family)
    )
    return common + classes


def export_type(family: Family) -> str:
    """``model_type`` of an export: its own, so that a loader never takes it for a dense model."""
    return f"llm_surgeon_{family.model_type}"


def auto_map(family: Family) -> dict[str, str]:
    """Which classes of the modelling file transformers is to take."""
    module = Path(MODELING_FILE).stem
    return {
        "AutoConfig": f"{module}.Pruned{family.config_class}",
        "AutoModelForCausalLM": f"{module}.Pruned{family.model_class}",
    }


def _write_config(model: PreTrainedModel, anatomy: Anatomy, form: Form, directory: Path) -> None:
    family, path = anatomy.family, directory / "config.json"
    names = type(model.config).attribute_map
    config = json.loads(path.read_text(encoding="utf8"))
    config |= {names.get(name, name): value for name, value in form.settings.items()}
    if not form.plain:
        config |= {
            "model_type": export_type(family),
            "architectures": [f"Pruned{family.model_class}"],
            "auto_map": auto_map(family),
        }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))

"""Writing of a pruned model as a checkpoint that plain transformers loads.

This module decides no form of its own: see ``form.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.export.companions import GENERATION_FILE, copy_companions
from llm_surgeon.export.form import Form, emptied, form_of, renamed
from llm_surgeon.export.stored import stored_towers
from llm_surgeon.mathematics.keep_masks import KeepMask
from llm_surgeon.models.anatomy import Anatomy
from llm_surgeon.models.modeling_text import MODELING_FILE, auto_map, export_type, modeling_text
from llm_surgeon.models.weights import quietly
from llm_surgeon.system.files import writing


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    anatomy: Anatomy,
    keep: Mapping[str, KeepMask] | None,
    directory: Path,
    source: Path | None = None,
) -> Form:
    """Write weights (safetensors), configuration, tokenizer, generation configuration and, if needed, modelling file.

    The source's files of tokenizer, processor, generation and licence are copied byte for byte. Towers beside the
    language model have the bits of the source's weight files.

    Args:
        model: The pruned model.
        tokenizer: Tokenizer of the model.
        anatomy: Prunable layers of the model.
        keep: Rows and columns that are left of them; None if all are, and the architecture is the dense one.
        directory: Directory to write to, which exists.
        source: Directory of the dense checkpoint; None for a model that comes from none.

    Returns:
        The form of the export, which says what loads it.

    Raises:
        DiskSpaceError: If the disk is full.
        OutputError: If writing fails for another reason.
    """
    form = form_of(anatomy, keep, model.config)
    with writing(directory, sum(parameter.nbytes for parameter in model.parameters())):
        with _writable(model) as aside, quietly():
            # Names in the original format are known to the model's own type only, not to that of an export.
            state = state_of(model, anatomy, form)
            if source is not None and anatomy.family.text_config is not None:
                state = (state or model.state_dict()) | stored_towers(model, anatomy.family, source)
            # A model that was pruned in memory has a method of its own, which comes here.
            type(model).save_pretrained(model, directory, state_dict=state, save_original_format=form.plain)
        generation = getattr(model, "generation_config", None)
        if generation is not None:
            (directory / GENERATION_FILE).write_text(generation.to_json_string(), encoding="utf8")
        copied = source is not None and copy_companions(source, directory)
        if tokenizer is not None and not copied:
            tokenizer.save_pretrained(directory)
        _write_config(model, anatomy, form, directory, aside)
        if form.kind != "plain":
            (directory / MODELING_FILE).write_text(modeling_text(anatomy.family, form.kind), encoding="utf8")
    return form


@contextlib.contextmanager
def _writable(model: PreTrainedModel) -> Iterator[Mapping[str, Any]]:
    """Set settings of generation aside, which transformers might refuse to write; yields those of the configuration."""
    config: Any = model.config
    generation: Any = getattr(model, "generation_config", None)
    declared = {entry.name for entry in dataclasses.fields(config)}
    names = GenerationConfig().to_dict().keys() - declared - {"use_cache"}
    aside = {name: vars(config).pop(name) for name in names if name in vars(config)}
    model.generation_config = GenerationConfig()
    try:
        yield aside
    finally:
        vars(config).update(aside)
        model.generation_config = generation


def state_of(model: PreTrainedModel, anatomy: Anatomy, form: Form) -> dict[str, Tensor] | None:
    """Parameters under the names and in the layout of the class that will load them; None if nothing changes."""
    transposed = {f"{name}.weight" for name in anatomy.layers if anatomy.family.transposed and form.kind != "gaps"}
    empty = emptied(model, anatomy)
    others = [part for part in anatomy.located if part.keeps_form]
    if len(form.blocks) == anatomy.blocks and not transposed and not empty and not others:
        return None
    whole = {name: value for name, value in model.state_dict().items() if not name.startswith(tuple(empty))}
    for part in others:
        whole = part.stored(whole)
    state = {}
    for name, value in whole.items():
        if (new := renamed(anatomy, form.blocks, name)) is not None:
            state[new] = value.T.contiguous() if name in transposed else value
    biases = {f"{name}bias": bias for name, bias in empty.items() if bias is not None}
    return state | {new: bias for name, bias in biases.items() if (new := renamed(anatomy, form.blocks, name))}


def _write_config(
    model: PreTrainedModel, anatomy: Anatomy, form: Form, directory: Path, aside: Mapping[str, Any]
) -> None:
    family, path = anatomy.family, directory / "config.json"
    names = type(family.settings_of(model.config)).attribute_map
    config = json.loads(path.read_text(encoding="utf8"))
    # Code of the dense checkpoint is not part of the export.
    config.pop("auto_map", None)
    config |= aside
    own = config if family.text_config is None else config[family.text_config]
    own |= {names.get(name, name): value for name, value in form.settings.items()}
    if form.kind != "plain":
        config |= {
            "model_type": export_type(family),
            "architectures": [f"Pruned{family.model_class}"],
            "auto_map": auto_map(family, form.kind),
        }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def weight_bytes(directory: Path) -> int:
    """Total bytes of the weight files in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))

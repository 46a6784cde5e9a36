"""Writing of a recovered model: the files of the export it was made of, with other values in the weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm_surgeon.export.companions import copy_companions
from llm_surgeon.export.stored import stored_towers
from llm_surgeon.export.verify import ReloadCheck, verify_export
from llm_surgeon.models.family import Family
from llm_surgeon.models.trust import is_own_export
from llm_surgeon.models.weights import quietly
from llm_surgeon.system.files import PARTIAL, readable_as_others, writing

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# Weights in other forms, which would be those of before.
_LEFT_OUT = (*_WEIGHTS, "*.gguf", "*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack")
_TEMPLATES = "additional_chat_templates"
# Files of a run that a plain export has beside those of any checkpoint.
_REPORTS = ("report.json", "report.html", "README.md", "recipe.yaml", "kept_fraction.png")
_CONFIG = "config.json"


def _copy_files(source: Path, directory: Path, names: tuple[str, ...] = ()) -> None:
    """Copy the files of a directory but for weights, or some of them, and the templates beside them."""
    for path in sorted(source.iterdir()):
        wanted = path.name in names if names else not any(map(path.match, _LEFT_OUT))
        # Of a link the contents are copied: files of a hub's cache are links.
        if path.is_file() and not path.name.startswith(".") and wanted:
            shutil.copyfile(path, directory / path.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, directory / _TEMPLATES, dirs_exist_ok=True)


@torch.no_grad()
def take(model: PreTrainedModel, changed: Iterable[tuple[str, Tensor]]) -> None:
    """Write trained values into a model's parameters, each in the type in which it is stored."""
    parameters = dict(model.named_parameters())
    for name, values in changed:
        parameters[name].copy_(values)


def write_recovered(model: PreTrainedModel, family: Family, source: Path, directory: Path) -> ReloadCheck:
    """Write a recovered model, and load the files in a fresh process.

    Towers beside the language model have the bits of the source's weight files.

    Args:
        model: The model, read from ``source``, with its new values.
        family: Entry of its architecture.
        source: Directory of the export that was trained.
        directory: Directory to write to, which exists.

    Returns:
        How far the logits of the reloaded files are from those of the model.

    Raises:
        DiskSpaceError: If the disk is full.
        OutputError: If writing fails for another reason.
        ExportMismatchError: If the reloaded files compute something else.
    """
    # Code of another checkpoint is not run, here or by those who load the result: its class is transformers' own.
    own, config = is_own_export(source), json.loads((source / _CONFIG).read_text(encoding="utf-8-sig"))
    plain = not own
    with writing(directory, sum(parameter.nbytes for parameter in model.parameters())):
        if own:
            _copy_files(source, directory)
        else:
            copy_companions(source, directory)
            _copy_files(source, directory, _REPORTS)
            config.pop("auto_map", None)
            (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
        # transformers writes a configuration too, and that of the source is the right one.
        with tempfile.TemporaryDirectory(prefix="weights-", suffix=PARTIAL, dir=directory.parent) as aside, quietly():
            towers = stored_towers(model, family, source) if family.text_config is not None else None
            state = None if towers is None else model.state_dict() | towers
            model.save_pretrained(aside, state_dict=state, save_original_format=plain)
            for pattern in _WEIGHTS:
                for path in Path(aside).glob(pattern):
                    shutil.move(path, directory / path.name)
        readable_as_others(directory)
    return verify_export(model, directory, plain)

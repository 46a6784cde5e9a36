"""Writing a pruned model so that plain transformers loads it, beside its place and then into it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_surgeon.errors import DiskSpaceError, OutputError
from llm_surgeon.models.family import Anatomy, Family
from llm_surgeon.models.matrix import layer_shape
from llm_surgeon.selection import KeepMask

MODELING_FILE = "modeling_pruned.py"

# What the export adds to the common modelling text: the classes of one family, subclasses of transformers' own.
_FAMILY_CLASSES = Template('''

from transformers import $config_class, $model_class  # noqa: E402


class Pruned$config_class($config_class):
    """The dense model's configuration, with the shapes of the pruned layers in ``pruned_linears``."""

    model_type = "$model_type"


class Pruned$model_class($model_class):
    """transformers' own model with the layers of ``config.pruned_linears`` replaced by smaller ones."""

    config_class = Pruned$config_class

    def __init__(self, config: Pruned$config_class) -> None:
        super().__init__(config)
        shrink_linears(self, config.pruned_linears)
''')


def check_output(out: Path) -> None:
    """Make sure that the export can go to ``out``.

    Raises:
        OutputError: If it is a file, a directory that is not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        kind = "is not empty" if out.is_dir() else "is a file"
        raise OutputError(f"The output directory {out} {kind}.", "Give a new directory, or remove this one first.")
    parent = _existing_parent(out)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"No directory can be made in {parent}.", "Give an output directory that you may write.")


def check_result_file(out: Path) -> None:
    """Make sure that a file of results can be written, and that none is lost by it.

    Raises:
        OutputError: If there is something of that name, or its directory does not exist or cannot be written.
    """
    if out.exists():
        raise OutputError(f"The file {out} exists.", "Name another one, or remove this one first.")
    parent = out.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"No file can be made in {parent}.", "Name a file in a directory that you may write.")


def check_disk_space(out: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes fit where ``out`` will be.

    Raises:
        DiskSpaceError: If they do not.
    """
    free = shutil.disk_usage(_existing_parent(out)).free
    if free < needed:
        raise DiskSpaceError(
            f"The export needs about {needed / 2**20:.0f} MiB at {out}, and {free / 2**20:.0f} MiB are free.",
            "Free some space, or give an output directory on another disk.",
        )


def _existing_parent(out: Path) -> Path:
    return next(path for path in (out.absolute(), *out.absolute().parents) if path.is_dir())


@contextlib.contextmanager
def directory_in_place(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that becomes ``out`` when the block ends well, and vanishes when it does not.

    Raises:
        OutputError: If the directory cannot be made or moved.
    """
    out = out.absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise OutputError(f"{out.parent} cannot be written: {error.strerror}.", "Give another --out.") from None
    try:
        yield beside
        # mkdtemp makes it private; the result should have the usual rights.
        beside.chmod(0o777 & ~_umask())
        try:
            os.replace(beside, out)  # replaces an empty directory too
        except OSError as error:
            raise OutputError(f"{out} appeared meanwhile: {error.strerror}.", "Give another --out.") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    anatomy: Anatomy,
    keep: Mapping[str, KeepMask] | None,
    directory: Path,
) -> None:
    """Write weights (safetensors), configuration, tokenizer, generation configuration and, if needed, modelling file.

    Args:
        model: The pruned model.
        tokenizer: Its tokenizer.
        anatomy: Its prunable layers.
        keep: Rows and columns that are left of them; None if all are, and the architecture is the dense one.
        directory: Where to write; exists.

    Raises:
        OutputError: If writing fails, a full disk for example.
    """
    try:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        if keep is not None:
            _write_config(anatomy, keep, directory)
            (directory / MODELING_FILE).write_text(modeling_text(anatomy.family), encoding="utf8")
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"The export cannot be written: {error}.", "Free some space, or give an --out on another disk."
        ) from None


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


def _write_config(anatomy: Anatomy, keep: Mapping[str, KeepMask], directory: Path) -> None:
    family, path = anatomy.family, directory / "config.json"
    module = Path(MODELING_FILE).stem
    config = json.loads(path.read_text(encoding="utf8"))
    config |= {
        "model_type": export_type(family),
        "architectures": [f"Pruned{family.model_class}"],
        "auto_map": {
            "AutoConfig": f"{module}.Pruned{family.config_class}",
            "AutoModelForCausalLM": f"{module}.Pruned{family.model_class}",
        },
        "pruned_linears": {name: layer_shape(anatomy, layer, keep[name]) for name, layer in anatomy.layers.items()},
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")


def weight_bytes(directory: Path) -> int:
    """Bytes of the weight files in a directory."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))

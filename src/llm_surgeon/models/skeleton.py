"""Skeleton of a model: its architecture without weights, known from the configuration alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from llm_surgeon.errors import UnsupportedModelError
from llm_surgeon.models import Anatomy, examine, family_of
from llm_surgeon.models.anatomy import straighten
from llm_surgeon.models.classes import auto_model, check_class
from llm_surgeon.models.loading import check_checkpoint, load_config, load_model, model_type_of
from llm_surgeon.models.settings import dtype_of, not_loaded, quantisation_of, stored_dtype
from llm_surgeon.models.streaming import stream
from llm_surgeon.models.trust import has_weights
from llm_surgeon.recipe.config import PruneConfig

# Methods whose checkpoints the package writes in 16 bits, as their makers publish no others.
DEQUANTISED = ("fp8", "mxfp4")


@dataclass(frozen=True)
class Skeleton:
    """A model as its configuration describes it.

    Attributes:
        source: A local directory or a hub id.
        network: The model on the meta device.
        anatomy: Prunable layers of the model.
        stored: Type of the weights in the files, by the configuration.
        dtype: Type in which the recipe loads the weights.
    """

    source: str
    network: PreTrainedModel
    anatomy: Anatomy
    stored: torch.dtype
    dtype: torch.dtype

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        width: int = self.network.config.get_text_config().hidden_size
        return width

    def state_bytes(self, tokens: int) -> int:
        """Bytes of the hidden states of some tokens between blocks; under autocast too they have the weights' type."""
        return tokens * self.hidden_size * self.dtype.itemsize

    @property
    def weight_bytes(self) -> int:
        """Bytes of the loaded weights."""
        return self.parameters * self.dtype.itemsize

    @property
    def converts(self) -> bool:
        """True if loading converts the stored weights to another type, which makes a copy."""
        return self.stored != self.dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of the weight files: counted in a local directory, else computed from the configuration."""
        files = sum(path.stat().st_size for path in Path(self.source).glob("*.safetensors"))
        return files or self.parameters * self.stored.itemsize


def skeleton_of(source: str, config: PruneConfig, *, weights: bool = True) -> Skeleton:
    """Build the skeleton of a model from its configuration, and check that the model is supported.

    In a local directory, the headers of the weight files are compared with the configuration.

    Args:
        source: A local directory or a hub id.
        config: The recipe.
        weights: Whether weights will be read, so that a local directory has to hold them.

    Raises:
        ModelError: If there is no configuration, the weights are not in safetensors, or not those of the model.
        UnsupportedModelError: If there is no entry for the architecture, or the weights are quantised.
        ConfigError: If every layer is ignored.
    """
    family = family_of(model_type_of(source))
    settings = load_config(source, config.trust_remote_code)
    if (how := quantisation_of(settings)) is not None:
        raise quantised(source, how)
    if Path(source).is_dir() and (weights or has_weights(Path(source))):
        check_checkpoint(source, config.trust_remote_code)
    network = _empty(source, settings, config.trust_remote_code)
    check_class(network, family.model_class)
    anatomy = examine(network, family, config.ignore)
    return Skeleton(source, network, anatomy, stored_dtype(source), dtype_of(source, config.dtype))


def quantised(source: str, how: Any) -> UnsupportedModelError:
    """Error for a checkpoint with quantised weights: how they are stored, and where to get others."""
    named = str((how if isinstance(how, Mapping) else vars(how)).get("quant_method") or "")
    method = named.rpartition(".")[2].lower()
    original = "Give the original checkpoint"
    if method in DEQUANTISED:
        original = f"Write it in 16 bits first: llm-surgeon dequantize {source} --out DIR"
    stored = f" ({method})" if method else ""
    return UnsupportedModelError(
        f"The weights of {source!r} are quantised{stored}.", f"{original}; quantise what comes out of it."
    )


def _empty(source: str, settings: Any, trust_remote_code: bool) -> PreTrainedModel:
    """Build a model on the meta device, without memory."""
    try:
        with torch.device("meta"):
            auto = auto_model(settings.model_type)
            network: PreTrainedModel = auto.from_config(settings, trust_remote_code=trust_remote_code)
        return network
    # A configuration may be wrong in any way, and its class may raise any error.
    except Exception as error:
        raise not_loaded(source, "model", error) from None


def loaded(
    skeleton: Skeleton, config: PruneConfig, device: torch.device, *, streamed: bool
) -> tuple[PreTrainedModel, Anatomy]:
    """Load the model of a skeleton with its weights, and describe its prunable layers.

    Args:
        skeleton: Skeleton of the model.
        config: The recipe.
        device: Device on which the model is to run.
        streamed: Whether the weights of its blocks come one block at a time.

    Raises:
        ModelError: If the model cannot be loaded.
        DiskSpaceError: If weights that are to be streamed do not fit on the disk.
    """
    # Weights that keep their stored type are mapped, and not read before they are needed.
    dtype, place = ("auto", torch.device("cpu")) if streamed else (config.dtype, device)
    network = load_model(skeleton.source, dtype, place, config.trust_remote_code)
    anatomy = examine(network, skeleton.anatomy.family, config.ignore)
    if streamed:
        scratch = None if config.scratch is None else Path(config.scratch)
        stream(network, anatomy.family.blocks, device, skeleton.dtype, scratch)
    return network, anatomy


def weightless(skeleton: Skeleton, device: torch.device) -> PreTrainedModel:
    """Build the model of a skeleton anew on a device, without its weights; for use under a ``FakeTensorMode``."""
    settings: Any = skeleton.network.config
    # Some towers draw their weights in a way that looks at these, which such a mode has none of.
    with device, no_init_weights():
        network: PreTrainedModel = auto_model(settings.model_type).from_config(settings, dtype=skeleton.dtype)
    straighten(network, skeleton.anatomy)
    return network

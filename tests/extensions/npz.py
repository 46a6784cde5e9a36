"""A format of one's own: all weights as float32 arrays in one file of NumPy, under the names of the plain model."""

from __future__ import annotations

import copy

import numpy
import torch

from llm_surgeon.errors import ConfigError, ExportMismatchError
from llm_surgeon.export.form import form_of
from llm_surgeon.export.format import Format
from llm_surgeon.export.verify import TOLERANCE, ReloadCheck
from llm_surgeon.models.probe import probe_logits

FILE = "weights.npz"


class Npz(Format):
    """Arrays by name, which a model of the class and with the widths of the result takes; for Llama's layout."""

    name = "npz"

    def loaders(self, config, settings):
        return (f"numpy, and everything that has {settings.model_type} with arrays for its weights",)

    def check(self, config, anatomy, settings):
        if config.parts and not config.uniform:
            raise ConfigError(
                f"The format npz has names for the weights of a plain model only, and as {config.structure} layers "
                "are removed unevenly.",
                "Use --uniform with neurons, heads or blocks, a structure of zeros, or leave npz out of --format.",
            )

    def loading(self):
        return ("import numpy", f"arrays = numpy.load({{place}} + '/{FILE}')")

    def nbytes(self, parameters, dtype):
        return 4 * parameters

    def write(self, exported, directory):
        arrays = {name: weight.detach().float().numpy() for name, weight in exported.model.named_parameters()}
        numpy.savez(directory / FILE, **arrays)
        return True

    def verify(self, exported, directory, plain):
        form = form_of(exported.anatomy, exported.keep, exported.model.config)
        settings = copy.deepcopy(exported.model.config)
        for name, value in form.settings.items():
            setattr(settings, name, value)
        anew = type(exported.model)(settings).to(exported.model.dtype).eval()
        with numpy.load(directory / FILE) as arrays, torch.no_grad():
            for name, weight in anew.named_parameters():
                weight.copy_(torch.from_numpy(arrays[name]))
        expected, found = probe_logits(exported.model), probe_logits(anew)
        difference, scale = float((expected - found).abs().max()), float(expected.abs().max())
        if not difference <= TOLERANCE[exported.model.dtype] * scale:
            raise ExportMismatchError(
                f"The logits of a model with the arrays differ by {difference:.3g}.", "Please report this."
            )
        return ReloadCheck(difference, scale)

    def weight_bytes(self, directory):
        return (directory / FILE).stat().st_size

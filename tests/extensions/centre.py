"""A stage of one's own: each layer, and each norm in a block, is multiplied by one number towards the dense model."""

from __future__ import annotations

import math

import torch

from llm_surgeon.models.anatomy import to_index
from llm_surgeon.models.matrix import core_of
from llm_surgeon.models.modes import arithmetic
from llm_surgeon.passes.head import last_states
from llm_surgeon.passes.hooks import Hooks
from llm_surgeon.passes.operations import model_operations
from llm_surgeon.records import Figure
from llm_surgeon.refit.cross_fit import half_of
from llm_surgeon.refit.stage import Fitted, Stage

NORMS = ("input_layernorm", "post_attention_layernorm")


class Centre(Stage):
    """One number a module, for the least squared difference from the dense model's outputs; for Llama's layout."""

    name = "centre"
    half = "own"
    needs_dense = True
    streams = False

    @classmethod
    def changes(cls, model, anatomy):
        return [f"{name}.weight" for name in places_of(anatomy) if name not in anatomy.layers]

    def work(self, shot, half):
        return 2 * len(places_of(self.session.anatomy)) * self._tokens(half).input_ids.numel()

    def fit(self, shot, half, advance):
        missed = kept = size = 0.0
        for name in places_of(self.session.anatomy):
            product, own, wanted = self.session.processes.total(*self._sums(name, rows_of(shot, name), half, advance))
            scale = product / own if own else 1.0
            _module(self.session.model, self.session.anatomy, name).weight.data.mul_(scale)
            missed += own - 2 * product + wanted
            kept += scale**2 * own - 2 * scale * product + wanted
            size += wanted
        return Fitted(
            (
                Figure(name="error of outputs before", value=_root(missed, size), kind="share"),
                Figure(name="error of outputs after", value=_root(kept, size), kind="share"),
            ),
            "The errors of outputs are relative to those of the dense model, each given the layers before it.",
        )

    def _tokens(self, half):
        return half_of(self.session.own, half, self.session.own.n_samples)

    def _sums(self, name, rows, half, advance):
        """Products of a module's outputs with the dense model's, with themselves, and of the latter with themselves.

        Of the dense model's outputs those are taken that the module still has, ``rows``, or all if that is None.
        """
        sums = torch.zeros(3, dtype=torch.float64)
        for ids, mask in self._tokens(half).batches(self.session.config.sequences_per_pass):
            sums += self._sums_of_batch(name, rows, ids, mask)
            advance(2 * ids.numel())
        return sums.tolist()

    def _sums_of_batch(self, name, rows, ids, mask):
        # A function of its own, so that no outputs of a batch are held while the next one runs.
        own = self._outputs(self.session.model, name, ids, mask)
        wanted = self._outputs(self.session.dense, name, ids, mask)
        wanted = wanted if rows is None else wanted[:, rows]
        return torch.stack([(own * wanted).sum(), own.square().sum(), wanted.square().sum()])

    def _outputs(self, model, name, ids, mask):
        """What a module puts out without its bias, ``[tokens, rows]``."""
        module, seen = _module(model, self.session.anatomy, name), []
        with torch.no_grad(), Hooks() as hooks, arithmetic(self.session.device, self.session.config.precision):
            hooks.positions = torch.arange(ids.numel()) if mask is None else to_index(mask.flatten())
            hooks.on_output(module, seen.append)
            last_states(model, ids, mask)
        (output,) = seen
        bias = getattr(module, "bias", None)
        return output.double() if bias is None else output.double() - bias.double()

    @classmethod
    def trace(cls, tracer, config):
        def prepare(session):
            widest = max(session.anatomy.layers.values(), key=lambda layer: layer.rows)
            rows = tracer.fake(torch.arange(widest.rows))

            def measure(live):
                cls(session)._sums(widest.name, rows, None, lambda _tokens: None)
                return live.peak

            return measure

        return tracer.by_depth(prepare)

    @classmethod
    def operations(cls, skeleton, config, kept, order):
        passes = sum(
            model_operations(skeleton, order, share, backward=False) for share in (*kept, *(1.0 for _ in kept))
        )
        return len(places_of(skeleton.anatomy)) * passes * config.samples * config.seq_len


def places_of(anatomy):
    """The layers with the norms in front of them, in the order of the forward pass."""
    places = []
    for block in range(anatomy.blocks):
        layers = [name for name, layer in anatomy.layers.items() if layer.block == block]
        prefix = f"{anatomy.family.blocks}.{block}."
        for norm, inside in zip(NORMS, ("self_attn", "mlp"), strict=True):
            places += [prefix + norm, *(name for name in layers if f".{inside}." in name)]
    return places


def rows_of(shot, name):
    """The rows that a layer has left; None for a norm, which has all."""
    return to_index(shot.keep[name].rows) if name in shot.keep else None


def _module(model, anatomy, name):
    return core_of(model, anatomy.layers[name]) if name in anatomy.layers else model.get_submodule(name)


def _root(part, whole):
    return math.sqrt(max(0.0, part) / whole)

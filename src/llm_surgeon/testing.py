"""Checks for those who write a family's entry of their own: whether a model of the class is as the entry says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llm_surgeon.errors import SurgeonError, UnsupportedModelError
from llm_surgeon.export.form import form_of
from llm_surgeon.export.save import state_of
from llm_surgeon.mathematics.candidates import bystanders
from llm_surgeon.mathematics.keep_masks import Coupling, KeepMask, Side
from llm_surgeon.mathematics.structured_selection import ALIVE, close
from llm_surgeon.models import Anatomy, Family, examine
from llm_surgeon.models.anatomy import straighten
from llm_surgeon.models.matrix import core_of, cut_out
from llm_surgeon.models.modeling_per_layer import narrow_blocks
from llm_surgeon.models.modeling_pruned import prune
from llm_surgeon.models.modes import frozen
from llm_surgeon.models.parts import MixturePart, Part
from llm_surgeon.models.parts.part import has_module
from llm_surgeon.models.permutation import fold_order, fold_residual
from llm_surgeon.passes.head import Head
from llm_surgeon.pruning.shapes import Shapes
from llm_surgeon.recipe.config import PruneConfig

# Largest difference, and smallest visible one, as fractions of the largest logit.
_SAME, _VISIBLE = 1e-4, 1e-3
_SEQUENCES, _SEQUENCES_OF_MIXTURES, _LENGTH = 3, 32, 12
# Structures of which a recipe can remove equally many from each block, so that plain classes hold what is left.
_UNIFORM = ("neurons", "heads", "experts")
_NAMES = "Correct the names in the entry: see docs/families.md."


def check_family(family: Family, model: PreTrainedModel) -> None:
    """Check a family's entry on a small model, by what the model computes.

    The checks are those that the package's own families pass: the layers are found; what is called dead has no
    effect; the smaller model computes what the one with zeros computes, with fewer neurons or heads, or a part that
    is gone; orders of channels can be folded into the weights; and an export can be rebuilt from its configuration.

    Args:
        family: The entry, registered or not.
        model: A dense model of the family with a few small blocks, of every kind that the family has. It is copied, and
            the copies get random weights: fresh biases of zero and norms of one would hide mistakes.

    Raises:
        UnsupportedModelError: If a check fails; the message says which, and what in the entry to correct.
    """
    _check_names(family, model)
    network = _with_random_weights(model)
    with _explained(family, "does not describe the model", _NAMES):
        anatomy = examine(deepcopy(network), family)
    checks = FamilyChecks(family, network, anatomy)
    checks.check_layers()
    checks.check_sizes()
    checks.check_inputs()
    checks.check_head()
    for coupling in anatomy.couplings:
        checks.check_coupling(coupling)
    checks.check_narrowing()
    checks.check_orders()
    checks.check_rebuilding()


@dataclass(frozen=True)
class FamilyChecks:
    """The checks of one entry, see ``check_family``.

    Attributes:
        family: The entry.
        network: A model with random weights, which no check changes.
        anatomy: Its layers and parts.
    """

    family: Family
    network: PreTrainedModel
    anatomy: Anatomy

    def check_layers(self) -> None:
        """Make sure that the entry names every linear layer of the blocks, once."""
        known = {*self.family.layers, *(name for part in self.family.parts for name in (*part.inside, *part.readers))}
        blocks = f"{self.family.blocks}."
        for name, module in self.network.named_modules():
            within = name.removeprefix(blocks).partition(".")[2]
            if name.startswith(blocks) and isinstance(module, (nn.Linear, Conv1D)):
                if name not in self.anatomy.layers and within not in known:
                    raise self._failure(f"does not name the linear layer {name}", "Name it in one of its parts.")
                if isinstance(module, Conv1D) != self.family.transposed:
                    raise self._failure(
                        f"says that transposed is {self.family.transposed}, and {name} is a {type(module).__name__}",
                        "Correct transposed.",
                    )

    def check_sizes(self) -> None:
        """Make sure that the layers have all rows and columns that the parts couple."""
        there = self.anatomy.dense_masks()
        for coupling in self.anatomy.couplings:
            for side in (*coupling.sides, *coupling.followers):
                size, last = len(there[side.layer].axis(side.axis)), int(side.index.max())
                if last >= size:
                    words = f"couples {side.axis} of {side.layer} up to number {last}, and the layer has {size}"
                    raise self._failure(f"{words} ({coupling.kind})", _NAMES)

    def check_inputs(self) -> None:
        """Make sure that layers which are said to read the same input do."""
        seen: dict[str, Tensor] = {}

        def listen(name: str) -> Any:
            return lambda _module, arguments: seen.__setitem__(name, arguments[0].detach().reshape(-1))

        network = self._copy()
        for name in self.anatomy.layers:
            network.get_submodule(name).register_forward_pre_hook(listen(name))
        self._logits(network, "cannot be run")
        for layer in self.anatomy.layers.values():
            if layer.name not in seen:
                raise self._failure(f"names {layer.name}, which is not called when the model runs", _NAMES)
            if not torch.equal(seen[layer.name], seen[layer.input_group]):
                raise self._failure(
                    f"says that {layer.name} and {layer.input_group} read the same input, and they do not",
                    "Correct the order or the names of the layers of the part.",
                )

    def check_head(self) -> None:
        """Make sure that logits are made of the last hidden states as the package makes them."""
        network = self._copy()
        with torch.no_grad(), frozen(network):
            states = network.base_model(input_ids=self._tokens).last_hidden_state
            ours = Head(network)(states)
        self._compare(ours, self._dense, "head", "makes other logits of the last hidden states than its head does", "")

    def check_coupling(self, coupling: Coupling) -> None:
        """Make sure that once a side of a group is dead, the rest of the group has no effect, for half of the groups.

        Args:
            coupling: One of the model's couplings.
        """
        count = len(coupling.sides[0].index)
        groups = torch.randperm(count, generator=_generator())[: -(-count // 2)]
        for side in coupling.sides:
            only = self.anatomy.dense_masks()
            _remove(only, side, groups)
            what = f"{coupling.kind} ({side.axis} of {side.layer})"
            one = self._logits(self.masked(only), f"without {what} cannot be run")
            if _difference(one, self._dense) <= _VISIBLE * float(self._dense.abs().max()):
                raise self._failure(f"names {what}, and without it the model computes the same", _NAMES)
            all_dead = self._logits(self.masked(self.implied(only)), f"without {what} cannot be run")
            self._compare(
                all_dead,
                one,
                coupling.kind,
                f"says that with {what} more is dead, and what is said to be dead has an effect",
                "Correct the names and the layout of the part, or what it couples (rotary, head_norms, activation).",
            )

    def check_narrowing(self) -> None:
        """Make sure that a model with smaller matrices computes what the one with zeros does.

        Rows and columns go at random; then, of each coupling, every second group with all that dies with it.
        """
        for sparsity in (0.3, 0.8):
            self.check_smaller(self._random_masks(sparsity), "rows and columns")
        for coupling in self.anatomy.couplings:
            name = f"{coupling.kind} of {coupling.sides[0].layer}"
            self.check_smaller(self.without_every_second(coupling), name)

    def check_smaller(self, keep: Mapping[str, KeepMask], what: str) -> None:
        """Make sure that a model without what is not kept computes what the one with zeros does.

        Args:
            keep: Rows and columns that are left.
            what: What has been removed, in words.
        """
        remedy = "Correct how its module narrows: for attention the layout, counts and head numbers."
        smaller = self.cut(keep, what)
        actual = self._logits(smaller, f"cannot be run without some of its weights ({what})", remedy)
        expected = self._logits(self.rerouted(keep), "cannot be run with zeros")
        self._compare(actual, expected, what, f"makes another function of a model that is cut ({what})", remedy)

    def check_orders(self) -> None:
        """Make sure that channels inside the parts, and those of the residual stream, may stand in another order."""
        for part in self.anatomy.parts:
            for order in part.orders():
                network = self._copy()
                random = [torch.randperm(order.channels, generator=_generator()) for _ in range(order.sets)]
                fold_order(network, order, torch.stack(random))
                words = f"says that the order of {order.name} in {order.reader.layer} is free, and it is not"
                self._compare(self._logits(network, "cannot be run"), self._dense, order.name, words, _NAMES)
        # The other towers write into the stream too.
        if self.family.text_config is not None:
            return
        network = self._copy()
        first = self.anatomy.parts[0]
        width = self.anatomy.layers[first.prefix + first.entry.readers[0]].columns
        fold_residual(network, self.family, torch.randperm(width, generator=_generator()))
        self._compare(
            self._logits(network, "cannot be run"),
            self._dense,
            "stream",
            "does not say right what reads and writes the residual stream",
            "Correct residual, and readers and writers of the parts.",
        )

    def check_rebuilding(self) -> None:
        """Make sure that the class with the configuration of an export has its shapes, for each kind of export."""
        self.check_export(self._random_masks(0.5))
        for entry in self.family.parts:
            parts = [part for part in self.anatomy.parts if part.entry == entry]
            for kind in self._removable(parts):
                keep = self._without_half(parts, kind)
                if entry.fixed is None and not form_of(self.anatomy, keep, self.network.config).plain:
                    raise self._failure(
                        f"has no entries of the configuration for fewer of the same {kind} in all blocks",
                        "Add them to the part's sizes, or say why it is fixed (free_heads).",
                    )
                self.check_export(keep)

    def _removable(self, parts: Sequence[Part]) -> list[str]:
        """Kinds of couplings of which a uniform structure removes some groups of a part, and leaves others."""
        refused = {structure for entry in self.family.parts for structure in entry.refused}
        couplings = [c for part in parts[:1] for c in part.couplings() if c.structure in {*_UNIFORM} - refused]
        groups = {kind: sum(len(c.sides[0].index) for c in couplings if c.kind == kind) for kind in _kinds(couplings)}
        return [kind for kind, count in groups.items() if count > 1]

    def _without_half(self, parts: Sequence[Part], kind: str) -> dict[str, KeepMask]:
        """Masks without every second group of a kind in each part, and without all that is dead by implication."""
        keep = self.anatomy.dense_masks()
        for part in parts:
            couplings = [coupling for coupling in part.couplings() if coupling.kind == kind]
            if len(couplings[0].sides[0].index) == 1:
                # Experts are a coupling each.
                couplings = couplings[::2]
            for side in (coupling.sides[0] for coupling in couplings):
                _remove(keep, side, torch.arange(0, len(side.index), 2))
        return self.implied(keep)

    def check_export(self, keep: Mapping[str, KeepMask]) -> None:
        """Make sure that the class rebuilds a smaller model from the settings and the state that are exported.

        Args:
            keep: Rows and columns that are left.
        """
        smaller = self.cut(keep, "an export")
        form = form_of(self.anatomy, keep, self.network.config)
        config = deepcopy(self.network.config)
        own = self.family.settings_of(config)
        for name, value in form.settings.items():
            setattr(own, name, value)
        state = state_of(smaller, self.anatomy, form) or smaller.state_dict()
        remedy = "Correct the configuration entries of the parts (width, counts, free_heads) and transposed."
        with _explained(self.family, f"gives an export with which {self.family.model_class} cannot be built", remedy):
            rebuilt = type(self.network)(config).eval()
            if form.kind == "gaps":
                prune(rebuilt, own)
            elif form.kind == "per layer":
                narrow_blocks(rebuilt.get_submodule(self.family.blocks), config)
            rebuilt.load_state_dict(state)
        words = "gives an export that computes something else than the model"
        actual = self._logits(rebuilt, "gives an export that cannot be run", remedy)
        self._compare(actual, self._logits(smaller, "cannot be run"), "export", words, remedy)

    def implied(self, only: Mapping[str, KeepMask]) -> dict[str, KeepMask]:
        """Masks without what is dead by implication.

        Args:
            only: Masks without some rows or columns; they stay as they are.
        """
        keep = {name: mask.copy() for name, mask in only.items()}
        groups = [bystanders(coupling) for coupling in self.anatomy.couplings]
        close(keep, groups, [torch.full(group.score.shape, ALIVE) for group in groups])
        return keep

    def without_every_second(self, *couplings: Coupling) -> dict[str, KeepMask]:
        """Masks without every second group of some couplings, and without all that is dead by implication."""
        keep = self.anatomy.dense_masks()
        for side in (coupling.sides[0] for coupling in couplings):
            _remove(keep, side, torch.arange(0, len(side.index), 2))
        return self.implied(keep)

    @torch.no_grad()
    def masked(self, keep: Mapping[str, KeepMask]) -> PreTrainedModel:
        """A copy of the model with zeros for rows, biases included, and columns that are not kept."""
        network = self._copy()
        for name, mask in keep.items():
            module = core_of(network, self.anatomy.layers[name])
            module.weight[~mask.rows] = 0
            module.weight[:, ~mask.columns] = 0
            if module.bias is not None:
                module.bias[~mask.rows] = 0
        return network

    def rerouted(self, keep: Mapping[str, KeepMask]) -> PreTrainedModel:
        """A copy of the model with zeros for what is not kept, whose routers choose among the experts that are left."""
        network = self.masked(keep)
        for part in self.anatomy.parts:
            if isinstance(part, MixturePart):
                part.narrow(network, keep)
        return network

    def cut(self, keep: Mapping[str, KeepMask], what: str) -> PreTrainedModel:
        """A copy of the model without what is not kept.

        Args:
            keep: Rows and columns that are left.
            what: What has been removed, in words.
        """
        network = self._copy()
        with _explained(self.family, f"does not allow to cut weights out ({what})", _NAMES):
            cut_out(network, self.anatomy, keep)
        return network

    def _copy(self) -> PreTrainedModel:
        network = deepcopy(self.network)
        straighten(network, self.anatomy)
        return network

    def _random_masks(self, sparsity: float) -> Mapping[str, KeepMask]:
        """Masks after rows and columns went at random, with all that dies with them; or neurons, or experts at last."""
        refused = {structure for entry in self.family.parts for structure in entry.refused}
        structure = next(name for name in ("rows-columns", "neurons", "experts") if name not in refused)
        rounding = {"round_to": 1} if structure == "neurons" else {}
        recipe = PruneConfig.from_mapping({"structure": structure, "sparsity": sparsity, **rounding})
        return Shapes(recipe, self.anatomy).random_masks(sparsity, seed=1)

    @cached_property
    def _tokens(self) -> Tensor:
        settings = self.network.config.get_text_config()
        length = min(_LENGTH, getattr(settings, "max_position_embeddings", None) or _LENGTH)
        mixed = any(isinstance(part, MixturePart) for part in self.anatomy.parts)
        # Every expert has to get tokens.
        count = _SEQUENCES_OF_MIXTURES if mixed else _SEQUENCES
        return torch.randint(settings.vocab_size, (count, length), generator=_generator())

    @cached_property
    def _dense(self) -> Tensor:
        return self._logits(self.network, "cannot be run")

    def _logits(self, network: PreTrainedModel, cause: str, remedy: str = _NAMES) -> Tensor:
        with _explained(self.family, f"is of a model that {cause}", remedy), torch.no_grad(), frozen(network):
            logits: Tensor = network(self._tokens, use_cache=False).logits
        return logits

    def _compare(self, actual: Tensor, expected: Tensor, what: str, cause: str, remedy: str) -> None:
        """Make sure that logits agree up to rounding; a NaN does not."""
        difference, scale = _difference(actual, expected), float(expected.abs().max())
        if not difference <= _SAME * scale:
            raise self._failure(f"{cause} ({what}: logits of up to {scale:.3g} differ by {difference:.3g})", remedy)

    def _failure(self, cause: str, remedy: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"The entry for {self.family.model_type!r} {cause}.", remedy)


def _kinds(couplings: Sequence[Coupling]) -> list[str]:
    """Kinds of couplings, each once."""
    return list(dict.fromkeys(coupling.kind for coupling in couplings))


def _check_names(family: Family, model: PreTrainedModel) -> None:
    """Make sure that a model is of the classes of an entry, and has what the entry names outside its parts."""

    def failure(cause: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"The entry for {family.model_type!r} {cause}.", _NAMES)

    for said, there in (
        (family.model_type, [model.config.model_type]),
        (family.model_class, [kind.__name__ for kind in type(model).__mro__]),
        (family.config_class, [kind.__name__ for kind in type(model.config).__mro__]),
    ):
        if said not in there:
            raise failure(f"says {said}, and the model has {there[0]}")
    if not has_module(model, family.blocks) or not isinstance(model.get_submodule(family.blocks), nn.ModuleList):
        raise failure(f"says that the blocks are {family.blocks}, and the model has no list of modules there")
    if not has_module(model, family.residual.tokens):
        raise failure(f"says that the token embedding is {family.residual.tokens}, and the model has no such module")
    for number in range(len(model.get_submodule(family.blocks))):  # type: ignore[arg-type]
        for name in (f"{family.blocks}.{number}.{norm}" for norm in family.residual.norms):
            if not has_module(model, name):
                raise failure(f"names the norm {name}, and the model has no such module")


@torch.no_grad()
def _with_random_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in float32 in which every parameter is random, so large that every weight has an effect."""
    network = deepcopy(model)
    network.float().eval()
    # The fused attention reads numbers of heads off the shapes, and would hide that an attribute is wrong.
    network.set_attn_implementation("eager")
    generator = _generator()
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(0.3 * noise)
    return network


@contextmanager
def _explained(family: Family, cause: str, remedy: str) -> Iterator[None]:
    """Say what an entry has to do with an error that the code of a model raises."""
    try:
        yield
    except SurgeonError:
        raise
    # What a model's code makes of wrong shapes is not foreseeable.
    except Exception as error:
        said = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
        raise UnsupportedModelError(f"The entry for {family.model_type!r} {cause}: {said}.", remedy) from error


def _remove(keep: Mapping[str, KeepMask], side: Side, groups: Tensor) -> None:
    keep[side.layer].axis(side.axis)[side.index[groups].reshape(-1)] = False


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max())


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)

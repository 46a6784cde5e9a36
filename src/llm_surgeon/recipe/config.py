"""The recipe: one validated, frozen, serialisable description of a run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError, model_validator

from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.recipe import structures
from llm_surgeon.recipe.file import read_mapping
from llm_surgeon.recipe.grouping import flat, grouped
from llm_surgeon.recipe.groups import GROUP_OF
from llm_surgeon.recipe.groups.calibration import Bos, CalibrationOptions
from llm_surgeon.recipe.groups.curvature import CurvatureOptions
from llm_surgeon.recipe.groups.evaluation import EvaluationOptions
from llm_surgeon.recipe.groups.export import ExportOptions
from llm_surgeon.recipe.groups.layerwise import LayerwiseOptions
from llm_surgeon.recipe.groups.lora import LoraOptions
from llm_surgeon.recipe.groups.recovery import RecoveryOptions
from llm_surgeon.recipe.groups.refit import HALVES, RefitOptions
from llm_surgeon.recipe.groups.resources import ResourcesOptions
from llm_surgeon.recipe.groups.selection import TARGETS, SelectionOptions
from llm_surgeon.recipe.methods import (
    CURVATURES,
    LAYERWISE,
    METHODS,
    CurvatureName,
    LayerwiseScope,
    resolve_curvature,
)
from llm_surgeon.recipe.presets import DEFAULT, METHOD, options_of
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.recipe.structures import STRUCTURES, UNSTRUCTURED
from llm_surgeon.recipe.switches import idle_options, why_idle
from llm_surgeon.recipe.wording import refusal, takes_text

# Other packages import these names of the groups' modules from here.
__all__ = ["HALVES", "TARGETS", "Bos", "PruneConfig", "differences", "goes_layerwise", "read_recipe"]


# Pydantic collects the options of the last base first.
class PruneConfig(
    ResourcesOptions,
    ExportOptions,
    EvaluationOptions,
    RecoveryOptions,
    LoraOptions,
    LayerwiseOptions,
    RefitOptions,
    CurvatureOptions,
    CalibrationOptions,
    SelectionOptions,
):
    """Everything that decides the result of a pruning run.

    The options are in the groups that this class inherits from, with the rules of each group. This class has the rules
    between groups. A function that needs one group only may take that group's type.

    ``sparsity`` counts the weights of the prunable linear layers only, which are the linear layers of the decoder
    blocks, without biases. Embeddings and the output head are not pruned, see ``ignore``.
    """

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_depend(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in flat(values).items() if value is not None}
        given = {"preset": DEFAULT if given.get("method", METHOD) == METHOD else "none"} | given
        given = _of_preset(given) | given
        if goes_layerwise(given):
            given = {"structure": UNSTRUCTURED, "shots": 1} | given
        targets = [name for name in TARGETS if name in given]
        if len([*targets, *(["sparsity"] if "sparsity" in given else [])]) > 1:
            raise ValueError(f"only one of sparsity, {', '.join(TARGETS)} can be given")
        if given.get("weights") == "streamed" and given.get("order", "auto") == "auto":
            given["order"] = "layer-major"
        if structures.uniform_by_default(structures.parts_of(given.get("structure"))):
            given = {"uniform": True} | given
        pattern = Pattern.parse(given.get("structure"))
        return given if pattern is None else {"sparsity": pattern.sparsity} | given

    @model_validator(mode="after")
    def _check_together(self) -> PruneConfig:
        if any(not 1 <= shot <= self.shots for shot in self.export_shots):
            raise ValueError(
                f"export_shots {shown(self.export_shots)} are not all between 1 and {self.shots}, the shots"
            )
        if self.target_latency is not None and (self.device_memory or self.host_memory or self.scratch_space):
            raise ValueError("with target_latency nothing is planned: no device_memory, host_memory or scratch_space")
        self._check_fitting()
        self._check_recovery()
        self._check_switches()
        if self.weights == "streamed":
            self._check_streamed()
        if self.layerwise:
            self._check_layerwise()
        else:
            self._check_global()
        return self

    def _check_switches(self) -> None:
        """Refuse options that have no effect because their switch is off.

        A default value is no mistake, as a resolved recipe has all options.

        Raises:
            ValueError: If there is such an option, with its switch.
        """
        values = vars(self)
        for name in idle_options(values):
            if values[name] != type(self).model_fields[name].default:
                raise ValueError(why_idle(name, values))

    def _check_fitting(self) -> None:
        """Check stages and steps against the structure, the text and the curvature.

        Raises:
            ValueError: If options do not go together, with their names.
        """
        if self.reconstruction and not self.parts:
            raise ValueError(f"reconstruction is for structures that shrink, not for {self.structure}")
        if self.samples < self.parts_of_text:
            raise ValueError(
                "cross_fit halves the calibration sequences: samples has to be at least 2, or cross_fit off"
            )
        if self.steps_per_shot > 1 and not (self.parts and _divisible(self.resolved_curvature)):
            able = ", ".join(name for name, row in CURVATURES.items() if row.divisible)
            raise ValueError(f"steps_per_shot is for structures that shrink and the curvatures {able}")

    def _check_recovery(self) -> None:
        """Check the training after the last shot.

        Raises:
            ValueError: If options do not go together, with their names.
        """
        if self.recover_tokens is None:
            return
        if self.formats != ("hf",):
            raise ValueError(
                "recover_tokens trains the export of formats hf: leave the others out, and write them of what was "
                "trained with `llm-surgeon export`"
            )
        if self.recover_tokens < self.recover_batch_size * self.seq_len:
            raise ValueError(
                f"{self.recover_tokens:,} tokens (recover_tokens) are fewer than one step of "
                f"{self.recover_batch_size} sequences (recover_batch_size) of {self.seq_len:,} tokens (seq_len)"
            )

    def _check_streamed(self) -> None:
        """Refuse options that need all weights where the model runs, if weights are streamed.

        Raises:
            ValueError: If options do not go together, with their names.
        """
        if self.lora:
            raise ValueError("lora trains all blocks together: weights cannot be streamed")
        if self.target_latency is not None:
            raise ValueError("a latency is that of resident weights: with target_latency weights cannot be streamed")

    def _check_global(self) -> None:
        """Refuse options that the curvature of a global method, or no global method, can have.

        Raises:
            ValueError: If options do not go together, with their names.
        """
        curvature = resolve_curvature(self.method, self.curvature)
        row = None if curvature is None else CURVATURES[curvature]
        if row is not None and not row.joint and any(STRUCTURES[part].joint for part in self.parts):
            raise ValueError(f"the {curvature} curvature has no joint costs: structure has to be without whole heads")
        if row is not None and row.structures and not (self.parts and set(self.parts) <= set(row.structures)):
            ranked = "+".join(row.structures)
            raise ValueError(f"{self.method} ranks {ranked} and nothing else: set structure to {ranked}")
        if row is not None and not row.subsets and self.max_correlations:
            raise ValueError(f"the {curvature} curvature updates all together: max_correlations has to be 0")
        if self.gradient_share < 1 and not (row is not None and row.samples_gradients):
            able = ", ".join(name for name, other in CURVATURES.items() if other.samples_gradients)
            raise ValueError(f"gradient_share is for the curvature {able}, not for {curvature or self.method}")
        asked = _layerwise_options(vars(self))
        if asked:
            raise ValueError(
                f"{', '.join(asked)} is for the layer-wise methods ({', '.join(LAYERWISE)}), not for {self.method}"
            )

    def _check_layerwise(self) -> None:
        """Refuse options that no layer-wise method, or not this one, can have.

        Raises:
            ValueError: If options do not go together, with their names.
        """
        pattern, solver = self.pattern, LAYERWISE[self.method].scope is None
        if self.gate_steps:
            raise ValueError(f"gate_steps is for the global methods ({', '.join(METHODS)}), not for {self.method}")
        if self.parts:
            raise ValueError(
                f"{self.method} as a layer-wise method removes single weights: structure is unstructured or N:M"
            )
        if self.curvature is not None:
            resolve_curvature(self.method, self.curvature)
        if self.shots != 1:
            raise ValueError(f"{self.method} goes through the layers once: shots has to be 1 (got {self.shots})")
        if self.order == "batch-major":
            raise ValueError(f"{self.method} goes layer by layer: order cannot be batch-major")
        if pattern is not None and self.sparsity != pattern.sparsity:
            raise ValueError(f"{self.method} with {self.structure} removes {pattern.sparsity:g}: leave sparsity out")
        if pattern is not None and (self.scope or self.layer_budget != "uniform"):
            raise ValueError("N:M compares within its groups and is the same in all layers: no scope, no layer_budget")
        if self.permute and pattern is None:
            raise ValueError("permute is for N:M")
        if solver and (self.scope or self.refine != "none"):
            raise ValueError(f"{self.method} has its own masks and updates: no scope, no refine")
        if self.global_scope and self.layer_budget != "uniform":
            raise ValueError("a global scope gives each layer its own sparsity: no layer_budget")

    def at(self, sparsity: float) -> PruneConfig:
        """The recipe with a sparsity in place of its target."""
        return self.model_validate(
            self.model_dump() | dict.fromkeys(TARGETS) | {"sparsity": min(max(sparsity, 1e-6), 1 - 1e-6)}
        )

    @property
    def layerwise(self) -> bool:
        """Whether the run goes layer by layer; magnitude does if it has an option that only layer-wise methods have."""
        return goes_layerwise(vars(self))

    @property
    def loop(self) -> str:
        """Name of the loop that runs the method, by the method's row."""
        return LAYERWISE[self.method].loop if self.layerwise else METHODS[self.method].loop

    @property
    def resolved_scope(self) -> LayerwiseScope | None:
        """Scope in which a layer-wise method compares weights: the option's or its own; None if it compares none."""
        return self.scope or LAYERWISE[self.method].scope

    @property
    def global_scope(self) -> bool:
        """Whether a layer-wise method compares weights over all layers; N:M compares within its groups."""
        return self.layerwise and self.resolved_scope == "global" and self.pattern is None

    @property
    def resolved_curvature(self) -> CurvatureName | None:
        """Name of the run's curvature: the option's or the method's own; None for methods that estimate none."""
        return None if self.layerwise else resolve_curvature(self.method, self.curvature)

    @property
    def without_effect(self) -> list[str]:
        """Options that have no effect because their switch is off."""
        return idle_options(vars(self))

    def resolved(self) -> dict[str, Any]:
        """All options by their flat names, with the values of the run; ``from_mapping`` makes the same run of them."""
        return self.model_dump(mode="json") | {
            "batch_size": self.sequences_per_pass,
            "curvature": self.resolved_curvature,
            "scope": self.resolved_scope if self.layerwise and self.pattern is None else None,
            "round_to": self.rounding if self.parts else None,
            "min_width": self.least_width if self.parts else None,
        }

    def to_yaml(self) -> str:
        """The resolved recipe as YAML, in groups."""
        return yaml.safe_dump(grouped(self.resolved()), sort_keys=False)

    @classmethod
    def from_mapping(cls, values: dict[str, Any]) -> PruneConfig:
        """Validate a mapping of options, flat or in groups.

        Raises:
            ConfigError: If a key is unknown or a value is out of range, with each of them.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise refusal(error.errors(include_url=False), cls.model_fields) from None


def _divisible(curvature: Any) -> bool:
    """Whether a shot can be divided into steps with a curvature; False if the value is no curvature's name."""
    row = CURVATURES.get(curvature) if isinstance(curvature, str) else None
    return row is not None and row.divisible


def _of_preset(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options that the preset of a recipe stands for, as far as they fit the rest of the recipe."""
    return options_of(
        given["preset"],
        shrinks=bool(structures.parts_of(given.get("structure", structures.DEFAULT))),
        divides=_divisible(given.get("curvature", METHODS[METHOD].curvatures[0])),
        reconstructs=given.get("reconstruction", True),
    )


def _layerwise_options(values: Mapping[str, Any]) -> list[str]:
    """Names of the options that are on and that only layer-wise methods have."""
    off = {"scope": (None, "global"), "layer_budget": ("uniform",), "refine": ("none",), "permute": (False,)}
    return [name for name, without in off.items() if values.get(name, without[0]) not in without]


def goes_layerwise(values: Mapping[str, Any]) -> bool:
    """Whether a method goes layer by layer; a method of both kinds does if an option of layer-wise methods is on."""
    method = values.get("method")
    if not isinstance(method, str) or method not in LAYERWISE:
        return False
    return method not in METHODS or bool(_layerwise_options(values))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Changes between two mappings of options, each in words; the mappings may have other keys too."""
    return [
        f"{name} was {shown(before.get(name))} and is {shown(now.get(name))}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a YAML recipe as a mapping of options with their flat names; hyphens in keys are accepted.

    Raises:
        ConfigError: If the file cannot be read or is not a mapping, or has an option twice.
    """
    # Only for options that take text, values such as 2:4 and true are text.
    names = {name for name, field in PruneConfig.model_fields.items() if takes_text(field.annotation)}
    return flat(read_mapping(path, names | {GROUP_OF[name].inner[name] for name in names}))

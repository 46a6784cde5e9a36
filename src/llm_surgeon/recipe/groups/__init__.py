"""Options of a recipe in groups, one file for each group, and the table of the groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from llm_surgeon.recipe.groups.base import Options
from llm_surgeon.recipe.groups.calibration import CalibrationOptions
from llm_surgeon.recipe.groups.curvature import CurvatureOptions
from llm_surgeon.recipe.groups.evaluation import EvaluationOptions
from llm_surgeon.recipe.groups.export import ExportOptions
from llm_surgeon.recipe.groups.layerwise import LayerwiseOptions
from llm_surgeon.recipe.groups.lora import LoraOptions
from llm_surgeon.recipe.groups.recovery import RecoveryOptions
from llm_surgeon.recipe.groups.refit import RefitOptions
from llm_surgeon.recipe.groups.resources import ResourcesOptions
from llm_surgeon.recipe.groups.selection import SelectionOptions


@dataclass(frozen=True)
class Group:
    """One row of the table of groups.

    Attributes:
        name: Key of the group in a recipe.
        title: Heading of the group's panel in the help.
        options: Class with the group's options.
        shorter: Names of options within the group, by their flat names, where the two differ.
    """

    name: str
    title: str
    options: type[Options]
    shorter: Mapping[str, str] = field(default_factory=dict)

    @property
    def inner(self) -> dict[str, str]:
        """Name of each option within the group, by its flat name."""
        return {name: self.shorter.get(name, name) for name in self.options.model_fields}


# The groups are in the order of a written recipe and of the help.
GROUPS = (
    Group("selection", "What to remove (selection)", SelectionOptions),
    Group("calibration", "Calibration text (calibration)", CalibrationOptions, {"calibration": "text"}),
    Group("curvature", "Curvature and update (curvature)", CurvatureOptions, {"curvature": "approximation"}),
    Group("refit", "Fitting what is left (refit)", RefitOptions),
    Group("layerwise", "Layer-wise methods (layerwise)", LayerwiseOptions),
    Group(
        "lora",
        "First-order corrections (lora)",
        LoraOptions,
        {"lora": "enabled"} | {name: name.removeprefix("lora_") for name in LoraOptions.model_fields if name != "lora"},
    ),
    Group(
        "recovery",
        "Training after the last shot (recovery)",
        RecoveryOptions,
        {name: name.removeprefix("recover_") for name in RecoveryOptions.model_fields},
    ),
    Group(
        "evaluation",
        "Evaluation text (evaluation)",
        EvaluationOptions,
        {"evaluation": "text", "eval_window": "window", "eval_tokens": "tokens"},
    ),
    Group("export", "Export (export)", ExportOptions, {"export_shots": "shots"}),
    Group("resources", "Machine (resources)", ResourcesOptions),
)
GROUP_OF: dict[str, Group] = {name: group for group in GROUPS for name in group.options.model_fields}

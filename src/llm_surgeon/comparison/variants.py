"""The plan of a comparison: variants of the recipe, settings that they are run under, and the cells of these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_surgeon.errors import ConfigError
from llm_surgeon.mathematics.nm_pattern import Pattern
from llm_surgeon.recipe.config import PruneConfig, goes_layerwise
from llm_surgeon.recipe.methods import method_names
from llm_surgeon.recipe.quantity import closest, shown
from llm_surgeon.recipe.sources import NONE, as_several
from llm_surgeon.recipe.switches import idle_options
from llm_surgeon.records import Setting

Options = Mapping[str, Any]

# Options that a suffix of a method stands for: wanda+owl is the method wanda with the layers' sparsities of OWL.
SUFFIXES: dict[str, dict[str, Any]] = {
    "one-shot": {"shots": 1},
    "reconstruction": {"reconstruction": True},
    "gates": {"gate_steps": 2},
    "cross-fit": {"reconstruction": True, "cross_fit": True},
    "lora": {"lora": True},
    "row": {"scope": "row"},
    "layer": {"scope": "layer"},
    "global": {"scope": "global"},
    "dsnot": {"refine": "dsnot"},
    "r2-dsnot": {"refine": "r2-dsnot"},
    "owl": {"layer_budget": "owl"},
    "permute": {"permute": True},
}

# Options that all variants share: the texts, and the dense model that they are compared with.
SHARED = (
    *("calibration", "samples", "seq_len", "windows_per_sample", "bos", "seed"),
    *("evaluation", "eval_window", "eval_tokens"),
    *("dtype", "device", "precision", "trust_remote_code"),
)
_SETTING = ("structure", "sparsity")
# What only a run from a checkpoint to an export can do; a cell loads a whole model and keeps none.
_OF_EXPORTS = (
    *("export_shots", "formats", "device_memory", "host_memory", "scratch_space", "weights"),
    *("recover_tokens", "recover_batch_size", "recover_learning_rate"),
)


@dataclass(frozen=True)
class PlannedCell:
    """One variant under one setting: its recipe, or the reason why there is none."""

    variant: str
    setting: Setting
    config: PruneConfig | None
    refusal: ConfigError | None = None

    @property
    def name(self) -> str:
        """Name of the cell's file, from variant and setting, with characters that every file system takes."""
        structure, sparsity = self.setting.structure.replace(":", "-"), f"-{self.setting.sparsity}"
        return f"{self.variant}@{structure}{'' if Pattern.parse(self.setting.structure) else sparsity}"


def parse_methods(text: str) -> dict[str, dict[str, Any]]:
    """Options of each variant in a list like ``surgeon,k-obd,surgeon+one-shot``.

    Raises:
        ConfigError: If a method or a suffix is not known; lists the known ones.
    """
    specs = [spec.strip() for spec in text.split(",")]
    return {spec: _parse_spec(spec) for spec in specs if spec}


def _parse_spec(spec: str) -> dict[str, Any]:
    method, *suffixes = spec.split("+")
    if method not in method_names():
        raise _not_known("method", method, spec, method_names())
    options: dict[str, Any] = {"method": method}
    for suffix in suffixes:
        if suffix not in SUFFIXES:
            raise _not_known("suffix", suffix, spec, SUFFIXES)
        options |= SUFFIXES[suffix]
    return options


def _not_known(kind: str, word: str, spec: str, known: Iterable[str]) -> ConfigError:
    meant = closest(word, known)
    return ConfigError(
        f"The {kind} {shown(word)} of {shown(spec)} is not known{f' (did you mean {meant}?)' if meant else ''}.",
        f"Methods are {', '.join(method_names())}; suffixes, each after a +, are {', '.join(SUFFIXES)}.",
    )


def settings_of(structures: Iterable[str], sparsities: Iterable[float]) -> list[Setting]:
    """Settings for every structure with every sparsity; N:M comes once, with the sparsity of the pattern."""
    sparsities, settings = list(sparsities), []
    for structure in structures:
        pattern = Pattern.parse(structure)
        for sparsity in [pattern.sparsity] if pattern else sparsities:
            settings.append(Setting(structure=structure, sparsity=sparsity))
    return list(dict.fromkeys(settings))


def plan(variants: Mapping[str, Options], settings: Sequence[Setting], common: Options) -> list[PlannedCell]:
    """Plan a cell for every variant under every setting, setting by setting.

    Args:
        variants: Options of each variant; they go before the common ones.
        settings: What they are run under.
        common: Options of all; layer-wise methods, which have one shot, take no notice of its shots, and no variant
            of options whose switch is off in it.

    Raises:
        ConfigError: If there is nothing to compare, if a comparison or a variant cannot set an option, or if a variant
            or a setting is possible in no cell at all.
    """
    if not variants or not settings:
        raise ConfigError("There is nothing to compare.", "Name methods, and at least one structure and sparsity.")
    _check_common(common)
    for name, options in variants.items():
        _check_variant(name, options)
    cells = [_planned(name, setting, common, options) for setting in settings for name, options in variants.items()]
    for name in variants:
        _check_possible(f"variant {shown(name)}", [cell for cell in cells if cell.variant == name])
    for setting in settings:
        _check_possible(f"setting {shown(setting.label)}", [cell for cell in cells if cell.setting == setting])
    return cells


def _planned(variant: str, setting: Setting, common: Options, own: Options) -> PlannedCell:
    # Methods are compared without presets. Suffixes, or options of a variant, name the stages that a preset would add.
    shared = {"preset": "none"} | {
        name: value for name, value in common.items() if name != "shots" or not goes_layerwise(own)
    }
    # What all have in common is for those whose switch is on.
    idle = idle_options({**shared, **own})
    shared = {name: value for name, value in shared.items() if name not in idle}
    try:
        return PlannedCell(variant, setting, PruneConfig.from_mapping({**shared, **own, **setting.model_dump()}))
    except ConfigError as error:
        return PlannedCell(variant, setting, None, error)


def _check_common(options: Options) -> None:
    wrong = next((name for name in (*_SETTING, *_OF_EXPORTS) if name in options), None)
    if wrong is not None:
        alone = "Leave it out: a comparison loads whole models and exports nothing."
        remedy = "Give it as part of a setting." if wrong in _SETTING else alone
        raise ConfigError(f"{wrong} is no option that the cells of a comparison have in common.", remedy)
    if as_several(options.get("evaluation")) == (NONE,):
        raise ConfigError("Without an evaluation text there is nothing to compare.", "Leave out evaluation: none.")


def _check_variant(name: str, options: Options) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+ -]{0,99}", name):
        raise ConfigError(
            f"A variant cannot be named {shown(name)}: a file is named after it.",
            "Use at most 100 letters, digits, spaces and the characters . _ + - in the name.",
        )
    wrong = [option for option in (*SHARED, *_SETTING, *_OF_EXPORTS) if option in options]
    if wrong:
        raise ConfigError(
            f"The variant {shown(name)} sets {', '.join(wrong)}, which would make it incomparable with the others.",
            "Set it for all of them, or make a comparison of its own.",
        )


def _check_possible(what: str, cells: list[PlannedCell]) -> None:
    refusals = [cell.refusal for cell in cells if cell.refusal is not None]
    if len(refusals) == len(cells):
        raise ConfigError(f"The {what} is possible in no cell. {refusals[0].cause}", refusals[0].remedy)

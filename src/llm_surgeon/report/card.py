"""Model card: the README.md of an exported checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llm_surgeon.data.corpora import FILE_TYPES, without_column
from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.methods import LAYERWISE, METHODS
from llm_surgeon.recipe.sources import as_several, sources_of
from llm_surgeon.recipe.structures import STRUCTURES
from llm_surgeon.records import PruneReport
from llm_surgeon.report.loading import loading_lines, reloaded, using_lines, why_so
from llm_surgeon.report.recovery_table import recovery_in_card
from llm_surgeon.report.table import dense_and_pruned, escape, fenced, footnotes, markdown_rows, scaled_bytes

_UNTOUCHED = "the rest stays as it was"

LIMITS = """\
## Limits

- What to remove, and how to correct the rest, was decided on the calibration data below. Text unlike it (other
  languages, code, dialogue) may have lost more than the table shows.
- Only the linear layers of the decoder blocks were pruned, so the whole model shrinks by less than its prunable
  weights. Embeddings and the output head are those of the original model, and so are norms that no stage changed.
- Perplexity measures the prediction of one text. It says little about reasoning, instruction following or safety:
  evaluate on your own task before use. It compares only with numbers of the same data, window and stride.
- Speed, where it was measured, holds for the machine, the type and the lengths in the table.
- Biases, limits of use and the licence of the original model apply.
"""

CITATION = """\
## Citation

```bibtex
@inproceedings{vanderouderaa2024llmsurgeon,
  title     = {The {LLM} Surgeon},
  author    = {van der Ouderaa, Tycho F. A. and Nagel, Markus and van Baalen, Mart and
               Asano, Yuki M. and Blankevoort, Tijmen},
  booktitle = {International Conference on Learning Representations (ICLR)},
  year      = {2024},
  url       = {https://arxiv.org/abs/2312.17244}
}
```
"""


def model_card(report: PruneReport) -> str:
    """Write the README.md of the exported checkpoint: the removal, the loading, the measures, and the limits."""
    sections = [
        f"---\n{to_yaml(_front_matter(report))}---\n",
        f"# {escape(title_name(report))}, pruned\n",
        _what_was_done(report),
        _loading(report),
        _measured(report),
        *([] if report.recovery is None else [recovery_in_card(report.recovery)]),
        LIMITS,
        _origin(report),
        _citation(report),
    ]
    return "\n".join(sections)


def _citation(report: PruneReport) -> str:
    """Citation of the paper of all global methods, or the source of a layer-wise method."""
    config = PruneConfig.model_validate(report.config)
    source = LAYERWISE[config.method].source if config.layerwise else ""
    return f"## Source\n\n{source}.\n" if source else CITATION


def is_hub_id(model: str) -> bool:
    """Whether a model's name is ``owner/name``, as on the hub, and not a path on this machine."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    return re.fullmatch(f"{part}/{part}", model) is not None and not Path(model).exists()


def _loading(report: PruneReport) -> str:
    lines = [*loading_lines(report, '"path/to/this/directory"'), "", *using_lines(report)]
    served = "".join(f"- {line}.\n" for line in report.export.engines) if report.export else ""
    quantised = "".join(f"- {line}\n" for line in report.export.quantising) if report.export else ""
    return (
        f"## Loading\n\n{fenced('python', chr(10).join(lines))}\n`llm-surgeon` is not needed. {why_so(report)}\n"
        + (f"\nWhat loads it:\n\n{served}" if served else "")
        + (f"\nQuantised types of llama.cpp:\n\n{quantised}" if quantised else "")
    )


def _front_matter(report: PruneReport) -> dict[str, Any]:
    """Values that the hub reads, with the dense model's own statements as far as they are known."""
    known = {key: value for key, value in report.origin.items() if value}
    if is_hub_id(report.model):
        known["base_model"] = report.model
    data = _hub_data(report)
    datasets = known.pop("datasets", [])
    datasets = list(dict.fromkeys([*([datasets] if isinstance(datasets, str) else datasets), *data]))
    structure = str(report.config.get("structure", "rows-columns"))
    tags = ["llm-surgeon", "pruned", *structure.split("+"), report.family]
    task = "image-text-to-text" if report.export is not None and report.export.reads_images else "text-generation"
    front = {"pipeline_tag": task, "tags": tags} | known
    if report.export is None or report.export.pretrained:
        front = {"library_name": "transformers"} | front
    return front | ({"datasets": datasets} if datasets else {})


def _hub_data(report: PruneReport) -> list[str]:
    """Names of the calibration texts that are data sets of the hub."""
    found = [_hub_name(source.text) for source in sources_of(as_several(report.config.get("calibration")))]
    return [name for name in dict.fromkeys(found) if name]


def _hub_name(text: str) -> str:
    """Name of a text that is a data set of the hub; empty for others."""
    spec = without_column(text)
    name = spec.split(":")[0]
    is_file = any(given.lower().endswith(FILE_TYPES) for given in (text, spec))
    return name if is_hub_id(name) and not is_file else ""


def title_name(report: PruneReport) -> str:
    """Name of the dense model for a heading; for ``demo``, the name of the model that it stands for, if known."""
    base = report.origin.get("base_model")
    return model_name(base if report.model == "demo" and isinstance(base, str) else report.model)


def model_name(model: str) -> str:
    """Last part of a hub id or of a path: cards are published, but not the directories of their authors."""
    return Path(model).name or model


def _what_was_done(report: PruneReport) -> str:
    """Two sentences on the removal and its method, and where to read more."""
    kept = report.shots[-1].size.prunable / report.dense_size.prunable if report.shots else 1.0
    shots = "one shot" if len(report.shots) == 1 else f"{len(report.shots)} shots"
    return (
        f"{_removed(report.config)} of the linear layers of {escape(title_name(report))} were removed in {shots}, "
        f"until {100 * kept:.1f} % of the prunable weights were left. {_how(report.config)}{_stages(report)}\n\n"
        f"More: [recipe.yaml](recipe.yaml) (all options; the same recipe gives {_again(report)} again), "
        "[report.html](report.html) (all that was measured, in one page), [report.json](report.json) (its numbers).\n"
    )


def _again(report: PruneReport) -> str:
    """The model that the recipe gives: this one, or the one that was trained afterwards."""
    later = report.recovery is not None and not report.config.get("recover_tokens")
    return "the model before its recovery" if later else "this model"


def _stages(report: PruneReport) -> str:
    """A sentence on the stages that fitted what was left; empty if there was none."""
    names = dict.fromkeys(stage.name for shot in report.shots for stage in shot.stages if stage.figures)
    return f" What was left was fitted to the calibration text: {', '.join(names)}." if names else ""


def _removed(config: Mapping[str, Any]) -> str:
    """Removed units in words."""
    recipe = PruneConfig.model_validate(config)
    words = " and ".join((STRUCTURES[part].noun or part) for part in recipe.parts)
    return f"Whole {words}" if words else f"Single weights ({recipe.structure})"


def _how(config: Mapping[str, Any]) -> str:
    """Sentence on the way in which the method works."""
    recipe = PruneConfig.model_validate(config)
    if not recipe.layerwise:
        how = METHODS[recipe.method]
        update = "the remaining weights were updated to make up for the loss" if how.correlated else _UNTOUCHED
        return f"The method `{recipe.method}` ({how.summary}) {how.course}, and {update}."
    layerwise = LAYERWISE[recipe.method]
    refined = "" if recipe.refine == "none" else f" refined by `{recipe.refine}`,"
    update = "the remaining weights of its layer were updated" if layerwise.scope is None else _UNTOUCHED
    return (
        f"The method `{recipe.method}` ({layerwise.summary}) went from block to block, each on the outputs of the "
        f"blocks already pruned,{refined} and {update}."
    )


def _measured(report: PruneReport) -> str:
    """Section on the dense model beside the pruned one, and on the way of measuring."""
    headings = ("", "dense", "pruned", "pruned to dense")
    table = "\n".join(markdown_rows(headings, dense_and_pruned(report)))
    notes = "\n".join(f"- {note}" for note in (*map(escape, footnotes(report)), *_checks(report)))
    picture = "![Weights kept in each layer, and perplexity](kept_fraction.png)"
    return f"## Dense and pruned\n\n{table}\n\n{notes}\n\n{picture}\n"


def _checks(report: PruneReport) -> list[str]:
    seconds = sum(shot.seconds for shot in report.shots)
    notes = [f"Pruning took {seconds:,.0f} s, with a peak of {scaled_bytes(report.memory.peak)} resident."]
    if report.export is not None:
        notes += [reloaded(form) for form in report.export.written]
    return notes


def _origin(report: PruneReport) -> str:
    command = report.command or "# called from Python: llm_surgeon.prune with the options in recipe.yaml"
    versions = ", ".join(f"{package} {version}" for package, version in report.versions.items())
    return (
        f"## Origin\n\nThe command:\n\n{fenced('bash', command)}\n"
        f"The calibration data:\n\n{fenced('yaml', to_yaml(_plain(report)['calibration']))}\n"
        f"The versions: {versions or 'not recorded'}.\n"
    )


def _plain(report: PruneReport) -> dict[str, Any]:
    """The report with JSON's types only, as safe YAML can write neither tuples nor paths."""
    return report.model_dump(mode="json")


def to_yaml(values: Any) -> str:
    """Write JSON values as YAML, in their order."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

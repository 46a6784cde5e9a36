"""The model card: the README.md of an exported checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

import yaml

from llm_surgeon.recipe.config import PruneConfig
from llm_surgeon.recipe.methods import LAYERWISE, METHODS
from llm_surgeon.records import PruneReport
from llm_surgeon.report.table import escape, markdown_table, scaled_bytes

LOADING = """\
## Loading

Plain `transformers` loads it; `llm-surgeon` is not needed. $why

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

DIR = "path/to/this/directory"
model = AutoModelForCausalLM.from_pretrained(DIR$trust)
tokenizer = AutoTokenizer.from_pretrained(DIR$trust)
```
"""

SMALLER = """\
What was removed is gone from the files, layer by layer, so
the checkpoint brings its own modelling file: hence `trust_remote_code`."""

PLAIN = """\
What was removed is gone from the files, equally in all
layers, so that the configuration says it all."""

ZEROS = """\
The weights that were removed are zeros in matrices
of the old shape: the files are as large as the dense model's, and it runs no faster, unless what runs it makes use of
the zeros (2:4 patterns on some GPUs, for example)."""

_UNITS = {
    "rows-columns": "rows and columns",
    "neurons": "neurons",
    "heads": "heads",
    "values": "value dimensions",
    "blocks": "attention and feed-forward parts",
}

_UNTOUCHED = "the rest stays as it was"

LIMITS = """\
## Limits

- What to remove, and how to correct the rest, was decided on the calibration data below. Text unlike it (other
  languages, code, dialogue) may have lost more than the table shows.
- Only the linear layers of the decoder blocks were pruned. Embeddings, norms and the output head are those of the
  original model, so the whole model shrinks by less than its prunable weights.
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
    """Write the README.md of the exported checkpoint: how to load it, what was done, measured and left open."""
    sections = [
        f"---\n{to_yaml(_front_matter(report))}---\n",
        f"# {escape(model_name(report.model))}, pruned\n",
        _loading(report),
        _what_was_done(report),
        f"## Measured\n\n{markdown_table(report)}{_checks(report)}",
        LIMITS,
        _origin(report),
        _citation(report),
    ]
    return "\n".join(sections)


def _citation(report: PruneReport) -> str:
    """The paper of a global method's frame, or where a layer-wise method comes from."""
    config = PruneConfig.model_validate(report.config)
    source = LAYERWISE[config.method].source if config.layerwise else ""
    return f"## Source\n\n{source}.\n" if source else CITATION


def is_hub_id(model: str) -> bool:
    """Whether a model's name is ``owner/name`` as the hub has them, and not a path on this machine."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]*"
    return re.fullmatch(f"{part}/{part}", model) is not None and not Path(model).exists()


def _loading(report: PruneReport) -> str:
    own_code = report.smaller and not (report.export is not None and report.export.plain)
    why = SMALLER if own_code else PLAIN if report.smaller else ZEROS
    return Template(LOADING).substitute(why=why, trust=", trust_remote_code=True" if own_code else "")


def _front_matter(report: PruneReport) -> dict[str, Any]:
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llm-surgeon", "pruned", report.family],
    }
    return front | ({"base_model": report.model} if is_hub_id(report.model) else {})


def model_name(model: str) -> str:
    """Give the last part of a hub id or of a path: cards are published, the directories of their authors are not."""
    return Path(model).name or model


def _what_was_done(report: PruneReport) -> str:
    kept = report.shots[-1].size.prunable / report.dense_size.prunable if report.shots else 1.0
    method = report.config.get("method", "surgeon")
    return (
        "## What was done\n\n"
        f"{_removed(report.config)} of the linear layers were removed in {len(report.shots)} shot(s)\n"
        f"by the method `{method}`\n"
        f"{_how(method, report.config)}\n"
        f"{100 * kept:.1f} % of the prunable weights were kept. The recipe:\n\n"
        f"{_fenced('yaml', to_yaml(_plain(report)['config']))}"
    )


def _removed(config: Mapping[str, Any]) -> str:
    """What was removed as a unit, in words."""
    recipe = PruneConfig.model_validate(config)
    words = " and ".join(_UNITS[part] for part in recipe.parts)
    return f"Whole {words}" if words else f"Single weights ({recipe.structure})"


def _how(method: str, config: Mapping[str, Any]) -> str:
    """How a method works, in half a sentence."""
    if not PruneConfig.model_validate(config).layerwise:
        how = METHODS[method]
        update = "the remaining weights are updated to make up for the loss" if how.correlated else _UNTOUCHED
        return f"({how.summary}): a cost ranks them, one threshold over all layers selects them, and {update}."
    layerwise = LAYERWISE[method]
    refined = "" if config["refine"] == "none" else f", refined by {config['refine']}"
    update = "the remaining weights of its layer are updated" if layerwise.scope is None else _UNTOUCHED
    return (
        f"({layerwise.summary}), block after block, each on the outputs of the blocks already\n"
        f"pruned{refined}; {update}."
    )


def _checks(report: PruneReport) -> str:
    seconds = sum(shot.seconds for shot in report.shots)
    notes = [f"- Pruning took {seconds:,.0f} s, with a peak of {scaled_bytes(report.memory.peak)} resident."]
    if report.export is not None:
        notes.append(
            f"- Loaded again from disk, its logits differ from the pruned model's by "
            f"{report.export.max_logit_difference:.1e} at most, on a scale of {report.export.logit_scale:.3g}."
        )
    return "\n".join(notes) + "\n"


def _origin(report: PruneReport) -> str:
    command = report.command or "# called from Python: llm_surgeon.prune with the recipe above"
    versions = "".join(f"- {package} {version}\n" for package, version in report.versions.items())
    return (
        f"## Origin\n\nThe command:\n\n{_fenced('bash', command)}\n"
        f"The calibration data:\n\n{_fenced('yaml', to_yaml(_plain(report)['calibration']))}\n"
        f"The versions:\n\n{versions}"
    )


def _plain(report: PruneReport) -> dict[str, Any]:
    """The report with JSON's types only, which safe YAML can write: no tuples, no paths."""
    return report.model_dump(mode="json")


def to_yaml(values: Any) -> str:
    """Write JSON values as YAML, in the order in which they are."""
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _fenced(language: str, text: str) -> str:
    # Longer than any fence in the text, which would end it.
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n"

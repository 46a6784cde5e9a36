"""Comparison of all methods on the same tokens: half and three fifths of the weights removed anywhere, and 2:4.

    python benchmarks/methods.py CALIBRATION.txt EVALUATION.txt OUT

Goes on where it was interrupted. Writes benchmarks/results/methods.md; OUT holds a file for each cell, the numbers and
a picture.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from common import PROTOCOL, RESULTS, circumstances

from llm_surgeon import compare
from llm_surgeon.comparison.variants import parse_methods, settings_of
from llm_surgeon.report.comparison_table import comparison_markdown

# Fast methods come first, so that an interrupted table has most rows.
METHODS = (
    "magnitude+layer,magnitude+one-shot,wanda,ria,sparsegpt,surgeon+one-shot,stochria,ri,lp-ri,symmetric,owanda,"
    "symwanda,wanda+dsnot,wanda+r2-dsnot,ria+r2-dsnot,wanda+owl,wanda+permute,ria+permute,sparsegpt+permute,"
    "l-obd+one-shot,k-obd+one-shot,obs-activations+one-shot"
)


def main() -> None:
    """Run the missing cells, and write the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--note", default="", help="what a reader of the table has to know")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    texts = {"calibration": arguments.calibration, "evaluation": arguments.evaluation}
    common = {name: value for name, value in PROTOCOL.items() if name not in ("sparsity", "shots")}
    settings = settings_of(["unstructured", "2:4"], [0.5, 0.6])
    command = "python benchmarks/methods.py CALIBRATION.txt EVALUATION.txt OUT"
    variants = parse_methods(arguments.methods)
    result = compare("demo", arguments.out, variants, settings, common | texts, command=command)
    where = circumstances(command)
    note = f"\nMeasured {where['date']} on {where['machine']}. {arguments.note}".rstrip() + "\n"
    (RESULTS / "methods.md").write_text(comparison_markdown(result) + note, encoding="utf8")


if __name__ == "__main__":
    main()

"""Benchmark of pruning beside quantisation: dense and pruned models at several types of weights, in llama.cpp.

    python benchmarks/frontier.py MODEL --out DIR [--llama DIRECTORY] [options] [--recipe OPTIONS OF PRUNE]

Prunes MODEL once for each structure to all sparsities, writes the dense model and every export as GGUF (float16),
quantises the files by llama-quantize, and measures each: bytes, fallbacks to other types, perplexity (llama-perplexity)
and speed (llama-bench). Speeds of a pruned file and of the dense file of its type are taken in turn. DIR holds a file
for each export and each measure: what is there is not done again. Models are removed after their measures.
Writes benchmarks/results/NAME.json, NAME.md and NAME.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import circumstances, save, write
from frontier_report import draw, loaded, markdown, rows_of
from llama_tools import ToolError, Tools, described

from llm_surgeon.data.corpora import load_corpus
from llm_surgeon.records import PruneReport
from llm_surgeon.system.files import in_place

TYPES = ("f16", "q8_0", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
PROMPT, GENERATED = 512, 64
# End of the names of exports whose blocks all have the same widths.
UNIFORM = "-uniform"

logger = logging.getLogger("frontier")


@dataclass(frozen=True)
class Model:
    """A model of the comparison.

    Attributes:
        name: Name of its files.
        structure: What was removed as a unit; empty for the dense model.
        uniform: Whether all blocks have the same widths.
        sparsity: Share of the weights that was to be removed.
        source: Directory, or other name, that the package reads it by.
    """

    name: str
    structure: str = ""
    uniform: bool = False
    sparsity: float = 0.0
    source: str = ""


class Work:
    """The directory of a comparison, and what is done in it.

    Args:
        options: The command line.
        tools: The tools of llama.cpp.
        text: The text of the perplexity.
    """

    def __init__(self, options: argparse.Namespace, tools: Tools, text: Path) -> None:
        self.options, self.tools, self.text = options, tools, text
        self.place: Path = options.out
        for name in ("exports", "files", "cells"):
            (self.place / name).mkdir(parents=True, exist_ok=True)

    def cell(self, model: Model, kind: str, measure: str) -> Path:
        """File of a measure."""
        return self.place / "cells" / f"{model.name}.{kind}.{measure}.json"

    def known(self, model: Model, kind: str, measure: str) -> dict[str, Any] | None:
        """Read a measure; None if it is not there."""
        path = self.cell(model, kind, measure)
        return json.loads(path.read_text(encoding="utf8")) if path.exists() else None

    def keep(self, model: Model, kind: str, measure: str, value: dict[str, Any]) -> None:
        """Write a measure."""
        put(self.cell(model, kind, measure), json.dumps(value, indent=2) + "\n")
        logger.info("%s %s %s: %s", model.name, kind, measure, brief(value))

    def file(self, model: Model, kind: str) -> Path:
        """GGUF file of a model with a type of weights, which is made if it is not there."""
        target = self.place / "files" / f"{model.name}.{kind}.gguf"
        if target.exists() and self.known(model, kind, "file"):
            return target
        if kind == "f16":
            self._export(model, target)
            said: dict[str, Any] = {"fallbacks": 0, "kinds": {}}
        else:
            said = self.tools.quantise(self.file(model, "f16"), target, kind)
        self.keep(model, kind, "file", {**described(target), **said})
        return target

    def _export(self, model: Model, target: Path) -> None:
        """Write a model as GGUF by the package's own command."""
        beside = target.with_suffix("")
        shutil.rmtree(beside, ignore_errors=True)
        call(["export", model.source, "--out", str(beside), "--format", "gguf-f16"])
        (written,) = (beside / "gguf-f16").glob("*.gguf")
        written.rename(target)
        shutil.rmtree(beside)

    def remove(self, model: Model, kinds: Sequence[str]) -> None:
        """Remove the files of a model."""
        if not self.options.keep:
            for kind in kinds:
                (self.place / "files" / f"{model.name}.{kind}.gguf").unlink(missing_ok=True)

    def measure(self, model: Model, dense: Model, kind: str) -> None:
        """Measure a model with a type of weights, but for the speed of a dense one."""
        if self.known(model, kind, "file") is None:
            self.file(model, kind)
        if self.known(model, kind, "perplexity") is None:
            options, file = self.options, self.file(model, kind)
            found = self.tools.perplexity(file, self.text, options.context, options.chunks)
            self.keep(model, kind, "perplexity", found)
        if model != dense and self.to_time(model, kind):
            names = {"dense": self.file(dense, kind), "pruned": self.file(model, kind)}
            self.keep(model, kind, "speed", self.in_turn(names))

    def to_time(self, model: Model, kind: str) -> bool:
        """Whether the speed is to be measured: it was not, or it was on a loaded machine and is to be once more."""
        if self.options.untimed:
            return False
        known = self.known(model, kind, "speed")
        return known is None or (self.options.retime and loaded(known))

    def measure_dense_speeds(self, dense: Model, kinds: Sequence[str]) -> None:
        """Measure the speeds of the dense files, all in turn."""
        if any(self.to_time(dense, kind) for kind in kinds):
            both = self.in_turn({kind: self.file(dense, kind) for kind in kinds})
            for kind in kinds:
                alone = {"samples": {"dense": both["samples"][kind]}}
                self.keep(dense, kind, "speed", both | alone)

    def in_turn(self, files: dict[str, Path]) -> dict[str, Any]:
        """Measure the speeds of files by turns; every other round goes through them backwards.

        Returns:
            ``samples``, milliseconds for a token by file and by prefill and decode, ``threads``, and ``load``, the
            largest mean of a minute of the machine's load, in which the measured program counts as its threads.
        """
        samples: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in files}
        load = 0.0
        for number in range(self.options.repeats):
            for name in list(files)[:: -1 if number % 2 else 1]:
                for part, value in self.tools.speed(files[name], PROMPT, GENERATED).items():
                    samples[name][part].append(value)
                load = max(load, os.getloadavg()[0])
        return {"samples": samples, "load": round(load, 2), "threads": self.tools.threads}


def put(path: Path, text: str) -> None:
    """Write a file, which is there only when it is complete."""
    with in_place(path) as partial:
        partial.write_text(text, encoding="utf8")


def brief(value: dict[str, Any]) -> str:
    """A measure in a line of the log."""
    return ", ".join(f"{name} {item}" for name, item in value.items() if not isinstance(item, dict))


def call(arguments: Sequence[str]) -> None:
    """Run the package's command; ends this script if it fails."""
    command = [sys.executable, "-m", "llm_surgeon", *arguments]
    logger.info("llm-surgeon %s", " ".join(arguments))
    if status := subprocess.run(command).returncode:
        raise SystemExit(f"llm-surgeon {' '.join(arguments)} ended with status {status}.")


def prune(options: argparse.Namespace, structure: str, uniform: bool) -> list[Model]:
    """Models of one pruning run, which takes place if it has not."""
    place = options.out / "exports" / f"{structure}{UNIFORM if uniform else ''}"
    if not (place / "report.json").exists():
        shots = len(options.sparsities)
        arguments = ["prune", options.model, "--out", str(place), "--structure", structure]
        arguments += [*(["--uniform"] if uniform else []), "--sparsity", str(options.sparsities[-1])]
        arguments += ["--shots", str(shots)]
        arguments += [item for shot in range(1, shots) for item in ("--export-shots", str(shot))]
        call([*arguments, *options.recipe])
    return models_in(options, place)


def models_in(options: argparse.Namespace, place: Path) -> list[Model]:
    """Models that a pruning run has exported."""
    places = [place / f"shot-{shot}" for shot in range(1, len(options.sparsities))] + [place]
    structure, uniform = place.name.removesuffix(UNIFORM), place.name.endswith(UNIFORM)
    return [
        Model(f"{place.name}-{round(100 * sparsity)}", structure, uniform, sparsity, str(there))
        for sparsity, there in zip(options.sparsities, places, strict=True)
    ]


def removed_share(model: Model) -> float:
    """Share of the prunable weights that was removed."""
    if not model.structure:
        return 0.0
    here = Path(model.source)
    report = (here if (here / "report.json").exists() else here.parent) / "report.json"
    shots = PruneReport.model_validate_json(report.read_text(encoding="utf8")).shots
    return next(shot.sparsity for shot in shots if abs(shot.target_sparsity - model.sparsity) < 1e-6)


def report(work: Work, version: str) -> None:
    """Write all that has been measured so far, by this call and by others."""
    options = work.options
    models = [Model("dense", source=options.model)]
    for found in sorted((work.place / "exports").glob("*/report.json")):
        models += models_in(options, found.parent)
    kinds = [kind for kind in dict.fromkeys((*TYPES, *options.types)) if work.known(models[0], kind, "perplexity")]
    cells = [
        {
            "model": model.name,
            "structure": model.structure,
            "uniform": model.uniform,
            "asked": model.sparsity,
            "removed": removed_share(model),
            "type": kind,
            **{measure: work.known(model, kind, measure) for measure in ("file", "perplexity", "speed")},
        }
        for model in models
        for kind in kinds
    ]
    done = [cell for cell in cells if cell["file"] and cell["perplexity"]]
    if not done:
        return
    names = ("model", "context", "chunks", "repeats", "cache_tokens", "recipe")
    settings = {name: getattr(options, name) for name in names} | {"text": options.text_name}
    result = circumstances("python benchmarks/frontier.py " + command_of(options)) | {
        "threads": work.tools.threads,
        "llama.cpp": version,
        "missing": len(cells) - len(done),
        "settings": settings,
        "rows": rows_of(done),
    }
    write(options.name, result, markdown(result))
    save(draw(result), options.name, dpi=120)


def command_of(options: argparse.Namespace) -> str:
    """Command line of a result, without the places of this machine."""
    structures = f"--structures {' '.join(options.structures)} --uniform {options.uniform}"
    sparsities = " ".join(f"{sparsity:g}" for sparsity in options.sparsities)
    recipe = " ".join(Path(item).name if "/" in item else item for item in options.recipe)
    return (
        f"{Path(options.model).name} --out DIR --sparsities {sparsities} {structures} "
        f"--types {' '.join(options.types)} "
        f"--text {options.text_name} --context {options.context} --chunks {options.chunks} "
        f"--repeats {options.repeats} --threads {options.threads}{' --recipe ' if recipe else ''}{recipe}"
    )


def agree(options: argparse.Namespace, text: Path, version: str) -> None:
    """Make sure that the measures in the directory were made by the same settings."""
    names = ("model", "sparsities", "recipe", "context", "chunks", "repeats", "threads")
    digest = hashlib.sha256(text.read_bytes()).hexdigest()
    now = {name: getattr(options, name) for name in names} | {"text_sha256": digest, "llama.cpp": version}
    path = options.out / "settings.json"
    if not path.exists():
        put(path, json.dumps(now, indent=2) + "\n")
    before = json.loads(path.read_text(encoding="utf8"))
    if other := {name: (before.get(name), value) for name, value in now.items() if before.get(name) != value}:
        raise SystemExit(f"{options.out} has measures by other settings (then, now): {other}. Give another --out.")


def text_of(options: argparse.Namespace) -> Path:
    """Text of the perplexity: the one given, or what pruning by the demo's text holds out of it."""
    options.out.mkdir(parents=True, exist_ok=True)
    if options.text:
        return options.text
    path = options.out / "text.txt"
    if not path.exists():
        _, held_out = load_corpus("demo").split()
        put(path, held_out.text)
    return path


def options_given() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.1, 0.2, 0.3], help="multiples of the first")
    parser.add_argument("--structures", nargs="*", default=["neurons+heads"], help="none: the dense model alone")
    parser.add_argument("--uniform", choices=("both", "yes", "no"), default="both")
    parser.add_argument(
        "--types", nargs="+", default=list(TYPES), help="types of weights, as llama-quantize names them"
    )
    parser.add_argument("--llama", metavar="DIRECTORY", help="directory of llama.cpp's tools (default: search path)")
    parser.add_argument("--text", type=Path, help="text of the perplexity (default: the demo text's held-out part)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a window of the perplexity")
    parser.add_argument("--chunks", type=int, default=20, help="windows of the perplexity")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the measure of speed")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of llama.cpp")
    parser.add_argument("--cache-tokens", type=int, default=8192, help="context that the key/value cache is given for")
    parser.add_argument("--untimed", action="store_true", help="measure no speed; a later call without it adds them")
    parser.add_argument("--retime", action="store_true", help="measure speeds again that a loaded machine made")
    parser.add_argument("--keep", action="store_true", help="keep the GGUF files")
    parser.add_argument("--name", default="frontier", help="name of the results")
    parser.add_argument("--recipe", nargs=argparse.REMAINDER, default=[], help="further options of prune; the last")
    options = parser.parse_args()
    options.sparsities.sort()
    step = options.sparsities[0]
    if any(abs(sparsity - number * step) > 1e-9 for number, sparsity in enumerate(options.sparsities, 1)):
        parser.error("--sparsities must be one, two, ... times the first, as one pruning run makes all of them.")
    options.types = list(dict.fromkeys(kind.lower() for kind in options.types))
    options.text_name = options.text.name if options.text else "demo (held-out part)"
    return options


def main() -> None:
    """Prune, export, quantise and measure what is missing, and write the results after each model."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = options_given()
    try:
        tools = Tools(options.llama, options.threads, options.out / "logs")
        version = tools.version()
        text = text_of(options)
        agree(options, text, version)
        work = Work(options, tools, text)
        run(work, version)
    except ToolError as error:
        raise SystemExit(str(error)) from None


def run(work: Work, version: str) -> None:
    """Do what is missing, model by model; the dense files stay until the end, as every other is compared with them."""
    options = work.options
    dense = Model("dense", source=options.model)
    for kind in options.types:
        work.measure(dense, dense, kind)
    work.measure_dense_speeds(dense, options.types)
    report(work, version)
    for structure in options.structures:
        for uniform in {"both": (True, False), "yes": (True,), "no": (False,)}[options.uniform]:
            for model in prune(options, structure, uniform):
                for kind in options.types:
                    work.measure(model, dense, kind)
                    work.remove(model, [kind] if kind != "f16" else [])
                work.remove(model, ["f16"])
                report(work, version)
    work.remove(dense, ["f16", *options.types])


if __name__ == "__main__":
    main()

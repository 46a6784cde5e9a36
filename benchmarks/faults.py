"""Fault test: runs are killed (SIGKILL) at random moments, begun again until they end, and their weights compared.

A phase is drawn, then a moment within it. One process imports everything and forks a child for each attempt. It does no
arithmetic itself, so that the children wait for no threads of their parent.

    python benchmarks/faults.py [--kills 50] [--seed 0] [--more] [--only CASE]

``--more`` adds to the kills of an earlier result. Writes benchmarks/results/faults.json and faults.md. The exit status
is 1 if weights differ, a run cannot be continued, or anything is left beside an output.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from common import circumstances, finished, table, write

from llm_surgeon import Comparison, PruneConfig, Setting, compare, prune_checkpoint
from llm_surgeon.errors import OutputError
from llm_surgeon.export import hugging_face
from llm_surgeon.pruning.checkpoint import Checkpoints
from llm_surgeon.run import export, opening
from llm_surgeon.run.run_directory import RunDirectory
from llm_surgeon.system.clock import Clock

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from quick import without_what_has_other_tests
from tiny import VOCABULARY, llama, tokenizer

# Option of the case whose runs are comparisons, of which the numbers of the table are compared.
COMPARED = "compared"
COMMON = {
    "preset": "none",
    "samples": 16,
    "seq_len": 64,
    "eval_window": 64,
    "eval_tokens": 1024,
    "shots": 3,
    "sparsity": 0.4,
}
CASES: dict[str, dict[str, Any]] = {
    "rows and columns": {},
    "neurons and heads, power iteration": {"structure": "neurons+heads", "curvature": "nearest-kronecker"},
    "single weights, true Fisher, a shot exported": {
        "structure": "unstructured",
        "fisher": "true",
        "export_shots": (1,),
    },
    "steps, cross-fitting, corrections": {
        "steps_per_shot": 2,
        "reconstruction": True,
        "reconstruction_copies": 1,
        "gate_steps": 1,
        "cross_fit": True,
        "lora": True,
        "lora_steps": 2,
        "lora_final_steps": 2,
    },
    "the default": {"preset": "best", "shots": 1},
    "fast, in two shots, both exported": {"preset": "fast", "shots": 2, "export_shots": (1,)},
    "SparseGPT on permuted channels, 2:4": {
        "method": "sparsegpt",
        "structure": "2:4",
        "permute": True,
        "shots": 1,
        "sparsity": 0.5,
    },
    "corrections of single weights": {
        "structure": "unstructured",
        "lora": True,
        "lora_steps": 2,
        "lora_final_steps": 2,
    },
    "two cells of a comparison": {COMPARED: True, "shots": 1},
}
NOT_COMMON = ("preset", "shots", "sparsity")
# Phases of each shot; all others come once in a run.
IN_SHOTS = ("curvature", "selection", "update", "reconstruction", "gates", "correction", "evaluation", "checkpoint")
# Share of the attempts that are not killed, so that runs end.
SPARED = 0.15


@dataclass
class Place:
    """Directory of the runs of one case, with the weights and the seconds of a first run, which is not killed."""

    directory: Path
    config: PruneConfig
    quick: bool
    compared: bool = False
    weights: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Output directory of the runs."""
        return self.directory / "results" / "out"


class Attempt:
    """A child process that prunes, and announces each phase."""

    def __init__(self, place: Place) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            os._exit(_prune(place, writing))
        os.close(writing)
        self._pipe, self.phases = reading, ["start"]
        self.times = [time.monotonic()]

    def read(self) -> bool:
        """Wait for the next phases; returns False once the process has ended."""
        text = os.read(self._pipe, 4096).decode()
        for phase in text.splitlines():
            self.phases.append(phase)
            self.times.append(time.monotonic())
        return bool(text)

    def end(self) -> int:
        """Wait for the end of the process; returns its exit status, negative for a signal."""
        while self.read():
            pass
        os.close(self._pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> int:
        """Kill the process as the kernel does when memory runs out; returns the exit status."""
        os.kill(self.pid, signal.SIGKILL)
        return self.end()


def _prune(place: Place, pipe: int) -> int:
    """Run the child: prune with phases announced; returns the exit status."""
    try:
        _announce(pipe)
        if place.quick:
            without_what_has_other_tests(SimpleNamespace(setattr=setattr))
        tempfile.tempdir = str(place.directory / "temporary")
        there = place.out.exists()
        if place.compared:
            _compare(place)
        else:
            prune_checkpoint(place.directory / "model", place.out, place.config)
    except OutputError as error:
        # A run that was killed in its last microseconds had already finished.
        return 0 if there and "is not empty" in error.cause else _said(error)
    except BaseException as error:
        return _said(error)
    return 0


def _compare(place: Place) -> None:
    """Run a comparison of two methods, each in a process of its own."""
    common = {name: getattr(place.config, name) for name in ("calibration", *COMMON) if name not in NOT_COMMON}
    variants = {name: {"method": name} for name in ("magnitude", "wanda")}
    result = compare(place.directory / "model", place.out, variants, [Setting(structure="2:4", sparsity=0.5)], common)
    if any(cell.status != "finished" for cell in result.cells):
        raise RuntimeError(f"a cell has failed: {result.cells}")


def _said(error: BaseException) -> int:
    traceback.print_exception(error)
    return 1


def _announce(pipe: int) -> None:
    """Write the name of each phase to a pipe when it begins."""

    def announced(holder: Any, attribute: str, name: str | None = None) -> None:
        original = getattr(holder, attribute)

        def call(*arguments: Any, **named: Any) -> Any:
            # A clock's phases are named by their argument.
            os.write(pipe, f"{name or arguments[1]}\n".encode())
            return original(*arguments, **named)

        setattr(holder, attribute, call)

    announced(opening, "prepare_texts", "texts")
    announced(opening, "foresee", "plan")
    announced(opening, "loaded", "load")
    announced(Checkpoints, "restore", "restore")
    announced(Clock, "phase")
    announced(Checkpoints, "write", "checkpoint")
    announced(hugging_face, "save_model", "export")
    announced(hugging_face, "verify_export", "check")
    announced(export, "_compare_speed", "speed")
    announced(export, "_write_report", "report")
    announced(RunDirectory, "finish", "move")
    announced(RunDirectory, "remove", "tidy up")


def digests(out: Path) -> dict[str, str]:
    """SHA-256 of all weight files of a result, or the measures of a comparison."""
    if (out / "comparison.json").is_file():
        cells = Comparison.model_validate_json((out / "comparison.json").read_bytes()).cells
        measured = {cell.variant: cell.measures for cell in cells}
        return {name: f"{m.perplexity} {m.divergence} {m.sparsity}" for name, m in measured.items() if m is not None}
    files = sorted(out.rglob("*.safetensors"))
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prepared(directory: Path, options: dict[str, Any], quick: bool) -> Place:
    """Prepare the directory of a case: model, text, and the weights of a run that is not killed."""
    generator = random.Random(0)
    for name in ("results", "temporary"):
        (directory / name).mkdir(parents=True)
    text = directory / "text.txt"
    text.write_text(" ".join(f"w{generator.randrange(VOCABULARY)}" for _ in range(20_000)), encoding="utf8")
    if (pid := os.fork()) == 0:
        llama(hidden_size=96, intermediate_size=256, num_hidden_layers=4).save_pretrained(directory / "model")
        tokenizer().save_pretrained(directory / "model")
        os._exit(0)
    os.waitpid(pid, 0)
    options = {**COMMON, "calibration": str(text), **options}
    compared = options.pop(COMPARED, False)
    place = Place(directory, PruneConfig.from_mapping(options), quick, compared)
    attempt = Attempt(place)
    if attempt.end():
        raise SystemExit("The run that nobody kills has failed.")
    ends = [*attempt.times[1:], time.monotonic()]
    for phase, begin, end in zip(attempt.phases, attempt.times, ends, strict=True):
        place.seconds[phase] = max(place.seconds.get(phase, 0.0), end - begin)
    place.weights = digests(place.out)
    _clear(place)
    return place


def _clear(place: Place) -> None:
    for path in sorted(place.out.rglob("*"), key=lambda path: -len(path.parts)):
        path.rmdir() if path.is_dir() else path.unlink()
    place.out.rmdir()


def drawn(place: Place, generator: random.Random) -> tuple[str, int]:
    """Draw a phase that is still to come in the next attempt, and the number of its occurrence."""
    run = place.out.with_name("out.run")
    done = Checkpoints(run).shots()[0] if run.is_dir() and Checkpoints(run).shots() else 0
    left = place.config.shots - done
    phases = [phase for phase in place.seconds if left or phase not in IN_SHOTS]
    phase = generator.choice(["restore", *phases] if done else phases)
    return phase, generator.randint(1, left) if phase in IN_SHOTS else 1


def run_until_done(place: Place, generator: random.Random, budget: int) -> dict[str, Any]:
    """Kill a run again and again, at most ``budget`` times; returns the phases of the kills and the outcome."""
    kills: list[str] = []
    while True:
        spared = len(kills) == budget or generator.random() < SPARED
        phase, times = drawn(place, generator)
        attempt = Attempt(place)
        if spared or not _killed(attempt, phase, times, generator.random() * place.seconds.get(phase, 0.01)):
            status = attempt.end()
            break
        kills.append(attempt.phases[-1])
    # The process of a cell ends a moment after its parent.
    time.sleep(0.5 if place.compared else 0.0)
    same = status == 0 and digests(place.out) == place.weights
    left = [path.name for path in place.out.parent.iterdir() if path.name != "out"]
    left += [path.name for path in (place.directory / "temporary").iterdir()]
    _clear(place)
    return {"kills": kills, "status": status, "same": same, "left": left}


def _killed(attempt: Attempt, phase: str, times: int, delay: float) -> bool:
    """Kill an attempt a moment after a phase has begun; returns False if it ends before that."""
    while attempt.phases.count(phase) < times:
        if not attempt.read():
            return False
    time.sleep(delay)
    if os.waitid(os.P_PID, attempt.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
        return False
    attempt.kill()
    return True


def measured(kills: int, seed: int, cases: list[str], quick: bool) -> Iterator[dict[str, Any]]:
    """Run all cases in turn until there were enough kills; yields the outcome of each run."""
    generator, runs = random.Random(seed), cast(list[dict[str, Any]], [])
    with tempfile.TemporaryDirectory() as scratch:
        places = {name: prepared(Path(scratch) / str(n), CASES[name], quick) for n, name in enumerate(cases)}
        while (missing := kills - sum(len(run["kills"]) for run in runs)) > 0:
            name = cases[len(runs) % len(cases)]
            runs.append({"case": name, **run_until_done(places[name], generator, missing)})
            print(runs[-1], file=sys.stderr)
            yield runs[-1]


def markdown(result: dict[str, Any]) -> str:
    """Result in words and a table, as Markdown."""
    runs = result["runs"]
    phases = Counter(phase for run in runs for phase in run["kills"])
    good = [run for run in runs if run["same"] and not run["left"]]
    most = max(len(run["kills"]) for run in runs)
    names = ("start", "texts", "plan", "load", "restore", *IN_SHOTS, "export", "check", "speed", "report", "move")
    rows = [(name, phases[name]) for name in (*names, "tidy up") if phases[name]]
    cases = "; ".join(f"{name} ({sum(run['case'] == name for run in runs)} runs)" for name in CASES)
    return (
        f"# Killed runs\n\n{result['date']}, {result['machine']}, {result['threads']} threads. "
        f"Command: `{result['command']}`\n\n{sum(phases.values())} kills (SIGKILL) in {len(runs)} runs of "
        f"{COMMON['shots']} shots of a random model, up to {most} in one run; each was begun again until it ended. "
        f"**{len(good)} of {len(runs)} have weight files that are byte for byte those of a run that nobody killed, and "
        f"left nothing else behind.** Runs: {cases}.\n\n{table(('killed in', 'kills'), rows)}\n"
    )


def main() -> None:
    """Kill runs, compare their weights, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=CASES, help="one case")
    parser.add_argument("--more", action="store_true", help="add to an earlier result")
    parser.add_argument("--quick", action="store_true", help="one case, runs as in tests, nothing written")
    arguments = parser.parse_args()
    cases = [arguments.only] if arguments.only else list(CASES)[:1] if arguments.quick else list(CASES)
    earlier = finished("faults") if arguments.more else {"runs": [], "command": ""}
    runs, command = earlier["runs"], " ".join(["python benchmarks/faults.py", *sys.argv[1:]])
    commands = "; ".join(filter(None, [earlier["command"], command]))
    for run in measured(arguments.kills, arguments.seed, cases, arguments.quick):
        runs.append(run)
        if not arguments.quick:
            result = {**circumstances(commands), "runs": runs}
            write("faults", result, markdown(result))
    raise SystemExit(any(run["status"] or run["left"] or not run["same"] for run in runs))


if __name__ == "__main__":
    main()

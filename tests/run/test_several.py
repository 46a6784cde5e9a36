"""Runs of several processes, started by torchrun: the result of one process, one writer, and no process left behind."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import fresh
import several
import several_recover
from llm_surgeon import RecoveryRecord, load, prune_checkpoint
from llm_surgeon.cli import app

TESTS = Path(__file__).parent.parent
SMALL = [
    "--preset",
    "none",
    "--samples",
    "8",
    "--seq-len",
    "32",
    "--eval-window",
    "64",
    "--eval-tokens",
    "512",
    "--precision",
    "float32",
]
# Nothing takes as long; a test that waits for it has found a process that hangs.
PATIENCE = 180


def started(processes, *command, python=None):
    """Several processes by torchrun, a thread each."""
    launcher = [
        python or sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [*launcher, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(run):
    """Exit status, standard output and standard error of a run that ends in time."""
    try:
        output, errors = run.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        run.kill()
        raise
    return run.returncode, output, errors


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    words = torch.randint(64, (6000,), generator=torch.Generator().manual_seed(0)).cumsum(0) % 64
    path = tmp_path_factory.mktemp("several") / "text.txt"
    path.write_text(" ".join(f"w{word}" for word in words.tolist()), encoding="utf8")
    return path


@pytest.fixture(scope="module")
def alone(text):
    """What one process makes of each recipe."""
    return {name: several.run(name, str(text)) for name in several.RECIPES}


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_make_what_one_makes(text, alone, tmp_path, processes):
    status, _, errors = ended(started(processes, TESTS / "several.py", text, tmp_path))
    assert status == 0, errors
    for name, (expected, perplexities) in alone.items():
        found, *others = (load_file(tmp_path / f"{name}-{rank}") for rank in range(processes))
        for other in others:
            assert all(torch.equal(found[key], other[key]) for key in found), f"{name}: processes differ"
        assert found.pop("perplexities").tolist() == pytest.approx(perplexities, rel=1e-4), name
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            # Shapes, indices and zeros are what was removed; other weights are the same to rounding.
            assert value.shape == found[key].shape, f"{name}: {key}"
            assert torch.equal(value == 0, found[key] == 0), f"{name}: {key}"
            assert torch.allclose(value.double(), found[key].double(), rtol=1e-3, atol=1e-4), f"{name}: {key}"


def pruning(processes, checkpoint, text, out, *options, python=None):
    command = ["-m", "llm_surgeon", "prune", checkpoint, "--out", out, "--calibration", text, "--device", "cpu"]
    return started(processes, *command, *SMALL, *options, python=python)


def test_one_of_them_writes_shows_and_reports(checkpoint, text, tmp_path):
    out = tmp_path / "out"
    options = ["--shots", "2", "--export-shots", "1", "--structure", "neurons+heads", "--round-to", "4"]
    status, output, errors = ended(pruning(2, checkpoint, text, out, *options, "--sparsity", "0.3"))
    assert status == 0, errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert output.count("The reloaded export agrees") == 1
    assert errors.count("shot 2/2: curvature: done") == errors.count("measuring the speed") == 1
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    assert report["processes"] == 2
    assert report["shots"][-1]["size"]["total"] < report["dense_size"]["total"]
    assert report["speed"] is not None
    assert sum(p.numel() for p in load(out, device="cpu")[0].parameters()) == report["shots"][-1]["size"]["total"]
    assert json.loads((out / "shot-1" / "report.json").read_text(encoding="utf8"))["processes"] == 2


def test_each_of_them_streams_its_weights(checkpoint, text, tmp_path):
    results = []
    for processes, weights in ((1, "resident"), (2, "streamed")):
        out, options = tmp_path / weights, ["--shots", "2", "--sparsity", "0.3", "--order", "layer-major"]
        status, _, errors = ended(pruning(processes, checkpoint, text, out, *options, "--weights", weights))
        assert status == 0, errors
        # Of streamed weights no speed is measured.
        report = json.loads((out / "report.json").read_text(encoding="utf8"))
        assert (report["speed"] is None) == report["plan"]["streamed"] == (weights == "streamed")
        assert report["plan"]["processes"] == processes
        results.append(load(out, device="cpu")[0].state_dict())
    expected, found = results
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(value, found[key], rtol=1e-3, atol=1e-4)


def test_they_are_planned_together(checkpoint, text, tmp_path):
    out, options = tmp_path / "out", ["--shots", "1", "--sparsity", "0.3", "--host-memory"]
    status, _, errors = ended(pruning(2, checkpoint, text, out, *options, "100MiB"))
    assert status != 0
    assert errors.count("in 2 processes, and --host-memory is 0.10 GiB") == 1
    assert "llm_surgeon/" not in errors
    assert not list(tmp_path.iterdir())
    status, _, errors = ended(pruning(2, checkpoint, text, out, *options, "64GiB"))
    assert status == 0, errors
    planned = json.loads((out / "report.json").read_text(encoding="utf8"))["plan"]
    assert planned["host_available"] == 2**35
    assert planned["order"] == "batch-major"


def test_they_recover_an_export_as_one_does(checkpoint, text, tmp_path):
    """Weights, gradients and moments are shared out, and the losses and the result are those of one process."""
    export, options = tmp_path / "export", {"samples": 8, "seq_len": 32, "preset": "none", "shots": 1, "device": "cpu"}
    prune_checkpoint(checkpoint, export, calibration=text, structure="2:4", evaluation="none", **options)
    given = [str(export), str(checkpoint), str(text)]
    (tmp_path / "two").mkdir()
    status, _, errors = ended(started(2, TESTS / "several_recover.py", *given, tmp_path / "two"))
    assert status == 0, errors
    assert errors.count("The training cannot begin in another process. The export is as it was pruned") == 1
    report = json.loads((tmp_path / "two" / "as pruned" / "report.json").read_text(encoding="utf8"))
    assert report["recovery"] is None
    for name in several_recover.RECOVERIES:
        alone = several_recover.run(name, *given, tmp_path / "one")
        shared = RecoveryRecord.model_validate_json((tmp_path / "two" / name / "recovery.json").read_bytes())
        assert (alone.processes, shared.processes) == (1, 2)
        losses = [[point.loss for point in record.curves.losses] for record in (alone, shared)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4), name
        points = [[point.perplexity.nll for point in record.curves.points] for record in (alone, shared)]
        assert points[1] == pytest.approx(points[0], rel=1e-4), name
        one, two = (load_file(tmp_path / which / name / "model.safetensors") for which in ("one", "two"))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.equal(value == 0, two[key] == 0), f"{name}: {key}"
            assert torch.allclose(value.double(), two[key].double(), rtol=1e-3, atol=1e-3), f"{name}: {key}"
        assert not (tmp_path / "two" / f"{name}.run").exists()


def test_when_one_is_killed_the_others_end_and_another_number_continues(checkpoint, text, tmp_path):
    out, options = tmp_path / "out", ["--shots", "12", "--sparsity", "0.3", "--eval-tokens", "64"]
    # Real processes: a kill is to meet one of them, and nobody who stands for it.
    run = pruning(3, checkpoint, text, out, *options, python=fresh.REAL)
    try:
        for line in run.stderr:
            if "shot 2/" in line:
                break
        workers = psutil.Process(run.pid).children()
        (last,) = [worker for worker in workers if worker.environ().get("RANK") == "2"]
        last.kill()
        status, _, errors = ended(run)
    finally:
        run.kill()
    assert status != 0
    assert not psutil.wait_procs(workers, timeout=0)[1], "a process is left"
    assert "nother process of this run has ended" in errors
    # torchrun has a stack trace of its own.
    assert "llm_surgeon/" not in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out.run"]
    status, _, errors = ended(pruning(2, checkpoint, text, out, *options))
    assert status == 0, errors
    assert errors.count("continuing after shot") == 1
    assert "processes was '3' and is '2'" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    report = json.loads((out / "report.json").read_text(encoding="utf8"))
    assert len(report["shots"]) == 12
    assert len(report["continued"]) == 1


def test_mistakes_are_said_once(checkpoint, text, tmp_path):
    status, output, errors = ended(pruning(2, checkpoint, text, tmp_path / "out", "--samples", "1"))
    assert status != 0
    assert (output + errors).count("1 calibration sequences cannot be shared out among 2 processes") == 1
    assert "llm_surgeon/" not in errors
    assert not (tmp_path / "out").exists()


def test_commands_for_one_process_refuse_several(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    # The command is about to end, and ignores torchrun's signal; this process is not.
    monkeypatch.setattr(signal, "signal", lambda _number, _handler: None)
    for arguments in (["plan", "m"], ["eval", "m"], ["bench", "m"], ["compare", "m", "--out", "c"]):
        # No torchrun is there whose store could be asked who else has said it.
        done = CliRunner().invoke(app, arguments)
        assert done.exit_code == 1
        assert f"`llm-surgeon {arguments[0]}` works in one process" in " ".join(done.output.split())


def test_they_go_on_together_inside_a_shot(checkpoint, text, tmp_path):
    status, _, errors = ended(started(2, TESTS / "several_inside.py", checkpoint, text, tmp_path))
    assert status == 0, errors
    (expected,), (found,) = ([*(tmp_path / name).glob("*.safetensors")] for name in ("whole", "ended"))
    assert expected.read_bytes() == found.read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "ended"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_machines_make_what_one_process_makes(checkpoint, text, tmp_path):
    """As on two machines with the output's directory in common and no other: each has its own copies and scratch."""
    options = ["--preset", "best", "--samples", "8", "--seq-len", "32", "--evaluation", "none", "--device", "cpu"]
    options += ["--precision", "float32", "--structure", "neurons+heads", "--sparsity", "0.3", "--round-to", "4"]
    command = ["-m", "llm_surgeon", "prune", checkpoint, "--out", tmp_path / "alone", "--calibration", text, *options]
    alone = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert alone.returncode == 0, alone.stderr
    port, runs = free_port(), []
    for node in range(2):
        machine = tmp_path / f"machine-{node}"
        shutil.copytree(checkpoint, machine / "model")
        shutil.copy(text, machine / "text.txt")
        (machine / "tmp").mkdir()
        where = ["--nnodes=2", f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--nproc-per-node=1", "-m", "llm_surgeon"]
        command += ["prune", "model", "--out", str(tmp_path / "out"), "--calibration", "text.txt", *options]
        runs.append(
            subprocess.Popen(
                command,
                cwd=machine,
                env=os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(machine / "tmp")},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for run in runs:
        status, _, errors = ended(run)
        assert status == 0, errors
    expected, found = (load(tmp_path / name, device="cpu")[0].state_dict() for name in ("alone", "out"))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(value, found[key], rtol=1e-3, atol=1e-4)
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf8"))
    assert report["processes"] == 2

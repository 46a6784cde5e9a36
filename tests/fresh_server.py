"""The server of ``fresh``: imports what takes long, and forks a child for each Python that is asked for.

``python -I fresh_server.py DIRECTORY`` serves until the tests that made the folder end.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import gc
import importlib.util
import io
import json
import locale
import os
import resource
import runpy
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import threading
import types

sys.path.insert(0, os.path.dirname(__file__))
from fresh import SIGNALS, received

# The child's modules come from where it finds them.
del sys.path[0]

STREAMS = ("stdin", "stdout", "stderr")
# Not pyarrow, and what imports it: it starts a thread, which a fork would lose.
PRELOADED = (
    *("torch", "torch.distributed.launcher.api", "torch.nn.utils.parametrize", "torch.nn.utils.prune", "torch._dynamo"),
    *("torch._subclasses.fake_tensor", "transformers", "transformers.modeling_utils", "transformers.generation"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("safetensors.torch", "tokenizers", "huggingface_hub", "accelerate", "gguf", "peft", "numpy", "scipy.optimize"),
    *("matplotlib.figure", "matplotlib.style", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
    *("pydantic.main", "pydantic.type_adapter", "typer", "rich.progress", "rich.table", "rich.logging", "rich.markup"),
    *("filelock", "psutil", "yaml"),
)


def serve(directory: str) -> dict:
    """Serve until the tests end; returns in children only, with what they are to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in PRELOADED:
        importlib.import_module(name)
    found = [name for name in sys.modules if name.split(".")[0] == "llm_surgeon"]
    assert not found, found
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose threads"
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(directory + "/unready")
    listening.listen(64)
    os.rename(directory + "/unready", directory + "/socket")
    gc.collect()
    gc.freeze()
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    # Ends with the tests.
    selector.register(os.open(directory + "/alive", os.O_RDONLY), selectors.EVENT_READ, "alive")
    while True:
        for key, _ in selector.select():
            if key.data == "alive":
                for other in [*selector.get_map().values()]:
                    if isinstance(other.data, int):
                        os.kill(other.data, signal.SIGKILL)
                shutil.rmtree(directory, ignore_errors=True)
                os._exit(0)
            elif key.fileobj is listening:
                selector.register(listening.accept()[0], selectors.EVENT_READ, None)
            elif key.data is None:
                if (request := forked(selector, key.fileobj)) is not None:
                    return request
            elif key.fileobj not in selector.get_map():
                continue  # ended since
            elif isinstance(key.data, int):
                # Whoever asked has ended by a kill.
                os.kill(key.data, signal.SIGKILL)
                selector.unregister(key.fileobj)
            else:
                reaped(selector, key)


def forked(selector, connection) -> dict | None:
    """Take a request and fork; returns it in the child."""
    selector.unregister(connection)
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    if len(head) < 8 or len(streams) < 3:
        connection.close()
        return None
    request = json.loads(received(connection, int.from_bytes(head, "big")))
    child = os.fork()
    if child == 0:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        # By the objects that hold them, which would close them later, when the numbers belong to others.
        for key in [*selector.get_map().values()]:
            key.fileobj.close() if isinstance(key.fileobj, socket.socket) else os.close(key.fileobj)
        selector.close()
        connection.close()
        os.closerange(3, 1 << 10)
        return request
    for stream in streams:
        os.close(stream)
    connection.sendall(child.to_bytes(8, "big"))
    selector.register(connection, 1, child)
    selector.register(os.pidfd_open(child), 1, (child, connection))
    return None


def reaped(selector, key) -> None:
    """Hand on the exit status of a child that has ended."""
    child, connection = key.data
    selector.unregister(key.fileobj)
    os.close(key.fileobj)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(KeyError):
        selector.unregister(connection)
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    connection.close()


# What follows is the child, which plays a Python that has just been started.


def be_fresh(request: dict) -> None:
    """Take over all that a process has from the one that starts it."""
    os.setsid()
    for number in SIGNALS:
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else default)
    os.umask(request["mask"])
    os.chdir(request["directory"])
    for name, limit in request["limits"].items():
        resource.setrlimit(getattr(resource, name), tuple(limit))
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(request["environment"])
    locale.setlocale(locale.LC_CTYPE, "")
    tempfile.tempdir = None
    set_what_was_read_early(before)
    make_streams(request["closed"], request["unbuffered"])
    sys.executable, sys.argv = request["program"], [request["what"], *request["arguments"]]
    sys.orig_argv = [request["program"], *request["arguments"]]
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        # Bytecode of the package goes to a folder of the tests; else every child would compile it.
        sys.dont_write_bytecode, sys.pycache_prefix = False, request["bytecode"]
    importlib.invalidate_caches()
    sys.modules.pop("sitecustomize", None)
    if importlib.util.find_spec("sitecustomize") is not None:
        importlib.import_module("sitecustomize")


def set_what_was_read_early(before: dict[str, str]) -> None:
    """Bring what packages have read from the environment on import to what it is now."""
    changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    if "HF_HUB_OFFLINE" in changed or os.environ.get("HF_HUB_OFFLINE") != before.get("HF_HUB_OFFLINE"):
        constants = sys.modules["huggingface_hub.constants"]
        constants.HF_HUB_OFFLINE = constants._is_true(os.environ.get("HF_HUB_OFFLINE"))
    if "HF_MODULES_CACHE" in changed:
        for module in [*sys.modules.values()]:
            if "HF_MODULES_CACHE" in getattr(module, "__dict__", {}):
                module.HF_MODULES_CACHE = changed["HF_MODULES_CACHE"]
    if "OMP_NUM_THREADS" in changed:
        sys.modules["torch"].set_num_threads(int(changed["OMP_NUM_THREADS"]))


def make_streams(closed: list[int], unbuffered: bool) -> None:
    """Standard streams as Python makes them."""
    encoding = codecs.lookup(locale.getencoding()).name
    plain = locale.setlocale(locale.LC_CTYPE) in ("C", "POSIX", "C.UTF-8", "C.utf8", "UTF-8")
    for number, name in enumerate(STREAMS):
        if number in closed:
            os.close(number)
            stream = None
        else:
            raw = io.FileIO(number, "w" if number else "r", closefd=False)
            errors = "backslashreplace" if number == 2 else "surrogateescape" if plain else "strict"
            buffer = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
            raw.name = f"<{name}>"
            lines = not unbuffered and (number == 2 or raw.isatty())
            stream = io.TextIOWrapper(buffer, encoding, errors, line_buffering=lines, write_through=unbuffered)
            stream.mode = "w" if number else "r"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def play(request: dict) -> None:
    """Run what Python was given to run, in a main module of its own."""
    what, front = request["what"], None
    if request["kind"] == "-m":
        front = os.getcwd()
    elif request["kind"] == "-c":
        front, sys.argv[0] = "", "-c"
    else:
        front = os.path.dirname(os.path.realpath(what))
    if not request["safe"]:
        sys.path.insert(0, front)
    if request["kind"] == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
        return
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if request["kind"] == "-c":
        source, name = what, "<string>"
    else:
        main.__file__ = name = os.path.abspath(what)
        with open(what, "rb") as file:
            source = file.read()
    exec(compile(source, name, "exec", dont_inherit=True), main.__dict__)


def play_to_the_end(request: dict) -> None:
    """Play, and end as Python does, but leave it to the kernel to take torch apart."""
    status = 0
    try:
        play(request)
    except SystemExit as error:
        if error.code is not None and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except OSError:
            status = 120 if status == 0 else status
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    asked = serve(sys.argv[1])
    asked["bytecode"] = sys.argv[1] + "/bytecode"
    be_fresh(asked)
    play_to_the_end(asked)

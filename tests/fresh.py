"""A fresh Python for tests, which has imported torch and transformers before it is asked for.

Starting Python and importing both takes seconds, and many tests start a process. ``Server.program`` is a program that
takes the arguments of ``python``. It hands its arguments, environment and standard streams to a server, which has
imported packages of others and nothing of this one, and has done no work. The server forks; the child plays the fresh
Python. Signals are passed on, and the exit status is the child's.

What cannot be played is not: for options and variables that the server knows nothing of, the program becomes the real
Python. The program imports this file in an interpreter without site packages, so nothing at its top takes time.

    python -I fresh.py DIRECTORY    the server
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

# The real Python, and the variable that has the path of the program that stands for it.
REAL = sys.executable
VARIABLE = "LLM_SURGEON_FRESH_PYTHON"
STREAMS = ("stdin", "stdout", "stderr")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Variables that something reads when Python starts or a package is imported. They have to be what the server was
# started with, but for those that the child sees to.
READ_EARLY = ("PYTHON", "LC_", "LANG", "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "CUDA")
READ_EARLY += ("ACCELERATE_", "MKL_", "OPENBLAS_", "KMP_", "LD_", "MALLOC_", "MPL", "MATPLOTLIB", "XDG_", "HOME")
SEEN_TO = ("PYTHONPATH", "PYTHONUNBUFFERED", "HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
# Python's switches against everything but ASCII, and whether the child can play them.
ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
# Not pyarrow, and what imports it: it starts a thread, which a fork would lose.
PRELOADED = (
    *("torch", "torch.distributed.run", "torch._dynamo", "torch._subclasses.fake_tensor", "torch.nn.utils.parametrize"),
    *("transformers", "transformers.modeling_utils", "transformers.generation", "transformers.integrations"),
    *(
        "transformers.models.llama.modeling_llama",
        "transformers.models.auto.modeling_auto",
        "transformers.trainer_utils",
    ),
    *("safetensors.torch", "tokenizers", "accelerate", "gguf", "huggingface_hub", "numpy", "scipy.optimize", "yaml"),
    *("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.ticker", "typer", "psutil"),
    *(
        "matplotlib.style",
        "matplotlib.backends.backend_svg",
        "pydantic.main",
        "pydantic.type_adapter",
        "torch.nn.utils.prune",
    ),
    *("rich.progress", "rich.table", "rich.logging", "rich.markup", "filelock", "peft"),
)


def environment() -> dict[str, str]:
    """Variables and mounts of this process, as text."""
    return dict(os.environ) | {"/mounts": os.readlink("/proc/self/ns/mnt")}


# What follows is the program that stands for Python.


def become_python(arguments: list[str]) -> None:
    """Be the real Python from here on."""
    os.execv(sys.executable, [sys.executable, *arguments])


def parsed(arguments: list[str]) -> dict[str, object] | None:
    """Python's arguments taken apart; None for options that the child cannot play."""
    rest, safe, unbuffered = [*arguments], False, bool(os.environ.get("PYTHONUNBUFFERED"))
    while rest and rest[0] in ("-P", "-u"):
        safe, unbuffered = safe or rest[0] == "-P", unbuffered or rest[0] == "-u"
        del rest[0]
    if len(rest) >= 2 and rest[0] in ("-c", "-m"):
        return {"kind": rest[0], "what": rest[1], "arguments": rest[2:], "safe": safe, "unbuffered": unbuffered}
    if rest and not rest[0].startswith("-"):
        return {"kind": "", "what": rest[0], "arguments": rest[1:], "safe": safe, "unbuffered": unbuffered}
    return None


def can_be_played(server: dict[str, str]) -> bool:
    """Whether nothing that is read early is other than it was when the server started."""
    here = environment()
    ascii_only = all(here.get(name) == value for name, value in ASCII_ONLY.items())
    for name in here.keys() | server.keys():
        early = name.startswith((*READ_EARLY, "/")) and name not in SEEN_TO
        if early and here.get(name) != server.get(name) and not (ascii_only and name in ASCII_ONLY):
            return False
    # A default of it is made from other variables.
    return "HF_MODULES_CACHE" in here or "HF_MODULES_CACHE" not in server


def open_closed_streams() -> list[int]:
    """Numbers of the standard streams that are closed; here they are open from now on, to nothing."""
    closed = []
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            closed.append(number)
            os.open(os.devnull, os.O_RDWR)
    return closed


def connected(directory: str) -> socket.socket | None:
    """A connection to the server, which is started if there is none; None if it cannot be."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(directory + "/socket")
        return connection
    except OSError:
        pass
    import fcntl
    import subprocess
    import time

    with open(directory + "/lock", "w") as lock, open(directory + "/said", "ab") as said:
        fcntl.flock(lock, fcntl.LOCK_EX)
        begun = None
        while True:
            try:
                connection.connect(directory + "/socket")
                return connection
            except OSError:
                if os.path.exists(directory + "/failed"):
                    return None
                if begun is None:
                    with open(directory + "/environment") as file:
                        variables = {k: v for k, v in json.load(file).items() if not k.startswith("/")}
                    # numpy's threads start on import.
                    variables["OPENBLAS_NUM_THREADS"] = "1"
                    command = [sys.executable, "-I", __file__, directory]
                    begun = subprocess.Popen(
                        command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=variables, cwd="/"
                    )
                if begun.poll() is not None:
                    open(directory + "/failed", "w").close()
                    return None
            time.sleep(0.02)


def main() -> None:
    """The whole of the program: have a child play, pass on signals, and end as it ends."""
    directory, arguments = os.path.dirname(sys.argv[0]), sys.argv[1:]
    request = parsed(arguments)
    with open(directory + "/environment") as file:
        session = json.load(file)
    if request is None or not can_be_played(session):
        become_python(arguments)
        return
    closed = open_closed_streams()
    connection = connected(directory)
    if connection is None:
        for number in closed:
            os.close(number)
        become_python(arguments)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    request |= {"program": sys.argv[0], "environment": dict(os.environ), "directory": os.getcwd(), "closed": closed}
    request |= {"ignored": ignored, "limits": limits(), "mask": os.umask(0o022)}
    os.umask(int(str(request["mask"])))
    message = json.dumps(request).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(message)
    child = int.from_bytes(received(connection, 8), "big")
    if not child:
        os._exit(70)
    for number in PASSED_ON:
        if number not in ignored:
            signal.signal(number, lambda number, _: os.kill(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    status = int.from_bytes(received(connection, 8), "big", signed=True)
    for number in PASSED_ON:
        signal.signal(number, signal.SIG_IGN)
    if status >= 0:
        os._exit(status)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(71)


def limits() -> dict[str, tuple[int, int]]:
    """All limits of this process."""
    import resource

    names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
    return {name: resource.getrlimit(getattr(resource, name)) for name in names}


def received(connection: socket.socket, size: int) -> bytes:
    """So many bytes, or zeros if the server has ended."""
    data = b""
    while len(data) < size:
        if not (part := connection.recv(size - len(data))):
            return bytes(size)
        data += part
    return data


# What follows is the server.


def serve(directory: str) -> dict:
    """Serve until the tests end; returns in children only, with what they are to do."""
    import gc
    import importlib
    import selectors
    import shutil

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
    import contextlib

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
    import importlib.util
    import locale
    import resource
    import tempfile

    os.setsid()
    for number in PASSED_ON:
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
    import codecs
    import io
    import locale

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
    import runpy
    import types

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
    import atexit
    import threading

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


# What follows is for the tests.


class Server:
    """The server, which starts when it is first needed, and its folder.

    Attributes:
        program: Path of the program that stands for Python.
    """

    def __init__(self, directory: str) -> None:
        self.directory, self.program = directory, directory + "/python"
        os.mkfifo(directory + "/alive")
        # The server reads the other end, and ends with this process, however that ends.
        self._alive = os.open(directory + "/alive", os.O_RDWR)
        with open(directory + "/environment", "w") as file:
            json.dump(environment(), file)
        code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r}); import fresh; fresh.main()\n"
        with open(self.program, "w") as file:
            file.write(f"#!{REAL} -IS\n{code}")
        os.chmod(self.program, 0o755)

    def close(self) -> None:
        """End the server."""
        import shutil

        os.close(self._alive)
        shutil.rmtree(self.directory, ignore_errors=True)


if __name__ == "__main__":
    asked = serve(sys.argv[1])
    asked["bytecode"] = sys.argv[1] + "/bytecode"
    be_fresh(asked)
    play_to_the_end(asked)

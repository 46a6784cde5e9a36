"""A fresh Python for tests, which has imported torch and transformers before it is asked for.

Starting Python and importing both takes seconds, and many tests start a process. ``Server.program`` is a program that
takes the arguments of ``python``. It hands its arguments, environment and standard streams to a server, which has
imported packages of others and nothing of this one, and has done no work. The server forks; the child plays the fresh
Python. Signals are passed on, and the exit status is the child's. Which packages of others a process has imported,
how it uses memory, and what it does as Python starts is not seen so: such tests take the fixture ``real_python``.

What cannot be played is not: for options and variables that the server knows nothing of, the program becomes the real
Python. The program imports this file in an interpreter without site packages, so nothing at its top takes time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# The real Python, and the variable that has the path of the program that stands for it.
REAL = sys.executable
VARIABLE = "LLM_SURGEON_FRESH_PYTHON"
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
# Variables that something reads when Python starts or a package is imported. They have to be what the server was
# started with, but for those that the child sees to.
READ_EARLY = ("PYTHON", "LC_", "LANG", "HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "TORCH_", "PYTORCH_", "CUDA")
READ_EARLY += ("ACCELERATE_", "MKL_", "OPENBLAS_", "KMP_", "LD_", "MALLOC_", "MPL", "MATPLOTLIB", "XDG_", "HOME")
SEEN_TO = ("PYTHONPATH", "PYTHONUNBUFFERED", "HF_MODULES_CACHE", "HF_HUB_OFFLINE", "TORCH_NCCL_ASYNC_ERROR_HANDLING")
# lm_eval sets both in a process that imports it; neither matters to tests.
SEEN_TO += ("HF_XET_HIGH_PERFORMANCE", "KMP_DUPLICATE_LIB_OK")
# Python's switches against everything but ASCII, and whether the child can play them.
ASCII_ONLY = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def environment() -> dict[str, str]:
    """Variables and mounts of this process, as text."""
    return dict(os.environ) | {"/mounts": os.readlink("/proc/self/ns/mnt")}


# What follows is the program that stands for Python.


def become_python(arguments: list[str]) -> NoReturn:
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
    # Their defaults are made from something else.
    return all(name in here or name not in server for name in ("HF_MODULES_CACHE", "OMP_NUM_THREADS"))


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
                    command = [sys.executable, "-I", __file__.replace("fresh.py", "fresh_server.py"), directory]
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
    closed = open_closed_streams()
    connection = connected(directory)
    if connection is None:
        for number in closed:
            os.close(number)
        become_python(arguments)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    ignored = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    request |= {"program": sys.argv[0], "environment": dict(os.environ), "directory": os.getcwd(), "closed": closed}
    request |= {"ignored": ignored, "limits": limits(), "mask": os.umask(0o022)}
    os.umask(int(str(request["mask"])))
    message = json.dumps(request).encode()
    socket.send_fds(connection, [len(message).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(message)
    child = int.from_bytes(received(connection, 8), "big")
    if not child:
        os._exit(70)
    for number in SIGNALS:
        if number not in ignored:
            signal.signal(number, lambda number, _: pass_on(child, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    status = int.from_bytes(received(connection, 8), "big", signed=True)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if status >= 0:
        os._exit(status)
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(71)


def pass_on(child: int, number: int) -> None:
    """Send a signal on; whoever has ended needs none."""
    import contextlib

    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


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


# What follows is for the tests.


def possible() -> bool:
    """Whether processes can be forked here and waited for as the server does."""
    # A fork of a process that has seen a GPU cannot use it.
    if sys.platform != "linux" or os.path.exists("/dev/nvidiactl") or " " in REAL or len(REAL) > 200:
        return False
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


class Server:
    """The server, which starts when it is first needed, and its folder.

    Attributes:
        program: Path of the program that stands for Python; of the real one where nothing can be executed.
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
        if not os.access(self.program, os.X_OK):
            self.program = REAL

    def close(self) -> None:
        """End the server."""
        import shutil

        os.close(self._alive)
        shutil.rmtree(self.directory, ignore_errors=True)

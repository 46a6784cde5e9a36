"""Other packages kept quiet while tasks run: no log lines, no bars, and one attempt to reach the hub of data sets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import datasets
import huggingface_hub
from tqdm import tqdm  # type: ignore[import-untyped]

# Loggers whose lines are on retries, defaults, caches, and a model given as an object, not as a name.
_LOGS = (
    *("lm_eval", "datasets", "evaluate", "huggingface_hub", "transformers"),
    *("httpx", "httpx2", "httpcore", "urllib3", "fsspec", "filelock"),
)
# Each client of the hub keeps a copy of the switch that makes it refuse the network.
_CLIENTS: tuple[Any, ...] = (huggingface_hub.constants, datasets.config)
# Time limit of the one attempt. The clients themselves ask six times, with pauses of 23 seconds.
_SECONDS_FOR_THE_HUB = 3.0
# Errors of a connection by the names of their classes: each client of HTTP has its own.
_CONNECTION_ERRORS = {
    *("ConnectionError", "TimeoutError", "Timeout", "TransportError", "ClientConnectionError", "gaierror"),
    "LocalEntryNotFoundError",
}


@contextmanager
def quiet_packages() -> Iterator[None]:
    """Turn off log lines of other packages and all bars; afterwards these, and the use of the network, are restored."""
    logs = [logging.getLogger(name) for name in _LOGS]
    levels = [log.level for log in logs]
    switches = [client.HF_HUB_OFFLINE for client in _CLIENTS]
    # The class of all bars is patched: lm-eval has no option for them, and datasets and the code of tasks one each.
    make = tqdm.__init__

    def make_disabled(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **{**kwargs, "disable": True})

    for log in logs:
        log.setLevel(logging.CRITICAL)
    tqdm.__init__ = make_disabled
    try:
        yield
    finally:
        tqdm.__init__ = make
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
        for client, switch in zip(_CLIENTS, switches, strict=True):
            client.HF_HUB_OFFLINE = switch
        hub_is_reachable.cache_clear()


@cache
def hub_is_reachable() -> bool:
    """Ask once whether the hub of data sets answers; if not, its clients stay offline until ``quiet_packages`` ends."""
    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        with suppress(Exception):  # each client of HTTP has its own
            huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_SECONDS_FOR_THE_HUB)
            return True
    for client in _CLIENTS:
        client.HF_HUB_OFFLINE = True
    return False


def speaks_of_a_connection(error: BaseException | None) -> bool:
    """Tell whether an error, or one that led to it, is of a connection."""
    while error is not None:
        if {kind.__name__ for kind in type(error).__mro__} & _CONNECTION_ERRORS or "Hugging Face Hub" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """Kind and message of another package's error on one line, shortened."""
    message = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__

"""Upload of an export to the hub: private unless it is asked to be public, and never without being asked."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError

from llm_surgeon.errors import ConfigError, UploadError
from llm_surgeon.models.trust import has_weights
from llm_surgeon.recipe.quantity import shown
from llm_surgeon.report.table import scaled_bytes
from llm_surgeon.session.given import as_path

logger = logging.getLogger(__name__)

# Errors without an answer of the hub. Those of the network's client are of a package that differs between versions.
_UNREACHABLE: tuple[type[Exception], ...] = (
    OSError,
    *(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError" and issubclass(kind, Exception)),
)
# Files without which an export cannot be used, or not be understood.
_NEEDED = ("config.json", "README.md")
_PART, _LONGEST = r"[A-Za-z0-9][A-Za-z0-9._-]*", 96
_NAME = "Give owner/name, as in your-name/smaller."


@dataclass(frozen=True)
class Upload:
    """What is sent to the hub.

    Attributes:
        repository: Name of the repository, ``owner/name``.
        private: Whether it is made for its owner only.
        files: Names of the files and their bytes, as they are sent.
        address: Address of the result; None if nothing was sent.
    """

    repository: str
    private: bool
    files: dict[str, int]
    address: str | None

    def lines(self) -> list[str]:
        """The upload in words, a line for each file."""
        done = f"Sent to {self.address}" if self.address else f"Would be sent to {self.repository}"
        kind = "private" if self.private else "public"
        return [
            f"{done} ({kind}), {len(self.files)} files, {scaled_bytes(sum(self.files.values()))}:",
            *(f"  {name}  {scaled_bytes(size)}" for name, size in self.files.items()),
        ]


def push(export: str | Path, repository: str, *, public: bool = False, dry_run: bool = False) -> Upload:
    """Upload an export to the hub, as a private repository unless it is to be public.

    The files of the export itself are sent; directories in it, of further formats and of single shots, are not.

    Args:
        export: Directory of the export.
        repository: ``owner/name``; made if it is not there.
        public: Whether everyone may see it.
        dry_run: Whether to say only what would be sent, without the network.

    Raises:
        ConfigError: If the directory is no export, or the name is none.
        UploadError: If the hub cannot be reached, or refuses.
    """
    directory = as_path(export)
    files = _files(directory)
    _check_name(repository)
    if dry_run:
        return Upload(repository, not public, files, None)
    check_hub(repository, public=public)
    logger.info("sending %s to %s", directory, repository)
    with _refusals(repository):
        api = HfApi()
        api.create_repo(repository, private=not public, exist_ok=True)
        sent = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            allow_patterns=[glob.escape(name) for name in files],
            ignore_patterns=["*/*"],
            commit_message="Pruned with llm-surgeon",
        )
    return Upload(repository, not public, files, str(getattr(sent, "repo_url", None) or f"{api.endpoint}/{repository}"))


def check_hub(repository: str, *, public: bool = False) -> None:
    """Make sure that a repository can be written to, before there is anything to send.

    Raises:
        ConfigError: If the name is none, or the repository is there and public although it is to be private, or the
            other way round.
        UploadError: If nobody is logged in, the hub cannot be reached, or refuses.
    """
    _check_name(repository)
    with _refusals(repository):
        api = HfApi()
        api.whoami()
        try:
            private = api.repo_info(repository).private
        except RepositoryNotFoundError:
            return
    if private is False and not public:
        raise ConfigError(
            f"The repository {repository} is there, and public.", "Give --public, or another name for a private one."
        )
    if private and public:
        raise ConfigError(
            f"The repository {repository} is there, and private.",
            "Leave --public out, or open it on the hub first.",
        )


def _check_name(repository: str) -> None:
    """Make sure that a name is one of a repository.

    Raises:
        ConfigError: If it is not.
    """
    known = len(repository) <= _LONGEST and re.fullmatch(rf"{_PART}/{_PART}", repository)
    if not known or "--" in repository or ".." in repository:
        raise ConfigError(f"{shown(repository)} is no name of a repository.", _NAME)


def _files(directory: Path) -> dict[str, int]:
    """Files of an export and their bytes.

    Raises:
        ConfigError: If the directory is no export.
    """
    missing = [name for name in _NEEDED if not (directory / name).is_file()]
    if not missing and not has_weights(directory):
        missing = ["*.safetensors"]
    if missing:
        raise ConfigError(
            f"{directory} is no export: it has no {' and no '.join(missing)}.", "Name a directory that prune made."
        )
    return {
        path.name: path.stat().st_size
        for path in sorted(directory.iterdir())
        if path.is_file() and not path.name.startswith(".")
    }


@contextmanager
def _refusals(repository: str) -> Iterator[None]:
    """Turn errors of the hub and of the network into messages.

    Raises:
        UploadError: If there is one.
    """
    try:
        yield
    except HFValidationError:
        raise ConfigError(f"{shown(repository)} is no name of a repository.", _NAME) from None
    except ValueError as error:
        cause = f"The hub's client refuses what is sent to {repository}: {_one_line(str(error))}."
        raise UploadError(cause, "Mend README.md, whose head it checks, and push again.") from None
    except LocalTokenNotFoundError:
        raise UploadError("Nobody is logged in to the hub on this machine.", "Run `hf auth login` first.") from None
    except HfHubHTTPError as error:
        cause = f"The hub refuses {repository}: {_one_line(error.server_message or str(error))}."
        remedy = "Check the name, and that your token may write (`hf auth whoami`)."
        raise UploadError(cause, remedy) from None
    except _UNREACHABLE as error:
        cause = f"The hub cannot be reached: {_one_line(str(error)) or type(error).__name__}."
        raise UploadError(cause, "Try again with a connection, and without HF_HUB_OFFLINE.") from None


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300].rstrip(".")

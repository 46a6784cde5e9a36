"""Companions of a checkpoint's weights, which pruning does not change: tokenizer, templates and licence are copied."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

GENERATION_FILE = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# Patterns in small letters, as licences are spelt in all ways.
_TOKENIZERS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
_LICENCES = ("license*", "licence*", "notice*", "copying*", "use_policy*")
_OTHERS = ("chat_template*", "*preprocessor_config.json", "processor_config.json", GENERATION_FILE, *_LICENCES)
_TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, directory: Path) -> bool:
    """Copy the files that a checkpoint has beside weights and configuration, byte for byte.

    Args:
        source: Directory of the checkpoint.
        directory: Directory to write to, which exists.

    Returns:
        Whether files of a tokenizer are among them.
    """
    tokenizers = list(_found(source, _TOKENIZERS))
    for path in (*tokenizers, *_found(source, _OTHERS), *_code_of_tokenizer(source)):
        # Only the contents are copied: files of a hub's cache are links, and may be read-only.
        shutil.copyfile(path, directory / path.name)
    for path in sorted((source / _TEMPLATES).glob("*")):
        (directory / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, directory / _TEMPLATES / path.name)
    return bool(tokenizers)


def copy_licences(source: Path, directory: Path) -> None:
    """Copy the licence and the like of a checkpoint, byte for byte.

    Args:
        source: Directory of the checkpoint.
        directory: Directory to write to, which exists.
    """
    for path in _found(source, _LICENCES):
        shutil.copyfile(path, directory / path.name)


def _found(source: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in patterns):
            yield path


def _code_of_tokenizer(source: Path) -> Iterator[Path]:
    """Yield the Python files that the tokenizer's configuration names; it could not be loaded without them."""
    try:
        named = json.loads((source / _TOKENIZER_CONFIG).read_text(encoding="utf-8-sig"))["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for name in named if isinstance(named, list) else [named]:
        # A name with two hyphens is of code in another repository.
        path = source / f"{str(name).partition('.')[0]}.py"
        if isinstance(name, str) and "--" not in name and path.parent == source and path.is_file():
            yield path

"""Files of a checkpoint that pruning does not change: copied byte for byte, so that nothing of them is lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

GENERATION_FILE = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# In small letters: licences are spelt in all ways.
_TOKENIZERS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.spm", "*.tiktoken", "tekken.json"),
)
_OTHERS = (
    *("chat_template*", "*preprocessor_config.json", "processor_config.json", GENERATION_FILE),
    *("license*", "licence*", "notice*", "copying*", "use_policy*"),
)
_TEMPLATES = "additional_chat_templates"


def copy_companions(source: Path, directory: Path) -> bool:
    """Copy what a checkpoint has beside weights and configuration.

    Args:
        source: Directory of the checkpoint.
        directory: Where to write; exists.

    Returns:
        Whether there are files of a tokenizer among them.
    """
    tokenizers = list(_found(source, _TOKENIZERS))
    for path in (*tokenizers, *_found(source, _OTHERS), *_code_of_tokenizer(source)):
        # The bytes alone: those of a hub's cache are links, and may be read-only.
        shutil.copyfile(path, directory / path.name)
    for path in sorted((source / _TEMPLATES).glob("*")):
        (directory / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, directory / _TEMPLATES / path.name)
    return bool(tokenizers)


def _found(source: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch(path.name.lower(), pattern) for pattern in patterns):
            yield path


def _code_of_tokenizer(source: Path) -> Iterator[Path]:
    """Files of Python that the tokenizer's configuration names; without them it could not be loaded again."""
    try:
        named = json.loads((source / _TOKENIZER_CONFIG).read_text(encoding="utf-8-sig"))["auto_map"]["AutoTokenizer"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for name in named if isinstance(named, list) else [named]:
        # Another repository's is before two hyphens.
        path = source / f"{str(name).partition('.')[0]}.py"
        if isinstance(name, str) and "--" not in name and path.parent == source and path.is_file():
            yield path

"""Files of a checkpoint that pruning does not change: copied byte for byte, so that nothing of them is lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

GENERATION_FILE = "generation_config.json"
_TOKENIZERS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "tokenization_*.py"),
)
_OTHERS = (
    *("chat_template*", "additional_chat_templates/*", "*preprocessor_config.json", "processor_config.json"),
    *(GENERATION_FILE, "LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*"),
)


def copy_companions(source: Path, directory: Path) -> bool:
    """Copy what a checkpoint has beside weights and configuration.

    Args:
        source: Directory of the checkpoint.
        directory: Where to write; exists.

    Returns:
        Whether there are files of a tokenizer among them.
    """
    for path in _found(source, _OTHERS):
        _copy(path, source, directory)
    tokenizers = list(_found(source, _TOKENIZERS))
    for path in tokenizers:
        _copy(path, source, directory)
    return any(path.suffix != ".py" for path in tokenizers)


def _found(source: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (path for pattern in patterns for path in sorted(source.glob(pattern)) if path.is_file())


def _copy(path: Path, source: Path, directory: Path) -> None:
    target = directory / path.relative_to(source)
    target.parent.mkdir(exist_ok=True)
    # The bytes alone: those of a hub's cache are links, and may be read-only.
    shutil.copyfile(path, target)

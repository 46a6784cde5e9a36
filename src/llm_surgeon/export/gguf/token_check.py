"""Check of a GGUF file's tokenizer: llama.cpp has to make the same tokens as the tokenizer of transformers."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from llm_surgeon.errors import ConfigError, ExportMismatchError
from llm_surgeon.export.fresh_process import run_script

ENGINE = "xllamacpp"


def ask_engine(file: Path, questions: Mapping[str, Any]) -> dict[str, Any]:
    """Load a GGUF file in llama.cpp, in a fresh process, and ask it.

    Args:
        file: The file.
        questions: Questions by name; see ``engine_check.py``.

    Returns:
        The answers, by the names of the questions.

    Raises:
        ConfigError: If llama.cpp is not installed.
        ExportMismatchError: If llama.cpp does not load the file.
    """
    if importlib.util.find_spec(ENGINE) is None:
        raise ConfigError("llama.cpp is not installed, and checks a GGUF file.", f"Install it: pip install {ENGINE}")
    script = Path(__file__).with_name("engine_check.py")
    with tempfile.TemporaryDirectory() as scratch:
        request = Path(scratch) / "request.json"
        request.write_text(
            json.dumps({"model": str(file), "threads": torch.get_num_threads(), **questions}), encoding="utf-8"
        )
        done = run_script(script, [str(request)])
        if done.returncode != 0:
            raise ExportMismatchError(
                f"llama.cpp cannot load {file.name}: {_last_error(done.stderr)}.",
                f"Please report this with the version of {ENGINE}.",
            )
        answers: dict[str, Any] = json.loads(request.with_name("request.json.out").read_text(encoding="utf-8"))
    return answers


def _last_error(log: str) -> str:
    """The line of a log that says most of what went wrong."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no message"])[-1].rstrip(".")


def check_tokens(file: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """Make sure that llama.cpp makes the tokens of a tokenizer, with special tokens at the ends and without.

    Special tokens that are written in a text count as such, as in the tokenizer.

    Args:
        file: The GGUF file.
        tokenizer: The tokenizer.
        texts: Texts to compare.

    Returns:
        Number of tokens that were compared.

    Raises:
        ConfigError: If llama.cpp is not installed.
        ExportMismatchError: If the tokens of a text differ, or llama.cpp does not load the file.
    """
    texts = list(texts)
    asked = [(text, special) for special in (False, True) for text in texts]
    if not asked:
        return 0
    answers = ask_engine(file, {"tokenize": asked})["tokenize"]
    expected = [
        ids for special in (False, True) for ids in tokenizer([*texts], add_special_tokens=special)["input_ids"]
    ]
    for (text, special), wanted, found in zip(asked, expected, answers, strict=True):
        if found != wanted:
            raise _differs(tokenizer, text, special, wanted, found)
    return sum(map(len, expected))


def _differs(
    tokenizer: PreTrainedTokenizerBase, text: str, special: bool, expected: list[int], found: list[int]
) -> ExportMismatchError:
    """Error that shows both lists from where they differ."""
    pairs = zip(expected, found, strict=False)
    start = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(expected), len(found)))
    shown = [
        f"{tokenizer.convert_ids_to_tokens(ids[start : start + 5])} {ids[start : start + 5]}"
        for ids in (found, expected)
    ]
    return ExportMismatchError(
        f"llama.cpp makes other tokens of {text[:80]!a} {'with' if special else 'without'} special tokens: from token "
        f"{start} on {shown[0]} of {len(found)}, instead of {shown[1]} of {len(expected)}.",
        "Please report this with the tokenizer's name; what is known is in TokenizerKeys.differences.",
    )

"""Names that llama.cpp has for the ways in which byte-level tokenizers split a text into words.

llama.cpp holds its patterns in its own code, and a file only names one. Each name in the table has been compared with
the tokenizers library through llama.cpp itself: on random texts of many scripts with a vocabulary whose merges do not
stop at words, so that any other split shows in the tokens, and by code point.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_surgeon.errors import UnsupportedModelError

Step = tuple[str | bool, ...]
REMEDY = "Leave the GGUF formats out of --format; llama.cpp's own converter may know this tokenizer."

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"


def _words(digits: str) -> str:
    """Pattern of the tokenizers that follow OpenAI's cl100k, with its own way to split numbers."""
    return rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"


def _cased(digits: str, contractions: str) -> str:
    """Pattern of the tokenizers that follow OpenAI's o200k, which split before capital letters."""
    start = r"[^\r\n\p{L}\p{N}]?"
    words = rf"{start}[{_UPPER}]*[{_LOWER}]+{contractions}|{start}[{_UPPER}]+[{_LOWER}]*{contractions}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"


_MARKED = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_SEED = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_SPACES}"
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
_DIGITS: Step = ("Digits", True)
_GPT2: Step = ("ByteLevel", True)
_BYTES: Step = ("ByteLevel", False)


def _split(pattern: str) -> Step:
    return ("Split", pattern)


@dataclass(frozen=True)
class PreTokenizer:
    """A way to split that llama.cpp has a name for.

    Attributes:
        name: The name, for ``tokenizer.ggml.pre``.
        steps: Steps of the tokenizer's backend that do the same.
        whole_words: Whether a word that is a token becomes it without merges (``ignore_merges``).
        difference: Texts that llama.cpp splits otherwise all the same; None if there are none.
    """

    name: str
    steps: tuple[Step, ...]
    whole_words: bool = False
    difference: str | None = None


_CAPITALS = (
    "Words with capital letters outside of ASCII, and letters with combining marks, may be split elsewhere in "
    "llama.cpp: its pattern of this name knows neither."
)
_WIDE_SPACES = (
    "White space outside of ASCII may be split elsewhere in llama.cpp if punctuation or a letter is beside it."
)

PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", (_GPT2,)),
    PreTokenizer("smollm", (_DIGITS, _GPT2)),
    PreTokenizer("llama-bpe", (_split(_words(r"\p{N}{1,3}")), _BYTES), whole_words=True),
    PreTokenizer("smaug-bpe", (_split(_words(r"\p{N}{1,3}")), _BYTES)),
    PreTokenizer("qwen2", (_split(_words(r"\p{N}")), _BYTES)),
    PreTokenizer("qwen35", (_split(_MARKED), _BYTES)),
    PreTokenizer("seed-coder", (_split(_SEED), _BYTES)),
    PreTokenizer("minicpm5", (_split(r"\p{N}{1,3}"), _split(_words(r"\p{N}+")), _BYTES), whole_words=True),
    PreTokenizer(
        "deepseek-v3", (_split(r"\p{N}{1,3}"), _split("[一-龥\u3040-\u309f\u30a0-\u30ff]+"), _split(_DEEPSEEK), _BYTES)
    ),
    PreTokenizer(
        "deepseek-coder",
        (
            *map(_split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-\ud7ff]+")),
            _DIGITS,
            _BYTES,
        ),
        difference=_WIDE_SPACES,
    ),
    PreTokenizer("gpt-4o", (_split(_cased(r"\p{N}{1,3}", f"{_CONTRACTIONS}?")), _BYTES), difference=_CAPITALS),
    PreTokenizer("tekken", (_split(_cased(r"\p{N}", "")), _BYTES), whole_words=True, difference=_CAPITALS),
)

# A pattern that matches every text whole: whether what it does not match is kept makes no difference.
_CASED = tuple(step for known in PRE_TOKENIZERS if known.difference == _CAPITALS for step in known.steps)


def pre_tokenizer_of(backend: Mapping[str, Any]) -> PreTokenizer:
    """The way in which a byte-level tokenizer splits.

    Args:
        backend: The tokenizer's backend, as in its ``tokenizer.json``.

    Raises:
        UnsupportedModelError: If llama.cpp has no name for it.
    """
    steps = tuple(_steps(backend["pre_tokenizer"]))
    whole_words = bool(backend["model"].get("ignore_merges"))
    for known in PRE_TOKENIZERS:
        if known.steps == steps and known.whole_words == whole_words:
            return known
    described = "; ".join(" ".join(map(str, step)) for step in steps) or "none"
    raise UnsupportedModelError(
        f"llama.cpp is not known to split words as this tokenizer does ({described[:300]}"
        f"{', whole words without merges' if whole_words else ''}).",
        REMEDY,
    )


def flattened(step: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Steps of a normalizer or pre-tokenizer, those of sequences within it in their order."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    inner = step.get("normalizers") or step.get("pretokenizers") or []
    return [each for part in inner for each in flattened(part)]


def _steps(pre_tokenizer: Mapping[str, Any] | None) -> Iterator[Step]:
    """Yield the steps, each in one form however it is written down."""
    for step in flattened(pre_tokenizer):
        match step:
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": str(behavior), "invert": bool(invert)}:
                # Line ends are written as such in some files, and escaped in others.
                plain = _split(regex.replace("\r", r"\r").replace("\n", r"\n"))
                whole = (behavior, invert) == ("Removed", True) and plain in _CASED
                isolated = (behavior, invert) == ("Isolated", False)
                yield plain if isolated or whole else (*plain, behavior, invert)
            case {"type": "Digits", "individual_digits": bool(individual)}:
                yield ("Digits", individual)
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(regex)}:
                yield ("ByteLevel", regex)
            case _:
                yield tuple(str(value) for value in step.values())

"""The table of formats that a pruned model can be exported in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FormatRow:
    """One row of the table of formats.

    Attributes:
        summary: Description of the format, in a few words.
    """

    summary: str


FORMATS: dict[str, FormatRow] = {
    "hf": FormatRow("a directory that transformers loads"),
    "gguf": FormatRow("a file for llama.cpp, in the model's own type"),
    "gguf-f32": FormatRow("a file for llama.cpp, float32"),
    "gguf-f16": FormatRow("a file for llama.cpp, float16"),
    "gguf-bf16": FormatRow("a file for llama.cpp, bfloat16"),
    "gguf-q8_0": FormatRow("a file for llama.cpp, 8 bits for a weight"),
    "nemotron-nas": FormatRow("a directory for vLLM's own class, whose blocks differ in the number of neurons"),
}


def explained() -> str:
    """Names of the formats, each with its description, for the help."""
    return ", ".join(f"{name} ({row.summary})" for name, row in FORMATS.items())

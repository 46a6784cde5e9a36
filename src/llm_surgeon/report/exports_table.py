"""Table of several models on the same texts, for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from llm_surgeon.records import ExportComparison
from llm_surgeon.records.names import distinct_names
from llm_surgeon.report.table import UNKNOWN, perplexity_cell, perplexity_note, scaled, scaled_bytes


def exports_table(found: ExportComparison) -> Table:
    """Draw a row for each model: parameters, bytes, and perplexity and divergence on each text."""
    texts = [perplexity.data for perplexity in found.models[0].perplexities]
    notes = [perplexity_note(perplexity) for perplexity in found.models[0].perplexities]
    notes.append("KL: divergence from the first model's predictions, mean over the tokens scored, in nats.")
    table = Table(caption=Text("\n".join(notes)), caption_justify="left", caption_style="dim", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(("model", "parameters", "bytes on disk")):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for text in distinct_names(texts):
        named = f" on {text}" if len(texts) > 1 else ""
        table.add_column(f"perplexity{named}", justify="right", overflow="fold")
        table.add_column(f"KL{named}", justify="right", overflow="fold")
    names = distinct_names([model.model for model in found.models])
    for name, model in zip(names, found.models, strict=True):
        cells = [
            cell
            for perplexity, divergence in zip(model.perplexities, model.divergences, strict=True)
            for cell in (
                perplexity_cell(perplexity.perplexity),
                UNKNOWN if divergence is None else f"{divergence:.4f}",
            )
        ]
        files = UNKNOWN if model.weight_bytes is None else scaled_bytes(model.weight_bytes)
        table.add_row(Text(name), scaled(model.parameters), files, *cells)
    return table

"""Table of several models on the same texts, for the terminal."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from llm_surgeon.records import ExportComparison
from llm_surgeon.report.card import model_name
from llm_surgeon.report.sample_table import names_of
from llm_surgeon.report.table import UNKNOWN, perplexity_cell, perplexity_note, scaled, scaled_bytes


def exports_table(found: ExportComparison) -> Table:
    """Draw a row for each model: parameters, bytes, and perplexity and divergence on each text."""
    texts = [perplexity.data for perplexity in found.models[0].perplexities]
    notes = [perplexity_note(perplexity) for perplexity in found.models[0].perplexities]
    notes.append("KL: divergence from the first model's predictions, mean over the tokens scored, in nats.")
    table = Table(caption=Text("\n".join(notes)), caption_justify="left", caption_style="dim", box=box.SIMPLE_HEAD)
    for number, heading in enumerate(("model", "parameters", "bytes on disk")):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    for text in texts:
        named = f" on {model_name(text)}" if len(texts) > 1 else ""
        table.add_column(f"perplexity{named}", justify="right", overflow="fold")
        table.add_column(f"KL{named}", justify="right", overflow="fold")
    names = names_of([model.model for model in found.models])
    for model in found.models:
        cells = [
            cell
            for perplexity, divergence in zip(model.perplexities, model.divergences, strict=True)
            for cell in (
                perplexity_cell(perplexity.perplexity),
                UNKNOWN if divergence is None else f"{divergence:.4f}",
            )
        ]
        files = UNKNOWN if model.weight_bytes is None else scaled_bytes(model.weight_bytes)
        table.add_row(Text(names[model.model]), scaled(model.parameters), files, *cells)
    return table
